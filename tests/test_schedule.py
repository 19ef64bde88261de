from fractions import Fraction

import pytest

from sbp.masks import kept_count
from sbp.schedule import LEVELS, keep_ratio_at


def over(epochs, first, last):
    return [keep_ratio_at(epoch, epochs, first, last) for epoch in range(epochs)]


@pytest.mark.parametrize("epochs", [2, 3, 9, 10, 300])
@pytest.mark.parametrize(("first", "last"), [(0.25, 0.75), (0.0625, 0.5), (0.3, 0.9), (0.5, 1.0), (0.4, 0.45)])
def test_it_changes_evenly_in_few_steps_between_its_ends(epochs, first, last):
    found = over(epochs, first, last)
    assert (found[0], found[-1]) == (first, last) and found == sorted(found)
    for epoch, ratio in enumerate(found):
        even = Fraction(first) + (Fraction(last) - Fraction(first)) * Fraction(epoch, epochs - 1)
        assert abs(ratio - even) <= Fraction(1, 2 * LEVELS) + Fraction(1, 10**12)
    assert all((LEVELS * ratio).is_integer() for ratio in {*found} - {first, last})
    assert over(epochs, last, first) == found[::-1]


@pytest.mark.parametrize("epochs", [2, 3, 9, 10, 12, 100, 300])
def test_its_mean_is_the_middle(epochs):
    """So that it costs what that ratio would."""
    for first, last in ((0.25, 0.75), (0.75, 0.25), (0.125, 0.875)):
        assert sum(over(epochs, first, last)) / epochs == 0.5


@pytest.mark.parametrize("positions", [16, 49, 64, 196])
def test_grids_keep_at_most_nine_numbers_of_positions_over_a_run(positions):
    counts = {kept_count("grid", positions, ratio) for ratio in over(300, 0.01, 0.99)}
    assert len(counts) <= LEVELS + 1


def test_layers_change_each_by_itself():
    found = over(5, [0.25, 0.5, 1.0], 0.5)
    assert found == [list(each) for each in zip(*(over(5, first, 0.5) for first in (0.25, 0.5, 1.0)), strict=True)]
    assert over(5, 0.5, [0.25, 0.5, 1.0]) == found[::-1]
    assert keep_ratio_at(0, 1, 0.5, 0.25) == 0.5  # the only epoch there is


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((5, 5, 0.5, 0.25), r"epoch must lie in \[0, 5\) \(epochs\), got 5"),
        ((-1, 5, 0.5, 0.25), r"epoch must lie in \[0, 5\) \(epochs\), got -1"),
        ((0, 5, 0, 0.25), r"keep_ratio must be a number in \(0, 1\], got 0"),
        ((0, 5, 0.5, [0.5, 2]), r"keep_ratio must be a number in \(0, 1\], got 2"),
        ((0, 5, [0.5], [0.5, 1]), "first and last must have as many keep-ratios, got 1 and 2"),
    ],
)
def test_what_is_wrong_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        keep_ratio_at(*given)
