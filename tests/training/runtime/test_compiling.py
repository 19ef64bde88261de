"""Compiled blocks: few kinds of them, and the losses and gradients of eager mode."""

import copy
import logging
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sbp
from sbp.schedule import keep_ratio_at
from sbp.training.engine import setup
from sbp.training.runtime.compiling import blocks_of, compile_model
from tests.conftest import (
    assert_same_gradients,
    gradients,
    images,
    others_slow,
    small_beit,
    small_convnext,
    small_eva,
    small_hiera,
    small_swin,
    small_vit,
)
from tests.training import runs

RATE = {"drop_path_rate": 0.3}
# Shallow ones, as compiling takes long: one block without SBP, and two of a kind with it.
small_vit = partial(small_vit, depth=3)
small_convnext = partial(small_convnext, depths=(1, 1, 2, 1))
MODELS = {
    "plain vit": lambda: small_vit(**RATE),
    "vit": lambda: sbp.apply(small_vit(**RATE)),
    "vit query, cheap": lambda: sbp.apply(small_vit(**RATE), mhsa_drop="query", recompute="cheap"),
    "vit rescaled": lambda: sbp.apply(small_vit(), rescale=True, mask="random"),
    "plain convnext": lambda: small_convnext(**RATE),
    "convnext": lambda: sbp.apply(small_convnext(**RATE)),
    "convnext rescaled": lambda: sbp.apply(small_convnext(), rescale=True),
    "convnext, input": lambda: sbp.apply(small_convnext(**RATE), dropped="input"),
    "convnext, neighbours": lambda: sbp.apply(small_convnext(**RATE), dropped="neighbours"),
    "convnext, block": lambda: sbp.apply(small_convnext(**RATE), recompute="block"),
}
OTHERS = {  # a model, the pixels of an image, and how many kinds of blocks there may be
    "plain eva": (lambda: small_eva(**RATE), 32, 3),
    "eva": (lambda: sbp.apply(small_eva(**RATE)), 32, 3),
    "dinov3 query, cheap": (
        lambda: sbp.apply(small_eva("vit_small_patch16_dinov3", **RATE), mhsa_drop="query", recompute="cheap"),
        32,
        3,
    ),
    "beit": (lambda: sbp.apply(small_beit(**RATE)), 32, 3),
    "swin": (lambda: sbp.apply(small_swin(**RATE)), 64, 2 * 4 + 3),
    "swin padded": (lambda: sbp.apply(small_swin(strict_img_size=False, **RATE), mhsa_drop="query"), 72, 2 * 4 + 3),
    "swin v2": (lambda: sbp.apply(small_swin("swinv2_tiny_window8_256", **RATE)), 64, 2 * 4 + 3),
    "hiera query": (lambda: sbp.apply(small_hiera(**RATE), mhsa_drop="query"), 96, 2 * 4 + 3),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def eager_copy(model):
    """The same layers, not compiled."""
    model = copy.deepcopy(model)
    for layer in blocks_of(model):
        for method in ("run", "forward"):
            vars(layer).pop(method, None)
    return model


@pytest.mark.parametrize("name", others_slow(MODELS, ["vit"], ["plain vit", "convnext", "convnext, input"]))
def test_few_kinds_of_blocks_with_the_gradients_of_eager_mode(name):
    model = MODELS[name]()
    keys = list(model.state_dict())
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    compile_model(model, "blocks", backend=counter, fullgraph=True)
    eager = eager_copy(model)
    is_vit = hasattr(model, "blocks")
    x = images(32 if is_vit else 64)
    for _ in range(3):
        assert_same_gradients(gradients(model, x), gradients(eager, x))
    downsamplings = 0 if is_vit else 3
    assert 0 < counter.frame_count <= (3 if is_vit else 2 * 4 + downsamplings)
    if name in ("vit", "convnext"):
        with sbp.disabled(model), sbp.disabled(eager):
            assert_same_gradients(gradients(model, x), gradients(eager, x))
    assert list(model.state_dict()) == keys
    model.eval(), eager.eval()
    torch.testing.assert_close(model(x), eager(x))


@pytest.mark.parametrize("name", others_slow(OTHERS, [], ["eva", "swin padded"]))
def test_the_other_families(name):
    make, size, kinds = OTHERS[name]
    model = make()
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    compile_model(model, "blocks", backend=counter, fullgraph=True)
    eager, x = eager_copy(model), images(size)
    for _ in range(3):
        assert_same_gradients(gradients(model, x), gradients(eager, x))
    assert 0 < counter.frame_count <= kinds
    model.eval(), eager.eval()
    torch.testing.assert_close(model(x), eager(x))


@torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256)  # the defaults, set back in the end
@pytest.mark.parametrize("case", others_slow(["blocks vit", "blocks convnext", "model vit"], [], ["blocks vit"]))
def test_each_keep_ratio_of_a_run_is_compiled_once_and_without_warning(case, caplog):
    how, name = case.split()
    model = sbp.apply(small_vit() if name == "vit" else small_convnext())
    x = images(32 if name == "vit" else 64)
    ratios = [keep_ratio_at(epoch, 12, 0.125, 1.0) for epoch in range(12)]
    different = len(set(ratios))
    assert different == 8  # as many as torch compiles by default; a block's code has several kinds of them
    counter = CompileCounterWithBackend("eager")
    eager = copy.deepcopy(model)
    compile_model(model, how, keep_ratios=different, backend=counter)
    counts = []
    for _ in range(2):
        for ratio in ratios:
            for one in (model, eager):
                sbp.set_keep_ratio(one, ratio)
                sbp.set_draw(one, 0)
            assert_same_gradients(gradients(model, x), gradients(eager, x))
        counts.append(counter.frame_count)
    kinds = {"vit": 3, "convnext": 2 * 4 + 3}[name] if how == "blocks" else 1
    assert different <= counts[0] <= kinds * different and counts[1] == counts[0]
    assert [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("make", [small_vit, small_convnext])
def test_inductor(make):
    model = sbp.apply(make())
    compile_model(model, "blocks")
    x = images(32 if make is small_vit else 64)
    assert_same_gradients(gradients(model, x), gradients(eager_copy(model), x), tolerance=1e-8)


def test_a_run_with_compiled_blocks_saves_what_any_run_can_load(tmp_path, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **kw: real(function, **kw | {"backend": "eager"}))
    ends = []
    for compiled in (False, "blocks"):
        config = runs.configured("vit", compile=compiled, recipe={"ema_decay": 0.9})
        ends.append(runs.run(config, tmp_path / str(compiled)))
    for key in ("state_dict", "state_dict_ema"):
        for name, value in ends[0][key].items():
            torch.testing.assert_close(ends[1][key][name], value, rtol=1e-3, atol=1e-5)
    cpu = torch.device("cpu")
    trainer = setup.build_trainer(config, setup.load_images(config, cpu).order, cpu)
    trainer.load_state_dict(ends[0])
