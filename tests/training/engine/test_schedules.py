"""What differs from step to step, or on purpose does not: exact epochs at the end, a fixed mask, the training size."""

import pytest
import torch

import sbp
from sbp.state import State
from sbp.training.engine import setup
from sbp.training.engine.train import train
from sbp.training.engine.trainer import Trainer
from sbp.training.record.checkpoint import Checkpoints, find
from sbp.training.runtime.distributed import pick_device
from sbp.training.tasks.accuracy import evaluate
from tests.conftest import others_long
from tests.training.comparing import assert_equal, record
from tests.training.configs import BACKBONES, QUICK, small

CPU = pick_device("cpu")


def run(folder, *overrides, backbone="vit"):
    """The weights that it ends with."""
    folder.mkdir()
    train(small(*QUICK, *overrides, backbone=backbone), folder)
    return dict(find(folder)[1]["state_dict"])


@pytest.mark.parametrize("backbone", others_long(BACKBONES, "vit"))
def test_with_all_epochs_exact_the_run_is_the_plain_one_bitwise(tmp_path, backbone):
    ends = [
        run(tmp_path / name, *overrides, backbone=backbone)
        for name, overrides in {
            "exact": ("sbp.exact_epochs=1", "micro_batch_size=8"),
            "plain": ("sbp=none", "micro_batch_size=8"),
            "all kept": ("sbp.keep_ratio=1", "micro_batch_size=8"),
        }.items()
    ]
    assert_equal(ends[0], ends[1])
    assert_equal(ends[0], ends[2])


@pytest.fixture
def steps(monkeypatch):
    """For each step run, by whichever run, whether SBP was on in it, in both passes, and what was recomputed."""
    seen: dict[int, set[tuple[bool, str]]] = {}
    real_loss, real_update = Trainer._loss, Trainer.update

    def loss(self, images, labels):
        (state,) = sbp.state.states(self.model)

        def now(*_):
            with torch.enable_grad():
                self.on.add((state.enabled, state.recomputes(self.model)))

        self.on = set()
        now()
        out = real_loss(self, images, labels)
        out[0].register_hook(now)
        return out

    def update(self, step):
        seen.setdefault(step, set()).update(self.on)
        return real_update(self, step)

    monkeypatch.setattr(Trainer, "_loss", loss)
    monkeypatch.setattr(Trainer, "update", update)
    return seen


class Interruption(BaseException):
    pass


