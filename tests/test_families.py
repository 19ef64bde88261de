"""What holds for every family alike. What is special to one is in a file of its own."""

import copy
import pickle
from functools import partial
from types import MethodType

import pytest
import torch
from torch.nn.utils import prune

import sbp
from sbp.memory import saved_bytes
from tests.conftest import (
    assert_same_gradients,
    gradients,
    images,
    one_of,
    others_long,
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


@pytest.mark.parametrize(("name", "again"), one_of(3, FAMILIES, ["none", "cheap", "block"]))
def test_disabled_recomputes_what_exact_recompute_says(name, again):
    """With plain timm's gradients, and the memory of exact training that recomputes so; SBP is as without."""
    make, size = FAMILIES[name]
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


@pytest.mark.parametrize("name", others_long(FAMILIES, *(FAMILIES.keys() - {"swin v2"})))
def test_another_keep_ratio_is_that_of_a_model_made_with_it(name):
    make, size = FAMILIES[name]
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


@pytest.mark.parametrize("name", ["vit", "eva"])
def test_a_frozen_block_sees_the_tokens_that_blocks_before_it_dropped(name):
    """It runs as timm's, so that what others dropped has to be there: as with a keep-ratio of one."""
    make, size = FAMILIES[name]
    ratios = [1 if i == 4 else 0.5 for i in range(6)]
    make = partial(make, global_pool="token")
    expected = gradients(sbp.apply(make(), layers="all", keep_ratio=ratios, seed=3), images(size))
    model = sbp.apply(make(), layers="all", seed=3)
    model.blocks[4].eval()
    assert_same_gradients(gradients(model, images(size)), expected)


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in ("vit", "eva", "beit") for method in ("forward_head", "forward")]
    + [("vit", "pool"), ("eva", "pool")],
)
def test_a_head_of_ones_own_may_read_every_token(name, method):
    """Where methods behind the blocks are not timm's, the dropped tokens are there, as in forward_features."""
    make, size = partial(FAMILIES[name][0], global_pool="token"), FAMILIES[name][1]
    model = sbp.apply(make(), seed=3)
    expected = sbp.apply(make(), seed=3).forward_features(images(size))
    assert expected.shape[1] == 17
    setattr(model, method, model.forward_features if method == "forward" else lambda x, *_, **__: x)
    if method == "pool":
        expected = model.head(model.fc_norm(expected))
    assert torch.equal(model(images(size)), expected)


@pytest.mark.parametrize("name", ["vit", "eva", "beit"])
def test_what_wraps_timms_forward_does_not_replace_it(name):
    """As accelerate does for autocast: dropped tokens, which nothing reads, are still not computed."""
    make, size = partial(FAMILIES[name][0], global_pool="token"), FAMILIES[name][1]
    model, wrapped = sbp.apply(make()), sbp.apply(make())
    wrapped.forward = MethodType(torch.autocast("cpu", enabled=False)(type(wrapped).forward), wrapped)
    x = images(size)
    assert sbp.count_flops(lambda: wrapped(x).sum()).forward == sbp.count_flops(lambda: model(x).sum()).forward


@pytest.mark.parametrize("name", ["vit", "eva", "beit"])
def test_an_evaluation_leaves_nothing_for_the_next_pass(name):
    """Which may come from elsewhere, and read every token."""
    make, size = partial(FAMILIES[name][0], global_pool="token"), FAMILIES[name][1]
    model = sbp.apply(make(), seed=3)
    expected = sbp.apply(make(), seed=3).forward_features(images(size))
    model.eval()(images(size))
    assert torch.equal(model.train().forward_features(images(size)), expected)


class Adapted(torch.nn.Linear):
    """A linear layer that does more than its weight and bias say, as LoRA's do."""

    def forward(self, x):
        return 2 * super().forward(x)


def of_another_class(layer):
    layer.__class__ = Adapted


