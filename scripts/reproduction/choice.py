"""What each way to train costs and loses: the table that a setting is chosen from."""

from collections.abc import Iterator, Mapping
from math import isfinite
from statistics import fmean

from scripts.reproduction.arms import ARMS
from scripts.reproduction.claims import Claim, arms_of
from scripts.reproduction.evidence import Evidence, label
from scripts.reproduction.verdicts import LEAST_PAIRS, NOT_RUN, difference


def trained(claim: Claim, one: Evidence) -> list[str]:
    """The arms to choose from, with runs enough; [] where there is no choice, or nothing that the claim asks was run.

    Of arms that differ in their costs alone those whose costs are known.
    """
    found = [arm for arm in arms_of([claim], one.setting) if len(one.trained(arm, "top1")) >= LEAST_PAIRS]
    found = [arm for arm in found if ARMS[arm].same_as is None or one.cost(arm) is not None]
    asked = not claim.comparisons or any(finding.verdict != NOT_RUN for finding in one.findings(claim))
    return found if asked and "plain" in found and len(found) > 1 else []


def relative(one: Evidence, arm: str) -> tuple[float, float] | None:
    """Time of the whole training and memory of a step, relative to plain training's; None where not measured.

    With as many epochs, that is the time of a step, too.
    """
    own, plain = one.cost(arm), one.cost("plain")
    return None if own is None or plain is None else (own.time / plain.time, own.memory / plain.memory)


def table(claim: Claim, one: Evidence) -> Iterator[list[str]]:
    """Top-1 in points against plain training and against published SBP, in pairs of runs of the same seed."""
    memory = "peak" if one.on_cuda else "saved"
    yield ["setting", "runs", "top-1 %", "against no SBP", "against published SBP", "time", memory]
    plain, published = one.trained("plain", "top1"), one.trained("sbp", "top1")
    for arm in trained(claim, one):
        top1, costs = one.trained(arm, "top1"), relative(one, arm)
        gaps = ["" if of is top1 or of == top1 else in_points(top1, of) for of in (plain, published)]
        shares = ["", ""] if costs is None else [f"{share:.2f}" for share in costs]
        same = ARMS[arm].same_as
        runs = str(len(top1)) if same is None else f"as {label(same)}"
        yield [label(arm), runs, f"{fmean(top1.values()):.2f}", *gaps, *shares]


def in_points(top1: Mapping[int, float], of: Mapping[int, float]) -> str:
    """Mean difference, and its 95 % interval."""
    gap = difference(top1, of)
    if not gap.pairs:
        return ""
    interval = f" [{gap.low:+.2f}, {gap.high:+.2f}]" if isfinite(gap.low) else ""
    return f"{gap.mean:+.2f}{interval}"
