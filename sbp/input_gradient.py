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
_ONE, _ZERO = 12, 1  # derivatives are (code - 1) / 12 for codes 0 to 15: from -1/12 to 14/12, with 0 and 1
_MIDDLE, _LARGEST = 128, 127  # of the codes of normalised inputs: that of zero, and how far others are from it


def obstacle(norm: Any, act: nn.Module | None = None, *others: nn.Module) -> str | None:
    """Why a branch of these parts cannot be one of these; None where it can. others: have to do nothing."""
    if type(norm) not in _CENTRED or norm.weight is None:
        return f"a {type(norm).__name__}"
    if act is not None and type(act) not in _ACTIVATIONS:
        return f"a {type(act).__name__} (known are GELU, SiLU and ReLU)"
    for one in others:
        if not isinstance(one, nn.Identity) and not (isinstance(one, nn.Dropout) and one.p == 0):
            return f"a {type(one).__name__}" + " within the MLP" * (type(one) in _CENTRED)
    return None


def branch(x: Tensor, norm: Any, up: Weights, act: nn.Module | None = None, down: Weights | None = None) -> Tensor:
    """down(act(up(norm(x)))), or up(norm(x)), with gradient for x alone; of parts that have no `obstacle`."""
    tensors = norm.weight, getattr(norm, "bias", None), *up[:3], *((None, None, None) if down is None else down[:3])
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
        normed, mean, rstd = _norm(x, centred, norm_weight, norm_bias, eps)
        hidden = F.linear(normed.reshape(len(x), -1, up.shape[1]).to(up.dtype), up, up_bias)
        if down is None:
            y, derivative, last_scale = hidden, None, up_scale
        else:
            derivative = packed_derivative(_ACTIVATIONS[act][1](hidden))
            y, last_scale = F.linear(_ACTIVATIONS[act][0](hidden), down, down_bias), down_scale
        ctx.save_for_backward(*quantized_rows(x, mean), rstd, derivative, norm_weight, up, down, last_scale)
        ctx.centred, ctx.dtype, ctx.shape = centred, x.dtype, x.shape
        return y if last_scale is None else y * last_scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, per_unit, rstd, derivative, norm_weight, up, down, scale = ctx.saved_tensors
        if down is None:
            grad = grad if scale is None else (grad * scale).to(up.dtype)
        else:  # divided first, as float16 ends at a number that gradients times _ONE reach
            grad = (grad / _ONE if scale is None else grad * (scale / _ONE)).to(up.dtype)
            grad = times_derivative(grad @ down, derivative)
        grad = (grad @ up).reshape(ctx.shape)
        return _norm_backward(grad, codes, per_unit, rstd, norm_weight, ctx.centred).to(ctx.dtype), *[None] * 11


# -- the norm. Its input is known by codes, from which (x - mean) = (code - _MIDDLE) / per_unit


def _norm(
    x: Tensor, centred: bool, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The normed x; mean, where it is centred, and 1 / standard deviation, (B, n, 1), at least float32."""
    if centred:
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        return normed, _at_least_float32(mean), _at_least_float32(rstd)
    square = _at_least_float32(x).square().mean(-1, keepdim=True)
    return F.rms_norm(x, x.shape[-1:], weight, eps), None, (square + eps).rsqrt()


def _norm_backward(
    grad: Tensor, codes: Tensor, per_unit: Tensor, rstd: Tensor, weight: Tensor, centred: bool
) -> Tensor:
    """The gradient of a norm's input, from that of its output. At least float32."""
    weight, step = weight.to(rstd.dtype), rstd / per_unit  # of the normalised input, for each code
    if centred:  # the codes are normalised as if they were the input, which multiplies the gradient by step
        middle = torch.full_like(step, _MIDDLE)
        given = grad * per_unit, codes.to(rstd.dtype), codes.shape[-1:], middle, step, weight, None
        return torch.ops.aten.native_layer_norm_backward(*given, [True, False, False])[0]
    normalised = (codes.to(rstd.dtype) - _MIDDLE) * step
    grad = grad * weight
    return rstd * (grad - normalised * (grad * normalised).mean(-1, keepdim=True))


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# -- few bits. Each of these reads and writes everything again, so they are made of as few operators as there can be


def quantized_rows(x: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """x (..., C) less its rows' mean as uint8 codes (..., C), and per_unit (..., 1), how many are one unit of x.

    The codes are off by at most half of one: 1 / 254 of a row's largest number.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # torch.aminmax is far slower on a CPU
    if mean is None:
        mean = torch.zeros_like(_at_least_float32(low))
    per_unit = _LARGEST / torch.maximum(high - mean, mean - low).clamp_min(1e-12)
    half = mean.new_full((), _MIDDLE + 0.5)  # which makes codes positive, so that cutting them off rounds them
    return torch.addcmul(half, x - mean, per_unit).to(torch.uint8), per_unit


def packed_derivative(x: Tensor) -> Tensor:
    """_ONE times derivatives (..., n), which it may change, in 4 bits each, as uint8 (..., ceil(n / 2)).

    They are off by at most 1 / 24 from -1/12 to 14/12, and at most as much more as they are outside of that.
    """
    codes = x.add_(_ZERO + 0.5).to(torch.uint8)  # hardly ever below 0, which it then is
    if codes.shape[-1] % 2:
        codes = F.pad(codes, (0, 1))
    low, high = codes.chunk(2, -1)
    return torch.add(low, high, alpha=16)


def times_derivative(grad: Tensor, packed: Tensor) -> Tensor:
    """grad (..., n), which it changes, times _ONE times the derivatives."""
    half = packed.shape[-1]
    low, high = packed & 15, packed >> 4
    grad[..., :half].mul_(low.view(torch.int8).sub_(_ZERO))
    grad[..., half:].mul_(high.view(torch.int8).sub_(_ZERO)[..., : grad.shape[-1] - half])
    return grad


# -- _ONE times the derivatives of activation functions: of GELU between -0.13 and 1.13, of SiLU -0.1 and 1.1


def _times_one(x: Tensor) -> Tensor:
    """A gradient of _ONE everywhere, of which there is one number only."""
    return x.new_full((), _ONE).expand_as(x)


def _of_gelu(approximate: str) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.ops.aten.gelu_backward(_times_one(x), x, approximate=approximate)


def _of_silu(x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(_times_one(x), x)


def _of_relu(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype).mul_(_ONE)


_GELU, _TANH = (F.gelu, _of_gelu("none")), (lambda x: F.gelu(x, approximate="tanh"), _of_gelu("tanh"))
_ACTIVATIONS: dict[type, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    nn.GELU: _GELU,
    GELU: _GELU,
    GELUTanh: _TANH,
    nn.SiLU: (F.silu, _of_silu),
    nn.ReLU: (F.relu, _of_relu),
}
