import copy
from functools import partial

import pytest
import timm
import torch

import sbp
from sbp.functional import Streams
from tests import oracles
from tests.conftest import (
    EVA,
    assert_same_gradients,
    gradients,
    gradients_image_by_image,
    images,
    masks_of,
    one_of,
    randomise,
    small_eva,
)
from tests.paths import assert_same_gradients_by, checkpointed_as_a_whole, through_intermediates, with_checkpoints

METHODS = ("qkv", "query", "head", "qkv_exact")
LAYERS = [f"blocks.{i}" for i in range(2, 6)]  # the last two thirds of six
MASK = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)  # 7 of 16


def gated(name="eva02_tiny_patch14_224"):
    """timm's network never asks for the gate that its attention has."""
    model = small_eva(name)
    for block in model.blocks:
        attn = block.attn
        if not hasattr(attn, "gate"):
            pytest.skip("this timm has no gate")
        attn.gate = torch.nn.Linear(24, 24).double()
    return randomise(model)


MODELS = {name: partial(small_eva, name) for name in EVA} | {
    "class token, drop path": partial(small_eva, global_pool="token", use_fc_norm=False, drop_path_rate=0.3),
    "no prefix": partial(small_eva, class_token=False, global_pool="avg", init_values=0.5),
    "registers, not fused": partial(small_eva, num_reg_tokens=2, qkv_fused=False, scale_mlp=True),
    "a gate": gated,
    "norms behind": partial(small_eva, "eva_giant_patch14_224", use_post_norm=True, drop_path_rate=0.3),
}


def keep_heads_0_and_2(monkeypatch):
    monkeypatch.setattr("sbp.masks.hashed_scores", lambda key, count, stream=0: torch.tensor([0, 2, 1]))


def oracle(model, mhsa_drop, mask=MASK, layers=LAYERS, rescale=False):
    heads = torch.tensor([True, False, True]) if mhsa_drop == "head" else None
    settings = mask, model.num_prefix_tokens, mhsa_drop, heads, rescale
    return oracles.install(copy.deepcopy(model), layers, oracles.eva_block, *settings)


def takes(name, mhsa_drop):
    """Whether the heads of the model stay apart, where the method asks for it."""
    return mhsa_drop != "head" or ("gate" not in name and "clip" not in name)


USUAL = ("vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224", "registers, not fused")
CASES = [(name, mhsa_drop) for name in MODELS for mhsa_drop in METHODS if takes(name, mhsa_drop)]
TOLERANCE = {"vit_small_patch16_rope_mixed_224": 1e-6}  # timm computes these angles in float32
each_case_some_slow = pytest.mark.parametrize(
    ("name", "mhsa_drop"), [pytest.param(*case, marks=() if case[0] in USUAL else pytest.mark.slow) for case in CASES]
)


@pytest.mark.parametrize(
    ("name", "mhsa_drop", "rescale"),
    [case for case in one_of(4, MODELS, METHODS, [False, True]) if takes(*case.values[:2])],
)
def test_gradients_equal_the_oracle(name, mhsa_drop, rescale, monkeypatch):
    keep_heads_0_and_2(monkeypatch)
    model = MODELS[name]()
    expected = gradients(oracle(model, mhsa_drop, rescale=rescale), images())
    sbp.apply(model, mhsa_drop=mhsa_drop, rescale=rescale)
    with sbp.fixed_mask(model, MASK):
        assert_same_gradients(gradients(model, images()), expected, TOLERANCE.get(name, 1e-10))


@pytest.mark.parametrize("mask_per", ["half", "sample"])
@each_case_some_slow
def test_images_with_masks_of_their_own(name, mhsa_drop, mask_per, monkeypatch):
    monkeypatch.setattr("sbp.masks.draw_key", lambda seed, rank, draw: torch.tensor(5))  # of the heads
    model = sbp.apply(MODELS[name](), mhsa_drop=mhsa_drop, mask="random", mask_per=mask_per)
    found = gradients(model, images())
    masks = masks_of(model.blocks[5].sbp_state.current.positions[-1], 4, 4, model.num_prefix_tokens)
    assert len(masks.unique(dim=0)) == (2 if mask_per == "half" else 3)
    expected = gradients_image_by_image(model, images(), masks)
    assert_same_gradients(found, expected, TOLERANCE.get(name, 1e-10))


@pytest.mark.parametrize(("recompute", "mask_per"), one_of(2, ["cheap", "block"], ["batch", "sample"]))
@each_case_some_slow
def test_recomputation_changes_no_gradient(name, mhsa_drop, recompute, mask_per):
    settings = {"mhsa_drop": mhsa_drop, "mask_per": mask_per, "mask": "random", "rescale": True}
    expected = gradients(sbp.apply(MODELS[name](), **settings), images())
    assert_same_gradients(gradients(sbp.apply(MODELS[name](), recompute=recompute, **settings), images()), expected)


