"""The phases of a run, in each of which all steps are alike: SBP, with one keep-ratio or several; exact epochs."""

from dataclasses import replace
from typing import Any

from sbp.training.config.keys import shown
from sbp.training.config.run import Config

EXACT = "exact epochs"


def phases(config: Config) -> dict[str, Config]:
    """By name, in their order, a config all of whose steps are those of the phase; of a run of one kind itself.

    Of a keep-ratio that changes the first and, where any layer then keeps more, the last: no step needs more than both.
    """
    sbp = config.sbp
    if not sbp.enabled or not (sbp.exact_epochs or sbp.keep_ratio_end is not None):
        return {"all epochs": config}
    alike = replace(sbp, keep_ratio_end=None, exact_epochs=0, exact_recompute=None)
    found = {"SBP": replace(config, sbp=alike)}
    if sbp.keep_ratio_end is not None:
        first, last = sbp.keep_ratio, sbp.keep_ratio_end
        ends = [first, last] if _keeps_more(last, first) else [first]
        found = {f"keep_ratio {shown(one)}": replace(config, sbp=replace(alike, keep_ratio=one)) for one in ends}
    if not sbp.exact_epochs:
        return found
    # What concerns masks alone is as by default, so that runs whose exact epochs are alike have the same config here.
    again = sbp.recompute if sbp.exact_recompute is None else sbp.exact_recompute
    exact = replace(alike, keep_ratio=1.0, recompute=again, mhsa_drop="qkv", dropped="none")
    last_phase = {EXACT: replace(config, sbp=exact)}
    return found | last_phase if sbp.exact_epochs < config.recipe.epochs else last_phase


def _keeps_more(last: Any, first: Any) -> bool:
    """Whether any layer does."""
    length = max(len(one) if isinstance(one, list) else 1 for one in (last, first))
    pairs = [one if isinstance(one, list) else [one] * length for one in (last, first)]
    return any(one > other for one, other in zip(*pairs, strict=True))
