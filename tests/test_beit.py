import copy
from functools import partial

import pytest
import torch
from timm.models.vision_transformer_relpos import ResPostRelPosBlock

import sbp
from tests import oracles
from tests.conftest import assert_same_gradients, gradients, images, one_of, small_beit
from tests.paths import assert_same_gradients_by, checkpointed_as_a_whole, through_intermediates, with_checkpoints

METHODS = ("qkv", "query", "head", "qkv_exact")
LAYERS = [f"blocks.{i}" for i in range(2, 6)]  # the last two thirds of six
MASK = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)  # 7 of 16
MODELS = {
    "beit": small_beit,
    "beit, class token": partial(small_beit, global_pool="token", drop_path_rate=0.3),
    "beit, one bias for all": partial(small_beit, use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    "beit, both, gated": partial(small_beit, use_shared_rel_pos_bias=True, swiglu_mlp=True, scale_mlp=True),
    "relpos": partial(small_beit, "vit_relpos_base_patch16_224", qk_norm=True, drop_path_rate=0.3),
    "relpos, norms behind": partial(small_beit, "vit_relpos_base_patch16_224", block_fn=ResPostRelPosBlock),
    "relpos, class token": partial(small_beit, "vit_relpos_base_patch16_cls_224"),
    "relpos, mlp, one for all": partial(small_beit, "vit_relpos_base_patch16_clsgap_224", shared_rel_pos=True),
}


def keep_heads_0_and_2(monkeypatch):
    monkeypatch.setattr("sbp.masks.hashed_scores", lambda key, count, stream=0: torch.tensor([0, 2, 1]))


def oracle(model, mhsa_drop, rescale=False):
    heads = torch.tensor([True, False, True]) if mhsa_drop == "head" else None
    settings = MASK, int(model.cls_token is not None), mhsa_drop, heads, rescale
    return oracles.install(copy.deepcopy(model), LAYERS, oracles.beit_block, *settings)


def without_dropout(model):
    """timm's bias of an MLP draws random numbers in training, which an oracle would draw in another order."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize(("name", "mhsa_drop", "rescale"), one_of(4, MODELS, METHODS, [False, True]))
def test_gradients_equal_the_oracle(name, mhsa_drop, rescale, monkeypatch):
    keep_heads_0_and_2(monkeypatch)
    model = without_dropout(MODELS[name]())
    expected = gradients(oracle(model, mhsa_drop, rescale), images())
    for recompute in ("none", "cheap", "block"):
        patched = sbp.apply(copy.deepcopy(model), mhsa_drop=mhsa_drop, rescale=rescale, recompute=recompute)
        with sbp.fixed_mask(patched, MASK):
            assert_same_gradients(gradients(patched, images()), expected)


@pytest.mark.parametrize(("name", "recompute"), one_of(3, MODELS, ["none", "cheap", "block"]))
def test_keep_ratio_1_is_the_plain_model(name, recompute):
    expected = gradients(MODELS[name](), images())
    model = sbp.apply(MODELS[name](), keep_ratio=1, recompute=recompute)
    assert_same_gradients(gradients(model, images()), expected, tolerance=0 if recompute == "none" else 1e-10)


@pytest.mark.parametrize("mhsa_drop", METHODS[1:])
@pytest.mark.parametrize("name", MODELS)
def test_the_forward_pass_is_the_plain_models(name, mhsa_drop):
    model = without_dropout(MODELS[name]())
    torch.manual_seed(5)
    expected = model(images())
    sbp.apply(model, mhsa_drop=mhsa_drop, mask="random", keep_ratio=0.3)
    torch.manual_seed(5)
    torch.testing.assert_close(model(images()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mhsa_drop", METHODS)
@pytest.mark.parametrize("name", ["beit, class token", "relpos"])
def test_every_path_through_timm_gives_the_same_gradients(name, mhsa_drop):
    ratios = [0.75, 0.5, 0.5, 0.25]
    paths = [through_intermediates(indices=1), checkpointed_as_a_whole, with_checkpoints]
    assert_same_gradients_by(paths, lambda: sbp.apply(MODELS[name](), mhsa_drop=mhsa_drop, keep_ratio=ratios), images())


def test_what_is_refused():
    for mask_per in ("half", "sample"):
        with pytest.raises(ValueError, match=f"mask_per='{mask_per}' would make the bias on attention"):
            sbp.apply(small_beit(), mask_per=mask_per)
    sbp.apply(small_beit(use_rel_pos_bias=False), mask_per="sample")  # which has none
