import itertools
import math

import pytest
import torch

from sbp import masks
from sbp.settings import MASK_PER, MASKS


@pytest.mark.parametrize("size", [(14, 14), (7, 9), (4, 4), (1, 5), (25, 42)])
@pytest.mark.parametrize("ratio", [1 / 8, 0.2, 0.25, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 0.75, 0.9, 0.123, 0.001, 1.0])
def test_the_kept_count_depends_on_grid_and_ratio_only(size, ratio):
    positions = math.prod(size)
    counts = {int(masks.grid_mask(*size, ratio, offset).sum()) for offset in range(12)}
    assert counts == {masks.kept_count("grid", positions, ratio)}
    (count,) = counts
    assert count >= 1 and abs(count - ratio * positions) <= max(0.5, 1 - ratio * positions)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7])
def test_grid_masks_follow_the_published_formula(n):
    """(i + j) mod n = offset is kept for 1/n and dropped for 1 - 1/n, but for the odd ones that fix the count."""
    i, j = torch.meshgrid(torch.arange(14), torch.arange(14), indexing="ij")
    for offset in range(n):
        published = (i + j) % n == offset
        pairs = [(masks.grid_mask(14, 14, 1 / n, offset), published)]
        if n > 2:
            pairs.append((masks.grid_mask(14, 14, 1 - 1 / n, offset), ~published))
        for mask, expected in pairs:
            assert (mask != expected).sum() == abs(int(mask.sum()) - int(expected.sum())) <= (0 if n in (2, 7) else 2)


def test_ratios_that_the_published_formula_confuses_are_told_apart():
    kept = [int(masks.grid_mask(14, 14, ratio).sum()) for ratio in (0.4, 0.5, 0.6)]
    assert kept == [78, 98, 118]


@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.4, 0.45, 0.55, 0.7, 0.85])
def test_grid_masks_are_regular(ratio):
    """Every row and column, and every 5 x 5 window, keeps nearly the same share."""
    for offset in range(7):
        mask = masks.grid_mask(14, 14, ratio, offset).double()
        windows = torch.nn.functional.avg_pool2d(mask[None, None], 5, stride=1)
        assert (mask.mean(0) - ratio).abs().max() < 0.15 and (mask.mean(1) - ratio).abs().max() < 0.15
        assert (windows - ratio).abs().max() < 0.11


def test_offsets_visit_every_position_equally_often():
    total = sum(masks.grid_mask(14, 14, 0.4, offset).int() for offset in range(5))
    assert total.float().mean() == 5 * 78 / 196
    assert set(total.flatten().tolist()) <= {1, 2, 3} and (total == 2).float().mean() > 0.9


