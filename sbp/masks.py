"""Which positions keep their gradient: pure functions of a grid, a ratio and one number.

A mask is a bool tensor (H, W), True where the gradient is kept; masks of several images are (B, H, W). How many
positions it keeps depends on the grid and the ratio alone, so every shape is known before the mask is drawn: nothing
here waits for a device, and all of it can be traced into a compiled graph.

Grid masks: Fang et al., NeurIPS 2022, "Gradient Keep Mask". Sources of everything else are named where used.
"""

from fractions import Fraction
from math import gcd
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST_PERIOD = 64  # of a grid pattern; finer ratios are met by the exact count
_WORD = 0xFFFFFFFF


class Positions(NamedTuple):
    """The two halves of a set of positions, each ascending.

    keep: (K,) or (B, K) int64, where the gradient is kept. drop: (D,) or (B, D) int64, all other positions.
    """

    keep: Tensor
    drop: Tensor


def check_keep_ratio(keep_ratio: float) -> float:
    """Returns the ratio as a float; raises ValueError unless it is a number in (0, 1]."""
    if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, Real) or not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must be a number in (0, 1], got {keep_ratio!r}")
    return float(keep_ratio)


def kept_count(kind: str, positions: int, keep_ratio: float) -> int:
    """How many of `positions` a mask keeps, at least 1.

    A grid mask takes the nearest count; a random mask drops exactly int((1 - keep_ratio) * positions), as
    published.
    """
    if kind == "grid":
        count = int(keep_ratio * positions + 0.5)
    else:
        count = positions - int((1 - keep_ratio) * positions)
    return max(1, count)


def grid_mask(height: int, width: int, keep_ratio: float, offset: int | Tensor = 0) -> Tensor:
    """A regular mask of diagonals, bool (..., height, width).

    Keeps (i, j) when (i + j) mod n = offset for a ratio of 1/n, drops it for 1 - 1/n: the published formula.
    Other ratios p/q keep p of q diagonals, as evenly spread as whole diagonals can be; then single positions
    are added or taken away until exactly `kept_count("grid", ...)` are kept, whatever the offset. Offsets beyond
    n or q repeat the pattern with other single positions.

    offset: int, or an int64 tensor (...), on whose device as many masks are then made.
    Raises ValueError for a ratio outside (0, 1].
    """
    keep_ratio = check_keep_ratio(keep_ratio)
    scores = _grid_scores(height, width, keep_ratio, torch.as_tensor(offset))
    return _lowest(scores, kept_count("grid", height * width, keep_ratio)).unflatten(-1, (height, width))


