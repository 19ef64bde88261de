"""Branches that give their input its gradient and their weights none, for next to no memory: `dropped="input"`.

What a linear layer's input gradient needs is its weights. What a norm or an activation function needs of a position is
small: the normalised input in 8 bits, and the activation's derivative in 4 (after Novikov et al., Few-Bit Backward,
ICML 2023, who find 3 to lose nothing). So a position of norm, linear (C, 4 C), activation, linear (4 C, C) saves 3 C
bytes, and not the 10 C of C and 4 C numbers in bfloat16 that a kept one does.

Shapes: positions (B, n, C), or the pixels of patches, (B, n * s * s, C), which the first linear layer reads together.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GELU, GELUTanh, LayerNorm, LayerNorm2d, RmsNorm, RmsNorm2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sbp.recompute import Weights

_CENTRED = {LayerNorm: True, LayerNorm2d: True, nn.LayerNorm: True, RmsNorm: False, RmsNorm2d: False}
_LEVELS, _ONE, _ZERO = 15, 12, 2  # derivatives are k / 12 - 1 / 6 for k = 0 .. 15: from -1/6 to 13/12, with 0 and 1


def obstacle(norm: Any, act: nn.Module | None = None, *others: nn.Module) -> str | None:
    """Why a branch of these parts cannot be one of these; None where it can. others: have to do nothing."""
    if type(norm) not in _CENTRED or norm.weight is None:
        return f"a {type(norm).__name__}"
    if act is not None and type(act) not in _ACTIVATIONS:
        return f"a {type(act).__name__} (known are GELU, SiLU and ReLU)"
    for one in others:
        if not isinstance(one, nn.Identity) and not (isinstance(one, nn.Dropout) and one.p == 0):
            return f"a {type(one).__name__}"
    return None


def branch(x: Tensor, norm: Any, up: Weights, act: nn.Module | None = None, down: Weights | None = None) -> Tensor:
    """down(act(up(norm(x)))), or up(norm(x)), with gradient for x alone; of parts that have no `obstacle`."""
    tensors = norm.weight, getattr(norm, "bias", None), *up, *(down or (None, None, None))
    parts = [one.detach() if isinstance(one, Tensor) else None for one in tensors]
    return _InputGradient.apply(x, _CENTRED[type(norm)], norm.eps, type(act), *parts)


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        centred: bool,
        eps: float,
        act: type,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        up_scale: Tensor | None,
        down: Tensor | None,
        down_bias: Tensor | None,
        down_scale: Tensor | None,
    ) -> Tensor:
        size = x.shape[-1:]
        if centred:
            normed = F.layer_norm(x, size, norm_weight, norm_bias, eps)
        else:
            normed = F.rms_norm(x, size, norm_weight, eps)
        normalised, rstd = _normalised(x, centred, eps)
        hidden = F.linear(normed.reshape(len(x), -1, up.shape[1]).to(up.dtype), up, up_bias)
        if down is None:
            y, derivative, last_scale = hidden, None, up_scale
        else:
            derivative = packed_derivative(_ACTIVATIONS[act][1](hidden))
            y, last_scale = F.linear(_ACTIVATIONS[act][0](hidden), down, down_bias), down_scale
        ctx.save_for_backward(*quantized_rows(normalised), rstd, derivative, norm_weight, up, down, last_scale)
        ctx.centred, ctx.dtype, ctx.shape = centred, x.dtype, x.shape
        return y if last_scale is None else y * last_scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, steps, rstd, derivative, norm_weight, up, down, scale = ctx.saved_tensors
        if scale is not None:
            grad = (grad * scale).to(up.dtype)
        if down is not None:
            grad = grad @ down
            grad = grad * unpacked_derivative(derivative, grad.shape[-1], grad.dtype)
        grad = (grad @ up).reshape(ctx.shape).to(norm_weight.dtype) * norm_weight
        normalised = dequantized_rows(codes, steps, grad.dtype)
        centre = grad.mean(-1, keepdim=True) if ctx.centred else 0.0
        along = (grad * normalised).mean(-1, keepdim=True)
        return (rstd * (grad - centre - normalised * along)).to(ctx.dtype), *[None] * 11


def _normalised(x: Tensor, centred: bool, eps: float) -> tuple[Tensor, Tensor]:
    """x of mean 0, where it is centred, and variance 1; and 1 / standard deviation (B, n, 1). At least float32."""
    x = x if x.dtype == torch.float64 else x.float()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * rstd, rstd


# -- few bits


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., C) as int8 (..., C), and steps (..., 1): off by at most half of one, 1/254 of a row's largest number."""
    steps = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / steps).round_().to(torch.int8), steps


def dequantized_rows(codes: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype) * steps.to(dtype)


def packed_derivative(x: Tensor) -> Tensor:
    """Derivatives x (..., n) in 4 bits each, as uint8 (..., ceil(n / 2)): off by at most 1/24 from -5/24 to 27/24."""
    codes = (x * _ONE).add_(_ZERO).round_().clamp_(0, _LEVELS).to(torch.uint8)
    if codes.shape[-1] % 2:
        codes = F.pad(codes, (0, 1))
    low, high = codes.chunk(2, -1)
    return torch.add(low, high, alpha=16)


def unpacked_derivative(packed: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    codes = torch.cat([packed & 15, packed >> 4], -1)[..., :channels]
    return codes.to(dtype).sub_(_ZERO).div_(_ONE)


# -- derivatives of activation functions: between -0.13 and 1.13 (GELU), -0.1 and 1.1 (SiLU)


def _of_gelu(approximate: str) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)


def _of_silu(x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(torch.ones_like(x), x)


def _of_relu(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


_GELU, _TANH = (F.gelu, _of_gelu("none")), (lambda x: F.gelu(x, approximate="tanh"), _of_gelu("tanh"))
_ACTIVATIONS: dict[type, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    nn.GELU: _GELU,
    GELU: _GELU,
    GELUTanh: _TANH,
    nn.SiLU: (F.silu, _of_silu),
    nn.ReLU: (F.relu, _of_relu),
}
