"""Recomputation: the same gradients, from less memory, and with no matrix product more than it says."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import GluMlp, SwiGLU
from timm.models.vitamin import GeGluMlp
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import sbp
from sbp import recompute
from sbp.settings import DROPPED
from scripts.saved_memory import saved_by
from tests.conftest import assert_same_gradients, gradients, images, one_of, small_convnext, small_vit


class Adapter(nn.Module):
    """Draws random numbers of its own, as some of PEFT's do."""

    def __init__(self, base):
        super().__init__()
        self.base, self.rank = base, nn.Parameter(torch.full((base.out_features,), 0.1, dtype=torch.float64))

    def forward(self, x):
        return self.base(x) + self.rank * torch.rand_like(self.rank)


def with_each_mlp(model, change):
    for block in model.blocks:
        change(block.mlp)
    return model


BITWISE = {  # nothing but norms, activations or whole blocks runs again: the very same numbers
    "vit": lambda: small_vit(drop_path_rate=0.3, proj_drop_rate=0.1, attn_drop_rate=0.1),
    "vit, mean pooling": lambda: small_vit(global_pool="avg", class_token=False),
    "vit, registers and qk norm": lambda: small_vit(reg_tokens=2, qk_norm=True),
    "vit, norms within attention and mlp": lambda: small_vit(scale_attn_norm=True, scale_mlp_norm=True),
    "vit, gated mlp": lambda: small_vit(mlp_layer=GluMlp),
    "vit, gated mlp with a trained activation": lambda: small_vit(mlp_layer=GluMlp, act_layer=nn.PReLU),
    "vit, a random activation": lambda: small_vit(act_layer=nn.RReLU),
    "vit, another dropout": lambda: with_each_mlp(small_vit(), lambda mlp: setattr(mlp, "drop1", nn.AlphaDropout(0.2))),
    "vit, a random adapter": lambda: with_each_mlp(small_vit(), lambda mlp: setattr(mlp, "fc1", Adapter(mlp.fc1))),
    "vit, an activation in place": lambda: small_vit(act_layer=partial(nn.SiLU, inplace=True)),
}
TO_ROUNDING = {  # a layer scale is folded into the layer before it, a convolution of patches is a linear layer
    "vit, swiglu": lambda: small_vit(mlp_layer=SwiGLU),  # two layers are one
    "vitamin's mlp": lambda: small_vit(mlp_layer=GeGluMlp, proj_drop_rate=0.1),
    "convnext without layer scale": lambda: small_convnext(drop_path_rate=0.3, ls_init_value=None),
    "vit with layer scale": lambda: small_vit(init_values=0.5, drop_path_rate=0.3, proj_drop_rate=0.1),
    "convnext": lambda: small_convnext(drop_path_rate=0.3),
    "convnext, conv mlp": lambda: small_convnext(conv_mlp=True),
    "convnext v2": lambda: small_convnext(use_grn=True),
    "convnext v2, conv mlp": lambda: small_convnext(use_grn=True, conv_mlp=True),
    "dilated convnext": lambda: small_convnext(output_stride=16),
}
MODELS = BITWISE | TO_ROUNDING
MODES = ["cheap", "block"]
VIT = {"SBP": 0.68, "SBP, cheap": 0.46, "keep_ratio 1, cheap": 0.69, "SBP, block": 0.12}
EVA = {"SBP": 0.68, "SBP, cheap": 0.46, "keep_ratio 1, cheap": 0.75, "SBP, block": 0.12}
WINDOWS = {"SBP": 0.66, "SBP, cheap": 0.5, "keep_ratio 1, cheap": 0.9, "SBP, block": 0.12}
CONVNEXT = {"SBP": 0.64, "SBP, cheap": 0.35, "keep_ratio 1, cheap": 0.52, "SBP, block": 0.19}
LIMITS = {  # shares of what the plain model saves
    "vit_tiny_patch16_224": VIT,
    "vit_base_patch16_224": VIT,
    "convnext_tiny": CONVNEXT,
    "convnext_base": CONVNEXT,
    "vit_small_patch16_dinov3": EVA,
    "eva02_base_patch14_224": EVA,
    "beit_base_patch16_224": EVA,
    "swin_tiny_patch4_window7_224": WINDOWS,
    "swinv2_tiny_window8_256": WINDOWS,
    "hiera_tiny_224": WINDOWS,
}


def size_of(model):
    return 32 if hasattr(model, "blocks") else 64


def without_and_with(name, mode, **settings):
    """The gradients of a model without and with recomputation."""
    plain = MODELS[name]()
    models = [sbp.apply(copy.deepcopy(plain), recompute=how, **settings) for how in ("none", mode)]
    return [gradients(model, images(size_of(model))) for model in models]


@pytest.mark.parametrize(("name", "mode", "keep_ratio"), one_of(3, MODELS, MODES, [0.5, 1]))
def test_gradients_are_those_without(name, mode, keep_ratio):
    expected, found = without_and_with(name, mode, keep_ratio=keep_ratio)
    if name in BITWISE and keep_ratio != 1:  # at 1 the other model is timm's own
        assert torch.equal(expected[0], found[0])
        assert all(torch.equal(found[1][key], value) for key, value in expected[1].items())
    assert_same_gradients(found, expected)


