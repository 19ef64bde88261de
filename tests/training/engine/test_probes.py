"""Peak memory, of training alone and of the process that needs most; and gradient cosines, which fit beside it."""

import copy

import pytest
import torch

import sbp
from sbp.training.engine import setup
from sbp.training.engine.probes import PeakMemory, gradient_cosines
from sbp.training.engine.train import train
from sbp.training.engine.trainer import Trainer
from sbp.training.runtime import distributed
from tests.training.comparing import assert_equal
from tests.training.configs import BACKBONES, QUICK, small

CPU = distributed.pick_device("cpu")


def test_the_peak_of_training_outlives_what_is_excluded(monkeypatch):
    now, peak = {}, PeakMemory(torch.device("cpu"))
    monkeypatch.setattr(peak, "_now", lambda: {"memory/peak_allocated": now["bytes"]})
    now["bytes"] = 5  # a step
    with peak.excluded():
        now["bytes"] = 900  # a probe
    now["bytes"] = 3  # another step
    assert peak.allocated() == 5


def test_the_peak_is_that_of_the_process_that_needs_most(monkeypatch):
    peak = PeakMemory(torch.device("cpu"))
    monkeypatch.setattr(peak, "_now", lambda: {"memory/peak_allocated": 5, "memory/peak_reserved": 8})
    monkeypatch.setattr(distributed, "maxima", lambda values: [max(pair) for pair in zip(values, (7, 6), strict=True)])
    assert peak.read() == {"memory/peak_allocated": 7, "memory/peak_reserved": 8}
    assert peak.allocated() == 5  # its own


def test_a_run_starts_with_the_memory_that_it_has_then():
    """Not with what an earlier job of the sweep, or the start of the program, has had and given back."""
    block = torch.ones(2**26)  # 256 MiB, touched
    with_block = PeakMemory(torch.device("cpu")).read()["memory/peak_rss"]
    del block
    assert PeakMemory(torch.device("cpu")).read()["memory/peak_rss"] < with_block - 2**27


@pytest.mark.parametrize("backbone", BACKBONES)
def test_cosines_are_the_same_in_parts(backbone):
    config = small("backbone.drop_path=0", "sbp.mask=random", "probe.images=7", backbone=backbone)
    images = setup.load_images(config, CPU)
    trainer = setup.build_trainer(config, images.order, CPU)
    before = copy.deepcopy((trainer.state_dict(), sbp.mask_state(trainer.model)))
    whole, parts = (gradient_cosines(trainer, *images.probe, draw=3, at_once=one) for one in (7, 2))
    assert parts == pytest.approx(whole, rel=1e-4) and whole["gradient_cosine/total"] < 0.999
    assert_equal(before, (trainer.state_dict(), sbp.mask_state(trainer.model)))


@pytest.mark.parametrize("mask_per", ["sample", "half"])
def test_images_that_have_masks_of_their_own_have_them_in_parts_too(monkeypatch, mask_per):
    """The same few in each part would be less than a step has."""
    config = small("sbp.mask=random", f"sbp.mask_per={mask_per}", "probe.images=8")
    images = setup.load_images(config, CPU)
    trainer = setup.build_trainer(config, images.order, CPU)
    (state,) = sbp.state.states(trainer.model)
    plain_loss, masks = trainer.plain_loss, set()

    def noted(*batch):
        loss = plain_loss(*batch)
        masks.update(map(tuple, state.running.positions[-1].keep.tolist()))
        return loss

    monkeypatch.setattr(trainer, "plain_loss", noted)
    gradient_cosines(trainer, *images.probe, draw=3, at_once=2)
    assert len(masks) == 8  # two for each of four parts
    assert sbp.mask_state(trainer.model)["draw"] == 0


def test_exact_backpropagation_has_a_part_of_what_a_step_has_at_once(tmp_path, monkeypatch):
    """Else the probe would be what does not fit into a memory that SBP fits into."""
    seen = []
    plain_loss = Trainer.plain_loss
    monkeypatch.setattr(
        Trainer, "plain_loss", lambda self, x, targets: seen.append(len(x)) or plain_loss(self, x, targets)
    )
    train(small(*QUICK, "global_batch_size=16", "probe.every_steps=2", "probe.images=10"), tmp_path)
    assert set(seen) == {4, 2} and sum(seen) - 4 - 2 == 2 * 2 * 10, seen  # and the images of the saved bytes
