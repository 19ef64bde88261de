import copy
import pickle
import re

import pytest
import timm
import torch
from timm.layers import DropPath, Mlp
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DataParallel

import sbp
from tests.conftest import assert_same_gradients, gradients, images, small_beit, small_convnext, small_vit

MODELS = [
    pytest.param(lambda: small_vit(drop_path_rate=0.2), id="vit"),
    pytest.param(lambda: small_vit(global_pool="avg", class_token=False), id="vit mean"),
    pytest.param(lambda: small_convnext(drop_path_rate=0.2), id="convnext"),
    pytest.param(lambda: small_convnext(use_grn=True, ls_init_value=None), id="convnext v2"),
]
each_model = pytest.mark.parametrize("make", MODELS)


def draws(model, count=4, size=64):
    """The kept positions of the last SBP layer in some training forward passes."""
    kept = []
    for _ in range(count):
        model(images(32 if hasattr(model, "blocks") else size))
        kept.append(next(m for m in model.modules() if hasattr(m, "sbp_state")).sbp_state.current.positions[-1].keep)
    return torch.stack(kept)


@each_model
def test_names_identity_and_values_stay(make):
    model = make()
    before = dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    modules = [name for name, _ in model.named_modules()]
    assert sbp.apply(model) is model
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert list(model.state_dict()) == list(state) and modules == [name for name, _ in model.named_modules()]
    make().load_state_dict(model.state_dict(), strict=True)


@each_model
@pytest.mark.parametrize(
    "evaluate", [nn.Module.eval, lambda model: torch.no_grad().__enter__()], ids=["eval", "no_grad"]
)
def test_evaluation_is_the_plain_model_bit_for_bit(make, evaluate):
    plain, model = make(), sbp.apply(make(), layers="all", mask_per="sample", rescale=True)
    x = images(32 if hasattr(model, "blocks") else 64)
    with torch.autograd.graph.save_on_cpu(), torch.set_grad_enabled(True):
        for one in (plain, model):
            evaluate(one)
        torch.manual_seed(0)
        expected = plain(x)
        torch.manual_seed(0)
        assert torch.equal(model(x), expected)
    torch.set_grad_enabled(True)
    assert sbp.mask_state(model)["draw"] == 0


@each_model
def test_remove_gives_the_plain_model_back(make):
    plain = make()
    x = images(32 if hasattr(plain, "blocks") else 64)
    expected = gradients(plain, x)
    model = sbp.apply(make(), layers="all")
    gradients(model, x)
    assert sbp.remove(model) is model
    assert_same_gradients(gradients(model, x), expected, tolerance=0)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any(key.startswith("sbp") for m in model.modules() for key in vars(m))
    sbp.apply(model)
    with pytest.raises(ValueError, match="not patched"):
        sbp.remove(plain)


@each_model
def test_disabled_is_exact(make):
    plain = make()
    x = images(32 if hasattr(plain, "blocks") else 64)
    model = sbp.apply(make())
    with sbp.disabled(model):
        assert_same_gradients(gradients(model, x), gradients(plain, x), tolerance=0)
    with pytest.raises(KeyError), sbp.disabled(model):
        raise KeyError
    assert not torch.allclose(gradients(model, x)[1]["input"], gradients(plain, x)[1]["input"])


@each_model
def test_a_deep_copy_draws_for_itself(make):
    model = sbp.apply(make(), mask="random")
    draws(model, 2)
    twin = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    ahead = draws(model)
    assert sbp.mask_state(model)["draw"] == 6 and sbp.mask_state(twin)["draw"] == 2
    assert torch.equal(draws(twin), ahead) and torch.equal(draws(pickled), ahead)
    sbp.remove(twin)
    assert sbp.mask_state(model)["draw"] == 6


@each_model
def test_ema_follows_and_evaluates_exactly(make):
    model = sbp.apply(make())
    ema = ModelEmaV3(model, decay=0.5)
    plain = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    ema.update(model)
    plain.load_state_dict(ema.module.state_dict())
    x = images(32 if hasattr(plain, "blocks") else 64)
    assert torch.equal(ema.module(x), plain.eval()(x))


