"""The gradient that dropped positions are lent by kept ones around them: `dropped="neighbours"`.

A dropped position has no gradient of its branch's input, which everything in front then lacks. Where neighbours see
much the same, as in the maps of a convolutional network, the mean of theirs is near to it. It costs no memory, and a
few passes over C numbers a position.

Shapes: maps of H x W = N positions, divided into cells of factor x factor, of which the mask keeps or drops each as a
whole; K and D positions are kept and dropped.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sbp.functional import Streams, scatter, take
from sbp.state import LayerMap


def lend(streams: Streams, keep: Tensor, drop: Tensor, where: LayerMap) -> Tensor:
    """The kept stream, whose gradient is lent to the dropped one as well.

    streams: (B, K, C) and (B, D, C). keep, drop: int64 (K,), (D,) or (B, K), (B, D). where: the map that they index.
    """
    assert streams.dropped is not None
    return _Lend.apply(streams.kept, streams.dropped, keep, drop, where)


def mean_of_neighbours(kept: Tensor, keep: Tensor, drop: Tensor, where: LayerMap) -> Tensor:
    """For each dropped position the mean of the kept ones in its own and the eight cells around it; 0 without any.

    kept: (B, K, C). Returns (B, D, C).
    """
    ones = kept.new_ones((*keep.shape, 1)) if keep.ndim == 2 else kept.new_ones((1, len(keep), 1))
    sums, counts = (_over_cells(scatter(one, None, keep, drop, 1), where) for one in (kept, ones))
    means = sums / counts.clamp_min(0.5 / 9)  # of less than one cell there is no mean
    return take(means, _cells(drop, where))


def _over_cells(x: Tensor, where: LayerMap) -> Tensor:
    """The mean of x (B, N, C) over each cell and those around it, beyond the border zeros. (B, cells, C)."""
    maps = x.unflatten(1, (where.height, where.width)).permute(0, 3, 1, 2)  # channels last
    cells = F.avg_pool2d(maps, where.factor) if where.factor > 1 else maps
    return F.avg_pool2d(cells, 3, stride=1, padding=1).flatten(2).transpose(1, 2)


def _cells(positions: Tensor, where: LayerMap) -> Tensor:
    """The cell of each position. At the border those that fill none belong to the last one, as in `masks.enlarge`."""
    rows, columns = where.height // where.factor, where.width // where.factor
    row = (positions // where.width // where.factor).clamp_max(rows - 1)
    column = (positions % where.width // where.factor).clamp_max(columns - 1)
    return row * columns + column


class _Lend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept: Tensor, dropped: Tensor, keep: Tensor, drop: Tensor, where: LayerMap) -> Tensor:
        ctx.save_for_backward(keep, drop)
        ctx.where = where
        return kept.view_as(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        keep, drop = ctx.saved_tensors
        return grad, mean_of_neighbours(grad, keep, drop, ctx.where), None, None, None
