"""The arithmetic of stochastic backpropagation: split positions into two streams, run, join.

    split         x (B, N, C)            ->  Streams(kept (B, K, C), dropped (B, D, C))
    kept_gradient f on both streams, remembering only what the kept one needs
    join          Streams                ->  (B, N, C)

Split and join are permutations, so both have an exact and cheap inverse: their backward passes are copies,
where autograd's own (index_add into zeros) would accumulate.

keep and drop: int64 index tensors (K,) and (D,) that together hold 0..N-1; or (B, K) and (B, D), for each image its
own, along dim 1 alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Streams(NamedTuple):
    """The kept and the dropped positions of one tensor.

    dropped is None where nothing reads the dropped positions, so that they need not be computed.
    """

    kept: Tensor
    dropped: Tensor | None


def keep_gradient(f: Callable[[Tensor], Tensor], x: Tensor, keep: Tensor, drop: Tensor, dim: int = 1) -> Tensor:
    """f(x), whose gradient is that of the kept positions alone (Algorithm 1 of Fang et al., NeurIPS 2022).

    f: any function that treats the positions along `dim` independently and keeps their number.
    x: tensor with N positions along `dim`. keep, drop: int64 index tensors (K,), (D,) that together hold 0..N-1, or
    (B, K), (B, D) with dim=1, for each image its own.
    Nothing is saved for the backward pass at dropped positions. Raises ValueError when keep and drop do not
    add up to N, or are not for the images of x.
    """
    if keep.shape[-1] + drop.shape[-1] != x.shape[dim]:
        raise ValueError(
            f"keep ({keep.shape[-1]}) and drop ({drop.shape[-1]}) must together be the {x.shape[dim]} positions "
            f"of dimension {dim} of x"
        )
    return join(kept_gradient(f, split(x, keep, drop, dim)), keep, drop, dim)


def split(x: Tensor, keep: Tensor, drop: Tensor, dim: int = 1) -> Streams:
    """Both streams carry gradient back to x. Raises ValueError for indices of another number of images."""
    if keep.ndim == 2 and (len(keep) != len(x) or dim != 1):
        raise ValueError(f"positions of {len(keep)} images along dimension 1 cannot split {len(x)} along {dim}")
    return Streams(*_Split.apply(x, keep, drop, dim))


def join(streams: Streams, keep: Tensor, drop: Tensor, dim: int = 1) -> Tensor:
    """The inverse of `split`; a dropped stream that is None leaves zeros."""
    kept, dropped = streams
    if dropped is not None:
        dropped = dropped.to(kept.dtype)  # index_copy takes one dtype only
    return _Join.apply(kept, dropped, keep, drop, dim)


def kept_gradient(f: Callable[[Tensor], Tensor], streams: Streams) -> Streams:
    """f on both streams, with gradient on the kept one only.

    The kept stream comes first: under autocast the weights are then cast once, with gradient.
    """
    kept = f(streams.kept)
    if streams.dropped is None:
        return Streams(kept, None)
    with torch.no_grad():
        return Streams(kept, f(streams.dropped))


def rescale_gradient(x: Tensor, scale: float, prefix: int = 0) -> Tensor:
    """x (B, n, C), whose gradient is multiplied by `scale`, but for the first `prefix` positions."""
    return x if scale == 1 else _Rescale.apply(x, scale, prefix)


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, prefix: int) -> Tensor:
        ctx.scale, ctx.prefix = scale, prefix
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        scaled = grad * ctx.scale
        scaled[:, : ctx.prefix] = grad[:, : ctx.prefix]
        return scaled, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, drop: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(keep, drop)
        ctx.dim = dim
        ctx.set_materialize_grads(False)
        return take(x, keep, dim), take(x, drop, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kept: Tensor | None, dropped: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if kept is None and dropped is None:
            return None, None, None, None
        keep, drop = ctx.saved_tensors
        return scatter(kept, dropped, keep, drop, ctx.dim), None, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept: Tensor, dropped: Tensor | None, keep: Tensor, drop: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(keep, drop)
        ctx.dim = dim
        return scatter(kept, dropped, keep, drop, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        keep, drop = ctx.saved_tensors
        kept = take(grad, keep, ctx.dim) if ctx.needs_input_grad[0] else None
        dropped = take(grad, drop, ctx.dim) if ctx.needs_input_grad[1] else None
        return kept, dropped, None, None, None


def scatter(kept: Tensor | None, dropped: Tensor | None, keep: Tensor, drop: Tensor, dim: int) -> Tensor:
    """A tensor with `kept` at keep and `dropped` at drop; zeros where one is None."""
    some = kept if kept is not None else dropped
    assert some is not None
    if torch.compiler.is_compiling():
        parts = [_or_zeros(part, some, index, dim) for part, index in ((kept, keep), (dropped, drop))]
        return take(torch.cat(parts, dim), _inverse(torch.cat([keep, drop], -1)), dim)
    shape = list(some.shape)
    shape[dim] = keep.shape[-1] + drop.shape[-1]
    whole = kept is not None and dropped is not None
    out = some.new_empty(shape) if whole else some.new_zeros(shape)
    for part, index in ((kept, keep), (dropped, drop)):
        if part is not None and index.ndim == 1:
            out.index_copy_(dim, index, part)
        elif part is not None:
            out.flatten(0, 1).index_copy_(0, _in_batch(index, shape[1]), part.flatten(0, 1))
    return out


def take(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """x at these positions along `dim`, (n,) or, along 1, (B, n)."""
    if index.ndim == 1:
        return x.index_select(dim, index)
    return x.flatten(0, 1).index_select(0, _in_batch(index, x.shape[1])).unflatten(0, index.shape)


def _or_zeros(part: Tensor | None, like: Tensor, index: Tensor, dim: int) -> Tensor:
    if part is not None:
        return part
    shape = list(like.shape)
    shape[dim] = index.shape[-1]
    return like.new_zeros(shape)


def _inverse(order: Tensor) -> Tensor:
    """Where each of 0..N-1 stands in permutations (..., N).

    For what is compiled: fused, reading from there costs no more than writing to `order` does, and torch 2.11 compiles
    a tensor that is made, then written to, as one without gradient, or into gradients of zero.
    """
    numbers = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, numbers)


def _in_batch(index: Tensor, positions: int) -> Tensor:
    """(B, K) among each image's positions to (B * K,) among all: whole rows are copied, where gather takes numbers."""
    return (index + positions * torch.arange(len(index), device=index.device)[:, None]).flatten()
