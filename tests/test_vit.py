import copy
from functools import partial

import pytest
import timm
import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import ResPostBlock
from timm.models.vitamin import GeGluMlp

import sbp
from sbp.attention import kept_heads
from sbp.vit import SBPBlock
from tests import oracles
from tests.conftest import (
    assert_same_gradients,
    gradients,
    gradients_image_by_image,
    images,
    masks_of,
    one_of,
    small_vit,
)
from tests.paths import assert_same_gradients_by, checkpointed_as_a_whole, through_intermediates, with_checkpoints

METHODS = ("qkv", "query", "head", "qkv_exact")
LAYERS = [f"blocks.{i}" for i in range(2, 6)]  # the last two thirds of six
MASK = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)

FORMS = [
    {},
    {"global_pool": "avg", "drop_path_rate": 0.3},
    {"global_pool": "avg", "class_token": False, "init_values": 0.1},
    {"reg_tokens": 2, "qk_norm": True, "drop_path_rate": 0.3},
    {"global_pool": "map", "qkv_bias": False},
    {"global_pool": ""},
    {"mlp_layer": GeGluMlp, "global_pool": "avg", "class_token": False},
    {"block_fn": ResPostBlock, "drop_path_rate": 0.3},
    {"name": "deit_tiny_distilled_patch16_224"},
]


def oracle(model, mhsa_drop, mask=MASK, layers=LAYERS, rescale=False):
    heads = None
    if mhsa_drop == "head":
        heads = torch.tensor([True, False, True])
    return oracles.install(
        copy.deepcopy(model), layers, oracles.vit_block, mask, model.num_prefix_tokens, mhsa_drop, heads, rescale
    )


def keep_heads_0_and_2(monkeypatch):
    monkeypatch.setattr("sbp.masks.hashed_scores", lambda key, count, stream=0: torch.tensor([0, 2, 1]))


@pytest.mark.parametrize(("kwargs", "mhsa_drop", "rescale"), one_of(4, FORMS, METHODS, [False, True]), ids=str)
def test_gradients_equal_the_oracle(kwargs, mhsa_drop, rescale, monkeypatch):
    keep_heads_0_and_2(monkeypatch)
    model = small_vit(**kwargs)
    mask = MASK.clone()
    mask[3, 1] = False  # 7 of 16
    expected = gradients(oracle(model, mhsa_drop, mask, rescale=rescale), images())
    sbp.apply(model, mhsa_drop=mhsa_drop, rescale=rescale)
    with sbp.fixed_mask(model, mask):
        assert_same_gradients(gradients(model, images()), expected)


@pytest.mark.parametrize(
    ("kwargs", "mhsa_drop", "mask_per"),
    one_of(
        2,
        [
            {"drop_path_rate": 0.3, "reg_tokens": 2},
            {"global_pool": "avg", "drop_path_rate": 0.3},
            {"global_pool": "avg", "class_token": False},
        ],
        METHODS,
        ["half", "sample"],
    ),
    ids=str,
)
def test_images_with_masks_of_their_own(kwargs, mhsa_drop, mask_per, monkeypatch):
    """The gradient is the sum of those that each image gives with its mask alone, which has an oracle."""
    monkeypatch.setattr("sbp.masks.draw_key", lambda seed, rank, draw: torch.tensor(5))  # of the heads
    model = sbp.apply(small_vit(**kwargs), mhsa_drop=mhsa_drop, mask="random", mask_per=mask_per)
    found = gradients(model, images())
    masks = masks_of(model.blocks[5].sbp_state.current.positions[-1], 4, 4, model.num_prefix_tokens)
    assert len(masks.unique(dim=0)) == (2 if mask_per == "half" else 3) and (masks.sum((1, 2)) == 8).all()
    assert_same_gradients(found, gradients_image_by_image(model, images(), masks))


