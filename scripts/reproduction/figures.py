"""The figures of RESULTS.md, which can be read in print and without colour."""

from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from scripts.reproduction import choice
from scripts.reproduction.arms import ARMS, NULLS
from scripts.reproduction.claims import STAGES, Claim, arms_of, gradients_of
from scripts.reproduction.evidence import Evidence, Finding, label, standard_error
from scripts.reproduction.verdicts import NOT_RUN, difference

MIB = 2**20
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h")
LINES = ("-", "--", ":", "-.")
BUBBLE = 600  # points², of the memory of plain training


def draw(claim: Claim, one: Evidence, path: Path) -> None:
    """The figure of a claim in a setting; none where nothing was run, and an old one is removed."""
    findings = [finding for finding in one.findings(claim) if finding.verdict != NOT_RUN]
    path.unlink(missing_ok=True)
    figure = choices(claim, one) if claim.shows == "choice" else None
    if figure is None and not findings:
        return
    if claim.shows == "similarities":
        figure = similarities(claim, one)
    elif claim.shows == "costs" and one.costs:
        figure = trade_offs(claim, one)
    elif figure is None:
        figure = differences(findings)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def differences(findings: list[Finding]) -> Any:
    """Mean advantage and 95 % interval of each comparison; a panel for each measure."""
    titles = {"val_loss": "advantage in validation loss (nats)", "cosine": "advantage in cosine similarity"}
    measures = [measure for measure in titles if any(one.measure == measure for one in findings)]
    most = max(sum(one.measure == measure for one in findings) for measure in measures)
    size = (8, (1.1 + 0.42 * most) * len(measures))
    figure, axes = plt.subplots(len(measures), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, measure in zip(axes[:, 0], measures, strict=True):
        rows = [one for one in findings if one.measure == measure]
        for y, one in enumerate(rows):
            gap = one.found
            axis.errorbar(gap.mean, y, xerr=[[gap.mean - gap.low], [gap.high - gap.mean]], fmt="ko", capsize=4)
        axis.axvline(0, color="black", linewidth=0.8, linestyle="--")
        axis.set_yticks(range(len(rows)), [one.what for one in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlabel(f"{titles[measure]}\nof the first over the second")
        bare(axis)
    return figure


def similarities(claim: Claim, one: Evidence) -> Any:
    """Cosine and norm ratio along training, and the cosine of each layer at its end."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    methods = [arm for arm in gradients_of([claim], one.setting) if arm in ARMS and one.cosines(arm)]
    for i, method in enumerate([*methods, *NULLS]):
        style: dict[str, Any] = {"marker": MARKERS[i], "linestyle": LINES[i % len(LINES)], "label": label(method)}
        style |= {"color": "black" if method in ARMS else "0.55", "markersize": 5}
        for axis, figure_name in zip(axes, ("cosine", "norm_ratio"), strict=False):
            found = [one.cosines(method, (stage,), figure_name) for stage in STAGES]
            errors = [standard_error(values) for values in found]
            means = [fmean(values.values()) for values in found]
            axis.errorbar(list(STAGES), means, yerr=errors if all(map(isfinite, errors)) else None, capsize=3, **style)
        layers = one.layers(method)
        axes[2].plot(range(len(layers)), list(layers.values()), **style)
        axes[2].set_xticks(range(len(layers)), list(layers), rotation=90, fontsize=7)
    for axis, title in zip(axes, ("cosine similarity", "norm ratio", "cosine of each layer, late"), strict=True):
        axis.set_ylabel(title)
        bare(axis)
    for axis in axes[:2]:
        axis.set_xlabel("checkpoint of training")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def trade_offs(claim: Claim, one: Evidence) -> Any:
    """Validation loss of each arm against the memory of a step and against the time of the whole training."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
    arms = [arm for arm in arms_of([claim], one.setting) if one.trained(arm, "val_loss") and one.cost(arm)]
    for i, arm in enumerate(arms):
        losses, cost = one.trained(arm, "val_loss"), one.cost(arm)
        assert cost is not None
        style: dict[str, Any] = {"fmt": MARKERS[i % len(MARKERS)], "capsize": 3, "color": "black", "label": label(arm)}
        style |= {} if arm == "sbp" else {"markerfacecolor": "white"}
        error = standard_error(losses)
        for axis, value in zip(axes, (cost.memory / MIB, cost.time), strict=True):
            axis.errorbar(value, fmean(losses.values()), yerr=error if isfinite(error) else None, **style)
    memory = "peak memory of a step, MiB" if one.on_cuda else "saved in a step, MiB"
    for axis, title in zip(axes, (memory, "time of the whole training, s"), strict=True):
        axis.set_xlabel(title)
        axis.set_xlim(left=0)
        bare(axis)
    axes[0].set_ylabel("validation loss (nats), mean ± standard error")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def choices(claim: Claim, one: Evidence) -> Any:
    """Accuracy against time; a bubble's area is the memory. None where there is nothing to choose from."""
    points = {arm: costs for arm in choice.trained(claim, one) if (costs := choice.relative(one, arm)) is not None}
    if not points:
        return None
    figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
    plain = one.trained("plain", "top1")
    for number, (arm, (time, memory)) in enumerate(points.items(), 1):
        gap = difference(one.trained(arm, "top1"), plain)
        style: dict[str, Any] = {"edgecolor": "black", "facecolor": "0.85" if arm in ("plain", "sbp") else "white"}
        name = f"{number}  {label(arm)}"
        axis.scatter(time, gap.mean, s=BUBBLE * memory, zorder=3, alpha=0.85, label=name, **style)
        axis.annotate(str(number), (time, gap.mean), ha="center", va="center", fontsize=8, zorder=4)
        if isfinite(gap.low) and arm != "plain":
            axis.errorbar(time, gap.mean, [[gap.mean - gap.low], [gap.high - gap.mean]], color="0.6", zorder=2)
    axis.axhline(0, color="black", linewidth=0.8, linestyle="--")
    axis.set_xlabel("time of training, of that without SBP")
    axis.set_ylabel("top-1 against no SBP, points (95 % intervals)")
    bare(axis)
    style = {"loc": "outside right upper", "frameon": False, "fontsize": 8, "markerscale": 0.3}
    figure.legend(title="area: memory of a step", title_fontsize=8, **style)
    return figure


def bare(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
