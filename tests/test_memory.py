"""Bytes saved for the backward pass, compared with arithmetic: units of C bytes a token under bfloat16 autocast."""

import copy

import pytest
import torch

import sbp
from tests.conftest import small_convnext, small_eva, small_vit


def bytes_per_image(model, size, low=2, high=4):
    """The slope between two batch sizes: without copies of weights and index tensors."""

    def saved(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return sbp.saved_bytes(lambda: model(torch.ones(batch, 3, size, size)).sum())

    return (saved(high) - saved(low)) / (high - low)


def block_bytes(make, size, layers, keep_ratio=0.5, **settings):
    """What one layer more saves, in bytes per image: the model with it as SBP, against it plain."""
    plain = make()
    patched = sbp.apply(copy.deepcopy(plain), layers=layers, keep_ratio=keep_ratio, **settings)
    return bytes_per_image(plain, size) - bytes_per_image(patched, size)


def vit(**kwargs):
    return lambda: small_vit(embed_dim=64, num_heads=2, img_size=64, **kwargs).float()


def test_nothing_that_was_counted_lives_on():
    model = small_vit()
    weight = model.blocks[0].attn.qkv.weight

    def node():
        return weight.expand_as(weight).grad_fn.next_functions[0][0]

    def loss():
        result = model(torch.ones(2, 3, 32, 32).double()).sum()
        node().metadata["seen"] = True
        return result

    assert sbp.saved_bytes(loss) > 0
    assert "seen" not in node().metadata


@pytest.mark.parametrize(
    ("mhsa_drop", "keep_ratio", "units"),
    [("qkv", 0.5, lambda r: 36 * r), ("qkv", 0.25, lambda r: 36 * r), ("qkv_exact", 0.5, lambda r: 32 * r + 4)],
)
def test_a_vit_block_saves_what_the_arithmetic_says(mhsa_drop, keep_ratio, units):
    """Plain 36, two-stream qkv 36 r, with all keys and values 32 r + 4 (64 tokens, no class token)."""
    tokens, channels = 64, 64
    one = ["blocks.5"]
    saved = block_bytes(vit(class_token=False, global_pool="avg"), 64, one, keep_ratio, mhsa_drop=mhsa_drop)
    expected = (36 - units(keep_ratio)) * tokens * channels
    assert saved == pytest.approx(expected, rel=0.03)  # norm statistics and the softmax's log sums are small


@pytest.mark.parametrize(
    ("recompute", "units"), [("none", lambda r: 44 - 36 * r), ("cheap", lambda r: 44 - 20 * r)], ids=["none", "cheap"]
)
def test_an_eva_block_saves_what_the_arithmetic_says(recompute, units):
    """Plain 44: to a ViT's 36 come turned queries and keys beside qkv (4) and what the layer scales read (4).

    SBP saves turned queries, turned keys and values alone, and folds the scales: 36 r; cheap, without what norms and
    the activation give, and with a residual stream that nothing makes float32: 20 r.
    """
    tokens, channels = 64, 64
    make = lambda: small_eva(  # noqa: E731
        "vit_small_patch16_dinov3", img_size=64, embed_dim=64, num_heads=2, num_reg_tokens=0, class_token=False
    ).float()
    plain = make()
    patched = sbp.apply(make(), layers=["blocks.5"], recompute=recompute)
    everything = sbp.apply(make(), layers=["blocks.5"], keep_ratio=1, recompute=recompute)
    saved = bytes_per_image(plain, 64) - bytes_per_image(patched, 64)
    if recompute == "cheap":  # the other blocks recompute, too
        saved -= (bytes_per_image(plain, 64) - bytes_per_image(everything, 64)) * 5 / 6
    assert saved == pytest.approx(units(0.5) * tokens * channels, rel=0.05)


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_a_convnext_block_saves_what_the_arithmetic_says(conv_mlp):
    """Plain 24 and SBP 2 + 20 r on a CPU, where norms take bfloat16: the layer scale is folded and saves nothing."""
    make = lambda: small_convnext(dims=(64, 64, 64, 64), depths=(2, 1, 1, 1), conv_mlp=conv_mlp).float()  # noqa: E731
    positions, channels = 16 * 16, 64
    saved = block_bytes(make, 64, ["stages.0.blocks.1"])
    assert saved == pytest.approx((22 - 20 * 0.5) * positions * channels, rel=0.06)


def test_keep_ratio_1_saves_what_the_plain_model_saves():
    for make, size in ((vit(), 64), (lambda: small_convnext().float(), 64)):
        plain = make()
        patched = sbp.apply(copy.deepcopy(plain), keep_ratio=1)
        assert bytes_per_image(plain, size) == bytes_per_image(patched, size)


@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
@pytest.mark.parametrize("mhsa_drop", ["qkv", "query", "head", "qkv_exact"])
def test_rescaling_saves_nothing_in_a_vit(mhsa_drop, recompute):
    make = vit(global_pool="avg", drop_path_rate=0.1)
    settings = {"mhsa_drop": mhsa_drop, "recompute": recompute}
    off, on = (sbp.apply(make(), rescale=rescale, **settings) for rescale in (False, True))
    assert bytes_per_image(on, 64) == bytes_per_image(off, 64)


@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
@pytest.mark.parametrize("use_grn", [False, True])
def test_rescaling_saves_nothing_in_a_convnext(use_grn, recompute):
    off, on = (
        sbp.apply(small_convnext(use_grn=use_grn).float(), rescale=rescale, recompute=recompute)
        for rescale in (False, True)
    )
    assert bytes_per_image(on, 64) == bytes_per_image(off, 64)


@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize(("make", "scale"), [(vit, "init_values"), (small_convnext, "ls_init_value")])
def test_without_autocast_layer_scales_save_no_weights(make, scale, recompute):
    """Which they are multiplied into: with a single image these would be more than all activations."""

    def of_no_image(**options):
        made = make(**options)
        model = sbp.apply(made() if make is vit else made.float(), recompute=recompute)
        one, three = (sbp.saved_bytes(lambda: model(torch.ones(count, 3, 64, 64)).sum()) for count in (1, 3))  # noqa: B023
        return one - (three - one) / 2

    assert of_no_image(**{scale: 0.1}) == of_no_image(**{scale: None})


def test_masks_of_each_image_save_their_positions_and_nothing_else():
    """8 bytes for each token, once; in a ConvNeXt for each position of a stage's map and each pixel downsampled."""
    for make, size, positions in [(vit(), 64, 65), (lambda: small_convnext().float(), 64, 2 * (256 + 64) + 16)]:
        one, each = (sbp.apply(make(), mask_per=mask_per) for mask_per in ("batch", "sample"))
        assert bytes_per_image(each, size) - bytes_per_image(one, size) == 8 * positions


def test_a_storage_counts_once_and_parameters_do_not():
    weight = torch.nn.Parameter(torch.ones(8, 8))
    x = torch.ones(4, 8, requires_grad=True)
    assert sbp.saved_bytes(lambda: x @ weight.t()) == 4 * 8 * 4
    assert sbp.saved_bytes(lambda: (x[:2] * x[2:]).sum()) == 4 * 8 * 4
    assert sbp.saved_bytes(lambda: x.sin().cos()) == 2 * 4 * 8 * 4


def test_a_weight_whose_gradient_is_not_wanted_everywhere_is_no_activation():
    """As dropped positions read it that pass on the gradient of their input."""
    weight = torch.nn.Parameter(torch.ones(8, 8))
    x = torch.ones(4, 8, requires_grad=True)
    assert sbp.saved_bytes(lambda: x @ weight.t() + x @ weight.detach().t()) == 4 * 8 * 4
