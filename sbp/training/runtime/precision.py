"""Mixed precision: autocast, and weights that are cast to it in one call rather than one by one.

Autocast casts each weight where it is first read, and its gradient back: two launches a weight, a quarter of all in a
ViT-Base's step, each of which moves little. Here one foreach call casts all weights before a pass, and one for each
block its gradients, as soon as it has them. Values and memory are those of autocast.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """Mixed precision as `amp` says: "off", "bfloat16" or "float16"."""
    return torch.autocast(device.type, DTYPES[amp]) if amp in DTYPES else nullcontext()


class _Weight(NamedTuple):
    layer: nn.Module
    name: str
    parameter: nn.Parameter


class _Group(NamedTuple):
    """The weights of a part of the model."""

    part: nn.Module
    weights: list[_Weight]


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
        self._waiting: list[RemovableHandle] = []

    def put(self) -> None:
        """Casts, and lets the layers read the copies until `remove`, which has to wait for the backward pass."""
        self.remove()
        parameters = [[one.parameter for one in group.weights] for group in self._groups]
        copies = [[torch.empty_like(p, dtype=self.dtype) for p in of_group] for of_group in parameters]
        with torch.no_grad():
            torch._foreach_copy_(list(chain(*copies)), list(chain(*parameters)))
        for group, of_group in zip(self._groups, copies, strict=True):
            self._give_when_called(group, of_group)

    def _give_when_called(self, group: _Group, copies: list[Tensor]) -> None:
        """Autograd casts gradients back in the order in which it was given the copies: those of each part when it is
        called, so that a block's gradients are there as soon as its backward pass is through.
        """

        def give(*_: Any) -> None:
            handle.remove()  # a recomputation calls the part again, and reads the same copies
            with torch.enable_grad():  # of a part that runs without, to be recomputed
                given = _Cast.apply(copies, self._read, *(one.parameter for one in group.weights))
            for one, copy in zip(group.weights, given, strict=True):
                vars(one.layer)[one.name] = copy  # found before the parameter of this name

        handle = group.part.register_forward_pre_hook(give)
        self._waiting.append(handle)

    def remove(self) -> None:
        while self._waiting:
            self._waiting.pop().remove()
        for group in self._groups:
            for one in group.weights:
                vars(one.layer).pop(one.name, None)
        if self._read:
            groups = ((part, [one for one in weights if one.parameter in self._read]) for part, weights in self._groups)
            self._groups = [_Group(part, weights) for part, weights in groups if weights]
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


def _groups(model: nn.Module) -> Iterator[_Group]:
    """The weights that autocast would cast: of each block, in what timm calls `blocks`, and of all that is left."""
    containers = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks"]
    blocks = [block for container in containers for block in container.children()]
    seen: set[nn.Module] = set()
    for part in [*blocks, model]:
        weights = []
        for layer in part.modules():
            if layer not in seen and type(layer) in (nn.Linear, nn.Conv2d):
                seen.add(layer)
                weights += [_Weight(layer, n, p) for n, p in layer.named_parameters(recurse=False) if p.requires_grad]
        if weights:
            yield _Group(part, weights)
