"""A keep-ratio that changes over the epochs of a run: a pure function of the epoch."""

from collections.abc import Sequence

from sbp.masks import check_keep_ratio

Ratios = float | Sequence[float]  # one for all SBP layers, or one for each

LEVELS = 8  # of keep-ratios, evenly spaced up to 1


def keep_ratio_at(epoch: int, epochs: int, first: Ratios, last: Ratios) -> float | list[float]:
    """What to keep in epoch `epoch` of `epochs`, counted from 0, so that it changes evenly from `first` to `last`.

    In between it is rounded to multiples of 1 / 8, as another number of kept positions is another shape, which is
    compiled or captured anew: such a share is one, two, ... of every eight diagonals of a grid mask, and a grid of
    N positions keeps the nearest whole number to that share of N (`masks.kept_count`). A falling ratio is the rising
    one backwards; the first and the last epoch have `first` and `last` exactly.

    first, last: shares in (0, 1], each one number or, in the order of the network, one for each SBP layer; then a list
    is returned. Raises ValueError for other ratios, for lists of different lengths, and for an epoch that is not in
    [0, epochs).
    """
    if not 0 <= epoch < epochs:
        raise ValueError(f"epoch must lie in [0, {epochs}) (epochs), got {epoch}")
    if not isinstance(first, Sequence) and not isinstance(last, Sequence):
        return _between(epoch, epochs, check_keep_ratio(first), check_keep_ratio(last))
    length = max(len(one) for one in (first, last) if isinstance(one, Sequence))
    pairs = [list(one) if isinstance(one, Sequence) else [one] * length for one in (first, last)]
    if len(pairs[0]) != len(pairs[1]):
        raise ValueError(f"first and last must have as many keep-ratios, got {len(pairs[0])} and {len(pairs[1])}")
    return [
        _between(epoch, epochs, check_keep_ratio(one), check_keep_ratio(other))
        for one, other in zip(*pairs, strict=True)
    ]


def _between(epoch: int, epochs: int, first: float, last: float) -> float:
    if epoch == 0:
        return first
    if epoch == epochs - 1:
        return last
    even = ((epochs - 1 - epoch) * first + epoch * last) / (epochs - 1)
    # Halves go to the even multiple, so that over the run as many go up as down.
    return min(max(round(LEVELS * even) / LEVELS, min(first, last)), max(first, last))
