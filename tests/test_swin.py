import copy
from functools import partial

import pytest
import torch

import sbp
from sbp.masks import grid_mask
from sbp.swin import in_shifted_window, on_map
from tests import oracles
from tests.conftest import assert_same_gradients, gradients, images, one_of, small_swin
from tests.paths import assert_same_gradients_by, through_intermediates, with_checkpoints

METHODS = ("qkv", "query", "qkv_exact")
BLOCKS = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.2.blocks.0", "layers.2.blocks.1"]
MERGING = ["layers.1.downsample", "layers.2.downsample"]
TILE = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)  # 7 of 16
V2 = "swinv2_tiny_window8_256"
MODELS = {
    "v1": partial(small_swin, drop_path_rate=0.3),
    "v2": partial(small_swin, V2, drop_path_rate=0.3),
    "v1, any size": partial(small_swin, strict_img_size=False),
}


def odd_images():
    return images(72, 92, batch=2)


def oracle(model, mhsa_drop, tile=TILE, rescale=False):
    model = oracles.install(copy.deepcopy(model), BLOCKS, oracles.swin_block, tile, mhsa_drop, rescale)
    return oracles.install(model, MERGING, oracles.swin_merging, tile, rescale)


@pytest.mark.parametrize(("name", "mhsa_drop", "rescale"), one_of(3, MODELS, METHODS, [False, True]))
def test_gradients_equal_the_oracle(name, mhsa_drop, rescale):
    model = MODELS[name]()
    expected = gradients(oracle(model, mhsa_drop, rescale=rescale), images(64))
    for recompute in ("none", "cheap", "block"):
        patched = sbp.apply(copy.deepcopy(model), mhsa_drop=mhsa_drop, rescale=rescale, recompute=recompute)
        with sbp.fixed_mask(patched, TILE):
            assert_same_gradients(gradients(patched, images(64)), expected)


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_windows_of_different_sizes(name):
    """The last two stages have windows of 4 x 4, as their maps are no larger, and the first one has 8 x 8."""
    model = small_swin(*([V2] if name == "v2" else []), window_size=8)
    assert [tuple(stage.blocks[0].window_size) for stage in model.layers] == [(8, 8), (8, 8), (4, 4), (2, 2)]
    expected = gradients(oracle(model, "query"), images(64))
    sbp.apply(model, mhsa_drop="query")
    with sbp.fixed_mask(model, TILE):
        assert_same_gradients(gradients(model, images(64)), expected)


@pytest.mark.parametrize(("name", "mhsa_drop"), one_of(2, ["v1", "v2"], METHODS))
def test_maps_that_are_no_multiple_of_their_windows(name, mhsa_drop):
    """18 x 23, 9 x 12, 5 x 6 and 3 x 3 in windows of 4 x 4 and one of 2 x 2: padding, shifts and odd halves."""
    model, x = small_swin(*([V2] if name == "v2" else []), strict_img_size=False), odd_images()
    expected = gradients(oracle(model, mhsa_drop, rescale=True), x)
    for recompute in ("none", "cheap", "block"):
        patched = sbp.apply(copy.deepcopy(model), mhsa_drop=mhsa_drop, rescale=True, recompute=recompute)
        with sbp.fixed_mask(patched, TILE):
            assert_same_gradients(gradients(patched, x), expected)
    plain = gradients(model, x)
    for recompute in ("none", "cheap", "block"):
        exact = sbp.apply(copy.deepcopy(model), keep_ratio=1, mhsa_drop=mhsa_drop, recompute=recompute)
        assert_same_gradients(gradients(exact, x), plain, tolerance=0 if recompute == "none" else 1e-10)
    assert mhsa_drop == "qkv" or torch.allclose(expected[0], plain[0], rtol=1e-10)
    assert not torch.allclose(expected[1]["input"], plain[1]["input"])


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", V2])
def test_as_the_encoder_of_a_segmentation_network(name):
    """features_only takes timm's network apart: its stages are what is looked for."""
    whole, apart = (small_swin(name, strict_img_size=False, features_only=only) for only in (False, True))
    weights = {key.replace("layers.", "layers_"): value for key, value in whole.state_dict().items()}
    assert not apart.load_state_dict(weights, strict=False).missing_keys
    found = []
    for model in (whole, apart):
        sbp.apply(model, mhsa_drop="query")
        torch.manual_seed(3)  # drop path
        with sbp.fixed_mask(model, TILE):
            if model is whole:
                maps = model.forward_intermediates(odd_images(), intermediates_only=True)
            else:
                maps = [one.permute(0, 3, 1, 2) for one in model(odd_images())]
        sum((one * torch.linspace(-1, 2, one.numel(), dtype=one.dtype).view_as(one)).sum() for one in maps).backward()
        found.append({key.replace("layers_", "layers."): p.grad for key, p in model.named_parameters()})
    for key, gradient in found[1].items():
        torch.testing.assert_close(gradient, found[0][key], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "recompute"), one_of(3, MODELS, ["none", "cheap", "block"]))
