"""What goes wrong without ending a run, and what ends it."""

import json
import logging
import os
from unittest.mock import Mock

import pytest
import torch

from sbp.training.data import loading
from sbp.training.engine import trainer
from sbp.training.engine.probes import PeakMemory
from sbp.training.engine.train import train
from sbp.training.record import tracking
from sbp.training.record.checkpoint import Checkpoints, find
from sbp.training.record.incidents import CORRUPT_IMAGES, SKIPPED_STEPS, Incidents
from sbp.training.record.status import Preempted, RunStatus, only_run_in, read_status
from sbp.training.record.tracking import Tracker, read_metrics
from sbp.training.runtime import signals
from tests.training.comparing import assert_equal, assert_same_run, record
from tests.training.configs import QUICK, small


def incidents(folder, max_corrupt_images=3, max_skipped_steps=2):
    return Incidents(folder, Checkpoints(folder / "checkpoints"), max_corrupt_images, max_skipped_steps)


def test_corrupt_images_are_counted_once_listed_and_too_many_are_an_error(tmp_path):
    found = incidents(tmp_path)
    found.replaced(0, ["b.png (broken)", "a.png (empty)"])
    found.replaced(5, ["a.png (empty)"])
    assert found.figures() == {"corrupt_images": 2}
    again = incidents(tmp_path)
    again.load_state_dict(found.state_dict())
    again.replaced(6, ["c.png (x)"])
    assert (tmp_path / CORRUPT_IMAGES).read_text() == "a.png (empty)\nb.png (broken)\nc.png (x)\n"
    with pytest.raises(ValueError, match=r"4 training images cannot be read by step 8, data\.max_corrupt_images=3"):
        again.replaced(7, ["d.png (x)"])


def test_names_that_are_not_utf8_or_have_line_breaks_are_listed_as_they_are(tmp_path, caplog):
    name = os.fsdecode(b"bad\xff.png (broken)")
    found = incidents(tmp_path)
    found.replaced(0, [name, "two\nlines.png (empty)"])
    assert (tmp_path / CORRUPT_IMAGES).read_bytes() == b"bad\xff.png (broken)\ntwo\\nlines.png (empty)\n"
    found.step_skipped(0, float("nan"), [name])
    assert json.loads((tmp_path / SKIPPED_STEPS).read_text())["images"] == [name]


def test_steps_without_a_finite_loss_are_left_out_until_they_are_too_many_in_a_row(tmp_path, caplog):
    found = incidents(tmp_path)
    nan = float("nan")
    for step in (3, 4):
        found.step_skipped(step, nan, ["a.png", "b.png"])
    found.step_succeeded()
    for step in (9, 10):
        found.step_skipped(step, float("inf"), ["c.png"])
    assert found.figures() == {"skipped_steps": 4} and "step 10 left out: its loss is inf" in caplog.text
    with pytest.raises(
        ValueError, match=r"the loss is nan in step 12; 3 steps in a row .* Last good checkpoint: none yet"
    ):
        found.step_skipped(11, nan, ["d.png"])
    lines = [json.loads(line) for line in (tmp_path / SKIPPED_STEPS).read_text().splitlines()]
    assert lines[0] == {"step": 4, "loss": "nan", "images": ["a.png", "b.png"]} and len(lines) == 5
    found.forget_after(10)  # where a run goes on, from a checkpoint of that step
    assert [json.loads(line)["step"] for line in (tmp_path / SKIPPED_STEPS).read_text().splitlines()] == [4, 5, 10]


def test_steps_that_overflow_float16_are_said_and_counted_until_no_scale_helps(tmp_path, caplog):
    caplog.set_level("INFO")
    found = incidents(tmp_path)
    found.step_overflowed(2, 2.0**15)
    assert found.figures() == {"overflowed_steps": 1}
    assert "step 3 left out: its gradient overflows float16; the loss scale falls to 32768" in caplog.text
    with pytest.raises(ValueError, match=r"infinite in float16: by step 21 the loss scale has fallen to 6\.1e-05"):
        found.step_overflowed(20, 2.0**-14)


def test_a_batch_that_cannot_be_read_ends_the_run_after_the_step_it_was_for(tmp_path, monkeypatch):
    """In all processes together: until then a process that lacks images takes part with others."""
    real, count = loading.SeededDataset.__getitem__, 0

    def unreadable(self, where):
        nonlocal count
        count += 1
        return loading.Sample(None, -1, [f"image {where[1]}"]) if count > 200 else real(self, where)

    monkeypatch.setattr(loading.SeededDataset, "__getitem__", unreadable)
    config = small("probe.every_steps=null", "micro_batch_size=8", "recipe.mixup=0.8")
    with pytest.raises(ValueError, match=r"step 6: cannot read images, nor others in their places: image \d+; image"):
        train(config, tmp_path)
    assert read_status(tmp_path)["state"] == "failed"