@pytest.mark.parametrize("mhsa_drop", ["query", "qkv_exact"])
def test_rescaled_gradients_of_complementary_masks_have_the_exact_mean(mhsa_drop):
    """Of the MLP weights of one block: its input and its output gradient are those of the plain model."""
    model = small_vit(global_pool="avg", class_token=False, drop_path_rate=0.3)
    expected = gradients(model, images())[1]
    sbp.apply(model, layers=["blocks.3"], mhsa_drop=mhsa_drop, rescale=True)
    found = []
    for offset in (0, 1):
        with sbp.fixed_mask(model, sbp.masks.grid_mask(4, 4, 0.5, offset)):
            found.append(gradients(model, images())[1])
    for name in [name for name in expected if "blocks.3.mlp" in name or "blocks.3.norm2" in name]:
        torch.testing.assert_close((found[0][name] + found[1][name]) / 2, expected[name], rtol=1e-10, atol=1e-10)
        assert not torch.allclose(found[0][name], expected[name])


@pytest.mark.parametrize("mhsa_drop", METHODS)
def test_a_dropped_position_gives_no_gradient_but_by_the_identity(mhsa_drop, monkeypatch):
    """With everything but one token dropped, the branch weights see that token and the class token only."""
    keep_heads_0_and_2(monkeypatch)
    model = small_vit(global_pool="avg")
    one = torch.zeros(4, 4, dtype=torch.bool)
    one[1, 2] = True
    expected = gradients(oracle(model, mhsa_drop, one), images())
    sbp.apply(model, mhsa_drop=mhsa_drop)
    with sbp.fixed_mask(model, one):
        assert_same_gradients(gradients(model, images()), expected)


def test_class_token_qkv_equals_dropping_the_tokens():
    """The honest limit: with class-token pooling published ViT SBP is token dropping in disguise."""
    model = small_vit(drop_path_rate=0.2)
    dropping = oracles.install(copy.deepcopy(model), LAYERS, oracles.drop_tokens, MASK, 1)
    expected = gradients(dropping, images())
    sbp.apply(model, mhsa_drop="qkv")
    with sbp.fixed_mask(model, MASK):
        assert_same_gradients(gradients(model, images()), expected)


@pytest.mark.parametrize("mask_per", ["batch", "half", "sample"])
def test_the_dropped_stream_is_skipped_only_where_nothing_reads_it(mask_per):
    def tokens_seen(call, keep_ratio=0.5, layers=None, mhsa_drop="qkv", **kwargs):
        settings = {"keep_ratio": keep_ratio, "layers": layers, "mhsa_drop": mhsa_drop, "mask_per": mask_per}
        model = sbp.apply(small_vit(**kwargs), **settings)
        seen = []
        for block in model.blocks:
            block.mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
        call(model)
        return sum(seen)

    forward = lambda model: model(images())  # noqa: E731
    assert tokens_seen(forward) == 2 * 17 + 3 * 9 + 1  # the last MLP's output is read at the class token only
    assert tokens_seen(forward, reg_tokens=2) == 2 * 19 + 3 * 11 + 3
    assert tokens_seen(lambda model: (model.set_grad_checkpointing(), model(images()))) == 2 * 17 + 4 * 9
    assert tokens_seen(lambda model: model.forward_features(images())) == 6 * 17
    assert tokens_seen(lambda model: model.forward_intermediates(images())) == 6 * 17
    assert tokens_seen(forward, global_pool="avg") == 6 * 17
    assert tokens_seen(forward, keep_ratio=[0.75, 0.5, 0.5, 0.25]) == 2 * 17 + 13 + 9 + 9 + 1
    assert tokens_seen(forward, keep_ratio=[0.25, 0.5, 0.5, 0.75]) == 5 * 17 + 1
    assert tokens_seen(forward, mhsa_drop="qkv_exact") == 5 * 17 + 1
    assert tokens_seen(forward, layers=["blocks.1", "blocks.2"]) == 6 * 17

    def after_a_failed_forward(model):
        with pytest.raises(AttributeError):
            model(None)
        model.forward_features(images())

    assert tokens_seen(after_a_failed_forward) == 6 * 17


