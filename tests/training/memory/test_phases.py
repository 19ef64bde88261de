from dataclasses import replace

from sbp.training.memory.forecast import with_sbp
from sbp.training.memory.phases import EXACT, phases
from tests.training import runs

CONFIG = replace(runs.configured(), recipe=replace(runs.configured().recipe, epochs=3))


def test_a_run_whose_steps_are_alike_is_its_own_phase():
    for config in (CONFIG, with_sbp(CONFIG, enabled=False), with_sbp(CONFIG, recompute="block")):
        assert phases(config) == {"all epochs": config}


def test_a_changing_keep_ratio_has_its_ends_as_phases_where_the_last_keeps_more():
    for first, last, ends in (
        (0.25, 0.75, [0.25, 0.75]),
        (0.75, 0.25, [0.75]),
        ([0.5, 0.5], [0.25, 0.75], [[0.5, 0.5], [0.25, 0.75]]),
        ([0.5, 0.75], 0.5, [[0.5, 0.75]]),
    ):
        config = with_sbp(CONFIG, keep_ratio=first, keep_ratio_end=last)
        expected = [with_sbp(CONFIG, keep_ratio=one) for one in ends]
        assert list(phases(config).values()) == expected
        with_exact = with_sbp(config, exact_epochs=1)
        assert list(phases(with_exact).values()) == [*expected, with_sbp(CONFIG, keep_ratio=1.0)]
    assert list(phases(with_sbp(CONFIG, keep_ratio=0.25, keep_ratio_end=0.75))) == [
        "keep_ratio 0.25",
        "keep_ratio 0.75",
    ]


def test_exact_epochs_are_a_phase_with_their_own_recomputation():
    for own in ("none", "cheap"):
        for again in (None, "none", "block"):
            sbp = with_sbp(CONFIG, recompute=own, mhsa_drop="query")
            config = with_sbp(sbp, exact_epochs=1, exact_recompute=again)
            assert phases(config) == {"SBP": sbp, EXACT: with_sbp(CONFIG, keep_ratio=1.0, recompute=again or own)}
            assert list(phases(with_sbp(config, exact_epochs=3))) == [EXACT]