@pytest.mark.parametrize(("name", "recompute"), one_of(3, MODELS, ["none", "cheap", "block"]))
def test_keep_ratio_1_is_the_plain_model(name, recompute):
    expected = gradients(MODELS[name](), images())
    model = sbp.apply(MODELS[name](), keep_ratio=1, recompute=recompute)
    assert_same_gradients(gradients(model, images()), expected, tolerance=0 if recompute == "none" else 1e-10)


@pytest.mark.parametrize(("name", "mhsa_drop"), [case for case in CASES if case[1] != "qkv"])
def test_the_forward_pass_is_the_plain_models(name, mhsa_drop):
    model = MODELS[name]()
    torch.manual_seed(5)
    expected = model(images())
    sbp.apply(model, mhsa_drop=mhsa_drop, mask="random", keep_ratio=0.3)
    torch.manual_seed(5)
    torch.testing.assert_close(model(images()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_per": "sample", "rescale": True},
        {"keep_ratio": [0.75, 0.5, 0.5, 0.25]},
        pytest.param({"keep_ratio": [0.25, 0.5, 1.0, 0.5]}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("mhsa_drop", METHODS)
@pytest.mark.parametrize("name", ["class token, drop path", "vit_small_patch16_dinov3"])
def test_every_path_through_timm_gives_the_same_gradients(name, mhsa_drop, settings):
    """Streams that are handed on, blocks that join for themselves, timm's checkpoints, and one around the model."""

    paths = [through_intermediates(indices=1), checkpointed_as_a_whole, with_checkpoints]
    assert_same_gradients_by(paths, lambda: sbp.apply(MODELS[name](), mhsa_drop=mhsa_drop, **settings), images())


@pytest.mark.parametrize("name", ["class token, drop path", "vit_small_patch16_dinov3"])
def test_streams_are_split_once_and_dropped_tokens_skipped_where_nothing_reads_them(name):
    model = sbp.apply(MODELS[name]())
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(type(out)))
        block.mlp.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    model(images())
    prefix = model.num_prefix_tokens
    if model.global_pool == "token":
        tokens = [16 + prefix] * 2 + [8 + prefix] * 3 + [prefix]
        assert [one for one in seen if isinstance(one, int)] == tokens
    assert [one for one in seen if not isinstance(one, int)] == [torch.Tensor] * 2 + [Streams] * 3 + [torch.Tensor]


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
@pytest.mark.parametrize("size", [(40, 24), (16, 48)])
def test_images_of_other_sizes(name, size):
    model = small_eva(name, dynamic_img_size=True)
    mask = sbp.masks.grid_mask(size[0] // 8, size[1] // 8, 0.4)
    expected = gradients(oracle(model, "query", mask), images(*size))
    sbp.apply(model, mhsa_drop="query")
    with sbp.fixed_mask(model, mask):
        assert_same_gradients(gradients(model, images(*size)), expected, TOLERANCE.get(name, 1e-10))


def test_features_only():
    kwargs = {"img_size": 32, "embed_dim": 24, "depth": 4, "num_heads": 3, "patch_size": 8, "features_only": True}
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_dinov3", **kwargs).double().train()
    prefix = model.model.num_prefix_tokens
    expected = copy.deepcopy(model)
    oracles.install(expected, [f"model.blocks.{i}" for i in range(4)], oracles.eva_block, MASK, prefix, "qkv_exact")
    sbp.apply(model, mhsa_drop="qkv_exact", layers="all")
    with sbp.fixed_mask(model, MASK):
        assert_same_gradients(gradients(model, images()), gradients(expected, images()))


def test_what_is_refused():
    with pytest.raises(ValueError, match="patch_drop_rate must be 0"):
        sbp.apply(small_eva(patch_drop_rate=0.5))
    with pytest.raises(ValueError, match=r"heads that do not mix .* see blocks.2.attn"):
        sbp.apply(MODELS["a gate"](), mhsa_drop="head")
    with pytest.raises(ValueError, match="attn_mask or is_causal"):
        sbp.apply(small_eva())(images(), is_causal=True)


def test_grouped_heads():
    if "num_kv_heads" not in timm.models.eva.Eva.__init__.__code__.co_varnames:
        pytest.skip("this timm has no grouped heads")
    make = partial(small_eva, "vit_pe_core_tiny_patch16_384", qkv_fused=False, num_kv_heads=1)
    for mhsa_drop in ("qkv", "query", "qkv_exact"):
        model = make()
        expected = gradients(oracle(model, mhsa_drop), images())
        sbp.apply(model, mhsa_drop=mhsa_drop, recompute="cheap")
        with sbp.fixed_mask(model, MASK):
            assert_same_gradients(gradients(model, images()), expected)
    with pytest.raises(ValueError, match="heads that do not mix"):
        sbp.apply(make(), mhsa_drop="head")


def test_blocks_that_are_pruned_after_apply():
    model = sbp.apply(small_eva("vit_small_patch16_dinov3"))
    model.prune_intermediate_layers(1)
    model(images()).sum().backward()
    assert model.blocks[1].mlp.fc1.weight.grad is not None