@pytest.mark.parametrize(
    ("name", "mode", "mhsa_drop"),
    one_of(2, ["vit", "vit, mean pooling", "vit with layer scale"], MODES, ["query", "head", "qkv_exact"]),
)
def test_gradients_of_every_attention_method(name, mode, mhsa_drop):
    expected, found = without_and_with(name, mode, mhsa_drop=mhsa_drop, mask="random")
    assert_same_gradients(found, expected)


@pytest.mark.parametrize(
    ("name", "mode", "settings"),
    one_of(
        3,
        [*BITWISE, "convnext", "convnext v2", "dilated convnext"],
        MODES,
        [{"mask_per": "half"}, {"mask_per": "sample", "rescale": True}],
    ),
    ids=str,
)
def test_gradients_with_masks_of_each_image_and_rescaled(name, mode, settings):
    expected, found = without_and_with(name, mode, mask="random", keep_ratio=0.3, **settings)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize(
    ("how", "name", "mode"),
    one_of(
        3,
        ["timm's checkpointing", "forward_intermediates", "disabled", "fixed mask", "held"],
        ["vit with layer scale", "convnext", "convnext v2"],
        MODES,
    ),
)
def test_gradients_on_other_ways_through_the_model(name, mode, how):
    def run(recompute):
        model = sbp.apply(MODELS[name](), recompute=recompute)
        x = images(size_of(model))
        if how == "timm's checkpointing":
            model.set_grad_checkpointing()
        if how == "forward_intermediates":
            model.forward = lambda x: model.forward_intermediates(x)[1]
        if how == "disabled":
            with sbp.disabled(model):
                return gradients(model, x)
        if how == "fixed mask":
            with sbp.fixed_mask(model, torch.eye(x.shape[-1] // (8 if size_of(model) == 32 else 16)) > 0):
                return gradients(model, x)
        if how == "held":
            with sbp.hold_mask(model):
                gradients(model, x)
                return gradients(model, x)
        return gradients(model, x)

    assert_same_gradients(run(mode), run("none"))


@pytest.mark.parametrize("mode", MODES)
def test_heads_where_nothing_is_dropped(mode):
    expected = gradients(small_vit(), images())
    everything = sbp.apply(small_vit(), keep_ratio=1, mhsa_drop="head", recompute=mode)
    assert_same_gradients(gradients(everything, images()), expected)
    half = sbp.apply(small_vit(), mhsa_drop="head", recompute=mode)
    with sbp.disabled(half):
        assert_same_gradients(gradients(half, images()), expected)


@pytest.mark.parametrize(
    ("case", "mode"),
    one_of(2, [("vit", "none"), *(("convnext", one) for one in DROPPED), ("convnext v2", "neighbours")], MODES),
    ids=str,
)
def test_two_forward_passes_before_one_backward(case, mode):
    name, dropped = case

    def run(recompute):
        settings = {"mask": "random", "mask_per": "sample", "rescale": True, "keep_ratio": 0.4, "dropped": dropped}
        model = sbp.apply(MODELS[name](), mhsa_drop="head", recompute=recompute, **settings)
        forward = model.forward
        model.forward = lambda x: (forward(x), forward(x))
        return gradients(model, images(size_of(model)))

    assert_same_gradients(run(mode), run("none"))


@pytest.mark.parametrize("mode", ["none", "cheap"])  # torch's own checkpointing, of whole blocks, notices nothing
def test_weights_that_change_before_the_backward_pass_are_noticed(mode):
    """Norms alone are trained here: with their new weights the gradient would be neither of the two."""
    model = small_vit(global_pool="avg")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("blocks" in name and "norm" in name)
    sbp.apply(model, recompute=mode, keep_ratio=1)
    out = model(images())
    out[:, 0].sum().backward(retain_graph=True)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out[:, 1].sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parts_get_no_gradient_and_the_others_theirs(mode):
    def run(how):
        model = sbp.apply(small_vit(), recompute=how)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "norm1" not in name and "fc1.weight" not in name and "blocks.0" not in name
        return gradients(model, images())

    expected, found = run("none"), run(mode)
    assert found[1].keys() == expected[1].keys()
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [small_vit, small_convnext])
def test_evaluation_is_exact_and_remove_restores(make, mode):
    plain = make()
    patched = sbp.apply(copy.deepcopy(plain), recompute=mode)
    x = images(64 if make is small_convnext else 32)
    assert torch.equal(patched.eval()(x), plain.eval()(x))
    assert f"recompute={mode}" in repr(patched)
    sbp.remove(patched)
    assert {type(m) for m in patched.modules()} == {type(m) for m in plain.modules()}
    assert_same_gradients(gradients(patched.train(), x), gradients(plain.train(), x), tolerance=0)


@pytest.mark.parametrize(
    ("dtype", "make", "mode"),
    one_of(2, [torch.bfloat16, torch.float16], [lambda: small_vit(init_values=1e-6), small_convnext], MODES),
)
def test_autocast(make, dtype, mode):
    """Gradients in low precision are as near to those of float32 as without recomputation."""

    def run(how, dtype):
        model = sbp.apply(make().float(), recompute=how)
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                nn.init.constant_(parameter, 1e-6)  # the published initial value, which float16 cannot multiply into
        model.register_forward_hook(lambda module, args, out: out.float() * 2**7)  # as a loss scaler does
        x = images(size_of(model)).float()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return gradients(model, x)[1]

    exact, without, found = run("none", torch.float32), run("none", dtype), run(mode, dtype)
    for name, gradient in exact.items():
        assert (found[name] - gradient).norm() < 0.1 * gradient.norm(), name

    def error(gradients):
        return sum((gradients[name] - gradient).norm() / gradient.norm() for name, gradient in exact.items())

    assert error(found) < 1.5 * error(without)


@pytest.mark.parametrize("make", [small_vit, small_convnext])
def test_cheap_runs_no_matrix_product_again_and_block_only_the_kept_part(make):
    def flops(**settings):
        model = sbp.apply(make(), **settings)
        loss = model(images(64 if make is small_convnext else 32)).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    for keep_ratio in (0.5, 1):
        assert flops(keep_ratio=keep_ratio, recompute="cheap") == flops(keep_ratio=keep_ratio)
    extra = {ratio: flops(keep_ratio=ratio, recompute="block") - flops(keep_ratio=ratio) for ratio in (0.25, 0.5, 1)}
    assert 0 < extra[0.25] < extra[0.5] < extra[1]


def test_cheap_saves_what_is_read_and_nothing_else():
    layer, norm = nn.Linear(8, 32), nn.LayerNorm(8)
    x = torch.ones(2, 16, 8, requires_grad=True)
    fused = recompute.linear(layer, norm, cheap=True)
    assert sbp.saved_bytes(lambda: fused(x)) == x.nbytes
    assert sbp.saved_bytes(lambda: layer(norm(x))) > 2 * x.nbytes
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.ones(2, 16, 8, dtype=torch.bfloat16, requires_grad=True)
        fused = recompute.linear(layer, lambda x: F.layer_norm(x.float(), (8,)), cheap=True)
        assert sbp.saved_bytes(lambda: fused(y)) == y.nbytes + layer.weight.nbytes // 2  # no float32 copy


@pytest.mark.long
@pytest.mark.parametrize(("name", "cuda"), [*((name, False) for name in LIMITS), ("convnext_tiny", True)])
def test_saved_memory_of_the_published_networks(name, cuda):
    """As `python -m scripts.saved_memory` prints it."""
    saved = saved_by(name, cuda)
    for arm, limit in LIMITS[name].items():
        assert saved[arm] <= limit * saved["plain"], arm
    assert saved["keep_ratio 1"] == saved["plain"]


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="recompute must be one of none, cheap, block, got 'all'"):
        sbp.apply(small_vit(), recompute="all")


