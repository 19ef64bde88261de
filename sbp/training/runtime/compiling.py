"""torch.compile of a whole model, or of its blocks: blocks of one kind share their code, which takes seconds."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from sbp.backbone import COMPILED

HOW = ("blocks", "model")


def compile_model(model: nn.Module, how: str, *, keep_ratios: int = 1, **options: Any) -> None:
    """Compiles in place; names of parameters stay. Call it when the model is on its device.

    how: "model", or "blocks": each block and downsampling layer by itself. A ViT has at most three kinds (without SBP,
    with it, and the last one), a ConvNeXt two a stage and its downsampling layers. keep_ratios: how many different ones
    a run has, each of which is compiled anew, for shapes of its own. options: of torch.compile.
    """
    if how == "model":
        if keep_ratios > 1:
            _allow(torch._dynamo.config.recompile_limit + 2 * keep_ratios)  # exact epochs and probes beside them
            options = {"dynamic": False} | options
        model.compile(**options)
        return
    layers = blocks_of(model)
    _share_drop_path(layers)
    _allow(2 * len(layers) * keep_ratios)  # heads are drawn for each block by its number
    for layer in layers:
        method = getattr(layer, COMPILED, "forward")
        vars(layer)[method] = torch.compile(getattr(layer, method), dynamic=False, **options)


def _allow(recompilations: int) -> None:
    """Of one function, before torch.compile warns and leaves it as it is."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, recompilations)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, limits.recompile_limit)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The children of what timm calls `blocks`, and the downsampling layers between stages."""
    named = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    blocks = [block for name, module in named if name == "blocks" for block in module.children()]
    return blocks + [one for name, one in named if name == "downsample" and not isinstance(one, nn.Identity)]


def _share_drop_path(layers: list[nn.Module]) -> None:
    """Makes the rate, which is another one in each block, a tensor: each number would be compiled anew."""
    paths = [
        (layer, name, path)
        for layer in layers
        for name, path in layer.named_children()
        if name.startswith("drop_path") and type(path) in (DropPath, nn.Identity)
    ]
    if all(isinstance(path, nn.Identity) for *_, path in paths):
        return
    for layer, name, path in paths:
        setattr(layer, name, _TensorDropPath(path, next(layer.parameters()).device))


class _TensorDropPath(DropPath):
    """timm's `DropPath`, whose rate is a tensor; other random numbers."""

    def __init__(self, path: nn.Module, device: torch.device) -> None:
        rate, scale_by_keep = getattr(path, "drop_prob", 0.0), getattr(path, "scale_by_keep", True)
        super().__init__(rate, scale_by_keep)
        self.keep = torch.tensor(1 - rate, device=device)
        self.train(path.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < self.keep
        scale = kept.to(x.dtype)
        return x * (scale / self.keep if self.scale_by_keep else scale)
