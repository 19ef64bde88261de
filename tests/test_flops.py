"""FLOPs against arithmetic, and how they fall with the keep-ratio."""

import pytest
import torch
from torch import nn

import sbp
from tests.conftest import fake_model, images, small_convnext, small_vit


@pytest.mark.parametrize("groups", [1, 8])
def test_a_convolution_costs_the_same_in_each_direction(groups):
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    x = torch.ones(2, 8, 10, 10, requires_grad=True)
    flops = sbp.count_flops(lambda: conv(x).sum())
    assert flops.forward == 2 * 2 * 8 * 100 * 9 * 8 // groups
    assert flops.backward == 2 * flops.forward
    assert sbp.count_flops(lambda: conv(x.detach()).sum()).backward == flops.forward


def test_linear_layers_and_attention():
    x = torch.ones(2, 16, 8, requires_grad=True)
    flops = sbp.count_flops(lambda: nn.Linear(8, 32)(x).sum())
    assert flops == (2 * 2 * 16 * 8 * 32, 2 * 2 * 2 * 16 * 8 * 32)


def backward_flops(make, size, **settings):
    model = sbp.apply(make(), **settings)
    return sbp.count_flops(lambda: model(images(size)).sum())


@pytest.mark.parametrize("mhsa_drop", ["qkv", "query", "qkv_exact"])
def test_the_backward_pass_of_a_vit_block_falls_with_the_keep_ratio(mhsa_drop):
    make = lambda: small_vit(img_size=64, global_pool="avg")  # noqa: E731
    plain = backward_flops(make, 64, keep_ratio=1)
    half, quarter = (
        backward_flops(make, 64, keep_ratio=ratio, layers=["blocks.4"], mhsa_drop=mhsa_drop) for ratio in (0.5, 0.25)
    )
    assert quarter.backward < half.backward < plain.backward
    assert half.forward <= plain.forward
    tokens, channels, batch = 64, 24, 3
    dropped = {0.5: tokens // 2, 0.25: tokens * 3 // 4}
    for ratio, found in ((0.5, half), (0.25, quarter)):  # MLP and projection lose just the dropped share
        least = 2 * 2 * batch * dropped[ratio] * (8 + 1) * channels**2
        assert plain.backward - found.backward >= least


def test_the_backward_pass_of_a_convnext_block_falls_with_the_keep_ratio():
    layer = "stages.0.blocks.1"
    plain = backward_flops(small_convnext, 64, keep_ratio=1)
    for ratio in (0.25, 0.5, 0.75):
        found = backward_flops(small_convnext, 64, keep_ratio=ratio, layers=[layer])
        positions, channels, batch = 16 * 16, 8, 3
        pointwise = 2 * (2 * batch * positions * 8 * channels**2)  # both gradients of both layers
        assert plain.backward - found.backward == (1 - ratio) * pointwise
        assert found.forward == plain.forward


def test_fake_tensors_cost_what_real_ones_do():
    real = sbp.apply(small_convnext(), recompute="cheap")
    fake, mode = fake_model(lambda: small_convnext(randomised=False))
    sbp.apply(fake, recompute="cheap")
    expected = sbp.count_flops(lambda: real(images(64)).sum())
    with mode:
        assert sbp.count_flops(lambda: fake(torch.empty(3, 3, 64, 64, dtype=torch.float64)).sum()) == expected