def test_masks_repeat_with_the_seed_and_differ_between_ranks():
    make = lambda **kwargs: sbp.apply(small_vit(), mask="random", **kwargs)  # noqa: E731
    first = draws(make(seed=5))
    assert len(first.unique(dim=0)) == 4
    assert torch.equal(draws(make(seed=5)), first)
    for other in (make(seed=6), make(seed=5, rank=1)):
        assert not torch.equal(draws(other), first)


def test_mask_state_is_read_saved_and_restored():
    model = sbp.apply(small_vit(), mask="random", seed=9, rank=2)
    draws(model, 3)
    saved = sbp.mask_state(model)
    assert saved == {"seed": 9, "rank": 2, "draw": 3}
    ahead = draws(model)
    other = sbp.apply(small_vit(), mask="random")
    sbp.load_mask_state(other, saved)
    assert torch.equal(draws(other), ahead)
    sbp.set_draw(model, 3)
    assert torch.equal(draws(model), ahead)
    with pytest.raises(ValueError, match=r"draw must be an integer in \[0, 2\^63\), got 1.7"):
        sbp.set_draw(model, 1.7)
    with pytest.raises(ValueError, match="saved must have seed, rank and draw, got seed"):
        sbp.load_mask_state(model, {"seed": 3})


def test_a_held_mask_lasts_for_all_forward_passes_inside():
    model = sbp.apply(small_vit(), mask="random")
    one = draws(model, 1)
    with sbp.hold_mask(model):
        held = draws(model, 3)
    assert len(held.unique(dim=0)) == 1
    after = draws(model, 1)
    assert len(torch.cat([one, held[:1], after]).unique(dim=0)) == 3
    sbp.set_draw(model, 0)
    assert torch.equal(draws(model, 3), torch.cat([one, held[:1], after]))


@pytest.mark.parametrize("mask_per", ["half", "sample"])
@pytest.mark.parametrize("make", [small_vit, small_convnext])
def test_held_masks_are_those_of_the_place_in_the_batch(make, mask_per):
    """The last micro batch may be smaller."""
    model = sbp.apply(make(), mask="random", mask_per=mask_per)
    size = 32 if make is small_vit else 64

    def kept(images_in_batch):
        model(images(size, batch=images_in_batch))
        return next(m for m in model.modules() if hasattr(m, "sbp_state")).sbp_state.current.positions[-1].keep

    with sbp.hold_mask(model):
        four, two, again = kept(4), kept(2), kept(4)
    assert torch.equal(four, again)
    assert torch.equal(two, four[:2] if mask_per == "sample" else four[1:3])
    after = kept(4)
    assert not torch.equal(after, four) and sbp.mask_state(model)["draw"] == 2
    sbp.set_draw(model, 0)
    assert torch.equal(kept(4), four) and torch.equal(kept(4), after)


def test_a_batch_of_one_image_has_the_mask_of_a_batch():
    batch, half = (sbp.apply(small_vit(), mask="random", mask_per=per) for per in ("batch", "half"))
    assert_same_gradients(gradients(half, images(batch=1)), gradients(batch, images(batch=1)))


def test_within_a_held_mask_one_can_keep_another_share_of_the_same_draw():
    model = sbp.apply(small_vit(), mask="random")
    (state,) = sbp.state.states(model)
    kept = []
    with sbp.hold_mask(model):
        for keep_ratio in (0.25, 0.25, 0.5):
            sbp.set_keep_ratio(model, keep_ratio)
            model(images())
            kept.append({*state.running.positions[0].keep.tolist()})
    assert kept[0] == kept[1] < kept[2] and sbp.mask_state(model)["draw"] == 1


def test_a_bad_keep_ratio_is_named_and_changes_nothing():
    model = sbp.apply(small_vit())
    for keep_ratio, message in ((0, r"number in \(0, 1\], got 0"), ([0.5], "keep_ratio has 1 values for 4 SBP layers")):
        with pytest.raises(ValueError, match=message):
            sbp.set_keep_ratio(model, keep_ratio)
    (state,) = sbp.state.states(model)
    assert state.keep_ratios == [0.5] * 4
    with pytest.raises(ValueError, match="the model is not patched"):
        sbp.set_keep_ratio(small_vit(), 0.5)


