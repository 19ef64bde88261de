"""The gradient that dropped positions are lent by kept ones around them: `dropped="neighbours"`.

A dropped position has no gradient of its branch's input, which everything in front then lacks. Where neighbours see
much the same, as in the maps of a convolutional network, the mean of theirs is near to it. It costs no memory, and a
few passes over C numbers a position.

Shapes: maps of H x W = N positions, divided into cells of factor x factor, of which the mask keeps or drops each as a
whole; K and D positions are kept and dropped.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sbp.functional import Streams, scatter, take
from sbp.masks import Positions
from sbp.state import LayerMap


class Neighbourhood(NamedTuple):
    """What the layers of one map have in common in a forward pass.

    keep, drop: int64 (K,), (D,) or (B, K), (B, D). cells: of the dropped positions, as `drop`. kept: how many of each
    cell and those around it are kept, at least 1, (1 or B, cells, 1). where: the map.
    """

    keep: Tensor
    drop: Tensor
    cells: Tensor
    kept: Tensor
    where: LayerMap


def neighbourhood(positions: Positions, where: LayerMap) -> Neighbourhood:
    """That of the map's kept and dropped positions."""
    keep, drop = positions
    ones = torch.ones(keep.shape if keep.ndim == 2 else (1, len(keep)), device=keep.device)
    kept = _around(scatter(ones[..., None], None, keep, drop, 1), where)
    return Neighbourhood(keep, drop, _cells(drop, where), kept.clamp_min(1), where)  # of none the sum is 0


def split(x: Tensor, around: Neighbourhood) -> Streams:
    """As `functional.split`, of x (B, N, C). In its gradient the kept positions lend theirs to the dropped ones."""
    return Streams(*_Split.apply(x, *around))


def lent(kept: Tensor, around: Neighbourhood) -> Tensor:
    """Kept positions (B, K, C) as they are; dropped ones as the mean of those in the 3 x 3 cells around theirs, or 0.

    Returns (B, N, C).
    """
    sums = _around(scatter(kept, None, around.keep, around.drop, 1), around.where)
    dropped = take(sums / around.kept.to(kept.dtype), around.cells)
    return scatter(kept, dropped, around.keep, around.drop, 1)


def _around(x: Tensor, where: LayerMap) -> Tensor:
    """The means of x (B, N, C) over cells, summed over each and those around it. (B, cells, C)."""
    maps = x.unflatten(1, (where.height, where.width)).permute(0, 3, 1, 2)  # channels last
    cells = F.avg_pool2d(maps, where.factor) if where.factor > 1 else maps
    return F.avg_pool2d(cells, 3, stride=1, padding=1, divisor_override=1).flatten(2).transpose(1, 2)


def _cells(positions: Tensor, where: LayerMap) -> Tensor:
    """The cell of each position. At the border those that fill none belong to the last one, as in `masks.enlarge`."""
    rows, columns = where.height // where.factor, where.width // where.factor
    row = (positions // where.width // where.factor).clamp_max(rows - 1)
    column = (positions % where.width // where.factor).clamp_max(columns - 1)
    return row * columns + column


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keep: Tensor, drop: Tensor, cells: Tensor, kept: Tensor, where: LayerMap
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(keep, drop, cells, kept)
        ctx.where = where
        dropped = take(x, drop)
        ctx.mark_non_differentiable(dropped)
        return take(x, keep), dropped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        keep, drop, cells, kept = ctx.saved_tensors
        around = Neighbourhood(keep, drop, cells, kept, ctx.where)
        return lent(grad, around), *[None] * len(around)