def run_in_parts(config, tmp_path, monkeypatch, stops):
    """Two folders: of the run, and of the same one interrupted after the checkpoints of these steps."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    train(config, whole)
    real, stops = Checkpoints.save, {*stops}

    def save(self, step, content):
        path = real(self, step, content)
        if step in stops:
            stops.remove(step)
            raise Interruption
        return path

    monkeypatch.setattr(Checkpoints, "save", save)
    while stops:
        with pytest.raises(Interruption):
            train(config, parts)
    train(config, parts)
    return whole, parts


@pytest.mark.parametrize(
    ("keys", "ratios"),
    [
        (("sbp.keep_ratio=1", "sbp.keep_ratio_end=[0.25,0.5]", "sbp.layers=all"), (1, 0.6875, 0.375)),
        pytest.param(("sbp.keep_ratio=0.25", "sbp.keep_ratio_end=0.75"), (0.25, 0.5, 0.75), marks=pytest.mark.long),
        pytest.param(
            ("sbp.keep_ratio=0.75", "sbp.keep_ratio_end=0.3", "sbp.exact_epochs=1"),
            (0.75, 0.3, 1),
            marks=pytest.mark.long,
        ),
    ],
    ids=str,
)
def test_a_keep_ratio_changes_over_the_epochs_also_after_interruptions(tmp_path, monkeypatch, keys, ratios):
    more = ("recipe.epochs=3", "checkpoint.every_steps=1", "checkpoint.keep=20", "probe.every_steps=3")
    kept: dict[int, tuple[list[float], float]] = {}
    real = Trainer.update

    def update(self, step):
        (state,) = sbp.state.states(self.model)
        share = 1.0 if self.is_exact(step) else sbp.effective_keep_ratio(self.model)
        kept[step] = (state.keep_ratios, share)
        return real(self, step)

    monkeypatch.setattr(Trainer, "update", update)
    config = small(*QUICK, *more, "log_every_steps=1", *keys)
    whole, parts = run_in_parts(config, tmp_path, monkeypatch, {3, 4, 6})
    assert_equal(find(whole)[1]["state_dict"], find(parts)[1]["state_dict"])
    assert record(whole) == record(parts)
    logged = {line["step"]: line["keep_ratio"] for line in record(whole) if "keep_ratio" in line}
    assert logged == {step + 1: pytest.approx(ratios[step // 4]) for step in range(12)}
    assert [kept[step][1] for step in range(12)] == pytest.approx([ratios[step // 4] for step in range(12)], abs=0.03)


@pytest.mark.parametrize("again", others_long(["none", "block"], "block"))
def test_the_last_epochs_are_exact_also_after_an_interruption_within_them(tmp_path, monkeypatch, steps, again):
    overrides = ("recipe.epochs=3", "sbp.exact_epochs=2", "checkpoint.every_steps=1", "probe.every_steps=3")
    more = () if again == "none" else (f"sbp.exact_recompute={again}",)
    config = small(*QUICK, *overrides, "checkpoint.keep=20", *more)
    expected = {step: {(True, "none") if step < 4 else (False, again)} for step in range(12)}
    whole, parts = run_in_parts(config, tmp_path, monkeypatch, {3, 6})
    assert steps == expected
    assert_equal(find(whole)[1]["state_dict"], find(parts)[1]["state_dict"])
    assert record(whole) == record(parts)
    cosines = {line["step"]: line["gradient_cosine/total"] for line in record(whole) if "gradient_cosine/total" in line}
    assert cosines.keys() == {3, 6, 9, 12} and max(cosines.values()) < 0.999  # what SBP would give


@pytest.mark.long
@pytest.mark.parametrize(("how", "again"), [("true", "null"), ("blocks", "block"), ("blocks", "cheap")])
def test_exact_steps_of_a_compiled_model_are_exact(monkeypatch, how, again):
    real = torch.compile
    eager = {"backend": "eager"}
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, **options | eager))
    model = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: model(self, **options | eager))
    torch._dynamo.reset()
    gradients = []
    compiled = (f"compile={how}", "sbp.exact_epochs=1", f"sbp.exact_recompute={again}")
    for overrides in ((*compiled, "recipe.epochs=2"), ("sbp=none", "recipe.epochs=2")):
        config = small(*QUICK, *overrides, "backbone.drop_path=0")
        images = setup.load_images(config, CPU)
        trainer = setup.build_trainer(config, images.order, CPU)
        batch = next(iter(images.train))[:2]
        found = []
        for step in (0, 3, 4, 7):
            trainer.backward(step, [batch])
            found.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
            trainer.skip()
        gradients.append(found)
    torch._dynamo.reset()
    for step, (ours, plain) in enumerate(zip(*gradients, strict=True)):
        same = all(torch.allclose(ours[name], plain[name], rtol=1e-3, atol=1e-6) for name in plain)
        assert same == (step >= 2), step


def kept(trainer, monkeypatch, steps):
    """The masks that these steps draw."""
    masks, real = [], State._drawn_masks

    def drawn(self, grid, key):
        chosen = real(self, grid, key)
        masks.append(next(iter(chosen.values()))[0])
        return chosen

    monkeypatch.setattr(State, "_drawn_masks", drawn)
    images = torch.randn(4, 3, 32, 32)
    for step in steps:
        trainer.backward(step, [(images, torch.arange(4))] * trainer.accumulation)
    monkeypatch.undo()
    return masks


def test_a_fixed_mask_is_the_first_one_in_every_step_and_those_of_other_runs_differ(monkeypatch):
    overrides = ("sbp.mask=random", "micro_batch_size=8", "backbone.kwargs.patch_size=4")
    found = {}
    for name, more in {
        "fixed": ("sbp.fixed_mask=true",),
        "fresh": (),
        "other": ("seed=1", "sbp.fixed_mask=true"),
    }.items():
        config = small(*QUICK, *overrides, *more)
        trainer = setup.build_trainer(config, setup.load_images(config, CPU).order, CPU)
        found[name] = kept(trainer, monkeypatch, (0, 1, 5))
    assert len(found["fixed"]) == 6 and all(torch.equal(mask, found["fresh"][0]) for mask in found["fixed"])
    assert not any(torch.equal(mask, found["fresh"][0]) for mask in found["fresh"][1:])
    assert not torch.equal(found["fixed"][0], found["other"][0])


def test_the_cosine_of_a_fixed_mask_is_that_of_the_mask_of_the_run(tmp_path, monkeypatch):
    numbers = []
    monkeypatch.setattr(
        "sbp.training.engine.run.gradient_cosines", lambda *_, draw, at_once: numbers.append(draw) or {}
    )
    run(tmp_path / "fixed", "sbp.fixed_mask=true", "probe.every_steps=3")
    run(tmp_path / "fresh", "probe.every_steps=3")
    assert numbers == [0, 0, 3, 4]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_images_may_be_smaller_than_those_of_evaluation(tmp_path, monkeypatch, backbone):
    sides = {"vit": (32, 24), "convnext": (64, 48)}[backbone]
    dynamic = ("+backbone.kwargs.dynamic_img_size=true",) if backbone == "vit" else ()
    sizes = {True: set(), False: set()}
    real = Trainer._loss

    def loss(self, images, labels):
        sizes[True].add(tuple(images.shape[-2:]))
        return real(self, images, labels)

    def evaluated(model, *args, **kwargs):
        model.register_forward_pre_hook(lambda _, inputs: sizes[False].add(tuple(inputs[0].shape[-2:])))
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_loss", loss)
    monkeypatch.setattr("sbp.training.tasks.accuracy.evaluate", evaluated)
    more = (f"data.image_size={sides[0]}", f"data.train_image_size={sides[1]}", "recipe.mixup=0.8", *dynamic)
    summary = train(small(*QUICK, *more, "probe.every_steps=3", backbone=backbone), tmp_path)
    assert sizes == {True: {(sides[1],) * 2}, False: {(sides[0],) * 2}}
    assert 0 < summary["gradient_cosine"] < 1 and summary["preprocessing"]["image_size"] == sides[0]


def test_a_list_that_does_not_fit_the_network_is_refused_before_anything_is_trained(tmp_path):
    keys = ("recipe.epochs=2", "sbp.layers=all", "sbp.keep_ratio_end=[0.5,0.25,0.25]")
    with pytest.raises(ValueError, match=r"sbp\.keep_ratio_end has 3 values for 2 SBP layers: blocks.0, blocks.1"):
        train(small(*QUICK, *keys), tmp_path)