def test_within_a_held_mask_one_can_fix_or_set_it():
    model = sbp.apply(small_vit(), mask="random", keep_ratio=0.25)
    third = draws(model, 3)[2]
    with sbp.hold_mask(model):
        held = draws(model, 1)
        with sbp.fixed_mask(model, torch.ones(4, 4, dtype=torch.bool).triu()):
            model(images())
            assert sbp.effective_keep_ratio(model) == 10 / 16
        sbp.set_draw(model, 2)
        assert torch.equal(draws(model, 2), third.expand(2, -1)) and not torch.equal(held[0], third)
    assert sbp.effective_keep_ratio(model) == 0.25  # of the last pass, also after it


@each_model
@pytest.mark.parametrize("mask_per", ["batch", "sample"])
def test_evaluation_draws_nothing(make, mask_per):
    model = sbp.apply(make(), mask_per=mask_per)
    x = images(32 if hasattr(model, "blocks") else 64)
    with torch.no_grad():
        model(x)
    model.eval()(x)
    assert sbp.mask_state(model)["draw"] == 0
    first = next(module for module in model.modules() if hasattr(module, "weight"))
    model.train()
    first.eval()  # a frozen stem
    model(x)
    assert sbp.mask_state(model)["draw"] == 1


@pytest.mark.parametrize("mask_per", ["batch", "half", "sample"])
@pytest.mark.parametrize("make", [small_vit, small_convnext])
def test_effective_keep_ratio(make, mask_per):
    size = 32 if make is small_vit else 64  # both have a 4 x 4 mask grid
    for requested, effective in [(0.5, 0.5), (0.4, 6 / 16), (0.36, 6 / 16), (1, 1.0), (0.01, 1 / 16)]:
        model = sbp.apply(make(), keep_ratio=requested, mask_per=mask_per)
        with pytest.raises(RuntimeError, match="no mask was drawn yet"):
            sbp.effective_keep_ratio(model)
        model(images(size))
        assert sbp.effective_keep_ratio(model) == pytest.approx(effective)


def test_published_layers_of_a_vit():
    with torch.device("meta"):
        for name, first in [("vit_tiny_patch16_224", 4), ("vit_large_patch16_224", 8)]:
            model = sbp.apply(timm.create_model(name))
            layers = model.blocks[-1].sbp_state.layers
            assert layers == [f"blocks.{i}" for i in range(first, len(model.blocks))]


@pytest.mark.parametrize("layers", [5, "blocks.9", ["blocks.9"], []])
def test_layers_that_there_are_not(layers):
    with pytest.raises(ValueError, match=r"layers must be None, 'all' or names of layers, got .*has blocks\.0, "):
        sbp.apply(small_vit(), layers=layers)


def test_chosen_layers():
    assert sbp.apply(small_vit(), layers="all").blocks[0].sbp_state.layers == [f"blocks.{i}" for i in range(6)]
    model = sbp.apply(small_convnext(), layers=["stages.3.blocks.0", "stages.1.downsample"], keep_ratio=[0.5, 0.25])
    state = model.stages[1].downsample.sbp_state
    assert state.layers == ["stages.1.downsample", "stages.3.blocks.0"]  # in the order of the network
    assert torch.isfinite(gradients(model, images(128))[0])


class Detector(nn.Module):
    def __init__(self, *backbones):
        super().__init__()
        self.backbones = nn.ModuleList(backbones)

    def forward(self, x):
        return sum(backbone(x) for backbone in self.backbones)


