"""The rotary embedding of queries and keys: where its angles are learned it saves nothing beside what attention saves.

Shapes: B images, h heads, n tokens (P prefix tokens among them), d channels of a head.
"""

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor
from torch.autograd.function import once_differentiable


def turned(x: Tensor, rope: Tensor, half: bool) -> Tensor:
    """x (B, h, n, d), whose last tokens are turned by the angles of `rope`, sine and cosine (..., n - P, 2 d).

    half: which channels are pairs, as timm's `rotate_half`. Angles that are learned need the tokens before they were
    turned; these are had by turning them back, so that of x nothing is saved beside the result. torch.compile chooses
    by itself what it saves.
    """
    learned = rope.requires_grad and not torch.compiler.is_compiling()
    return _Turn.apply(x, rope, half) if learned else _turn(x, rope, half)


def _turn(x: Tensor, rope: Tensor, half: bool) -> Tensor:
    prefix = x.shape[2] - rope.shape[-2]
    out = apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)
    return torch.cat([x[:, :, :prefix], out], 2).type_as(x)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rope: Tensor, half: bool) -> Tensor:
        out = _turn(x, rope, half)
        ctx.save_for_backward(out, rope)
        ctx.half = half
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        out, rope = ctx.saved_tensors
        sine, cosine = rope.chunk(2, -1)
        back = torch.cat([-sine, cosine], -1)
        grad_rope = None
        if ctx.needs_input_grad[1]:
            tokens = rope.shape[-2]
            length = torch.cat([sine**2 + cosine**2] * 2, -1)  # one, but for rounding
            x = apply_rot_embed_cat(out[:, :, -tokens:].to(rope.dtype), back / length, half=ctx.half)
            quarter = torch.cat([torch.ones_like(sine), torch.zeros_like(cosine)], -1)
            of_tokens = grad[:, :, -tokens:]
            parts = of_tokens * apply_rot_embed_cat(x, quarter, half=ctx.half), of_tokens * x
            grad_rope = torch.cat(parts, -1).sum_to_size(rope.shape)
        return _turn(grad, back, ctx.half), grad_rope, None
