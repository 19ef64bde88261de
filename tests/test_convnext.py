import copy

import pytest
import timm
import torch
from torch import nn

import sbp
from sbp.convnext import patch_pixels
from tests import oracles
from tests.conftest import (
    assert_same_gradients,
    gradients,
    gradients_image_by_image,
    images,
    masks_of,
    one_of,
    small_convnext,
)

FORMS = [
    {"name": "convnext_tiny", "conv_mlp": False},
    {"name": "convnext_tiny", "conv_mlp": True},
    {"name": "convnextv2_tiny", "conv_mlp": False, "use_grn": True, "ls_init_value": None},
    {"name": "convnextv2_tiny", "conv_mlp": True, "use_grn": True, "ls_init_value": None},
    {"name": "convnext_tiny", "drop_path_rate": 0.5, "norm_layer": "rmsnorm"},
    {"name": "convnext_tiny", "patch_size": 2, "stem_type": "patch"},
    {"name": "convnext_tiny", "stem_type": "overlap_tiered", "ls_init_value": None},
]
BLOCKS = ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.2.blocks.0", "stages.2.blocks.1"]
DOWNSAMPLES = ["stages.1.downsample", "stages.2.downsample"]


def oracle(model, mask, blocks=BLOCKS, downsamples=DOWNSAMPLES, rescale=False):
    model = oracles.install(copy.deepcopy(model), blocks, oracles.convnext_block, mask, rescale)
    return oracles.install(model, downsamples, oracles.convnext_downsample, mask, rescale)