def test_a_backbone_within_another_model():
    model = sbp.apply(Detector(small_vit()))
    assert model.backbones[0].blocks[3].sbp_state.layers[0] == "backbones.0.blocks.2"
    with pytest.raises(ValueError, match=r"2 backbones \(backbones.0, backbones.1\): call sbp.apply on each"):
        sbp.apply(Detector(small_vit(), small_vit()))
    two = Detector(sbp.apply(small_vit()), sbp.apply(small_vit(), seed=1))
    plain = Detector(small_vit(), small_vit())
    with sbp.disabled(two):
        assert_same_gradients(gradients(two, images()), gradients(plain, images()), tolerance=0)
    with pytest.raises(ValueError, match="several patched backbones"):
        sbp.mask_state(two)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_ratio": 0}, r"keep_ratio must be a number in \(0, 1\], got 0"),
        ({"keep_ratio": 1.5}, r"keep_ratio must be a number in \(0, 1\], got 1.5"),
        ({"keep_ratio": "half"}, r"keep_ratio must be a number in \(0, 1\], got 'half'"),
        ({"keep_ratio": [0.5, 0.5]}, r"keep_ratio has 2 values for 4 SBP layers: blocks.2, blocks.3"),
        ({"keep_ratio": [0.5, 0.5, 0.5, 2]}, r"keep_ratio must be a number in \(0, 1\], got 2"),
        ({"mask": "checker"}, "mask must be one of grid, random, got 'checker'"),
        ({"mhsa_drop": "key"}, "mhsa_drop must be one of qkv, query, head, qkv_exact, got 'key'"),
        ({"mask_per": "image"}, "mask_per must be one of batch, half, sample, got 'image'"),
        ({"evaluation": "partial"}, "evaluation must be one of exact, published, got 'partial'"),
        ({"layers": []}, "layers must be None, 'all' or names of layers"),
        ({"layers": "blocks.1"}, "layers must be None, 'all' or names of layers"),
        ({"layers": ["blocks.1", "blocks.9"]}, r"got \['blocks.9'\]; this model has blocks.0, blocks.1"),
        ({"exact_recompute": "all"}, "exact_recompute must be one of none, cheap, block, got 'all'"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\^32\), got -1"),
        ({"rank": "0"}, r"rank must be an integer in \[0, 2\^32\), got '0'"),
        ({"rescale": "no"}, "rescale must be True or False, got 'no'"),
    ],
)
def test_bad_settings_are_named_and_change_nothing(settings, message):
    model = small_vit()
    with pytest.raises(ValueError, match=message):
        sbp.apply(model, **settings)
    assert not any("sbp_state" in vars(module) for module in model.modules())


def test_models_that_cannot_be_patched():
    model = sbp.apply(small_vit())
    with pytest.raises(ValueError, match="already patched"):
        sbp.apply(model)
    with pytest.raises(ValueError, match="take DistributedDataParallel"):
        sbp.apply(DataParallel(small_vit()))
    with pytest.raises(ValueError, match="wrapped in OptimizedModule"):
        sbp.apply(torch.compile(small_vit()))
    with pytest.raises(ValueError, match=r"supported are timm's ViT and DeiT .* and timm's ConvNeXt"):
        sbp.apply(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.ones(4, 4), r"must be a bool tensor \(H, W\), got torch.float32 \(4, 4\)"),
        (torch.ones(16, dtype=torch.bool), r"got torch.bool \(16,\)"),
        ([[True]], "got list"),
        (torch.zeros(4, 4, dtype=torch.bool), "at least one position"),
        (torch.ones(3, 4, dtype=torch.bool), r"shape \(3, 4\), but the mask grid of this input is \(4, 4\)"),
    ],
)
def test_bad_fixed_masks(keep, message):
    model = sbp.apply(small_vit())
    with pytest.raises(ValueError, match=message), sbp.fixed_mask(model, keep):
        model(images())


class Adapted(Mlp):
    """As an adapter is put around a part."""

    def forward(self, x):
        return super().forward(x) + x


def replaced(part):
    part.forward = lambda x, **kwargs: x


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (small_vit, lambda m: replaced(m.blocks[3].attn), r"blocks.3.attn has a `forward` of its own"),
        (small_vit, lambda m: replaced(m.blocks[3].ls2), r"blocks.3.ls2 has a `forward` of its own"),
        (small_convnext, lambda m: replaced(m.stages[1].blocks[0]), r"stages.1.blocks.0 has a `forward` of its own"),
        (
            small_convnext,
            lambda m: setattr(m.stages[1].blocks[0].mlp, "__class__", Adapted),
            r"stages.1.blocks.0.mlp is a Adapted, a subclass of timm's Mlp",
        ),
    ],
)
def test_parts_whose_own_forward_would_not_run_are_refused(make, change, message):
    model = make()
    change(model)
    with pytest.raises(ValueError, match=message):
        sbp.apply(model)