@pytest.mark.parametrize("ratio", [0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0])
def test_random_masks_drop_the_published_number(ratio):
    generator = torch.Generator().manual_seed(0)
    first, second = (masks.random_mask(14, 14, ratio, generator) for _ in range(2))
    assert (~first).sum() == (~second).sum() == int((1 - ratio) * 14 * 14)
    assert ratio == 1 or not torch.equal(first, second)
    assert torch.equal(first, masks.random_mask(14, 14, ratio, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("mask_per", MASK_PER)
@pytest.mark.parametrize("kind", MASKS)
def test_drawn_masks_are_nested(kind, mask_per):
    ratios = [0.6, 0.25, 0.5, 0.75, 0.25, 1.0, 0.1]
    for draw in range(20):
        key = masks.draw_key(0, 0, torch.tensor(draw))
        drawn = masks.nested_masks(kind, 14, 14, ratios, key, mask_per, images=5)
        assert sorted(drawn) == sorted(set(ratios))
        assert all(mask.shape == ((14, 14) if mask_per == "batch" else (5, 14, 14)) for mask in drawn.values())
        for small, large in zip(sorted(drawn), sorted(drawn)[1:], strict=False):
            assert not (drawn[small] & ~drawn[large]).any()
            assert (drawn[large].sum((-2, -1)) == masks.kept_count(kind, 196, large)).all()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", [(14, 14), (7, 9)])
@pytest.mark.parametrize("ratios", [[0.1], [0.4], [0.5], [0.6], [0.9], [1.0], [0.2, 0.3, 0.5], [0.3, 0.7, 0.8, 0.95]])
def test_the_halves_of_a_batch_share_as_little_as_they_can(kind, size, ratios):
    for draw in range(10):
        key = masks.draw_key(0, 0, torch.tensor(draw))
        halves = masks.nested_masks(kind, *size, ratios, key, "half", images=5)
        alone = masks.nested_masks(kind, *size, ratios[:1], key)[ratios[0]]
        for ratio, (first, second, third, fourth, fifth) in halves.items():
            assert torch.equal(first, second) and torch.equal(first, third) and torch.equal(fourth, fifth)
            positions, kept = math.prod(size), masks.kept_count(kind, math.prod(size), ratio)
            assert (first & fourth).sum() == max(0, 2 * kept - positions)
        assert torch.equal(halves[ratios[0]][0], alone)  # what the whole batch would have


def test_the_halves_of_a_batch_are_complementary_where_scores_are_equal(monkeypatch):
    monkeypatch.setattr(masks, "hashed_scores", lambda key, count, stream=0: torch.arange(count) // 4)
    first, second = masks.nested_masks("random", 5, 6, [0.5], torch.tensor(0), "half", images=2)[0.5]
    assert torch.equal(first, ~second)


@pytest.mark.parametrize("kind", MASKS)
def test_the_mask_of_an_image_depends_on_its_place_and_not_on_the_others(kind):
    key = masks.draw_key(3, 1, torch.tensor(7))
    many, few = (masks.nested_masks(kind, 14, 14, [0.2, 0.5], key, "sample", images) for images in (32, 5))
    for ratio, mask in few.items():
        assert torch.equal(many[ratio][:5], mask)
    assert len(many[0.2].unique(dim=0)) >= (5 if kind == "grid" else 32)
    other = masks.nested_masks(kind, 14, 14, [0.2], masks.draw_key(3, 2, torch.tensor(7)), "sample", 32)
    assert not torch.equal(other[0.2], many[0.2])


@pytest.mark.parametrize("kind", MASKS)
def test_every_image_keeps_every_position_about_as_often(kind):
    """Over draws, whatever its place; and two places agree as often as chance has it."""
    keys = masks.draw_key(0, 0, torch.arange(1000))
    drawn = masks.nested_masks(kind, 4, 4, [0.25], keys, "sample", 3)[0.25].double()  # (1000, 3, 4, 4)
    alone = masks.nested_masks(kind, 4, 4, [0.25], keys[7], "sample", 3)[0.25]
    assert torch.equal(drawn[7], alone.double())
    assert (drawn.sum(0) - 250).abs().max() < 5 * math.sqrt(1000 * 0.25 * 0.75)
    both = (drawn[:, 0] * drawn[:, 1]).sum(0)
    assert (both - 1000 / 16).abs().max() < 5 * math.sqrt(1000 / 16)


@pytest.mark.parametrize("ratio", [0.001, 0.25, 0.4, 0.75, 1.0])
def test_masks_of_several_keys_are_those_of_each(ratio):
    keys = masks.hashed_scores(torch.tensor(5), 6)
    grids = masks.grid_mask(5, 7, ratio, keys)
    fine = masks.enlarge(grids, 11, 15, 2)
    count = masks.kept_count("grid", 35, ratio)
    keep, drop = masks.positions(grids, count, prefix=1)
    for i, key in enumerate(keys):
        assert torch.equal(grids[i], masks.grid_mask(5, 7, ratio, int(key)))
        assert torch.equal(fine[i], masks.enlarge(grids[i], 11, 15, 2))
        alone = masks.positions(grids[i], count, prefix=1)
        assert torch.equal(keep[i], alone.keep) and torch.equal(drop[i], alone.drop)
        assert torch.equal(masks.hashed_scores(keys, 9)[i], masks.hashed_scores(key, 9))


@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_a_pure_function_of_seed_rank_and_draw(kind):
    def mask(seed, rank, draw):
        return masks.nested_masks(kind, 14, 14, [0.2], masks.draw_key(seed, rank, torch.tensor(draw)))[0.2]

    assert torch.equal(mask(1, 2, 3), mask(1, 2, 3))
    for other in (
        [mask(1, 2, d) for d in range(20)],
        [mask(1, r, 3) for r in range(20)],
        [mask(s, 2, 3) for s in range(20)],
    ):
        assert len({tuple(m.flatten().tolist()) for m in other}) >= (5 if kind == "grid" else 20)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("size", "ratio"),
    [
        *itertools.product(
            [(14, 14), (4, 4), (7, 7)],
            [1 / 32, 0.05, 0.1, 1 / 8, 0.2, 0.25, 1 / 3, 0.4, 0.5, 2 / 3, 0.9, 0.95],
        ),
        *(((25, 42), ratio) for ratio in (0.05, 0.4)),
    ],
)
def test_every_position_is_kept_about_as_often(kind, size, ratio):
    """Over many draws: a position that was never kept would never give a gradient."""
    draws = 1500
    drawn = masks.nested_masks(kind, *size, [ratio], masks.draw_key(0, 0, torch.arange(draws)))[ratio]
    for draw in (0, draws - 1):  # as they are drawn one by one
        alone = masks.nested_masks(kind, *size, [ratio], masks.draw_key(0, 0, torch.tensor(draw)))[ratio]
        assert torch.equal(drawn[draw], alone)
    kept = drawn.sum(0)
    expected = draws * masks.kept_count(kind, math.prod(size), ratio) / math.prod(size)
    slack = 0.25 * expected + 5 * math.sqrt(expected)
    assert kept.min() > expected - slack and kept.max() < expected + slack


@pytest.mark.parametrize(
    ("side", "ratio", "off"),
    [(14, 0.5, 0), (8, 0.5, 0), (8, 0.25, 0), (7, 0.5, 0.05), (7, 0.25, 0.13), (6, 0.25, 0.17)],
)
def test_how_evenly_a_grid_keeps_its_positions(side, ratio, off):
    """Over all of its masks; exactly where the pattern divides the grid."""
    period = round(1 / ratio)
    drawn = torch.stack([masks.grid_mask(side, side, ratio, offset) for offset in range(period * side**2)]).double()
    share = drawn.mean(0) / drawn.mean()
    assert float((share - 1).abs().max()) == pytest.approx(off, abs=0.01)


def test_a_grid_of_half_the_positions_has_two_masks():
    drawn = {masks.grid_mask(14, 14, 0.5, offset) for offset in range(100)}
    assert len({tuple(m.flatten().tolist()) for m in drawn}) == 2


def test_draws_are_uniform():
    """Chi-square of the offsets over consecutive draws, ranks and seeds, and of the random positions."""
    draws = torch.arange(20_000)
    for keys in (masks.draw_key(0, 0, draws), masks.draw_key(7, 3, draws), masks.draw_key(0, 1, draws * 4)):
        assert keys.min() >= 0 and keys.max() < 2**32
        for n in (2, 3, 7, 10, 64):
            observed = torch.bincount(keys % n, minlength=n).double()
            chi_square = ((observed - 20_000 / n) ** 2 / (20_000 / n)).sum()
            assert chi_square < n - 1 + 5 * math.sqrt(2 * (n - 1)) + 5
        assert abs(torch.corrcoef(torch.stack([keys[:-1], keys[1:]]).double())[0, 1]) < 0.03
    over_ranks = torch.stack([masks.draw_key(0, rank, torch.tensor(5)) for rank in range(4096)])
    assert abs((over_ranks % 2).double().mean() - 0.5) < 0.03
    times_kept = sum(
        masks.nested_masks("random", 4, 4, [0.25], masks.draw_key(0, 0, torch.tensor(draw)))[0.25].int()
        for draw in range(2000)
    )
    assert (times_kept - 500).abs().max() < 5 * math.sqrt(2000 * 0.25 * 0.75)


def test_streams_of_one_draw_are_independent():
    key = masks.draw_key(0, 0, torch.tensor(0))
    scores = torch.stack([masks.hashed_scores(key, 1000, stream) for stream in range(4)]).double()
    assert (torch.corrcoef(scores) - torch.eye(4)).abs().max() < 0.12


def test_positions_are_the_mask():
    mask = masks.random_mask(5, 6, 0.3, torch.Generator().manual_seed(0))
    keep, drop = masks.positions(mask, int(mask.sum()), prefix=2)
    assert keep[:2].tolist() == [0, 1]
    assert torch.equal(keep[2:] - 2, mask.flatten().nonzero()[:, 0])
    assert torch.equal(drop - 2, (~mask).flatten().nonzero()[:, 0])


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), "0.5", None, True])
def test_a_bad_ratio_is_named(ratio):
    for make in (masks.grid_mask, masks.random_mask):
        with pytest.raises(ValueError, match=r"keep_ratio must be a number in \(0, 1\]"):
            make(14, 14, ratio)
