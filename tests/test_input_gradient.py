"""dropped="input": without rounding equal to the oracle in float64; how far rounding goes; what is saved."""

import copy

import pytest
import torch
from timm.layers import GELUTanh, LayerNorm
from torch import nn
from torch.func import functional_call

import sbp
from sbp import input_gradient, recompute
from tests import oracles
from tests.conftest import assert_same_gradients, gradients, images, one_of, small_convnext, small_vit
from tests.test_memory import block_bytes

GRID = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)  # 7 of 16


@pytest.fixture
def unrounded(monkeypatch):
    """As if numbers had all their bits."""

    def rows(x, mean):
        ones = torch.ones_like(x[..., :1])
        return x - (0 if mean is None else mean) + input_gradient._MIDDLE, ones

    monkeypatch.setattr(input_gradient, "quantized_rows", rows)
    monkeypatch.setattr(input_gradient, "packed_derivative", lambda x: x)
    monkeypatch.setattr(input_gradient, "times_derivative", lambda grad, packed: grad * packed)


# -- the oracle: a branch's value, whose input has its whole gradient and whose weights have that of kept positions


class Branch(nn.Module):
    """A function of a layer, for torch.func to give it other weights."""

    def __init__(self, layer, run):
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self, x):
        return self.run(self.layer, x)


def split_gradient(layer, run, x, kept, scale):
    branch = Branch(layer, run)
    fixed = {name: p.detach() for name, p in branch.named_parameters()}
    of_input = functional_call(branch, fixed, (x,))
    of_weights = oracles.only_kept(branch(x.detach()), kept, scale)
    return of_input + (of_weights - of_weights.detach())


def convnext_block(block, x, grid):
    def run(block, y):
        y = y if block.use_conv_mlp else y.permute(0, 2, 3, 1)
        y = block.mlp(block.norm(y))
        y = y if block.use_conv_mlp else y.permute(0, 3, 1, 2)
        return y if block.gamma is None else y * block.gamma[:, None, None]

    y = block.conv_dw(x)
    mask = oracles.block_mask(grid, *y.shape[-2:])
    branch = split_gradient(block, run, y, mask, mask.numel() / int(mask.sum()))
    return block.drop_path(branch) + block.shortcut(x)


