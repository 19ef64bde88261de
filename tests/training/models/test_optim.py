"""Layer-wise learning-rate decay."""

import pytest
import timm
import torch

import sbp
from sbp.training.config.recipe import LATER_SCHEDULERS, SCHEDULERS, RecipeConfig
from sbp.training.config.rules import validate
from sbp.training.models.build import build_model
from sbp.training.models.optim import build_optimizer, build_scheduler
from tests.training.configs import BACKBONES, small

RECIPE = RecipeConfig(epochs=3, warmup_epochs=1, warmup_lr=0.0, min_lr=0.0, layer_decay=0.5)


def groups(model, recipe=RECIPE):
    """lr_scale, weight decay and names of each parameter group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        (group.get("lr_scale"), group["weight_decay"], [names[one] for one in group["params"]])
        for group in build_optimizer(model, recipe, 1.0).param_groups
    ]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_sbp_changes_no_parameter_group(backbone):
    config = small(backbone=backbone)
    config.sbp.recompute = "cheap"
    model = build_model(config.backbone, config.sbp, 10, 32)
    patched = groups(model)
    sbp.remove(model)
    assert patched == groups(model)
    assert sum(len(names) for *_, names in patched) == len(list(model.parameters()))


def test_each_block_learns_at_a_share_of_the_next_ones_rate():
    model = timm.create_model("vit_tiny_patch16_224", depth=3)
    for scale, weight_decay, names in groups(model):
        for name in names:
            layer = {"blocks": 1, "norm": 3, "head": 4}.get(name.split(".")[0], 0)
            layer += int(name.split(".")[1]) if name.startswith("blocks.") else 0
            assert scale == 0.5 ** (4 - layer), name
            no_decay = name.endswith("bias") or "norm" in name or name in ("cls_token", "pos_embed")
            assert weight_decay == (0 if no_decay else 0.05), name


def test_the_schedule_scales_each_group_and_the_largest_rate_is_the_recipes():
    model = timm.create_model("convnext_tiny", dims=(8, 8, 8, 8), depths=(1, 1, 2, 1))
    optimizer = build_optimizer(model, RECIPE, 1.0)
    scheduler = build_scheduler(optimizer, RECIPE, 10)
    for step, base in ((0, 0.0), (5, 0.5), (10, 1.0), (20, 0.5), (30, 0.0)):
        scheduler.step_update(step)
        assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(base)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(base * group["lr_scale"])


def test_without_it_nothing_is_scaled_and_a_bad_value_is_refused():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert [scale for scale, *_ in groups(model, RecipeConfig())] == [None, None]
    for value in (0, 1.5):
        with pytest.raises(ValueError, match=r"recipe\.layer_decay must be null or lie in \(0, 1\]"):
            validate(small(f"recipe.layer_decay={value}"))
    validate(small("recipe.layer_decay=1"))


MULTISTEP = ("recipe.scheduler=multistep", "recipe.decay_milestones=[5,7]")


def rates(steps_per_epoch=10, **recipe):
    """The learning rate of each step of a run of 8 epochs with the peak 1."""
    settings = RecipeConfig(**{"epochs": 8, "min_lr": 0.0, "warmup_lr": 0.0, "warmup_epochs": 0} | recipe)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, settings, steps_per_epoch)
    found = []
    for step in range(settings.epochs * steps_per_epoch):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize(
    ("warmup", "steps"),
    [({}, 0), ({"warmup_epochs": 3}, 30), ({"warmup_epochs": 4}, 40), ({"warmup_steps": 7}, 7)],
)
def test_milestones_are_epochs_of_the_run_whatever_the_warm_up(warmup, steps):
    found = rates(scheduler="multistep", decay_milestones=[5, 7], **warmup)
    expected = [step / steps if step < steps else 0.1 ** ((step >= 50) + (step >= 70)) for step in range(80)]
    assert found == pytest.approx(expected)


AVAILABLE = [one for one in SCHEDULERS if one not in LATER_SCHEDULERS or hasattr(timm.scheduler, "WSDLRScheduler")]


def test_a_schedule_that_this_timm_has_not_is_refused(monkeypatch):
    monkeypatch.delattr(timm.scheduler, "WSDLRScheduler", raising=False)
    with pytest.raises(ValueError, match=r"recipe.scheduler=wsd needs a later timm than .*, which has cosine, "):
        validate(small("recipe.scheduler=wsd"))


@pytest.mark.parametrize("scheduler", AVAILABLE)
@pytest.mark.parametrize("warmup", [{"warmup_epochs": 3}, {"warmup_steps": 30}])
def test_each_schedule_reaches_its_peak_and_ends_with_the_run(scheduler, warmup):
    milestones = {"decay_milestones": [5, 7]} if scheduler == "multistep" else {}
    found = rates(scheduler=scheduler, decay_rate=0.5, **warmup, **milestones)
    assert found[:30] == pytest.approx([step / 30 for step in range(30)], abs=0.01)
    assert max(found) == max(found[29:32]) and found[30] > 0.2  # what a schedule has lost in place of a warm-up
    assert scheduler == "constant" or found[-1] < 0.3


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"warmup_steps": 500}, r"recipe\.warmup_steps must be less than the 80 steps of the run .*, got 500"),
        ({"warmup_steps": 80}, r"recipe\.warmup_steps must be less than the 80 steps of the run .*, got 80"),
        (
            {"warmup_steps": 50, "scheduler": "multistep", "decay_milestones": [5, 7]},
            r"must be less than the 50 steps to the first of recipe\.decay_milestones, epoch 5, got 50",
        ),
    ],
)
def test_a_warm_up_that_the_run_has_no_room_for_is_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        rates(**recipe)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("recipe.scheduler=rsqrt",), "must be above 0 with recipe.scheduler=rsqrt"),
        (
            (*MULTISTEP, "recipe.epochs=8", "recipe.warmup_epochs=5"),
            r"increasing epochs in \(5, 8\) \(recipe.warmup_epochs, recipe.epochs\) .*, got \[5, 7\]",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_its_warm_up_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        validate(small(*overrides))
