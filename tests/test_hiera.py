import copy
from functools import partial

import pytest
import torch

import sbp
from sbp.functional import Streams
from tests import oracles
from tests.conftest import (
    assert_same_gradients,
    gradients,
    gradients_image_by_image,
    images,
    masks_of,
    one_of,
    small_hiera,
)
from tests.paths import assert_same_gradients_by, checkpointed_as_a_whole, through_intermediates, with_checkpoints

METHODS = ("qkv", "query", "qkv_exact")
LAYERS = [f"blocks.{i}" for i in range(5)]  # the first two stages, and two of three
UNITS = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
MODELS = {
    "hiera": small_hiera,
    "layer scale, drop path": partial(small_hiera, init_values=0.5, drop_path_rate=0.3),
    "pooled shortcuts, another place": partial(small_hiera, use_expand_proj=False, abs_win_pos_embed=True),
}


def oracle(model, mhsa_drop, layers=LAYERS, rescale=False):
    return oracles.install(copy.deepcopy(model), layers, oracles.hiera_block, UNITS, mhsa_drop, rescale)


@pytest.mark.parametrize(("name", "mhsa_drop", "rescale"), one_of(3, MODELS, METHODS, [False, True]))
def test_gradients_equal_the_oracle(name, mhsa_drop, rescale):
    model = MODELS[name]()
    expected = gradients(oracle(model, mhsa_drop, rescale=rescale), images(96))
    for recompute in ("none", "cheap", "block"):
        patched = sbp.apply(copy.deepcopy(model), mhsa_drop=mhsa_drop, rescale=rescale, recompute=recompute)
        assert patched.blocks[0].sbp_state.layers == LAYERS
        with sbp.fixed_mask(patched, UNITS):
            assert_same_gradients(gradients(patched, images(96)), expected)


def test_all_layers():
    model = small_hiera()
    expected = gradients(oracle(model, "query", [f"blocks.{i}" for i in range(7)]), images(96))
    sbp.apply(model, mhsa_drop="query", layers="all")
    with sbp.fixed_mask(model, UNITS):
        assert_same_gradients(gradients(model, images(96)), expected)


@pytest.mark.parametrize(
    ("mhsa_drop", "mask_per", "recompute"), one_of(2, METHODS, ["half", "sample"], ["none", "block"])
)
def test_images_with_masks_of_their_own(mhsa_drop, mask_per, recompute):
    settings = {"mask": "random", "mask_per": mask_per, "recompute": recompute}
    model = sbp.apply(small_hiera(), mhsa_drop=mhsa_drop, **settings)
    found = gradients(model, images(96))
    masks = masks_of(model.blocks[0].sbp_state.current.positions[-1], 3, 3)
    assert len(masks.unique(dim=0)) == (2 if mask_per == "half" else 3)
    assert_same_gradients(found, gradients_image_by_image(model, images(96), masks))


@pytest.mark.parametrize(("name", "recompute"), one_of(3, MODELS, ["none", "cheap", "block"]))
def test_keep_ratio_1_is_the_plain_model(name, recompute):
    expected = gradients(MODELS[name](), images(96))
    model = sbp.apply(MODELS[name](), keep_ratio=1, recompute=recompute)
    assert_same_gradients(gradients(model, images(96)), expected, tolerance=0 if recompute == "none" else 1e-10)


@pytest.mark.parametrize("mhsa_drop", ["query", "qkv_exact"])
@pytest.mark.parametrize("name", MODELS)
def test_the_forward_pass_is_the_plain_models(name, mhsa_drop):
    model = MODELS[name]()
    torch.manual_seed(5)
    expected = model(images(96))
    sbp.apply(model, mhsa_drop=mhsa_drop, mask="random", keep_ratio=0.3)
    torch.manual_seed(5)
    torch.testing.assert_close(model(images(96)), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("mhsa_drop", "keep_ratio"), one_of(2, METHODS, [0.5, [0.75, 0.75, 0.5, 0.5, 0.25]]), ids=str)
def test_every_path_through_timm_gives_the_same_gradients(mhsa_drop, keep_ratio):
    def make():
        return sbp.apply(small_hiera(drop_path_rate=0.3), mhsa_drop=mhsa_drop, keep_ratio=keep_ratio)

    assert_same_gradients_by([through_intermediates(), checkpointed_as_a_whole, with_checkpoints], make, images(96))


def test_streams_are_split_once():
    model = sbp.apply(small_hiera())
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(type(out)))
    model(images(96))
    assert seen == [Streams] * 4 + [torch.Tensor] * 3


def test_what_is_refused():
    with pytest.raises(ValueError, match="patch_drop_rate must be 0"):
        sbp.apply(small_hiera(patch_drop_rate=0.5))
    with pytest.raises(ValueError, match="mhsa_drop must be one of qkv, query, qkv_exact for this model, got 'head'"):
        sbp.apply(small_hiera(), mhsa_drop="head")
    model = sbp.apply(small_hiera())
    for kept in (1, 3, 6):  # also where the tokens that are left would fill as many units
        with pytest.raises(ValueError, match=rf"got {64 * kept} tokens, .* 9 units of 64: .* takes neither"):
            model(images(96), mask=torch.arange(9).expand(3, 9) < kept)
    model.eval()(images(96), mask=torch.arange(9).expand(3, 9) < 3)
