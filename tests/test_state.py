"""Recomputation in backward: the masks are those of the forward pass, or an error says that they cannot be."""

from functools import partial

import pytest
import torch
from timm.models import checkpoint_seq
from torch.utils.checkpoint import checkpoint

import sbp
from tests.conftest import images, small_convnext, small_vit

make = pytest.mark.parametrize("make", [small_vit, small_convnext])


def loss(model, scale=1.0):
    return (model(images(32 if hasattr(model, "blocks") else 64)) * scale).sum()


def gradient(model, compute):
    model.zero_grad()
    compute().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@make
def test_reentrant_checkpointing_is_refused(make, monkeypatch):
    """It would run the plain model forward and SBP in backward."""
    model = sbp.apply(make())
    x = images(32 if make is small_vit else 64).requires_grad_()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        checkpoint(model, x, use_reentrant=True).sum().backward()
    loss(model).backward()  # a pass that is fine hides nothing
    module = "vision_transformer" if make is small_vit else "convnext"
    monkeypatch.setattr(f"timm.models.{module}.checkpoint_seq", partial(checkpoint_seq, use_reentrant=True))
    model.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss(model).backward()


@make
def test_reentrant_checkpointing_of_one_layer_is_refused(make):
    model = sbp.apply(make())
    if make is small_vit:
        model.forward_features = lambda x, **_: model.forward_intermediates(x, indices=1)[0]  # block by block
    block = model.blocks[4] if make is small_vit else model.stages[0].blocks[1]
    forward = block.forward
    block.forward = lambda x, **_: checkpoint(forward, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss(model).backward()


@make
@pytest.mark.parametrize("mask_per", ["batch", "sample"])
def test_two_forward_passes_before_one_backward(make, mask_per):
    model = sbp.apply(make(), mask="random", mask_per=mask_per, rescale=True, keep_ratio=0.3)

    def two():
        return loss(model) + loss(model, 2.0)

    expected = gradient(model, two)
    model.set_grad_checkpointing()
    sbp.set_draw(model, 0)
    with pytest.raises(RuntimeError, match="hold_mask"):
        gradient(model, two)

    model.set_grad_checkpointing(False)
    sbp.set_draw(model, 0)
    with sbp.hold_mask(model):
        held = gradient(model, two)
    model.set_grad_checkpointing()
    sbp.set_draw(model, 0)
    with sbp.hold_mask(model):
        torch.testing.assert_close(gradient(model, two), held)
    assert not torch.equal(held, expected)


@make
def test_passes_that_are_over_or_abandoned_do_not_count(make):
    model = sbp.apply(make(), mask="random")
    expected = gradient(model, lambda: loss(model))
    model.set_grad_checkpointing()
    sbp.set_draw(model, 0)
    done = loss(model)
    done.backward()  # and `done` stays alive
    loss(model)  # never differentiated
    sbp.set_draw(model, 0)
    torch.testing.assert_close(gradient(model, lambda: loss(model)), expected)


def test_blocks_before_any_mask():
    model = sbp.apply(small_vit())
    with pytest.raises(RuntimeError, match=r"blocks.2 ran before the model drew a mask"):
        model.blocks[2](torch.zeros(1, 17, 24, dtype=torch.float64))
    model(images())
    with pytest.raises(ValueError, match="got 5 tokens, but its mask is for 17"):
        model.blocks[2](torch.zeros(1, 5, 24, dtype=torch.float64))
    model = sbp.apply(small_vit(), mask_per="sample")
    model(images(batch=3))
    with pytest.raises(ValueError, match="positions of 3 images along dimension 1 cannot split 1"):
        model.blocks[2](torch.zeros(1, 17, 24, dtype=torch.float64))
