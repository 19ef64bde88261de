"""Stochastic backpropagation (SBP) for timm vision models.

The forward pass runs whole; the backward pass goes through a kept subset of spatial positions, and nothing of
the dropped ones is saved (Fang et al., "An In-depth Study of Stochastic Backpropagation", NeurIPS 2022).
"""

from sbp import masks
from sbp.diagnostics import GradientCosine, compare_gradients, gradient, gradient_cosine
from sbp.flops import Flops, count_flops
from sbp.functional import keep_gradient
from sbp.memory import saved_bytes
from sbp.patch import (
    Support,
    apply,
    disabled,
    effective_keep_ratio,
    fixed_mask,
    hold_mask,
    load_mask_state,
    mask_state,
    remove,
    set_draw,
    set_keep_ratio,
    supports,
)
from sbp.schedule import keep_ratio_at

__all__ = [
    "Flops",
    "GradientCosine",
    "Support",
    "apply",
    "compare_gradients",
    "count_flops",
    "disabled",
    "effective_keep_ratio",
    "fixed_mask",
    "gradient",
    "gradient_cosine",
    "hold_mask",
    "keep_gradient",
    "keep_ratio_at",
    "load_mask_state",
    "mask_state",
    "masks",
    "remove",
    "saved_bytes",
    "set_draw",
    "set_keep_ratio",
    "supports",
]
