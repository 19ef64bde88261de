"""Mixed precision: autocast, and weights that are cast to it in one call rather than one by one.

Autocast casts each weight where it is first read, and its gradient back: two launches a weight, a quarter of all in a
ViT-Base's step, each of which moves little. Here one foreach call casts all weights before a pass, and one for each
block its gradients, as soon as it has them. Values and memory are those of autocast.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """Mixed precision as `amp` says: "off", "bfloat16" or "float16"."""
    return torch.autocast(device.type, DTYPES[amp]) if amp in DTYPES else nullcontext()


class _Weight(NamedTuple):
    layer: nn.Module
    name: str
    parameter: nn.Parameter


class Casts:
    """Copies of the weights of a model's linear layers and convolutions, for as long as a pass lasts.

    dtype: that of autocast. Parameters, their names and the state dict stay as they are: a copy only hides its weight
    from the layer. What a layer did not read as it is, such as a weight that a layer scale is folded into, is left to
    autocast from the second pass on.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._groups = list(_groups(model))
        self._read: set[nn.Parameter] = set()  # in the backward pass

    def put(self) -> None:
        """Casts, and lets the layers read the copies until `remove`, which has to wait for the backward pass."""
        self.remove()
        copies = [[torch.empty_like(one.parameter, dtype=self.dtype) for one in group] for group in self._groups]
        with torch.no_grad():
            torch._foreach_copy_(
                [copy for group in copies for copy in group], [one.parameter for group in self._groups for one in group]
            )
        for group, empty in zip(self._groups, copies, strict=True):
            for one, copy in zip(group, _Cast.apply(empty, self._read, *(one.parameter for one in group)), strict=True):
                vars(one.layer)[one.name] = copy  # found before the parameter of this name

    def remove(self) -> None:
        for group in self._groups:
            for one in group:
                vars(one.layer).pop(one.name, None)
        if self._read:
            groups = ([one for one in group if one.parameter in self._read] for group in self._groups)
            self._groups = [group for group in groups if group]
            self._read.clear()


class _Cast(torch.autograd.Function):
    """Gives out copies of weights; casts their gradients back, together."""

    @staticmethod
    def forward(ctx: Any, copies: list[Tensor], read: set[nn.Parameter], *weights: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.weights, ctx.read = weights, read
        ctx.set_materialize_grads(False)
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = {p: gradient for p, gradient in zip(ctx.weights, gradients, strict=True) if gradient is not None}
        ctx.read.update(found)
        cast = [torch.empty_like(gradient, dtype=p.dtype) for p, gradient in found.items()]
        torch._foreach_copy_(cast, list(found.values()))
        by_weight = dict(zip(found, cast, strict=True))
        return None, None, *map(by_weight.get, ctx.weights)


def _groups(model: nn.Module) -> Iterator[list[_Weight]]:
    """The weights that autocast would cast: of each block, in what timm calls `blocks`, and of all that is left."""
    containers = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks"]
    blocks = [block for container in containers for block in container.children()]
    seen: set[nn.Module] = set()
    for part in [*blocks, model]:
        group = []
        for layer in part.modules():
            if layer not in seen and type(layer) in (nn.Linear, nn.Conv2d):
                seen.add(layer)
                group += [_Weight(layer, n, p) for n, p in layer.named_parameters(recurse=False) if p.requires_grad]
        if group:
            yield group