def random_mask(height: int, width: int, keep_ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """A uniformly random mask, bool (height, width), on the generator's device (the CPU without one).

    Raises ValueError for a ratio outside (0, 1].
    """
    keep_ratio = check_keep_ratio(keep_ratio)
    device = generator.device if generator is not None else None
    scores = torch.rand(height * width, generator=generator, device=device)
    return _lowest(scores, kept_count("random", height * width, keep_ratio)).view(height, width)


def nested_masks(
    kind: str,
    height: int,
    width: int,
    keep_ratios: list[float],
    key: Tensor,
    mask_per: str = "batch",
    images: int = 1,
) -> dict[float, Tensor]:
    """What one draw gives each different ratio: bool (height, width), or (images, height, width) for other `mask_per`.

    A smaller mask lies within a larger one. key: the random number of this draw, from `draw_key`. mask_per: "batch";
    "half" (of an odd number of images the first half is the larger); or "sample".
    """
    if mask_per == "sample":
        key = hashed_scores(key, images, stream=-1)
    masks: dict[float, Tensor] = {}
    inner = None
    for keep_ratio in sorted(set(keep_ratios)):
        if kind == "grid":
            scores = _grid_scores(height, width, keep_ratio, key)
        else:
            scores = hashed_scores(key, height * width)
        if mask_per == "half":  # ranks, as equal scores would be the lowest of both
            ranks = scores.argsort(stable=True).argsort()
            scores = torch.stack([ranks, -ranks])
        if inner is not None:
            limits = torch.iinfo(scores.dtype)
            if mask_per == "half":  # what the other half keeps comes last
                scores = scores.masked_fill(inner.flip(0), scores.new_full((), limits.max))
            scores = scores.masked_fill(inner, scores.new_full((), limits.min))
        inner = _lowest(scores, kept_count(kind, height * width, keep_ratio))
        masks[keep_ratio] = inner.unflatten(-1, (height, width))
    if mask_per == "half":
        half = (2 * torch.arange(images, device=key.device) >= images + images % 2).long()
        masks = {ratio: two.index_select(0, half) for ratio, two in masks.items()}
    return masks


def enlarge(mask: Tensor, height: int, width: int, factor: int) -> Tensor:
    """The masks (..., H, W) of a finer map, bool (..., height, width): factor x factor follow one base position.

    Rows and columns past the last whole block follow the last base row and column.
    """
    rows = (torch.arange(height, device=mask.device) // factor).clamp(max=mask.shape[-2] - 1)
    columns = (torch.arange(width, device=mask.device) // factor).clamp(max=mask.shape[-1] - 1)
    return mask[..., rows[:, None], columns]


def positions(mask: Tensor, count: int, prefix: int = 0) -> Positions:
    """The kept and the dropped positions of flattened masks (..., H, W), of which each keeps `count`.

    prefix: number of positions in front of the mask that are always kept (class and register tokens).
    """
    order = torch.argsort(~mask.flatten(-2), dim=-1, stable=True) + prefix
    always = torch.arange(prefix, device=mask.device).expand(*order.shape[:-1], prefix)
    order = torch.cat([always, order], -1)
    return Positions(order[..., : prefix + count], order[..., prefix + count :])


def draw_key(seed: int, rank: int, draw: Tensor) -> Tensor:
    """The random number of one draw, int64 in [0, 2^32): a pure function of its arguments.

    draw: int64 tensor without dimensions. Being arithmetic on a tensor, this runs on the device and within a
    compiled graph, where a torch.Generator cannot.
    """
    return _hash(draw ^ _hash(rank ^ _hash(seed)))


def hashed_scores(key: Tensor, count: int, stream: int = 0) -> Tensor:
    """`count` random numbers, int64 (..., count), in [0, 2^32), different for each key of (...) and stream."""
    numbers = torch.arange(count, device=key.device)
    return _hash(_hash(key ^ _hash(stream + 1))[..., None] + numbers)


def _hash(x):
    """Mixes the bits of an int or int64 tensor into [0, 2^32).

    Two rounds of a 32-bit multiply-xorshift hash whose multipliers (from the "hash-prospector" search, C.
    Wellons) are below 2^31, so that no product leaves the range of int64, on any device.
    """
    x = (x + 0x9E3779B9) & _WORD
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _WORD
    return x ^ (x >> 15)


def _grid_scores(height: int, width: int, keep_ratio: float, offset: Tensor) -> Tensor:
    """Scores (..., H*W) int64, all different: the k lowest are the grid mask that keeps k positions."""
    if keep_ratio == 1:
        return torch.arange(height * width, device=offset.device).expand(*offset.shape, -1)
    if keep_ratio > 0.5:  # published: the same pattern, of dropped positions
        return -_diagonal_scores(height, width, 1 - keep_ratio, offset)
    return _diagonal_scores(height, width, keep_ratio, offset)


def _diagonal_scores(height: int, width: int, ratio: float, offset: Tensor) -> Tensor:
    kept, period, diagonal, row_step, tie_step = _pattern(height, width, ratio)
    offset = offset[..., None, None]
    i = torch.arange(height, device=offset.device)[:, None]
    j = torch.arange(width, device=offset.device)
    # Each round of offsets starts from another place, lest the odd ones out be the same for ever.
    turn = offset // period
    rolled_i, rolled_j = (i + turn) % height, (j + turn // height) % width
    if not diagonal:
        i, j = rolled_i, rolled_j
    # The `kept` lowest of `period` phases are evenly spaced (a Bresenham line).
    phase = ((j - offset % period) * kept + i * row_step) % period
    # Within a phase rows are taken in strides, lest the odd ones out lie side by side.
    order = rolled_i * tie_step % height * width + rolled_j
    return (phase * (height * width) + order).flatten(-2)


@torch.compiler.assume_constant_result
def _pattern(height: int, width: int, ratio: float) -> tuple[int, int, bool, int, int]:
    """Kept phases, the period they repeat with, whether they are diagonals, the phase's step from row to row, and
    the stride among ties.

    Diagonals further apart than the grid is wide would leave it empty. Then the phase steps by a golden section of
    the period, which spreads the few positions over the grid (a rank-1 lattice).
    """
    pattern = Fraction(ratio).limit_denominator(_LARGEST_PERIOD)
    if pattern == 0:
        pattern = Fraction(1, min(round(1 / ratio), height * width))
    kept, period = pattern.numerator, pattern.denominator
    diagonal = period <= max(height, width)
    return kept, period, diagonal, kept if diagonal else _golden_section(period), _golden_section(height)


def _golden_section(length: int) -> int:
    """The number nearest to 0.618 * length that has no divisor in common with it."""
    return min((n for n in range(1, length + 1) if gcd(n, length) == 1), key=lambda n: abs(n - 0.618 * length))


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Bool (..., N): True at the `count` lowest scores (..., N)."""
    chosen = torch.argsort(scores, dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