def test_a_step_that_is_left_out_changes_nothing_but_the_schedule(tmp_path, monkeypatch):
    real, losses = trainer.Trainer._loss, []

    def loss(self, *args):
        value, parts = real(self, *args)
        losses.append(0)
        return value * float("nan") if len(losses) in (2, 3) else value, parts

    states = []

    def update(self, step):
        states.append(step)
        return real_update(self, step)

    real_update = trainer.Trainer.update
    monkeypatch.setattr(trainer.Trainer, "_loss", loss)
    monkeypatch.setattr(trainer.Trainer, "update", update)
    train(small(*QUICK, "recipe.epochs=2", "log_every_steps=1", "recipe.ema_decay=0.9"), tmp_path)
    assert states == [0, *range(3, 8)]  # steps 1 and 2 changed no weight
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[2]["skipped_steps"] == 1 and lines[-1].get("val/top1") is not None
    assert all(value.isfinite().all() for value in find(tmp_path)[1]["state_dict"].values())


@pytest.mark.parametrize("amp", ["off", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_a_gradient_that_is_not_finite_costs_its_step_and_nothing_else(tmp_path, monkeypatch, amp):
    """One element of it, where the loss is finite."""
    real, seen = trainer.Trainer.backward, {}

    def backward(self, step, micro_batches):
        loss = real(self, step, micro_batches)
        states = self.model.state_dict(), self.ema.module.state_dict()
        seen[step] = [{name: value.clone() for name, value in state.items()} for state in states]
        if step == 5:
            next(self.model.parameters()).grad.view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(trainer.Trainer, "backward", backward)
    config = small("probe.every_steps=null", "log_every_steps=1", "recipe.ema_decay=0.9", f"amp={amp}")
    summary = train(config, tmp_path)
    assert_equal(seen[5], seen[6])
    assert not torch.equal(seen[6][0]["head.weight"], seen[7][0]["head.weight"])
    (line,) = [json.loads(line) for line in (tmp_path / SKIPPED_STEPS).read_text().splitlines()]
    assert (line["step"], line["gradient_norm"], len(line["images"])) == (6, "inf", 32)
    assert read_metrics(tmp_path / "metrics.jsonl")[6]["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in find(tmp_path)[1]["state_dict_ema"].values())
    assert summary["top1"] > 15


def test_gradients_that_stay_infinite_end_a_run_with_the_files_of_the_first_such_step(tmp_path, monkeypatch):
    real = trainer.Trainer.backward

    def backward(self, step, micro_batches):
        loss = real(self, step, micro_batches)
        if step >= 5:
            next(self.model.parameters()).grad.view(-1)[0] = float("nan")
        return loss

    monkeypatch.setattr(trainer.Trainer, "backward", backward)
    config = small("probe.every_steps=null", "amp=bfloat16", "recipe.clip_grad=1", "max_skipped_steps=2")
    with pytest.raises(ValueError, match="the gradient norm is nan in step 8; 3 steps in a row had to") as error:
        train(config, tmp_path)
    assert "in another run_dir: a lower recipe.lr, a lower recipe.clip_grad, amp=off" in str(error.value)
    lines = [json.loads(line) for line in (tmp_path / SKIPPED_STEPS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 7, 8]


@pytest.mark.parametrize(
    ("amp", "clip_grad", "remedies"),
    [
        ("off", None, "a lower recipe.lr, recipe.clip_grad=1"),
        ("off", 5.0, "a lower recipe.lr, recipe.clip_grad=1"),
        ("bfloat16", 1.0, "a lower recipe.lr, a lower recipe.clip_grad, amp=off"),
        ("float16", 0.5, "a lower recipe.lr, a lower recipe.clip_grad, amp=bfloat16"),
    ],
)
def test_what_is_advised_is_not_in_force_already(tmp_path, amp, clip_grad, remedies):
    found = Incidents(tmp_path, Checkpoints(tmp_path), 0, 0, amp, clip_grad)
    with pytest.raises(ValueError, match=f"in another run_dir: {remedies}$"):
        found.step_skipped(0, float("nan"), ["a.png"])


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    content = {"state_dict": {"weight": torch.ones(3)}, "config": {}}
    good = checkpoints.save(1, content)
    content["state_dict"]["weight"][1] = float("inf")
    with pytest.raises(ValueError, match=f"after step 2 weight is not finite.*{good}"):
        checkpoints.save(2, content)
    assert checkpoints.paths() == [good]


@pytest.mark.long
def test_the_best_checkpoint_is_kept_and_one_a_killed_process_left_is_removed(tmp_path, monkeypatch):
    accuracies = iter([30.0, 50.0, 40.0, 50.0])

    def measured(model, *args, **kwargs):
        from sbp.training.tasks.accuracy import Accuracy

        return Accuracy(next(accuracies), 90.0, 1.0, 360)

    monkeypatch.setattr("sbp.training.tasks.accuracy.evaluate", measured)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.tmp99").write_text("half")
    summary = train(small("recipe.epochs=4", "checkpoint.keep=1", "probe.every_steps=null"), tmp_path)
    assert summary["best_step"] == 88
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["best.pt", "step-00000176.pt"]
    assert torch.load(checkpoints.best, weights_only=True)["step"] == 88
    checkpoints.paths()[0].write_text("damaged")
    path, content = checkpoints.latest()  # better than to start afresh
    assert path == checkpoints.best and content["step"] == 88


@pytest.mark.long
def test_an_evaluation_that_was_stopped_is_made_up_for(tmp_path, monkeypatch):
    config = small("recipe.epochs=2", "probe.every_steps=null", "checkpoint.every_epochs=2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole)

    def stopped(model, *args, **kwargs):
        raise Preempted("stopped by SIGTERM during evaluation")

    with monkeypatch.context() as patch:
        patch.setattr("sbp.training.tasks.accuracy.evaluate", stopped)
        with pytest.raises(Preempted):
            train(config, parts)
    assert read_status(parts)["state"] == "preempted"
    assert [line["step"] for line in record(parts)] == [0, 44]
    peaks = iter([9.0, 7.0])  # a process that only evaluates has measured no training
    monkeypatch.setattr(PeakMemory, "read", lambda self: {"memory/peak_rss": next(peaks)})
    summary = train(config, parts)
    assert_same_run(whole, parts)
    assert summary["peak_rss"] == 9


def test_a_disk_that_is_full_at_the_last_evaluation_costs_another_one(tmp_path, monkeypatch):
    config = small(*QUICK)
    log = Tracker.log

    def log_on_a_full_disk(self, step, figures, *more):
        if "val/top1" in figures:
            patch.setattr(tracking, "open_text", Mock(side_effect=OSError("no space left on the device")))
        log(self, step, figures, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log_on_a_full_disk)
        with pytest.raises(ValueError, match=r"all 4 steps are done, but .*metrics.jsonl could not be written"):
            train(config, tmp_path)
    summary = train(config, tmp_path)
    assert summary["top1"] is not None and summary["best_step"] == 4


@pytest.mark.long
def test_what_a_kill_between_two_writes_left_undone_is_done_at_the_next_start(tmp_path, monkeypatch):
    config = small("recipe.epochs=2", "probe.every_steps=null")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "keep_best", lambda self, step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path)
    best = tmp_path / "checkpoints" / "best.pt"
    assert not best.exists() and find(tmp_path)[1]["step"] == 44
    (tmp_path / "status.json").write_text("")  # as a power failure can leave it
    summary = train(config, tmp_path)
    assert torch.load(best, weights_only=True)["step"] == summary["best_step"]


def test_what_a_folder_says_from_the_start_on(tmp_path):
    with pytest.raises(ValueError, match="must be one of"):
        config = small()
        config.amp = "float7"
        train(config, tmp_path)
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"]) == ("failed", 1) and "amp must be one of" in status["message"]
    train(small(*QUICK, "seed=3"), tmp_path)
    assert read_status(tmp_path)["state"] == "completed"
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["config"]["seed"] == facts["seed"] == 3 and facts["versions"]["torch"]
    assert facts["lr"] == 1e-3 and facts["global_batch_size"] == 16


def test_a_folder_is_one_processs_own_and_signals_are_given_back(tmp_path):
    with only_run_in(tmp_path):
        pass
    before = {one: signals.signal.getsignal(one) for one in signals.SIGNALS}
    with signals.deferred():
        assert not signals.stop_requested()
        signals.signal.raise_signal(signals.signal.SIGUSR1)
        assert signals.stop_requested() and signals.name() == "SIGUSR1"
    assert before == {one: signals.signal.getsignal(one) for one in signals.SIGNALS}
    assert not signals.stop_requested()


def test_a_status_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), RunStatus(tmp_path / "nowhere"):
        pass
    assert "cannot write" in caplog.text
