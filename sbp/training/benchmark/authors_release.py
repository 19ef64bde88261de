"""The authors' own SBP models, imported from a folder that holds their release.

https://github.com/amazon-science/stochastic-backpropagation, branch neurips2022. It was written for timm 0.3.2;
the modules it imports from there are made to stand for those of today's timm, for as long as the import takes.
"""

import importlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import timm.layers
import timm.models
from timm.models import ConvNeXt, VisionTransformer
from torch import nn

from sbp.state import states

_PACKAGE = "sbp_authors_release"


def release_model(folder: Path, model: nn.Module, drop_path: float) -> nn.Module:
    """Their model with the sizes, SBP layers and SBP settings of `model`, a timm ViT or ConvNeXt after `sbp.apply`.

    Raises ValueError when the folder does not hold the release, and for what their code cannot do.
    """
    if not (folder / "models" / "vit_sbp.py").is_file():
        raise ValueError(f"release={folder} does not hold models/vit_sbp.py of the authors' branch neurips2022")
    (state,) = states(model)
    if len(set(state.keep_ratios)) > 1:
        raise ValueError("sbp.keep_ratio must be one number: the authors' models know no other")
    common: dict[str, Any] = {
        "drop_path_rate": drop_path,
        "grad_keep_ratio": state.keep_ratios[0],
        "grad_mask_sampling_method": state.settings.mask,
    }
    with redirect_stdout(io.StringIO()):  # they print their settings
        if isinstance(model, VisionTransformer):
            return _vit(folder, model, state.layers, common | {"drop_attn_option": state.settings.mhsa_drop})
        return _convnext(folder, model, state.layers, common)  # type: ignore[arg-type]


def _vit(folder: Path, model: Any, layers: list[str], common: dict[str, Any]) -> nn.Module:
    if model.global_pool != "token" or model.num_prefix_tokens != 1:
        raise ValueError("the authors' ViT has a class token and reads nothing else")
    block = model.blocks[0]
    return _load(folder, "vit_sbp").VisionTransformerSBP(
        img_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        num_classes=model.num_classes,
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
        qkv_bias=block.attn.qkv.bias is not None,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        grad_drop_list=[int(f"blocks.{i}" in layers) for i in range(len(model.blocks))],
        **common,
    )


def _convnext(folder: Path, model: ConvNeXt, layers: list[str], common: dict[str, Any]) -> nn.Module:
    stages: list[Any] = list(model.stages)
    scale = stages[0].blocks[0].gamma
    return _load(folder, "convnext_sbp").ConvNeXtSBP(
        num_classes=model.num_classes,
        depths=[len(stage.blocks) for stage in stages],
        dims=[stage.blocks[0].conv_dw.in_channels for stage in stages],
        layer_scale_init_value=0.0 if scale is None else 1e-6,  # the value has no bearing on time or memory
        grad_drop_list=[
            [int(f"stages.{i}.blocks.{j}" in layers) for j in range(len(stage.blocks))]
            for i, stage in enumerate(stages)
        ],
        grad_drop_downsample_layers="stages.1.downsample" in layers,
        **common,
    )


def _load(folder: Path, name: str) -> Any:
    """models/<name>.py of the release, as a module."""
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(folder / "models")]
    registry = ModuleType("timm.models.registry")
    registry.register_model = lambda function: function  # type: ignore[attr-defined]  # timm's own stays as it is
    stand_ins = {
        _PACKAGE: package,
        "timm.models.helpers": timm.models,
        "timm.models.layers": timm.layers,
        "timm.models.registry": registry,
    }
    with _standing_in(stand_ins):
        return importlib.import_module(f"{_PACKAGE}.{name}")


@contextmanager
def _standing_in(modules: dict[str, ModuleType]) -> Iterator[None]:
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    version = timm.__version__
    sys.modules.update(modules)
    timm.__version__ = "0.3.2"
    try:
        yield
    finally:
        timm.__version__ = version
        for name in [name for name in sys.modules if name in modules or name.startswith(f"{_PACKAGE}.")]:
            del sys.modules[name]
        sys.modules.update(before)
