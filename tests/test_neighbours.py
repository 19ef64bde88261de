"""dropped="neighbours": equal to the oracle in float64; nearer to the exact gradient than nothing; saves nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import sbp
from sbp import neighbours
from sbp.masks import Positions, positions
from sbp.neighbours import neighbourhood
from sbp.state import LayerMap
from tests import oracles
from tests.conftest import assert_same_gradients, gradients, images, others_long, small_convnext, small_vit
from tests.test_input_gradient import BLOCKS, DOWNSAMPLES, GRID, Branch
from tests.test_memory import block_bytes


def naive(gradient, mask, factor):
    """gradient (B, C, H, W), at each dropped position replaced: one by one."""
    out = gradient.clone()
    for i, j in (~mask).nonzero().tolist():
        row, column = i // factor, j // factor
        rows = slice(max(0, (row - 1) * factor), (row + 2) * factor)
        columns = slice(max(0, (column - 1) * factor), (column + 2) * factor)
        around = mask[rows, columns]
        values = gradient[:, :, rows, columns][:, :, around]
        out[:, :, i, j] = values.mean(-1) if around.any() else 0
    return out


def with_lent_gradient(layer, run, x, mask, kept_outputs, factor):
    """run(layer, x); x has the gradient of kept positions and what they lend, weights that of kept outputs."""
    branch = Branch(layer, run)
    fixed = {name: p.detach() for name, p in branch.named_parameters()}
    entering = x.view_as(x)
    entering.register_hook(lambda gradient: naive(gradient, mask, factor))
    of_input = functional_call(branch, fixed, (entering,))
    of_weights = oracles.only_kept(branch(x.detach()), kept_outputs)
    return of_input + (of_weights - of_weights.detach())


def block(block, x, grid):
    def run(block, y):
        y = block.mlp(block.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return y if block.gamma is None else y * block.gamma[:, None, None]

    y = block.conv_dw(x)
    mask = oracles.block_mask(grid, *y.shape[-2:])
    branch = with_lent_gradient(block, run, y, mask, mask, y.shape[-1] // grid.shape[-1])
    return block.drop_path(branch) + block.shortcut(x)


def downsample(downsample, x, grid):
    fine = oracles.block_mask(grid, *x.shape[-2:])
    coarse = oracles.block_mask(grid, x.shape[-2] // 2, x.shape[-1] // 2)
    factor = x.shape[-1] // grid.shape[-1]
    return with_lent_gradient(downsample, nn.Sequential.forward, x, fine, coarse, factor)


@pytest.mark.parametrize("again", ["none", "cheap", "block"])
@pytest.mark.parametrize("form", [{}, {"drop_path_rate": 0.5}, {"ls_init_value": None, "act_layer": nn.SiLU}], ids=str)
def test_gradients_equal_the_oracle(form, again):
    model = small_convnext(**form)
    oracle = oracles.install(copy.deepcopy(model), BLOCKS, block, GRID)
    oracle = oracles.install(oracle, DOWNSAMPLES, downsample, GRID)
    expected = gradients(oracle, images(64))
    sbp.apply(model, dropped="neighbours", recompute=again)
    with sbp.fixed_mask(model, GRID):
        assert_same_gradients(gradients(model, images(64)), expected)


@pytest.mark.parametrize("factor", [1, 2])
def test_each_image_may_have_a_mask_of_its_own(factor):
    torch.manual_seed(0)
    grids = torch.stack([torch.randperm(16).view(4, 4) < 5 for _ in range(3)])
    masks = grids.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    side = 4 * factor
    where, on = positions(masks, 5 * factor**2), LayerMap(side, side, factor)
    gradient = torch.randn(3, 6, side, side).double()
    flat = gradient.flatten(2).transpose(1, 2)
    each = torch.arange(3)[:, None]
    found = neighbours.lent(flat[each, where.keep], neighbourhood(where, on))
    for image in range(3):
        expected = naive(gradient[image : image + 1], masks[image], factor).flatten(2)[0].T
        torch.testing.assert_close(found[image], expected)
        own = Positions(*(one[image] for one in where))
        alone = neighbours.lent(flat[image : image + 1, own.keep], neighbourhood(own, on))
        torch.testing.assert_close(found[image : image + 1], alone)


def test_without_a_neighbour_there_is_none():
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[0, 0] = True
    where = positions(mask, 1)
    found = neighbours.lent(torch.ones(1, 1, 2).double(), neighbourhood(where, LayerMap(5, 5)))
    assert found[0, :, 0].nonzero().flatten().tolist() == [0, 1, 5, 6]
    assert found[0, [0, 1, 5, 6]].eq(1).all()


@pytest.mark.parametrize("size", [72, 80])
def test_maps_that_are_no_multiple_of_the_grid(size):
    """What is left at the border belongs to the last cells, as the mask has it."""
    model = sbp.apply(small_convnext(), dropped="neighbours", keep_ratio=0.25)
    _, found = gradients(model, images(size))
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_a_gradient_that_changes_evenly_is_lent_as_it_is():
    """In the middle of a chequered map, where neighbours lie on all sides."""
    side = 8
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    mask = (row + column) % 2 == 0
    gradient = torch.stack([row + 2.0 * column, 3.0 - row], -1).flatten(0, 1)[None].double()
    where = positions(mask, side**2 // 2)
    found = neighbours.lent(gradient[:, where.keep], neighbourhood(where, LayerMap(side, side)))
    inner = ((row > 0) & (row < side - 1) & (column > 0) & (column < side - 1)).flatten()
    torch.testing.assert_close(found[:, inner], gradient[:, inner])


def test_a_response_norm_may_be_within():
    model = sbp.apply(small_convnext(use_grn=True), dropped="neighbours")
    assert all(gradient.isfinite().all() for gradient in gradients(model, images(64))[1].values())


def test_the_forward_pass_and_evaluation_are_the_plain_models():
    exact = small_convnext()
    model = sbp.apply(copy.deepcopy(exact), dropped="neighbours")
    x = images(64)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), exact.train(mode)(x))


@pytest.mark.parametrize("again", others_long(["none", "cheap", "block"], "block"))
def test_it_saves_nothing_more(again):
    make = lambda: small_convnext(dims=(64, 64, 64, 64), depths=(2, 1, 1, 1)).float()  # noqa: E731
    before, after = (
        block_bytes(make, 64, ["stages.0.blocks.1"], 0.25, recompute=again, dropped=dropped)
        for dropped in ("none", "neighbours")
    )
    assert after == before


def test_others_than_convnexts_are_refused():
    with pytest.raises(ValueError, match=r"for the maps of a ConvNeXt, and blocks\.2 is a Block"):
        sbp.apply(small_vit(), dropped="neighbours")
