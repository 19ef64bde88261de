"""Which models have an SBP form, and what is said of those that have none."""

import re

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

import sbp
from sbp.refusals import REASONS
from scripts.supported import PAGE, page, refusals_of
from tests.conftest import small_vit


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


class UsersBlock(Block):
    def forward(self, x, **kwargs):
        return super().forward(x, **kwargs) * 2


def test_yes_with_the_layers():
    model = small_vit()
    answer = sbp.supports(model)
    assert answer and answer.reason == ""
    assert answer.layers == tuple(f"blocks.{i}" for i in range(6)) and answer.published == answer.layers[2:]
    assert not any("sbp_state" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_small_patch16_18x2_224", "blocks.0 is a ParallelThingsBlock"),
        ("vit_dwee_patch16_reg1_gap_256", "blocks.0.attn is a DiffAttention"),
        ("naflexvit_base_patch16_gap", r"without use_naflex=True a ViT is timm's VisionTransformer"),
        ("crossvit_tiny_240", "two grids of tokens at once"),
        ("pit_ti_224", "convolutions that overlap"),
        ("mobilevit_xxs", "folded out of the maps"),
        ("resnet18", r"convolutions mix positions .*set_grad_checkpointing\(\)"),
        ("mixer_s16_224", "without attention"),
    ],
)
def test_the_obstacle_is_named(name, reason):
    model = on_meta(name)
    answer = sbp.supports(model)
    assert not answer and answer.layers == ()
    with pytest.raises(ValueError, match=reason) as error:
        sbp.apply(model)
    assert str(error.value) == answer.reason


def test_a_users_block_is_named():
    model = small_vit(block_fn=UsersBlock)
    assert "blocks.0 is a UsersBlock, a subclass of timm's Block whose own forward" in sbp.supports(model).reason


def test_blocks_outside_of_a_transformer():
    model = nn.Sequential(Block(24, 3), Block(24, 3))
    assert "timm's Block, but in no VisionTransformer" in sbp.supports(model).reason


@pytest.mark.parametrize(
    ("make", "instead"),
    [
        ("vit_b_16", "vit_base_patch16_224"),
        ("convnext_tiny", "convnext_tiny"),
        ("swin_t", "swin_tiny_patch4_window7_224"),
    ],
)
def test_torchvisions_own(make, instead):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = getattr(torchvision.models, make)()
    reason = sbp.supports(model).reason
    assert "is torchvision's own and not timm's" in reason and f"create_model('{instead}')" in reason


def test_hugging_faces_own():
    own = type("ViTModel", (nn.Linear,), {"__module__": "transformers.models.vit.modeling_vit"})
    reason = sbp.supports(own(2, 2)).reason
    assert "Hugging Face's own and not timm's: load vit_base_patch16_224 or another ViT of timm through Timm" in reason
    own.__module__ = "transformers.models.mask2former.modeling_mask2former"
    assert "load a network of timm through TimmWrapperModel" in sbp.supports(own(2, 2)).reason
    wrapper = type("TimmWrapperModel", (nn.Sequential,), {"__module__": "transformers.models.timm_wrapper.modeling"})
    assert sbp.supports(wrapper(small_vit())).layers[0] == "0.blocks.0"
    assert "ResNet has no SBP form" in sbp.supports(wrapper(on_meta("resnet18"))).reason


def test_a_model_that_is_patched_or_wrapped():
    assert "already patched" in sbp.supports(sbp.apply(small_vit())).reason
    assert "take DistributedDataParallel" in sbp.supports(nn.DataParallel(small_vit())).reason


def test_vitamins_mlp_is_position_wise():
    model = on_meta("vitamin_small_224")
    assert isinstance(model, VisionTransformer) and sbp.supports(model)


def test_the_page_lists_all_of_timms_modules():
    """Otherwise: python -m scripts.supported"""
    text = PAGE.read_text()
    if f"timm {timm.__version__} " not in text:
        pytest.skip("the page is that of another timm")
    for module in timm.list_modules():
        assert f"`{module}`" in text, module
        assert not (f"| `{module}` |" in text and module in REASONS), module


@pytest.mark.long
def test_the_page_of_one_module():
    refused = {module: refusals_of(module) for module in ("vision_transformer_hybrid", "visformer")}
    text = re.sub(" +", " ", page(refused))
    assert "| `vision_transformer_hybrid` | 14 | 14 |" in text and "`visformer` 2" in text