@pytest.mark.parametrize(
    ("form", "size", "rescale"), one_of(3, FORMS, [(64, 64), (72, 40), (93, 64)], [False, True]), ids=str
)
def test_gradients_equal_the_oracle(form, size, rescale):
    if form.get("stem_type") == "overlap_tiered" and size == (93, 64):
        size = (92, 64)
    model = small_convnext(**form)
    downsamples = [*DOWNSAMPLES, "stages.0.downsample"] if form.get("patch_size") == 2 else DOWNSAMPLES
    mask = torch.rand(size[0] // 16, size[1] // 16, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = gradients(oracle(model, mask, downsamples=downsamples, rescale=rescale), images(*size))
    sbp.apply(model, rescale=rescale)
    with sbp.fixed_mask(model, mask):
        assert_same_gradients(gradients(model, images(*size)), expected)


@pytest.mark.parametrize(("form", "mask_per"), one_of(2, FORMS, ["half", "sample"]), ids=str)
def test_images_with_masks_of_their_own(form, mask_per):
    """The gradient is the sum of those that each image gives with its mask alone, which has an oracle."""
    model = sbp.apply(small_convnext(**form), mask="random", mask_per=mask_per)
    found = gradients(model, images(64))
    masks = masks_of(model.stages[2].blocks[0].sbp_state.current.positions[-1], 4, 4)
    assert len(masks.unique(dim=0)) == (2 if mask_per == "half" else 3) and (masks.sum((1, 2)) == 8).all()
    assert_same_gradients(found, gradients_image_by_image(model, images(64), masks))


@pytest.mark.parametrize("mask_per", ["half", "sample"])
def test_images_with_masks_of_their_own_need_whole_blocks(mask_per):
    model = sbp.apply(small_convnext(), mask_per=mask_per)
    with pytest.raises(ValueError, match=rf"mask_per='{mask_per}' needs maps .* got a map of 18 x 16 .* 4 x 4"):
        model(images(72, 64))
    with sbp.fixed_mask(model, sbp.masks.grid_mask(4, 4, 0.5)):
        gradients(model, images(72, 64))


@pytest.mark.parametrize("mask", ["grid", "random"])
@pytest.mark.parametrize("size", [(64, 64), (90, 64)], ids=str)
def test_drawn_masks_follow_the_mask_grid(mask, size):
    model = small_convnext()
    expected = copy.deepcopy(model)
    sbp.apply(model, keep_ratio=0.4, mask=mask, seed=1)
    actual = gradients(model, images(*size))
    where = model.stages[2].blocks[0].sbp_state.current.positions[-1]
    grid = (size[0] // 16, size[1] // 16)
    base = torch.zeros(grid[0] * grid[1], dtype=torch.bool).index_fill(0, where.keep, True).view(grid)
    assert_same_gradients(actual, gradients(oracle(expected, base), images(*size)))


def test_ratios_that_differ_between_layers():
    names = sorted([*BLOCKS, *DOWNSAMPLES], key=lambda name: (name.split(".")[1], "blocks" in name, name))
    ratios = [0.9, 0.7, 1.0, 0.5, 0.3, 0.3, 0.2]
    model = small_convnext()
    expected = copy.deepcopy(model)
    sbp.apply(model, keep_ratio=ratios)
    actual = gradients(model, images(128))
    positions = dict(zip(names, model.stages[0].blocks[0].sbp_state.current.positions, strict=True))
    for name, where in positions.items():
        if where is None:
            continue
        size = {"0": 32, "1": 16, "2": 8}[name.split(".")[1]]
        mask = torch.zeros(size * size, dtype=torch.bool).index_fill(0, where.keep, True).view(size, size)
        forward = oracles.convnext_block if "blocks" in name else oracles.convnext_downsample
        oracles.install(expected, [name], forward, mask)
    assert_same_gradients(actual, gradients(expected, images(128)))
    assert positions["stages.1.downsample"] is None


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_forward_pass_is_the_plain_models(form):
    model = small_convnext(**form)
    torch.manual_seed(5)
    expected = model(images(64))
    sbp.apply(model, layers="all", keep_ratio=0.3, mask="random")
    torch.manual_seed(5)
    torch.testing.assert_close(model(images(64)), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS[:4], ids=str)
def test_keep_ratio_1_is_the_plain_model(form):
    model = small_convnext(drop_path_rate=0.3, **form)
    expected = gradients(model, images(64))
    assert_same_gradients(gradients(sbp.apply(model, keep_ratio=1), images(64)), expected, tolerance=0)


def test_kept_and_dropped_parts_sum_to_the_full_gradient_of_a_layer():
    """dW = dW_keep + dW_drop for one layer whose input and output gradients are the same in all three runs."""
    model = small_convnext()
    mask = sbp.masks.grid_mask(4, 4, 0.4)
    full = gradients(model, images(64))[1]
    sbp.apply(model, layers=["stages.2.blocks.1"])
    halves = []
    for keep in (mask, ~mask):
        with sbp.fixed_mask(model, keep):
            halves.append(gradients(model, images(64))[1])
    for part in ("norm.weight", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "gamma"):
        name = f"stages.2.blocks.1.{part}"
        torch.testing.assert_close(halves[0][name] + halves[1][name], full[name], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(halves[0][name], full[name])


@pytest.mark.parametrize("layer", ["stages.0.blocks.1", "stages.2.downsample", "stages.2.blocks.1"])
@pytest.mark.parametrize("masks", [2, 4])
def test_rescaled_gradients_have_the_exact_mean_over_the_masks(layer, masks):
    """With one SBP layer every gradient of the model is linear in the mask."""
    model = small_convnext(drop_path_rate=0.3)
    expected = gradients(model, images(64))
    sbp.apply(model, layers=[layer], rescale=True)
    results = []
    grid = 16 if layer.startswith("stages.0") else 4
    for offset in range(masks):
        with sbp.fixed_mask(model, sbp.masks.grid_mask(grid, grid, 1 / masks, offset)):
            results.append(gradients(model, images(64))[1])
    mean = {name: sum(found[name] for found in results) / masks for name in results[0]}
    assert_same_gradients((expected[0], mean), expected)
    assert not torch.allclose(results[0]["stem.0.weight"], expected[1]["stem.0.weight"])


def test_features_only():
    model = small_convnext(features_only=True, out_indices=(1, 2))
    mask = sbp.masks.random_mask(4, 4, 0.5)
    renamed = [[name.replace("stages.", "stages_", 1) for name in names] for names in (BLOCKS, DOWNSAMPLES)]
    expected = gradients(oracle(model, mask, *renamed), images(64))
    sbp.apply(model)
    with sbp.fixed_mask(model, mask):
        assert_same_gradients(gradients(model, images(64)), expected)


@pytest.mark.parametrize("settings", [{}, {"mask_per": "sample", "rescale": True}], ids=str)
def test_checkpointing_changes_nothing(settings):
    expected = gradients(sbp.apply(small_convnext(drop_path_rate=0.3), **settings), images(64))
    model = sbp.apply(small_convnext(drop_path_rate=0.3), **settings)
    model.set_grad_checkpointing()
    assert_same_gradients(gradients(model, images(64)), expected, tolerance=0)


@pytest.mark.parametrize("mask_per", ["batch", "sample"])
def test_channels_last(mask_per):
    expected = gradients(sbp.apply(small_convnext(), mask_per=mask_per), images(64))
    model = sbp.apply(small_convnext(), mask_per=mask_per).to(memory_format=torch.channels_last)
    actual = gradients(model, images(64).to(memory_format=torch.channels_last))
    assert_same_gradients(actual, expected)


def test_published_layers():
    for depths, blocks in [((3, 3, 9, 3), 6), ((3, 3, 27, 3), 21), ((2, 2, 6, 2), 4), ((1, 1, 3, 1), 2)]:
        model = sbp.apply(timm.create_model("convnext_tiny", depths=depths, dims=(4, 4, 4, 4)))
        layers = model.stages[0].blocks[0].sbp_state.layers
        assert len(layers) == depths[0] + depths[1] + blocks + 2
        assert f"stages.2.blocks.{blocks - 1}" == layers[-1]
        assert not any(name.startswith("stages.3") for name in layers)


def test_pixels_of_patches():
    mask = patch_pixels(torch.tensor([1, 4]), 3, 2)  # of a 4 x 6 map in 2 x 2 patches, 3 a row
    assert mask.tolist() == [2, 3, 8, 9, 14, 15, 20, 21]
    assert patch_pixels(torch.tensor([[1], [4]]), 3, 2).tolist() == [[2, 3, 8, 9], [14, 15, 20, 21]]


def test_other_convnexts_are_refused():
    with pytest.raises(ValueError, match="GroupNorm1; SBP knows"):
        sbp.apply(small_convnext(conv_mlp=True, norm_layer="groupnorm1"))
    other = small_convnext()
    other.stages[1].downsample = torch.nn.Conv2d(8, 16, 2, 2)
    assert "stages.1.downsample is not a norm over channels and a convolution" in sbp.supports(other).reason
    with pytest.raises(ValueError, match="too small for the SBP stages"):
        sbp.apply(small_convnext())(images(8))


def test_downsampling_of_patches_that_overlap_stays_exact():
    dilated = small_convnext(output_stride=8)
    answer = sbp.supports(dilated)
    for names in (answer.layers, answer.published):
        assert [name for name in names if "downsample" in name] == ["stages.1.downsample"]
    sbp.apply(dilated)
    mask = sbp.masks.grid_mask(8, 8, 0.5)
    with sbp.fixed_mask(dilated, mask):
        gradients(dilated, images(64))


class Adapter(nn.Module):
    """As LoRA is put around a convolution."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down = nn.Conv2d(layer.in_channels, 2, 1, bias=False).to(layer.weight)
        self.up = nn.Conv2d(2, layer.out_channels, 1, bias=False).to(layer.weight)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("use_grn", [False, True])
@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
def test_adapters_around_convolutions_take_part(use_grn, recompute):
    def adapted():
        model = small_convnext(conv_mlp=True, use_grn=use_grn)
        torch.manual_seed(1)
        for block in (model.stages[0].blocks[0], model.stages[2].blocks[1]):
            block.mlp.fc1, block.mlp.fc2 = Adapter(block.mlp.fc1), Adapter(block.mlp.fc2)
        return model

    x, plain = images(64), adapted()
    everything = sbp.apply(adapted(), keep_ratio=1, recompute=recompute)
    assert_same_gradients(gradients(everything, x), gradients(plain, x))
    half = gradients(sbp.apply(adapted(), recompute=recompute), x)
    assert_same_gradients(half, gradients(sbp.apply(adapted()), x))
    for name in ("fc1", "fc2"):  # kept positions have a gradient of them, and it is not the exact one
        weight = f"stages.0.blocks.0.mlp.{name}.up.weight"
        assert bool(half[1][weight].any()) and not torch.allclose(half[1][weight], gradients(plain, x)[1][weight])