def test_keep_ratio_1_is_the_plain_model(name, recompute):
    expected = gradients(MODELS[name](), images(64))
    model = sbp.apply(MODELS[name](), keep_ratio=1, recompute=recompute)
    assert_same_gradients(gradients(model, images(64)), expected, tolerance=0 if recompute == "none" else 1e-10)


@pytest.mark.parametrize("mhsa_drop", ["query", "qkv_exact"])
@pytest.mark.parametrize("name", MODELS)
def test_the_forward_pass_is_the_plain_models(name, mhsa_drop):
    model = MODELS[name]()
    torch.manual_seed(5)
    expected = model(images(64))
    sbp.apply(model, mhsa_drop=mhsa_drop, mask="random", keep_ratio=0.3)
    torch.manual_seed(5)
    torch.testing.assert_close(model(images(64)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_every_path_through_timm_gives_the_same_gradients(name):
    def make():
        return sbp.apply(MODELS[name](), mhsa_drop="query", keep_ratio=0.3)

    assert_same_gradients_by([through_intermediates(), with_checkpoints], make, images(64))


@pytest.mark.parametrize("window", [(7, 7), (8, 8), (4, 6)])
def test_each_window_keeps_the_same_number_shifted_or_not(window):
    size, mask = (window[0] * 3, window[1] * 2), grid_mask(*window, 0.4)
    keep = mask.flatten().nonzero()[:, 0]
    whole = mask.repeat(3, 2)
    for shift in [(0, 0), (window[0] // 2, window[1] // 2)]:
        found = on_map(in_shifted_window(keep, window, shift), window, shift, size)
        assert torch.equal(found.sort().values, whole.flatten().nonzero()[:, 0])
        windows = torch.arange(size[0] * size[1]).view(size).roll((-shift[0], -shift[1]), (0, 1))
        windows = windows.unflatten(1, (2, -1)).unflatten(0, (3, -1)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        for ours, own in zip(found.view(6, -1), windows, strict=True):
            assert {*ours.tolist()} <= {*own.tolist()}


def test_what_is_refused():
    with pytest.raises(ValueError, match="mask_per='sample' would make the bias"):
        sbp.apply(small_swin(), mask_per="sample")
    with pytest.raises(ValueError, match="mhsa_drop must be one of qkv, query, qkv_exact for this model, got 'head'"):
        sbp.apply(small_swin(), mhsa_drop="head")


def test_windows_that_no_mask_tiles_are_named_when_the_model_is_patched():
    model = small_swin(img_size=96)
    with pytest.raises(ValueError, match=r"stages?\.|layers\..*leave the stages of other windows out of `layers`"):
        sbp.apply(model, layers="all")
    assert not any("sbp_state" in vars(module) for module in model.modules())