def with_a_forward_of_its_own(layer):
    usual = layer.forward
    layer.forward = lambda x: 2 * usual(x)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.3)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, of_another_class) for name in FAMILIES),
        *((name, change) for name in ("vit", "convnext") for change in (with_a_forward_of_its_own, pruned)),
    ],
)
def test_layers_that_do_more_than_their_weights_say_are_called_or_refused(name, change):
    """Their forward pass is timm's; where weights would have to be read instead, an error says so."""
    make, size = FAMILIES[name]

    def adapted(**settings):
        model = make()
        for one in list(model.modules()):
            if type(one) is torch.nn.Linear and one is not getattr(model, "head", None):
                change(one)
        return sbp.apply(model, layers="all", **settings) if settings else model

    x, exact = images(size), {"convnext": {}, "hiera": {"mhsa_drop": "query"}}.get(name, {"mhsa_drop": "qkv_exact"})
    for recompute in ("none", "cheap"):
        model = adapted(recompute=recompute, **exact)
        torch.testing.assert_close(model(x), adapted()(x), rtol=1e-10, atol=1e-10)
    refused = {"vit": [{"dropped": "input", "mhsa_drop": "query"}], "convnext": [{"dropped": "input"}]}.get(name, [])
    refused += [{"mhsa_drop": "head"}] if name in ("vit", "eva", "beit") else []
    for settings in refused:
        with pytest.raises(ValueError, match=r"a (Adapted|Linear with a forward or .*) may do more"):
            adapted(**settings)(x)


@each_family
def test_data_parallel_is_refused(make, size):
    """Its replicas have no parameters of their own, and would share the masks' state among threads."""
    model = sbp.apply(make(), recompute="cheap")
    for module in model.modules():
        module._is_replica = True
    with pytest.raises(RuntimeError, match="take DistributedDataParallel"):
        model(images(size))
    model.eval()(images(size))


@each_family
def test_a_copy_is_in_no_context_that_the_original_was_in(make, size):
    model = sbp.apply(make(), layers="all")
    expected = gradients(copy.deepcopy(model), images(size))
    with sbp.disabled(model), sbp.hold_mask(model):
        for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same_gradients(gradients(one, images(size)), expected, tolerance=0)
            assert sbp.mask_state(one)["draw"] == 1


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "convnext"])
def test_block_recomputation_saves_nothing_of_dropped_positions(name):
    """Under qkv; other methods, and a ConvNeXt's convolutions, read them again."""
    make, size = FAMILIES[name]
    if name in ("vit", "eva", "beit"):
        make = partial(make, global_pool="avg")
    x, saved = images(size, batch=2), {}
    for ratio in (0.25, 0.5, 1):
        model = sbp.apply(make(), layers="all", keep_ratio=ratio, recompute="block")
        saved[ratio] = sbp.saved_bytes(lambda model=model: model(x).sum())
    assert 1.1 * saved[0.25] < saved[0.5] < saved[1]


def test_what_sbp_could_not_train_runs_as_timm_has_it_otherwise():
    """Windows that no mask tiles are an error of SBP passes alone."""
    swin, plain, x = sbp.apply(small_swin()), small_swin(), images(48)
    for model in (swin, plain):
        model.set_input_size(img_size=48, window_size=4)  # windows of 4, 4, and 3
    with pytest.raises(ValueError, match="multiples of the smallest one"):
        swin(x)
    with sbp.disabled(swin):
        assert_same_gradients(gradients(swin, x), gradients(plain, x), tolerance=0)
    assert torch.equal(swin.eval()(x), plain.eval()(x))


def test_masks_are_drawn_in_training_after_an_evaluation_in_inference_mode():
    """Where the number of the draw first moves to the model's device."""
    model = sbp.apply(small_vit(), evaluation="published").to("meta")
    x = images().to("meta")
    with torch.inference_mode():
        model.eval()(x)
    model.train()(x).sum().backward()
