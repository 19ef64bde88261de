"""Counts the floating-point operations of a forward and a backward pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


class Flops(NamedTuple):
    """Floating-point operations of matrix products, convolutions and attention; a multiplication with addition is 2."""

    forward: int
    backward: int


def count_flops(compute_loss: Callable[[], Tensor]) -> Flops:
    """The operations of `compute_loss()` and of the backward pass from the scalar that it returns.

    Adds to the gradients, as any backward pass does. Counts by shapes, so fake tensors do as well as real ones.
    """
    corrected = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=corrected) as counter:
        loss = compute_loss()
        forward = counter.get_total_flops()
        loss.backward()
    return Flops(forward, counter.get_total_flops() - forward)


def _convolution_backward(
    grad_shape: list[int], x_shape: list[int], weight_shape: list[int], *args: Any, **kwargs: Any
) -> int:
    """Each of the two gradients costs what the forward pass did; torch's own formula multiplies by the groups too."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, (needs_x, needs_weight, _) = args
    return (needs_x + needs_weight) * conv_flop_count(x_shape, weight_shape, grad_shape, transposed)