@pytest.mark.parametrize(
    ("keep_ratio", "mhsa_drop"), one_of(2, [[0.75, 0.5, 0.5, 0.25], [0.25, 0.5, 1.0, 0.5]], METHODS), ids=str
)
def test_ratios_that_differ_between_layers(mhsa_drop, keep_ratio, monkeypatch):
    keep_heads_0_and_2(monkeypatch)
    monkeypatch.setattr("sbp.attention.kept_heads", lambda heads, ratio: 2)
    for kwargs in ({}, {"global_pool": "avg"}):
        model = small_vit(**kwargs)
        expected_model = copy.deepcopy(model)
        sbp.apply(model, keep_ratio=keep_ratio, mhsa_drop=mhsa_drop, seed=4)
        actual = gradients(model, images())
        for name, where in zip(LAYERS, model.blocks[2].sbp_state.current.positions, strict=True):
            if where is not None:
                mask = torch.zeros(17, dtype=torch.bool).index_fill(0, where.keep, True)[1:].view(4, 4)
                oracles.install(
                    expected_model, [name], oracles.vit_block, mask, 1, mhsa_drop, torch.tensor([True, False, True])
                )
        assert_same_gradients(actual, gradients(expected_model, images()))


@pytest.mark.parametrize("mhsa_drop", METHODS)
@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_keep_ratio_1_is_the_plain_model(mhsa_drop, global_pool):
    model = small_vit(global_pool=global_pool, drop_path_rate=0.3)
    expected = gradients(model, images())
    sbp.apply(model, keep_ratio=1, mhsa_drop=mhsa_drop)
    assert_same_gradients(gradients(model, images()), expected, tolerance=0)


@pytest.mark.parametrize("mhsa_drop", ["query", "head", "qkv_exact"])
@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_the_forward_pass_is_the_plain_models(mhsa_drop, global_pool):
    model = small_vit(global_pool=global_pool, drop_path_rate=0.3)
    torch.manual_seed(5)
    expected = model(images())
    sbp.apply(model, mhsa_drop=mhsa_drop, mask="random", keep_ratio=0.3)
    torch.manual_seed(5)
    torch.testing.assert_close(model(images()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("mhsa_drop", "global_pool", "settings"),
    one_of(2, METHODS, ["token", "avg"], [{}, {"mask_per": "sample", "rescale": True}]),
    ids=str,
)
def test_every_path_through_timm_gives_the_same_gradients(mhsa_drop, global_pool, settings, monkeypatch):
    """The split-once path, blocks run one by one, checkpointed segments, and the model checkpointed as a whole."""

    def make():
        return sbp.apply(small_vit(global_pool=global_pool, drop_path_rate=0.3), mhsa_drop=mhsa_drop, **settings)

    def in_segments(model):
        monkeypatch.setattr("timm.models.vision_transformer.checkpoint_seq", partial(checkpoint_seq, every=2))
        with_checkpoints(model)

    paths = [through_intermediates(indices=1), checkpointed_as_a_whole, with_checkpoints, in_segments]
    assert_same_gradients_by(paths, make, images())


def test_drop_path_is_decided_once_for_kept_and_dropped_positions():
    model = sbp.apply(small_vit(global_pool="", drop_path_rate=0.5, class_token=False), layers=["blocks.5"])
    model.norm, model.head = torch.nn.Identity(), torch.nn.Identity()
    seen = {}
    model.blocks[5].register_forward_pre_hook(lambda module, args: seen.update(into=args[0]))
    model.blocks[5].register_forward_hook(lambda module, args, out: seen.update(out=out))
    decisions = set()
    for seed in range(20):
        torch.manual_seed(seed)
        model(images(batch=8))
        unchanged = [(a == b).all(2) for a, b in zip(seen["into"], seen["out"], strict=True)]  # (8, K), (8, D)
        for kept, dropped in zip(*unchanged, strict=True):
            assert kept.all() == kept.any() == dropped.all() == dropped.any()
            decisions.add(bool(kept.all()))
    assert decisions == {True, False}  # both branches of an image were dropped at least once


@pytest.mark.parametrize("mhsa_drop", METHODS)
def test_dropout_runs(mhsa_drop):
    model = sbp.apply(small_vit(proj_drop_rate=0.2, attn_drop_rate=0.2, global_pool="avg"), mhsa_drop=mhsa_drop)
    loss, found = gradients(model, images())
    assert torch.isfinite(loss) and all(g.isfinite().all() for g in found.values())
    assert_same_gradients(
        (loss, found),
        gradients(
            sbp.apply(small_vit(proj_drop_rate=0.2, attn_drop_rate=0.2, global_pool="avg"), mhsa_drop=mhsa_drop),
            images(),
        ),
    )


def test_images_of_other_sizes():
    for kwargs, size, expected in [
        ({"dynamic_img_size": True}, (40, 24), (5, 3)),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, (37, 20), (5, 3)),
        ({"img_size": (16, 48)}, (16, 48), (2, 6)),
        ({"patch_size": 4, "img_size": 16}, (16, 16), (4, 4)),
    ]:
        model = small_vit(global_pool="avg", **kwargs)
        mask = sbp.masks.grid_mask(*expected, 0.4)
        expected_gradients = gradients(oracle(model, "query", mask), images(*size))
        sbp.apply(model, mhsa_drop="query")
        with sbp.fixed_mask(model, mask):
            assert_same_gradients(gradients(model, images(*size)), expected_gradients)


