"""The figure of a sweep: accuracy and memory against what was swept."""

from collections import defaultdict
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sbp.cli.sweep_table import Job, swept_keys

MIB = 2**20
STYLES = [("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."), ("v", (0, (5, 1))), ("x", (0, (1, 1)))]


def draw(jobs: list[Job], path: Path) -> None:
    """Lines over the one number that was swept, one for each choice of the rest; else a dot for each job.

    Runs that differ in their seed alone are dots around the line of their means. Without a finished job: no figure.
    """
    shown = {"top1": "top-1, %", "box_ap": "box AP", "mask_ap": "mask AP"}
    finished = [job.summary for job in jobs if job.summary]
    if finished and all({"top1_ema", "box_ap_ema"} & one.keys() for one in finished):  # of which best.pt is
        shown = {f"{name}_ema": f"{label} (EMA)" for name, label in shown.items()}
    shown = {name: label for name, label in shown.items() if any(job.summary.get(name) is not None for job in jobs)}
    done = [job for job in jobs if shown and all(job.summary.get(name) is not None for name in shown)]
    if not done:
        return
    keys = [key for key in swept_keys(jobs) if key != "seed"]
    numeric = [key for key in keys if all(_is_number(job.overrides.get(key)) for job in done)]
    series: dict[str, list[Job]] = defaultdict(list)
    for job in done:
        series[_label(job, [key for key in keys if key not in numeric])].append(job)
    panels = {label: itemgetter(name) for name, label in shown.items()} | _memory(done)
    if len(numeric) == 1 and len(series) <= len(STYLES):
        _lines(panels, series, numeric[0], path)
    else:
        _dots(panels, done, keys, path)


def _memory(jobs: list[Job]) -> dict[str, Any]:
    """The device's peak where all have one. Of a process on a CPU the peak says little: what is saved for backward."""
    if all(job.summary.get("peak_allocated") for job in jobs):
        return {"peak memory of the device, MiB": lambda s: s["peak_allocated"] / MIB}
    return {"saved activations, MiB / image": lambda s: s["saved_bytes_per_image"] / MIB}


def _lines(panels: dict[str, Any], series: dict[str, list[Job]], key: str, path: Path) -> None:
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.4), layout="constrained")
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for (marker, line), (label, jobs) in zip(STYLES, series.items(), strict=False):
            points = defaultdict(list)
            for job in jobs:
                points[float(job.overrides[key])].append(value(job.summary))
            places = sorted(points)
            for x in places:
                axis.plot([x] * len(points[x]), points[x], ".", color="0.6", markersize=5)
            means = [fmean(points[x]) for x in places]
            axis.plot(places, means, marker=marker, linestyle=line, label=label, markersize=5)
        every = [float(job.overrides[key]) for jobs in series.values() for job in jobs]
        if min(every) > 0 and max(every) / min(every) >= 100:
            axis.set_xscale("log")
        axis.set_xlabel(key)
        axis.set_ylabel(title)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def _dots(panels: dict[str, Any], jobs: list[Job], keys: list[str], path: Path) -> None:
    size = (9, 1.2 + 0.25 * len(jobs))
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, layout="constrained")
    labels = [_label(job, [*keys, "seed"]) or job.name for job in jobs]
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        axis.plot([value(job.summary) for job in jobs], range(len(jobs)), "ko", markersize=5)
        axis.set_yticks(range(len(jobs)), labels, fontsize=8)
        axis.grid(axis="y", color="0.85")
        axis.set_axisbelow(True)
        axis.set_xlabel(title)
        axis.margins(x=0.1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _label(job: Job, keys: list[str]) -> str:
    return ", ".join(f"{key}={job.overrides[key]}" for key in keys if key in job.overrides)


def _is_number(value: str | None) -> bool:
    try:
        float(value or "")
    except ValueError:
        return False
    return True
