"""What holds for every family alike. What is special to one is in a file of its own."""

import copy
import pickle

import pytest
import torch

import sbp
from sbp.memory import saved_bytes
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

FAMILIES = {  # a model, and a size for it
    "vit": (small_vit, 32),
    "eva": (small_eva, 32),
    "beit": (small_beit, 32),
    "swin": (small_swin, 64),
    "swin v2": (lambda: small_swin("swinv2_tiny_window8_256"), 64),
    "hiera": (small_hiera, 96),
    "convnext": (small_convnext, 64),
}
each_family = pytest.mark.parametrize(("make", "size"), FAMILIES.values(), ids=FAMILIES)


@each_family
def test_evaluation_is_the_plain_model_bit_for_bit(make, size):
    plain, model = make().eval(), sbp.apply(make(), layers="all").eval()
    assert torch.equal(model(images(size)), plain(images(size)))
    with torch.no_grad():
        torch.manual_seed(0)  # drop path
        expected = plain.train()(images(size))
        torch.manual_seed(0)
        assert torch.equal(model.train()(images(size)), expected)
    assert sbp.mask_state(model)["draw"] == 0


@each_family
def test_remove_and_disabled_give_the_plain_model_back(make, size):
    expected = gradients(make(), images(size))
    model = sbp.apply(make(), layers="all", recompute="none")
    assert not torch.allclose(gradients(model, images(size))[1]["input"], expected[1]["input"])
    assert sbp.effective_keep_ratio(model) == pytest.approx(0.5, abs=0.07)
    with sbp.disabled(model):
        assert_same_gradients(gradients(model, images(size)), expected, tolerance=0)
    sbp.remove(model)
    assert_same_gradients(gradients(model, images(size)), expected, tolerance=0)
    assert [type(one) for one in model.modules()] == [type(one) for one in make().modules()]
    assert not any(one._forward_pre_hooks for one in model.modules())


@pytest.mark.parametrize("again", ["none", "cheap", "block"])
@each_family
def test_disabled_recomputes_what_exact_recompute_says(make, size, again):
    """With plain timm's gradients, and the memory of exact training that recomputes so; SBP is as without."""
    x = images(size)
    mode = "block" if again == "cheap" else "cheap"
    model = sbp.apply(make(), recompute=mode, exact_recompute=again)
    alone = sbp.apply(make(), keep_ratio=1, recompute=again)
    with sbp.disabled(model):
        assert_same_gradients(gradients(model, x), gradients(make(), x))
        assert saved_bytes(lambda: model(x).sum()) == saved_bytes(lambda: alone(x).sum())
    assert_same_gradients(gradients(model, x), gradients(sbp.apply(make(), recompute=mode), x), tolerance=0)
    of_sbp = sbp.apply(make(), exact_recompute=again)
    assert saved_bytes(lambda: of_sbp(x).sum()) == saved_bytes(lambda: sbp.apply(make())(x).sum())


@each_family
def test_another_keep_ratio_is_that_of_a_model_made_with_it(make, size):
    x, model = images(size), sbp.apply(make(), mask="random")
    layers = len(sbp.supports(make()).published)
    for draw, keep_ratio in enumerate((0.25, 1.0, [0.75] * layers, [0.25] * (layers - 1) + [0.75], 0.5)):
        sbp.set_keep_ratio(model, keep_ratio)
        other = sbp.apply(make(), mask="random", keep_ratio=keep_ratio)
        sbp.set_draw(other, draw)
        assert_same_gradients(gradients(model, x), gradients(other, x), tolerance=0)
        assert sbp.effective_keep_ratio(model) == sbp.effective_keep_ratio(other)


@each_family
def test_a_copy_draws_for_itself(make, size):
    model = sbp.apply(make(), mask="random")
    model(images(size))
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = gradients(model, images(size))
    for twin in twins:
        assert_same_gradients(gradients(twin, images(size)), expected, tolerance=0)
    assert sbp.mask_state(model)["draw"] == 2


@each_family
def test_supports_tells_the_layers_that_apply_takes(make, size):
    answer = sbp.supports(make())
    assert answer and set(answer.published) < set(answer.layers)
    for mhsa_drop in answer.mhsa_drops:
        sbp.apply(make(), layers=answer.layers, mhsa_drop=mhsa_drop)


@each_family
def test_the_less_is_kept_and_the_more_recomputed_the_less_is_saved(make, size):
    def saved(**settings):
        model = sbp.apply(make(), **settings)
        return saved_bytes(lambda: model(images(size)).sum())

    plain = saved(keep_ratio=1)
    half, quarter = saved(), saved(keep_ratio=0.25)
    assert quarter < half < plain
    for keep_ratio, none in ((1, plain), (0.5, half)):
        cheap, block = (saved(keep_ratio=keep_ratio, recompute=how) for how in ("cheap", "block"))
        assert block < cheap < none