def test_features_only():
    kwargs = {"features_only": True, "out_indices": (1, 3)}
    model = small_vit(**kwargs)
    layers = [f"model.blocks.{i}" for i in range(4)]
    expected = copy.deepcopy(model)
    expected = gradients(oracles.install(expected, layers, oracles.vit_block, MASK, 1, "qkv_exact"), images())
    sbp.apply(model, mhsa_drop="qkv_exact", layers="all")
    with sbp.fixed_mask(model, MASK):
        assert_same_gradients(gradients(model, images()), expected)


def test_published_evaluation_is_the_training_forward_pass():
    model = small_vit()
    expected = oracle(model, "qkv").eval()(images())
    plain = copy.deepcopy(model).eval()(images())
    sbp.apply(model, mhsa_drop="qkv", evaluation="published").eval()
    with torch.no_grad(), sbp.fixed_mask(model, MASK):
        torch.testing.assert_close(model(images()), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(expected, plain)


def test_heads():
    assert [kept_heads(12, ratio) for ratio in (0.01, 0.25, 0.5, 0.99)] == [1, 3, 6, 12]
    model = sbp.apply(small_vit(), mhsa_drop="head", keep_ratio=0.4)
    drawn = set()
    for _ in range(40):
        _, found = gradients(model, images())
        rows = found["blocks.5.attn.qkv.weight"].unflatten(0, (3, 3, 8)).abs().sum((0, 2, 3)) > 0
        columns = found["blocks.5.attn.proj.weight"].unflatten(1, (3, 8)).abs().sum((0, 2)) > 0
        assert rows.tolist() == columns.tolist() and rows.sum() == 1
        drawn.add(int(rows.nonzero()))
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize("size", [36, 4])
def test_an_image_that_leaves_no_whole_grid(size):
    model = sbp.apply(small_vit(dynamic_img_size=True))
    with pytest.raises(ValueError, match=rf"images of {size} x {size} pixels leave no whole grid of 8 x 8 patches"):
        model(images(size))


def test_masks_of_attention_are_refused_in_training_only():
    model = sbp.apply(small_vit())
    with pytest.raises(ValueError, match="attn_mask or is_causal"):
        model(images(), is_causal=True)
    plain = small_vit().eval()
    assert torch.equal(model.eval()(images(), is_causal=True), plain(images(), is_causal=True))


def test_other_transformers_are_refused():
    for name in ("vit_small_patch16_18x2_224", "resnet18"):
        with torch.device("meta"):
            model = timm.create_model(name)
        with pytest.raises(ValueError, match="no SBP"):
            sbp.apply(model)
    with pytest.raises(ValueError, match="patch_drop_rate must be 0"):
        sbp.apply(small_vit(patch_drop_rate=0.5))
    with pytest.raises(ValueError, match="heads that do not mix"):
        sbp.apply(small_vit(scale_attn_norm=True), mhsa_drop="head")


def test_blocks_say_what_they_do():
    model = sbp.apply(small_vit(), keep_ratio=0.25)
    assert isinstance(model.blocks[3], SBPBlock) and "keep_ratio=0.25, mask=grid\n" in repr(model)
    model = sbp.apply(small_vit(), mask_per="half", rescale=True)
    assert "keep_ratio=0.5, mask=grid, mask_per=half, rescale=True\n" in repr(model)
