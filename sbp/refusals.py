"""Why a model has no SBP form, and what would work in its place.

No library is imported to find out: the module that a class was defined in names it.
"""

from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn

# Why SBP has no form of a network, and timm's modules with such networks alone.
_REASONS = {
    "convolutions mix positions in all of its layers": """
        byobnet cpubone csatv2 cspnet cspnext densenet dla dpn edgenext efficientnet efficientvim fasternet
        fastvit focalnet ghostnet hardcorenas hgnet hrnet inception_next inception_resnet_v2 inception_v3
        inception_v4 lcnetv2 mambaout mobilenetv3 mobilenetv5 nasnet nfnet pnasnet rdnet regnet repghost repvit
        res2net resnest resnet resnetv2 rexnet selecsls senet sknet starnet tresnet vgg vovnet xception
        xception_aligned""",
    "SBP does not know its attention": """
        cait coat convit davit deepseek_vit gcvit gemma4_vit hieradet_sam2 lowformer maxxvit
        mvitv2 nest pvt_v2 qwen3_vit shvit swin_transformer_v2_cr tnt twins
        vision_transformer_sam volo xcit""",
    "convolutions and batch norm stand among its attention blocks": """
        byoanet efficientformer efficientformer_v2 efficientvit_mit efficientvit_msra iformer levit metaformer
        nextvit swiftformer tiny_vit visformer""",
    "its layers mix all positions without attention": "convmixer mlp_mixer sequencer",
    "its blocks work on two grids of tokens at once, which exchange their class tokens": "crossvit",
    "it pools its tokens by convolutions that overlap, and its blocks are in no VisionTransformer": "pit",
    "its blocks see tokens that are folded out of the maps of the convolutions around them": "mobilevit",
    "each of its images may have a grid of its own, padded and masked (without use_naflex=True a ViT is timm's "
    "VisionTransformer, which is supported)": "naflexvit",
}
REASONS = {module: reason for reason, modules in _REASONS.items() for module in modules.split()}

_WRAPPER = "TimmWrapperModel or TimmWrapperForImageClassification"
# Other libraries: what the module of a class starts with, and what is to be used.
_OTHERS = {
    "torchvision.models.vision_transformer": "use timm.create_model('vit_base_patch16_224') and so on",
    "torchvision.models.convnext": "use timm.create_model('convnext_tiny') and so on",
    "torchvision.models.swin_transformer": "use timm.create_model('swin_tiny_patch4_window7_224') and so on",
    **{
        f"transformers.models.{own}": f"load {timms} of timm through {_WRAPPER}"
        for own, timms in {
            "vit": "vit_base_patch16_224 or another ViT",
            "dinov2": "vit_base_patch14_dinov2 or another ViT",
            "dinov2_with_registers": "vit_base_patch14_reg4_dinov2 or another ViT",
            "dinov3_vit": "vit_base_patch16_dinov3 or another EVA",
            "dinov3_convnext": "convnext_tiny or another ConvNeXt",
            "convnext": "convnext_tiny or another ConvNeXt",
            "convnextv2": "convnextv2_tiny or another ConvNeXt",
            "swin": "swin_tiny_patch4_window7_224 or another Swin",
            "swinv2": "swinv2_tiny_window8_256 or another Swin",
            "beit": "beit_base_patch16_224 or another BEiT",
            "hiera": "hiera_tiny_224 or another Hiera",
        }.items()
    },
    "transformers.models": f"load a network of timm through {_WRAPPER}",
}


def why_not(model: nn.Module, supported: str) -> str:
    """Why no family found a backbone in `model`. supported: what they look for."""
    timms = [one for one in model.modules() if type(one).__module__.rpartition(".")[2] in REASONS and _is_timms(one)]
    if timms:
        reasons = [REASONS[type(one).__module__.rpartition(".")[2]] for one in timms]
        reason = min(reasons, key=[*REASONS.values()].count)  # of what is within, the most special
        return f"{type(timms[0]).__name__} has no SBP form, as {reason}{_instead(timms[0])}; supported are {supported}"
    for module in model.modules():
        where = f"{type(module).__module__}."
        library = next((one for one in _OTHERS if where.startswith(f"{one}.")), None)
        if library is not None and ".timm_" not in where:  # its wrappers of timm's networks are no reason
            owner = "torchvision" if library.startswith("torchvision") else "Hugging Face"
            own = f"{type(module).__name__} is {owner}'s own and not timm's"
            return f"{own}: {_OTHERS[library]}; supported are {supported}"
    reason = f"found no blocks to train with SBP in {type(model).__name__}"
    if any(type(module) is Block and type(module.attn) is Attention for module in model.modules()):
        reason += ": it has timm's Block, but in no VisionTransformer, which would draw the masks"
    return f"{reason}; supported are {supported}"


def _instead(module: nn.Module) -> str:
    if not hasattr(module, "set_grad_checkpointing"):
        return ""
    return " (what saves memory there, exactly, is its set_grad_checkpointing())"


def _is_timms(module: nn.Module) -> bool:
    return type(module).__module__.startswith("timm.models.")
