"""Weights cast together: bit for bit what autocast computes, in fewer calls."""

import copy
from collections import Counter

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sbp
from sbp.training.runtime.precision import Casts
from tests.conftest import images, others_long, small_convnext, small_vit

MODELS = {
    "plain vit": small_vit,
    "plain convnext": small_convnext,
    "vit": lambda: sbp.apply(small_vit(init_values=0.5)),
    "vit query": lambda: sbp.apply(small_vit(), mhsa_drop="query"),
    "vit head": lambda: sbp.apply(small_vit(), mhsa_drop="head"),
    "vit cheap": lambda: sbp.apply(small_vit(init_values=0.5), recompute="cheap"),
    "vit block": lambda: sbp.apply(small_vit(proj_drop_rate=0.1, drop_path_rate=0.2), recompute="block"),
    "convnext": lambda: sbp.apply(small_convnext()),
    "convnext v2 cheap": lambda: sbp.apply(small_convnext(use_grn=True), recompute="cheap"),
    "convnext block": lambda: sbp.apply(small_convnext(drop_path_rate=0.2), recompute="block"),
}


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count[operator.name()] += 1
        return operator(*args, **(kwargs or {}))


def step(model, casts=None):
    x = images(64 if hasattr(model, "stages") else 32).float()
    model.zero_grad()
    torch.manual_seed(2)
    if casts is not None:
        casts.put()
    with Calls() as calls:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
    if casts is not None:
        casts.remove()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}, calls.count


@pytest.mark.parametrize(
    "name", others_long(MODELS, "vit", "vit head", "vit block", "plain convnext", "convnext v2 cheap")
)
def test_gradients_are_those_of_autocast_bitwise_and_names_stay(name):
    model = MODELS[name]().float()
    other = copy.deepcopy(model)
    casts = Casts(model, torch.bfloat16)
    keys = list(model.state_dict())
    for _ in range(3):
        expected, each = step(other)
        found, together = step(model, casts)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        assert list(model.state_dict()) == keys and not any("weight" in vars(one) for one in model.modules())
    weights = sum(len(group.weights) for group in casts._groups)
    assert together["aten::_to_copy"] <= each["aten::_to_copy"] - 2 * weights  # of each weight, and of its gradient
    assert together["aten::_foreach_copy_"] == len(casts._groups)


def test_a_blocks_gradients_are_there_before_the_backward_pass_of_the_one_below():
    """So that processes exchange them meanwhile, as they do under autocast."""
    model = sbp.apply(small_vit()).float()
    seen = []
    for number, block in enumerate(model.blocks):
        block.register_full_backward_pre_hook(lambda *_, number=number: seen.append(f"block {number}"))
        block.mlp.fc1.weight.register_post_accumulate_grad_hook(lambda _, number=number: seen.append(f"grad {number}"))
    step(model, Casts(model, torch.bfloat16))
    assert seen == [f"{what} {number}" for number in (5, 4, 3, 2, 1, 0) for what in ("block", "grad")]


def test_copies_that_no_part_has_asked_for_are_taken_back():
    model = small_vit().float()
    casts = Casts(model, torch.bfloat16)
    casts.put()
    casts.remove()
    model(images().float())
    assert not any("weight" in vars(one) or one._forward_pre_hooks for one in model.modules())


def test_what_is_frozen_is_left_to_autocast():
    model = small_vit().float()
    model.blocks[0].requires_grad_(False)
    casts = Casts(model, torch.bfloat16)
    casts.put()
    with torch.autocast("cpu", torch.bfloat16):
        model(images().float())
    assert "weight" not in vars(model.blocks[0].attn.qkv) and model.blocks[1].attn.qkv.weight.dtype == torch.bfloat16
    assert model.blocks[1].attn.qkv._parameters["weight"].dtype == torch.float32
    casts.remove()
    assert model.blocks[1].attn.qkv.weight.dtype == torch.float32
    found, _ = step_of_trainable(model, casts)
    expected, _ = step_of_trainable(model, None)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def step_of_trainable(model, casts):
    for p in model.parameters():
        p.grad = None
    if casts is not None:
        casts.put()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images().float()).float().sum()
    loss.backward()
    if casts is not None:
        casts.remove()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loss


def test_layers_of_other_types_keep_their_weights():
    """A convolution that standardises its weight computes with what it is given: that stays in full precision."""
    model = timm.create_model("vit_small_r26_s32_224", pretrained=False)
    types = {type(one.layer).__name__ for group in Casts(model, torch.bfloat16)._groups for one in group.weights}
    assert types == {"Linear", "Conv2d"}
