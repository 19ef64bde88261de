"""A plan as a table, as JSON and as a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sbp.training.plan.gpus import Gpu
from sbp.training.plan.search import Point
from sbp.training.plan.times import Times
from sbp.training.record.table import markdown

MIB = 2**20


def entry(times: Times, peak: int, images: int) -> dict[str, Any]:
    """One arm of the JSON."""
    return {
        "kernel_ms": 1000 * times.kernels,
        "launches": times.launches,
        "step_ms": 1000 * times.step,
        "peak": peak,
        "images_per_second": images / times.step,
    }


def as_json(gpu: Gpu, points: Sequence[Point], images: int) -> dict[str, Any]:
    return {"gpu": gpu.name, "arms": {one.name: entry(one.times, one.peak, images) for one in points}}


def table(points: Sequence[Point], marked: Point) -> str:
    """One line for each point; the marked one has a star."""
    headings = [
        "", "setting", "keep", "MHSA", "recompute", "compile", "graph", "micro batch", "largest", "peak MiB",
        "step ms", "images/s", "accuracy, points",
    ]  # fmt: skip
    rows = [headings]
    for one in points:
        rows.append(
            [
                "*" if one is marked else "",
                one.name,
                f"{one.setting.keep_ratio:g}",
                "" if one.setting.exact else one.setting.mhsa_drop,
                one.setting.recompute,
                "blocks" if one.how.compile else "",
                "yes" if one.how.graph else "",
                f"{one.micro_batch_size} x {one.accumulation}",
                str(one.largest),
                f"{one.peak / MIB:.0f}",
                f"{1000 * one.times.step:.1f}",
                f"{one.images_per_second:.0f}",
                one.accuracy,
            ]
        )
    return markdown(rows)


def arms_table(gpu: Gpu, arms: dict[str, dict[str, Any]]) -> str:
    rows = [["arm", "kernels ms", "launches", "step ms", "peak MiB", "images/s"]]
    for name, one in arms.items():
        rows.append(
            [
                name,
                f"{one['kernel_ms']:.1f}",
                str(one["launches"]),
                f"{one['step_ms']:.1f}",
                f"{one['peak'] / MIB:.0f}",
                f"{one['images_per_second']:.0f}",
            ]
        )
    return markdown(rows)


def draw(points: Sequence[tuple[str, bool, int, float]], title: str, available: float | None, path: Path) -> None:
    """Images a second against memory. points: name, whether the gradient is exact, bytes, images a second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: no state, no display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for exact, color, marker, label in ((True, "#3b6fb6", "o", "exact gradient"), (False, "#d1495b", "D", "SBP")):
        chosen = [(peak / 2**30, speed) for _, one, peak, speed in points if one is exact]
        if chosen:
            axis.plot(*zip(*chosen, strict=True), marker, color=color, markeredgecolor="white", label=label)
    for name, _, peak, speed in points:
        axis.annotate(name, (peak / 2**30, speed), (6, 3), textcoords="offset points", fontsize=7)
    if available is not None:
        axis.axvline(available / 2**30, color="0.6", linestyle="--", linewidth=1)
    axis.set_xlabel("peak memory, GiB (forecast)")
    axis.set_ylabel("images a second (forecast)")
    axis.set_title(title, fontsize=10)
    axis.margins(0.12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
