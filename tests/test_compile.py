"""torch.compile: one graph, no recompilation when the mask changes, gradients as in eager mode."""

import copy

import pytest
import torch
from timm.models.hiera import Hiera
from torch._dynamo.testing import CompileCounterWithBackend

import sbp
from tests.conftest import (
    assert_same_gradients,
    gradients,
    images,
    small_beit,
    small_convnext,
    small_eva,
    small_hiera,
    small_swin,
    small_vit,
)

MODELS = {
    "vit qkv": lambda: sbp.apply(small_vit()),
    "vit query": lambda: sbp.apply(small_vit(), mhsa_drop="query"),
    "vit head": lambda: sbp.apply(small_vit(), mhsa_drop="head"),
    "vit qkv_exact, random": lambda: sbp.apply(small_vit(global_pool="avg"), mask="random", mhsa_drop="qkv_exact"),
    "vit, ratios": lambda: sbp.apply(small_vit(), keep_ratio=[0.75, 0.5, 0.5, 0.3]),
    "convnext": lambda: sbp.apply(small_convnext()),
    "convnext v2, random": lambda: sbp.apply(small_convnext(use_grn=True), mask="random", keep_ratio=0.3),
    "vit qkv_exact, cheap": lambda: sbp.apply(small_vit(init_values=0.5), mhsa_drop="qkv_exact", recompute="cheap"),
    "vit query, block": lambda: sbp.apply(small_vit(), mhsa_drop="query", recompute="block"),
    "convnext, block": lambda: sbp.apply(small_convnext(), recompute="block"),
    "vit query, input": lambda: sbp.apply(small_vit(), mhsa_drop="query", dropped="input"),
    "convnext, input": lambda: sbp.apply(small_convnext(), dropped="input"),
    "vit query, sample": lambda: sbp.apply(small_vit(), mhsa_drop="query", mask_per="sample", rescale=True),
    "vit head, half, rescaled": lambda: sbp.apply(
        small_vit(global_pool="avg"), mhsa_drop="head", mask="random", mask_per="half", rescale=True
    ),
    "vit, half, ratios": lambda: sbp.apply(small_vit(), keep_ratio=[0.75, 0.5, 0.5, 0.3], mask_per="half"),
    "vit, sample, block": lambda: sbp.apply(small_vit(), mask_per="sample", rescale=True, recompute="block"),
    "dinov3": lambda: sbp.apply(small_eva("vit_small_patch16_dinov3")),
    "eva, class token, cheap": lambda: sbp.apply(small_eva(global_pool="token", use_fc_norm=False), recompute="cheap"),
    "eva, mixed rope, sample": lambda: sbp.apply(
        small_eva("vit_small_patch16_rope_mixed_224"), mhsa_drop="qkv_exact", mask_per="sample", recompute="block"
    ),
    "beit": lambda: sbp.apply(small_beit()),
    "relpos, class token, query, cheap": lambda: sbp.apply(
        small_beit("vit_relpos_base_patch16_cls_224", rel_pos_type="bias"), mhsa_drop="query", recompute="cheap"
    ),
    "swin, query": lambda: sbp.apply(small_swin(), mhsa_drop="query"),
    "swin v2, cheap": lambda: sbp.apply(small_swin("swinv2_tiny_window8_256"), recompute="cheap"),
    "hiera, query": lambda: sbp.apply(small_hiera(), mhsa_drop="query"),
    "hiera, sample, cheap": lambda: sbp.apply(small_hiera(), mask_per="sample", recompute="cheap"),
    "convnext v2, sample": lambda: sbp.apply(small_convnext(use_grn=True), mask_per="sample", rescale=True),
}
DEFAULT = [("vit qkv", 1.0), ("vit query, sample", 0.25)]
LONG = [
    ("convnext, input", 1.0),
    ("vit query, input", 1.0),
    ("swin, query", 1.0),
    ("dinov3", 1.0),
    ("convnext", 0.25),
    ("vit qkv", 0.25),
    ("vit head", 1.0),
    ("convnext, block", 1.0),
]
CASES = [
    pytest.param(
        name,
        budget,
        marks=() if (name, budget) in DEFAULT else pytest.mark.long if (name, budget) in LONG else pytest.mark.slow,
    )
    for name in MODELS
    for budget in (1.0, 0.25)
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def memory_budget(request):
    with torch._functorch.config.patch(activation_memory_budget=request.param):
        yield


def size_of(model):
    return 96 if isinstance(model, Hiera) else 32 if hasattr(model, "blocks") else 64


def plain_names(result):
    return result[0], {name.removeprefix("_orig_mod."): gradient for name, gradient in result[1].items()}


@pytest.mark.parametrize(("name", "memory_budget"), CASES, indirect=["memory_budget"])
def test_one_graph_with_the_gradients_of_eager_mode(name, memory_budget):
    model = MODELS[name]()
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = images(size_of(model))
    for _ in range(4):
        assert_same_gradients(plain_names(gradients(compiled, x)), gradients(eager, x))
    assert counter.frame_count == 1
    assert sbp.mask_state(compiled) == sbp.mask_state(eager) == sbp.mask_state(eager) | {"draw": 4}


@pytest.mark.parametrize("name", ["vit qkv", pytest.param("convnext", marks=pytest.mark.slow)])
@pytest.mark.long
def test_contexts_and_diagnostics_take_the_compiled_model(name):
    model = MODELS[name]()
    plain = sbp.remove(copy.deepcopy(model))
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    x = images(size_of(model))
    with sbp.disabled(compiled):
        assert_same_gradients(plain_names(gradients(compiled, x)), gradients(plain, x))
    mask = sbp.masks.random_mask(4, 4, 0.3, torch.Generator().manual_seed(0))
    with sbp.fixed_mask(compiled, mask), sbp.fixed_mask(eager, mask):
        assert_same_gradients(plain_names(gradients(compiled, x)), gradients(eager, x))
    ours, expected = (sbp.gradient_cosine(m, lambda m=m: m(x).square().sum()) for m in (compiled, eager))
    assert ours.total == pytest.approx(expected.total, abs=1e-9) and ours.per_layer.keys() == expected.per_layer.keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("memory_budget", [1.0, 0.25], indirect=True)
def test_inductor(name, memory_budget):
    model = MODELS[name]()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    x = images(size_of(model))
    for _ in range(3):
        assert_same_gradients(plain_names(gradients(compiled, x)), gradients(eager, x), tolerance=1e-8)
