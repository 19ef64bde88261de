"""Layer-wise learning-rate decay."""

import pytest
import timm

import sbp
from sbp.training.config import RecipeConfig, validate
from sbp.training.models import build_model
from sbp.training.optim import build_optimizer, build_scheduler
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