@pytest.mark.parametrize("keep_ratio", [0.5, 1.0])
@pytest.mark.parametrize("again", ["none", "cheap", "block"])
def test_nothing_holds_the_map_that_a_downsampling_layer_was_given(again, keep_ratio):
    """Neither for the backward pass, which `saved_bytes` counts, nor by a closure, which it cannot see."""
    model = sbp.apply(small_convnext(), recompute=again, keep_ratio=keep_ratio)
    given = {}
    for number in (1, 2):
        model.stages[number].downsample.register_forward_pre_hook(
            lambda _, args, number=number: given.update({number: StorageWeakRef(args[0].untyped_storage())})
        )
    loss = model(images(64)).sum()
    plain = keep_ratio == 1 and again == "none"
    assert len(given) == 2 and all(one.expired() != plain for one in given.values())
    loss.backward()


def test_a_pass_on_the_meta_device():
    with torch.device("meta"):
        model = sbp.apply(small_vit(init_values=0.1), recompute="cheap").to("meta")
        model(torch.empty(2, 3, 32, 32, dtype=torch.float64)).sum().backward()
    assert model.blocks[2].mlp.fc1.weight.grad.device.type == "meta"


@pytest.mark.parametrize("mode", ["none", "cheap"])
def test_under_autocast_a_layer_scale_costs_no_further_copy_of_the_weights(mode):
    """Only the product with it is lowered."""

    class Lowered(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            weight = func.overloadpacket is torch.ops.aten._to_copy and args[0].ndim == 2
            self.count += weight and args[0].dtype == torch.float32
            return func(*args, **kwargs or {})

    def lowered(scale):
        model = sbp.apply(small_vit(init_values=scale).float(), recompute=mode)
        with Lowered() as found, torch.autocast("cpu", torch.bfloat16):
            model(images().float()).sum()
        return found.count

    assert lowered(0.1) == lowered(None) > 0
