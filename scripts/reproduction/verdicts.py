"""The rule that decides a claim, fixed before the runs, and what it says of differences and costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean

from scipy.stats import ttest_1samp

RULE = """\
Runs are paired by their seed. For each comparison the differences of the pairs have a mean with a 95 % interval
(Student's t). The measure is the validation loss after the last epoch, or the cosine similarity of gradients, mean
over the checkpoints from the middle and the end of training. No epoch is chosen, and intervals are not corrected
for their number.

- **reproduced**: the whole interval lies on the side that is claimed
- **opposite**: the whole interval lies on the other side
- **not separated**: zero is within it
- **not run**: fewer than three pairs, or a cost that decides and was not measured

That 0.5 is the sweet spot is compared with the other ratios and ways to train in the claim's table: reproduced where
the other needs more memory in a step or, by more than two in a hundred, more time in all; else by the difference of
the losses.
Table 1's memory is one measurement on a GPU: reproduced when SBP takes at most the talk's share of what plain training
takes, for all four networks.

A claim with several comparisons is reproduced when all of them are, opposite when one is opposite, not run when one has
not run, and else not separated."""

REPRODUCED, OPPOSITE, NOT_SEPARATED, NOT_RUN = "reproduced", "opposite", "not separated", "not run"
CONFIDENCE = 0.95
LEAST_PAIRS = 3
SAME_TIME = 1.02  # two in a hundred


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences and its interval. pairs: how many."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> str:
        """On the claim that the difference is above zero."""
        if self.pairs < LEAST_PAIRS:
            return NOT_RUN
        if self.low > 0:
            return REPRODUCED
        return OPPOSITE if self.high < 0 else NOT_SEPARATED


@dataclass(frozen=True)
class Cost:
    """memory: bytes of a training step. time: seconds of the whole training."""

    memory: float
    time: float


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """`first` minus `second`, over the seeds that both have."""
    values = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if len(values) < 2:
        return Difference(fmean(values) if values else 0.0, -inf, inf, len(values))
    interval = ttest_1samp(values, 0).confidence_interval(CONFIDENCE)
    return Difference(fmean(values), float(interval.low), float(interval.high), len(values))


def combined(verdicts: Sequence[str]) -> str:
    """Of a claim, from those of its comparisons."""
    for decisive in (OPPOSITE, NOT_RUN, NOT_SEPARATED):
        if decisive in verdicts:
            return decisive
    return REPRODUCED if verdicts else NOT_RUN


def of_table_1(reached: Sequence[bool], networks: int) -> str:
    """reached: of each network that was measured, whether SBP takes at most the talk's share of the memory."""
    if len(reached) < networks:
        return NOT_RUN
    return REPRODUCED if all(reached) else OPPOSITE


def not_dominated(advantage: Difference, own: Cost, other: Cost) -> str:
    """On the claim that the other way to train is not as lean, as fast and better than our own.

    advantage: validation loss of the other minus our own.
    """
    if advantage.pairs < LEAST_PAIRS:
        return NOT_RUN
    return REPRODUCED if needs_more(own, other) else advantage.verdict


def needs_more(own: Cost, other: Cost) -> str:
    """What the other way to train needs more of: "memory", "time", both, or ""."""
    needs = {"memory": other.memory > own.memory, "time": other.time > SAME_TIME * own.time}
    return " and ".join(name for name, more in needs.items() if more)