def test_a_drop_path_with_a_forward_of_its_own_takes_part():
    models = [small_vit(drop_path_rate=0.5) for _ in range(2)]
    for model in models:
        for module in model.modules():
            if isinstance(module, DropPath):
                module.forward = lambda x: 0.5 * x
    sbp.apply(models[0], mhsa_drop="query")
    torch.testing.assert_close(models[0](images()), models[1](images()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.blocks.__setitem__(5, m.blocks[4]), "blocks.5 and blocks.4 are the same module"),
        (lambda m: setattr(m, "blocks", nn.ModuleList(m.blocks)), "a ModuleList, and SBP knows timm's Sequential"),
    ],
)
def test_blocks_in_another_structure_are_refused_and_nothing_is_changed(change, message):
    model = small_vit()
    change(model)
    assert re.search(message, sbp.supports(model).reason)
    with pytest.raises(ValueError, match=message):
        sbp.apply(model)
    assert not any("sbp_state" in vars(module) for module in model.modules())


def test_a_mask_held_within_another_is_that_one():
    model = sbp.apply(small_vit(), mask="random", mask_per="sample")

    def kept(images_in_batch):
        model(images(batch=images_in_batch))
        return sbp.state.states(model)[0].running.positions[-1].keep

    with sbp.hold_mask(model):
        four = kept(4)
        with sbp.hold_mask(model):
            assert torch.equal(kept(4), four)
        assert torch.equal(kept(2), four[:2]) and sbp.mask_state(model)["draw"] == 0
    assert sbp.mask_state(model)["draw"] == 1


def test_gradients_of_gradients_are_refused_with_sbp_and_exact_without():
    def penalty(model):
        x = images(64).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return gradient.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, model = small_convnext(), sbp.apply(small_convnext())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        penalty(model)
    model.zero_grad()
    with sbp.disabled(model):
        assert_same_gradients(penalty(model), penalty(plain))


def test_the_mask_is_drawn_anew_after_an_error_in_hold_mask():
    model = sbp.apply(small_vit())
    with pytest.raises(RuntimeError, match="on purpose"), sbp.hold_mask(model):
        raise RuntimeError("on purpose")
    assert sbp.mask_state(model)["draw"] == 1


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224"])
def test_two_backbones_that_were_taken_apart_are_two(name):
    model = nn.ModuleDict({one: timm.create_model(name, features_only=True) for one in ("before", "after")})
    with pytest.raises(ValueError, match=r"several backbones \(before, after\): call sbp.apply on each"):
        sbp.apply(model)
    sbp.apply(model["before"])


def small_relpos():
    return small_beit("vit_relpos_small_patch16_224")


@pytest.mark.parametrize(
    "makes", [(small_vit, small_convnext), (small_convnext, small_vit), (small_beit, small_relpos)]
)
def test_two_backbones_of_different_families_are_two(makes):
    """As a teacher and its student: one of them would train as timm's own without a word."""
    model = nn.ModuleDict(dict(zip(("teacher", "student"), (make() for make in makes), strict=True)))
    with pytest.raises(
        ValueError, match=r"backbones \((teacher.*student|student.*teacher).*\): call sbp.apply on each"
    ):
        sbp.apply(model)
    assert not sbp.supports(model)
    sbp.apply(model["student"])


def test_a_backbone_within_another_is_a_part_of_it():
    model = small_vit()
    model.patch_embed.backbone = small_convnext()  # which SBP leaves as it is
    sbp.apply(model)
    assert all(name.startswith("blocks.") for name in sbp.state.states(model)[0].layers)


def test_a_model_is_patched_wherever_it_is_made():
    x = images()
    with torch.inference_mode():
        inferred = sbp.apply(small_vit())
    with torch.device("meta"):
        model = sbp.apply(small_vit())
    model = model.to_empty(device="cpu").double()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.1)
    model(x).sum().backward()
    assert inferred.blocks[3].sbp_state.draw.is_inference() is False


@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_weights_that_are_no_parameters_of_their_layer_are_found(recompute):
    """As FSDP1 makes layers have views of one flat parameter."""
    models = [sbp.apply(small_convnext(), recompute=recompute) for _ in range(2)]
    for module in list(models[0].modules()):
        for name, parameter in list(module._parameters.items()):
            delattr(module, name)
            setattr(module, name, parameter.view_as(parameter) if parameter is not None else None)
    torch.testing.assert_close(models[0](images(64)), models[1](images(64)), rtol=0, atol=0)