def convnext_downsample(downsample, x, grid):
    mask = oracles.block_mask(grid, x.shape[-2] // 2, x.shape[-1] // 2)
    return split_gradient(downsample, nn.Sequential.forward, x, mask, mask.numel() / int(mask.sum()))


def vit_block(block, x, grid, prefix, mhsa_drop):
    kept = torch.cat([torch.ones(prefix, dtype=torch.bool), grid.flatten()])
    heads, ones = torch.tensor([True, False, True]), torch.ones(len(kept), 1).to(x)
    attn = block.attn
    q, k, v = oracles._heads(attn, attn.qkv(block.norm1(x)))
    qkv = attn.q_norm(q), attn.k_norm(k), v
    out = oracles._mhsa(attn, qkv, kept, mhsa_drop, heads, ones, block.ls1, attn.proj, 0.0)
    x = x + block.drop_path1(out)
    scale = ones.clone()
    scale[prefix:] = grid.numel() / int(grid.sum())
    run = lambda block, x: block.ls2(block.mlp(block.norm2(x)))  # noqa: E731
    return x + block.drop_path2(split_gradient(block, run, x, kept[:, None], scale))


BLOCKS = ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.2.blocks.0", "stages.2.blocks.1"]
DOWNSAMPLES = ["stages.1.downsample", "stages.2.downsample"]
FORMS = [
    {"conv_mlp": False},
    {"conv_mlp": True, "drop_path_rate": 0.5},
    {"norm_layer": "rmsnorm"},
    {"ls_init_value": None, "act_layer": nn.SiLU},
]


def convnext_oracle(model, grid):
    model = oracles.install(copy.deepcopy(model), BLOCKS, convnext_block, grid)
    return oracles.install(model, DOWNSAMPLES, convnext_downsample, grid)


@pytest.mark.parametrize(("form", "again"), one_of(3, FORMS, ["none", "cheap", "block"]), ids=str)
def test_a_convnexts_gradients_equal_the_oracle(form, again, unrounded):
    model = small_convnext(**form)
    expected = gradients(convnext_oracle(model, GRID), images(64))
    sbp.apply(model, dropped="input", recompute=again)
    with sbp.fixed_mask(model, GRID):
        assert_same_gradients(gradients(model, images(64)), expected)


@pytest.mark.parametrize(
    ("form", "mhsa_drop", "again"),
    one_of(
        3,
        [
            {"global_pool": "avg", "drop_path_rate": 0.3},
            {"global_pool": "map", "init_values": 0.1, "act_layer": GELUTanh},
            {"reg_tokens": 2},
        ],
        ["qkv", "query", "head", "qkv_exact"],
        ["none", "cheap", "block"],
    ),
    ids=str,
)
def test_a_vits_gradients_equal_the_oracle(form, mhsa_drop, again, unrounded, monkeypatch):
    if mhsa_drop in ("qkv", "qkv_exact") and "global_pool" not in form:
        with pytest.raises(ValueError, match=f"with {mhsa_drop} and a class token no gradient reaches dropped tokens"):
            sbp.apply(small_vit(**form), dropped="input", mhsa_drop=mhsa_drop)
        return
    monkeypatch.setattr("sbp.masks.hashed_scores", lambda key, count, stream=0: torch.tensor([0, 2, 1]))
    model = small_vit(**form)
    layers = [f"blocks.{i}" for i in range(2, 6)]
    oracle = oracles.install(copy.deepcopy(model), layers, vit_block, GRID, model.num_prefix_tokens, mhsa_drop)
    expected = gradients(oracle, images())
    sbp.apply(model, dropped="input", mhsa_drop=mhsa_drop, recompute=again)
    with sbp.fixed_mask(model, GRID):
        assert_same_gradients(gradients(model, images()), expected)


@pytest.mark.parametrize(
    "make", [small_convnext, lambda: small_vit(global_pool="avg", class_token=False)], ids=["convnext", "vit"]
)
def test_the_gradient_that_reaches_the_first_layer_is_nearly_exact(make):
    """With rounding: that of the stem, at a quarter of the positions, where SBP's own is far off."""
    exact, found = make(), {}
    x = images(64 if make is small_convnext else 32)
    name = next(iter(dict(exact.named_parameters())))
    expected = gradients(copy.deepcopy(exact), x)[1][name].flatten()
    for dropped in ("none", "input"):
        settings = {"keep_ratio": 0.25, "mhsa_drop": "head", "dropped": dropped}
        model = sbp.apply(copy.deepcopy(exact), **settings)
        given = gradients(model, x)[1][name].flatten()
        found[dropped] = float((given - expected).norm() / expected.norm())
    assert found["input"] < (0.03 if make is small_convnext else 0.8 * found["none"])  # a ViT has attention besides


# -- one branch


def parts(channels=32, act=nn.GELU, dtype=torch.float64):
    torch.manual_seed(0)
    norm, up, down = LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
    for one in (norm, up, down):
        nn.init.normal_(one.weight, std=0.3)
    return [one.to(dtype) for one in (norm, up, act(), down)]


@pytest.mark.parametrize("act", [nn.GELU, GELUTanh, nn.SiLU, nn.ReLU])
def test_rounding_changes_little(act):
    norm, up, act, down = parts(act=act)
    x = 3 * torch.randn(4, 9, 32, dtype=torch.float64) + 1
    results = []
    for run in (
        lambda x: down(act(up(norm(x)))),
        lambda x: input_gradient.branch(x, norm, recompute.weights(up), act, recompute.weights(down)),
    ):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    (y, expected), (same, found) = results
    torch.testing.assert_close(same, y)
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert not any(p.grad is not None for one in (norm, up, down) for p in one.parameters())


def test_derivatives_in_four_bits():
    x = torch.cat([torch.linspace(-1 / 12, 14 / 12, 1000), torch.tensor([0.0])]).double()  # an odd number
    assert len(x) % 2
    back = input_gradient.times_derivative(torch.ones_like(x), input_gradient.packed_derivative(12 * x)) / 12
    assert (back - x).abs().max() <= 1 / 24 + 1e-12 and back[-1] == 0 and back[x == 1].eq(1).all()
    packed = input_gradient.packed_derivative(torch.rand(2, 3, 8))
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", list(input_gradient._ACTIVATIONS), ids=lambda act: act.__name__)
def test_no_derivative_is_beyond_the_codes(act, dtype):
    x = torch.linspace(-12, 12, 4001).to(dtype).requires_grad_()
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(act()(x.float()).sum(), x)
    packed = input_gradient.packed_derivative(input_gradient._ACTIVATIONS[act][1](x.detach()))
    found = input_gradient.times_derivative(torch.ones_like(x), packed).detach().float() / 12
    assert (found - expected.float()).abs().max() < 1 / 24 + 0.006


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_in_eight_bits(centred, dtype):
    x = (torch.randn(50, 64) * torch.rand(50, 1) + 3 * torch.randn(50, 1)).to(dtype)
    wide = x.double()
    mean = wide.mean(1, keepdim=True).to(torch.promote_types(dtype, torch.float32)) if centred else None
    codes, per_unit = input_gradient.quantized_rows(x, mean)
    expected = wide - mean if centred else wide
    error = ((codes.double() - 128) / per_unit - expected).abs()
    assert codes.dtype == torch.uint8
    assert (error <= expected.abs().amax(1, keepdim=True) / 254 * 1.001).all()


def test_rows_without_any_difference_have_no_gradient_of_their_own():
    codes, per_unit = input_gradient.quantized_rows(torch.full((1, 4), 3.0), torch.full((1, 1), 3.0))
    assert codes.eq(128).all() and per_unit.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_branch_under_autocast(dtype):
    """Scales of the output that float16 cannot fold, too."""
    norm, up, act, down = parts(dtype=torch.float32)
    gamma = torch.full((32,), 0.1)
    found = []
    for run in (
        lambda x: down(act(up(norm(x)))) * gamma,
        lambda x: input_gradient.branch(x, norm, recompute.weights(up), act, recompute.weights(down, gamma)),
    ):
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = run(x)
        found.append((y.float(), *torch.autograd.grad(y.float().square().sum(), x)))
    for one, expected in zip(*reversed(found), strict=True):
        assert (one - expected).norm() < 0.05 * expected.norm()


# -- what it costs


@pytest.mark.parametrize(("again", "kept"), [("none", 20), ("cheap", 10)])
def test_a_convnext_block_saves_what_the_arithmetic_says(again, kept):
    """Plain 24, units of C bytes; here 2 for the convolution, `kept` at kept positions and 3 at dropped ones."""
    make = lambda: small_convnext(dims=(64, 64, 64, 64), depths=(2, 1, 1, 1)).float()  # noqa: E731
    positions, channels = 16 * 16, 64
    saved = block_bytes(make, 64, ["stages.0.blocks.1"], 0.25, dropped="input", recompute="none")
    if again == "none":
        assert saved == pytest.approx((22 - 20 * 0.25 - 3 * 0.75) * positions * channels, rel=0.06)
    more = block_bytes(make, 64, ["stages.0.blocks.1"], 0.25, recompute=again)
    less = block_bytes(make, 64, ["stages.0.blocks.1"], 0.25, recompute=again, dropped="input")
    # Statistics of each position, 8 bytes, are an eighth of C here.
    assert more - less == pytest.approx((3 + 8 / channels) * 0.75 * positions * channels, rel=0.03)


def test_a_vit_block_saves_what_the_arithmetic_says():
    make = lambda: small_vit(embed_dim=64, num_heads=2, img_size=64, global_pool="avg", class_token=False).float()  # noqa: E731
    more, less = (block_bytes(make, 64, ["blocks.5"], 0.25, mhsa_drop="query", dropped=d) for d in ("none", "input"))
    assert more - less == pytest.approx((3 + 8 / 64) * 0.75 * 64 * 64, rel=0.03)


# -- what it cannot do


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small_convnext(use_grn=True), "GlobalResponseNorm.*, which stages.0.blocks.0 has"),
        (lambda: small_convnext(norm_layer="simplenorm"), "SimpleNorm"),
        (lambda: small_vit(global_pool="avg", scale_mlp_norm=True), "a LayerNorm within the MLP, which blocks.2 has"),
        (lambda: small_vit(global_pool="avg", proj_drop_rate=0.1), "a Dropout, which blocks.2 has"),
        (lambda: small_vit(global_pool="avg", act_layer=nn.Softplus), r"a Softplus \(known are GELU, SiLU and ReLU\)"),
    ],
    ids=["response norm", "norm", "norm in the MLP", "dropout", "activation"],
)
def test_refusals_name_the_layer(make, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        sbp.apply(model, dropped="input")
    sbp.apply(model)


def test_a_setting_that_there_is_not():
    with pytest.raises(ValueError, match="dropped must be one of none, input, neighbours, got 'output'"):
        sbp.apply(small_vit(), dropped="output")


def test_where_dropped_tokens_come_to_be_skipped_the_gradient_is_that_without():
    """Ratios that rise at first, as a schedule may have it, so that there was something to pass on."""
    found = {}
    for dropped in ("none", "input"):
        model = sbp.apply(small_vit(), dropped=dropped, keep_ratio=[0.25, 0.25, 0.25, 0.5])
        sbp.set_keep_ratio(model, 0.25)
        found[dropped] = gradients(model, images())
    assert_same_gradients(found["input"], found["none"])
