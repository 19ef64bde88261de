from math import inf

import numpy as np
import pytest
from scipy.stats import ttest_rel

from scripts.reproduction.verdicts import (
    NOT_RUN,
    NOT_SEPARATED,
    OPPOSITE,
    REPRODUCED,
    Cost,
    Difference,
    combined,
    difference,
    not_dominated,
)

CLEAR = Difference(0.1, 0.05, 0.15, 6)
REVERSED = Difference(-0.1, -0.15, -0.05, 6)
UNCLEAR = Difference(0.1, -0.05, 0.25, 6)
ENOUGH, FEW = (Difference(0.1, 0.05, 0.15, pairs) for pairs in (3, 2))


@pytest.mark.parametrize("pairs", [2, 3, 6])
def test_the_interval_is_that_of_the_paired_t_test(pairs):
    random = np.random.default_rng(pairs)
    first, second = random.normal(0.3, 1, pairs), random.normal(0, 1, pairs)
    found = difference(dict(enumerate(first)), dict(enumerate(second)))
    interval = ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert found.mean == pytest.approx((first - second).mean()) and found.pairs == pairs


def test_runs_are_paired_by_their_seed():
    found = difference({3: 1.0, 1: 5.0, 9: 7.0}, {1: 4.0, 2: 0.0, 3: 2.0})
    assert found.pairs == 2 and found.mean == 0.0
    assert difference({1: 1.0}, {1: 0.5}) == Difference(0.5, -inf, inf, 1)
    assert difference({1: 1.0}, {2: 1.0}).pairs == 0


@pytest.mark.parametrize(
    "gap, verdict",
    [(CLEAR, REPRODUCED), (ENOUGH, REPRODUCED), (REVERSED, OPPOSITE), (UNCLEAR, NOT_SEPARATED), (FEW, NOT_RUN)],
)
def test_a_comparison(gap, verdict):
    assert gap.verdict == verdict


@pytest.mark.parametrize(
    "verdicts, one",
    [
        ([REPRODUCED, REPRODUCED], REPRODUCED),
        ([REPRODUCED, NOT_SEPARATED], NOT_SEPARATED),
        ([REPRODUCED, NOT_RUN, NOT_SEPARATED], NOT_RUN),
        ([REPRODUCED, NOT_RUN, OPPOSITE], OPPOSITE),
        ([], NOT_RUN),
    ],
)
def test_a_claim_of_several_comparisons(verdicts, one):
    assert combined(verdicts) == one


@pytest.mark.parametrize(
    "gap, other, verdict",
    [
        (REVERSED, Cost(11, 9), REPRODUCED),  # better, but needs more memory
        (REVERSED, Cost(10, 10.5), REPRODUCED),  # or more time
        (REVERSED, Cost(10, 10.1), OPPOSITE),  # times so near are equal
        (UNCLEAR, Cost(9, 9), NOT_SEPARATED),
        (CLEAR, Cost(9, 9), REPRODUCED),
        (FEW, Cost(11, 9), NOT_RUN),
    ],
)
def test_the_sweet_spot(gap, other, verdict):
    """gap: validation loss of the other minus our own."""
    assert not_dominated(gap, Cost(10, 10), other) == verdict
