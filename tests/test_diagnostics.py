import copy
from functools import partial

import pytest
import torch
from torch import nn

import sbp
from tests.conftest import images, small_convnext, small_vit

make = pytest.mark.parametrize("make", [small_vit, small_convnext])


def compute(model):
    x = images(32 if hasattr(model, "blocks") else 64)
    return lambda: model(x).square().sum()


def flat(model, compute_loss, names):
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    return torch.cat([g.flatten() for g in torch.autograd.grad(compute_loss(), chosen)])


@make
def test_cosines_are_those_of_the_two_gradients(make):
    model = sbp.apply(make())
    plain = make()
    found = sbp.gradient_cosine(model, compute(model))
    names = [name for name, _ in model.named_parameters()]
    layer = "blocks.3" if make is small_vit else "stages.2.blocks.1"
    for layer_names, cosine in [
        (names, found.total),
        ([name for name in names if name.startswith(f"{layer}.")], found.per_layer[layer]),
    ]:
        sbp.set_draw(model, 0)
        ours, exact = flat(model, compute(model), layer_names), flat(plain, compute(plain), layer_names)
        assert cosine == pytest.approx(float(nn.functional.cosine_similarity(ours, exact, 0)), abs=1e-12)
        assert 0 < cosine < 1
    assert found.norm_ratio == pytest.approx(float(ours_norm(model, plain, names)), abs=1e-12)
    assert found.norm_ratio_per_layer.keys() == found.per_layer.keys()


def ours_norm(model, plain, names):
    sbp.set_draw(model, 0)
    return flat(model, compute(model), names).norm() / flat(plain, compute(plain), names).norm()


@make
def test_gradients_of_other_losses_compare_as_well(make):
    """Those of parts of a batch: their mean is that of the batch."""
    model = make()
    x = images(32 if make is small_vit else 64)[:2]
    parts = [sbp.gradient(model, lambda p=p: model(p).square().mean()) for p in (x[:1], x[1:])]
    whole = sbp.gradient(model, lambda: model(x).square().mean())
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in whole}
    found = sbp.compare_gradients(mean, whole)
    assert found.total == pytest.approx(1, abs=1e-12) and found.norm_ratio == pytest.approx(1, abs=1e-12)
    assert sbp.compare_gradients(parts[0], whole).total < 1
    doubled = {name: 2 * grad for name, grad in whole.items()}
    assert set(sbp.compare_gradients(doubled, whole).norm_ratio_per_layer.values()) == {2.0}


@make
def test_every_parameter_belongs_to_a_layer(make):
    model = sbp.apply(make())
    layers = sbp.gradient_cosine(model, compute(model)).per_layer
    if make is small_vit:
        assert set(layers) == {"patch_embed", "cls_token", "pos_embed", "norm", "head"} | {
            f"blocks.{i}" for i in range(6)
        }
    else:
        assert set(model.stages[0].blocks[0].sbp_state.layers) <= set(layers) and {"stem.0", "head"} <= set(layers)


@make
def test_keep_ratio_1_has_a_cosine_of_1(make):
    model = sbp.apply(make(drop_path_rate=0.3), keep_ratio=1)
    assert sbp.gradient_cosine(model, compute(model)).total == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("make", [small_vit, small_convnext])
def test_the_parts_of_a_batch_add_up(make):
    """Also where a part has no gradient for some parameters."""
    model = sbp.apply(make(), mask="random")
    x = images(32 if make is small_vit else 64, batch=5)
    head = torch.nn.Parameter(torch.ones((), dtype=x.dtype))
    model.register_parameter("own", head)

    def loss(part, own=False):
        out = model(x[part]).square().sum()
        return out * head if own else out

    with sbp.hold_mask(model):
        whole = sbp.gradient_cosine(model, lambda: loss(slice(0, 2), own=True) + loss(slice(2, None)))
        parts = [partial(loss, slice(0, 2), own=True), partial(loss, slice(2, None))]
        found = sbp.gradient_cosine(model, parts)
        swapped = sbp.gradient_cosine(model, parts[::-1])
    for one in (found, swapped):
        assert one.total == pytest.approx(whole.total, abs=1e-12) and one.total < 0.99
        assert one.per_layer == pytest.approx(whole.per_layer, abs=1e-12)
        assert one.norm_ratio_per_layer == pytest.approx(whole.norm_ratio_per_layer, rel=1e-10)


def test_no_gradient_at_all_is_no_difference():
    model = sbp.apply(small_vit())
    found = sbp.gradient_cosine(model, lambda: model(images()).sum() * 0)
    assert found.total == found.norm_ratio == 1 and set(found.per_layer.values()) == {1.0}


@make
def test_the_probe_leaves_nothing_behind(make):
    model = sbp.apply(make(drop_path_rate=0.3), mask="random")
    model.register_buffer("count", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, args: vars(module)["_buffers"]["count"].add_(1) and None)
    compute(model)().backward()
    before = copy.deepcopy([p.grad for p in model.parameters()])
    torch.manual_seed(11)
    expected_random, expected_draw = torch.get_rng_state(), sbp.mask_state(model)
    expected_current = model.stages[0].blocks[0].sbp_state.current if make is small_convnext else None
    sbp.gradient_cosine(model, compute(model))
    assert torch.equal(torch.get_rng_state(), expected_random) and sbp.mask_state(model) == expected_draw
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))
    assert model.count == 1
    if make is small_convnext:
        assert model.stages[0].blocks[0].sbp_state.current is expected_current


def test_a_probe_that_fails_leaves_nothing_behind_either():
    model = sbp.apply(small_vit())
    model.register_buffer("count", torch.zeros(()))

    def fails():
        model(images())
        model.count += 1
        raise KeyError

    with pytest.raises(KeyError):
        sbp.gradient_cosine(model, fails)
    assert sbp.mask_state(model)["draw"] == 0 and model.count == 0


def test_what_it_needs():
    model = sbp.apply(small_vit())
    with pytest.raises(ValueError, match="needs training mode"):
        sbp.gradient_cosine(model.eval(), compute(model))
    with pytest.raises(ValueError, match="not patched"):
        sbp.gradient_cosine(small_vit(), lambda: None)
    frozen = model.train().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        sbp.gradient_cosine(frozen, compute(frozen))
