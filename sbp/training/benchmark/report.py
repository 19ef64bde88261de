"""What a benchmark found: JSON, a Markdown table, and a figure of memory against time."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from sbp.training.benchmark.arms import ARMS, DROPPING, EXACT, RELEASE, SBP
from sbp.training.benchmark.runner import PARTS
from sbp.training.record.files import write_text
from sbp.training.record.table import markdown

STYLES = {EXACT: ("#3b6fb6", "o"), DROPPING: ("#8a8a8a", "s"), SBP: ("#d1495b", "D"), RELEASE: ("#e0a030", "^")}


def write(result: dict[str, Any], folder: Path, name: str) -> None:
    """Writes <name>.md, <name>.png where there is matplotlib, and <name>.json; the JSON last, and whole or not at all.

    The JSON being there says that the others are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_report(result, folder, name)
    write_record(result, folder / f"{name}.json")


def write_record(values: dict[str, Any], path: Path) -> None:
    """What was measured, as JSON, with the folder that it lies in; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=1) + "\n")


def write_report(result: dict[str, Any], folder: Path, name: str) -> None:
    """The table and the figure alone."""
    write_text(folder / f"{name}.md", f"{caption(result)}\n\n{table(result)}\n")
    if find_spec("matplotlib") and any(record.get("time_ratio") for record in result["arms"].values()):
        draw(result, folder / f"{name}.png")


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The arms of several benchmarks of one network; the ratios of each stay those to its own plain arm."""
    arms: dict[str, Any] = {}
    versions: dict[str, str] = {}
    for result in results:
        arms |= {name: record for name, record in result["arms"].items() if name not in arms}
        for name, version in result["versions"].items():
            known = versions.get(name, version)
            versions[name] = known if version in known.split(" / ") else f"{known} / {version}"
    ordered = {name: arms[name] for name in ARMS if name in arms}
    rounds = min(result["rounds"] for result in results)
    return results[0] | {"arms": ordered, "versions": versions, "rounds": rounds}


def caption(result: dict[str, Any]) -> str:
    """Where and how it was measured, in one paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    settings = result["settings"]
    memory = "the peak of a step" if result["device_memory"] else "what autograd saves for the backward pass"
    parts = [
        f"{result['network']} ({result['parameters'] / 1e6:.1f} M parameters) on {result['device']}",
        f"{result['threads']} CPU thread(s), {result['world_size']} process(es)",
        f"batch {result['batch_size']} a process, {image_size(settings)} px, amp {result['amp']}",
        f"AdamW; medians of {result['rounds']} rounds x {settings['steps']} steps (first to third quartile)",
        f"time and memory relative to plain; memory is {memory}",
        versions,
    ]
    if any("largest_batch" in record for record in result["arms"].values()):
        gib = settings["memory_gib"] or result["device_memory"] / 2**30
        parts.append(f"largest batch in {gib:.0f} GiB: ~ is extrapolated, the others were run")
    return "; ".join(parts) + "."


def image_size(settings: dict[str, Any]) -> str:
    """In pixels; of a detector the shorter and the longer side."""
    data, detects = settings["data"], settings.get("task") == "detection"  # older records have no task
    return f"{data['image_size']} x {data['max_size']}" if detects else str(data["image_size"])


def table(result: dict[str, Any]) -> str:
    """One line for each arm; columns that have no value for any arm are left out."""
    lines = [_cells(record) for record in result["arms"].values()]
    headings = [heading for heading in lines[0] if any(line[heading] for line in lines)]
    return markdown([headings, *([line[heading] for heading in headings] for line in lines)])


def _cells(record: dict[str, Any]) -> dict[str, str]:
    def mib(key: str) -> str:
        return f"{record[key] / 2**20:.4g}" if key in record else ""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    median, quartiles = record.get("median_ms", {}), record.get("quartiles_ms", {})
    step = f"{median['step']:.1f} ({quartiles['step'][0]:.1f}-{quartiles['step'][1]:.1f})" if median else ""
    mark = "~" if record.get("largest_batch_estimated") else ""
    return {
        "arm": record["label"],
        "kind": record["kind"],
        "step ms": step,
        **{f"{part} ms": shown(median.get(part), ".1f") for part in PARTS},
        "kernel ms": shown(record.get("kernel_ms"), ".1f"),
        "launches": shown(record.get("launches"), ".0f"),
        "images/s": shown(record.get("images_per_second"), ".0f"),
        "time": shown(record.get("time_ratio"), ".2f"),
        "memory": shown(record.get("memory_ratio"), ".2f"),
        "peak MiB": mib("peak_allocated"),
        "reserved MiB": mib("peak_reserved"),
        "saved MiB": mib("saved_bytes"),
        "largest batch": f"{mark}{record['largest_batch']}" if "largest_batch" in record else "",
        "error": record["error"] or record.get("largest_batch_error", ""),
    }


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats in one coordinate without losing in the other, by the first.

    Of equal points the first one counts.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i], i)):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def draw(result: dict[str, Any], path: Path) -> None:
    """Step time against memory, both relative to plain, with the Pareto frontier."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot: no state, no display
    from matplotlib.figure import Figure

    records = [record for record in result["arms"].values() if record.get("time_ratio")]
    points = [(record["memory_ratio"], record["time_ratio"]) for record in records]
    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.axhline(1, color="0.85", zorder=0)
    axis.axvline(1, color="0.85", zorder=0)
    front = [points[i] for i in pareto(points)]
    axis.step(*_columns(front), where="post", color="0.5", linewidth=1, linestyle="--", zorder=1,
              label="Pareto frontier")  # fmt: skip
    for kind, (color, marker) in STYLES.items():
        chosen = [point for point, record in zip(points, records, strict=True) if record["kind"] == kind]
        if chosen:
            axis.plot(*_columns(chosen), marker, color=color, markersize=7, markeredgecolor="white", label=kind)
    memory = "peak memory" if result["device_memory"] else "memory saved for the backward pass"
    axis.set_xlabel(f"{memory}, relative to plain")
    axis.set_ylabel("step time, relative to plain")
    title = f"{result['network']}, {result['device']}, batch {result['batch_size']}, amp {result['amp']}"
    axis.set_title(title, fontsize=10)
    axis.margins(0.12)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.draw_without_rendering()  # fixes the layout that the labels are placed in
    colors = [STYLES[record["kind"]][0] for record in records]
    _label(axis, points, [record["label"] for record in records], colors, front)
    figure.savefig(path)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _label(
    axis: Any, points: list[tuple[float, float]], texts: list[str], colors: list[str], front: list[tuple[float, float]]
) -> None:
    """Writes each text beside its point, where it overlaps least with points, frontier and the texts before it.

    adjustText 1.4 is alive, but left texts on the frontier and on markers that it was told to avoid, in these figures.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    renderer = axis.figure.canvas.get_renderer()
    pixels = axis.transData.transform(points)
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in pixels]
    for (x0, y0), (x1, y1) in pairwise(axis.transData.transform(front)):
        taken += [Bbox.from_extents(x0, y0 - 2, x1, y0 + 2), Bbox.from_extents(x1 - 2, y1, x1 + 2, y0)]
    frame = axis.get_window_extent(renderer)
    places = [
        (right * distance, up * distance)
        for distance in (9, 16, 26, 38, 52)  # in points, from the marker
        for right, up in ((1, 0), (0.7, 0.7), (0.7, -0.7), (-1, 0), (-0.7, 0.7), (-0.7, -0.7), (0, 1), (0, -1))
    ]
    for i in sorted(range(len(points)), key=lambda i: pixels[i][0]):
        best: tuple[float, Any, Any] | None = None
        for right, up in places:
            note = axis.annotate(
                texts[i],
                points[i],
                (right, up),
                textcoords="offset points",
                fontsize=8,
                color=colors[i],
                ha="left" if right > 0 else "right" if right < 0 else "center",
                va="center",
                path_effects=[withStroke(linewidth=2, foreground="white")],
                arrowprops={"arrowstyle": "-", "color": colors[i], "linewidth": 0.5, "shrinkB": 4}
                if abs(right) + abs(up) > 17
                else None,
            )
            box = Bbox.from_bounds(*_text_box(note, renderer).bounds)
            cost = sum(_overlap(box, other) for other in taken) + 10 * (_area(box) - _overlap(box, frame))
            if best is None or cost < best[0] - 1e-6:
                if best is not None:
                    best[1].remove()
                best = (cost, note, box)
            else:
                note.remove()
            if cost < 1e-6:
                break
        assert best is not None
        taken.append(best[2])


def _text_box(note: Any, renderer: Any) -> Any:
    """Where the text of an annotation is, in pixels, without its line."""
    from matplotlib.text import Text

    note.update_positions(renderer)
    return Text.get_window_extent(note, renderer)


def _area(box: Any) -> float:
    return box.width * box.height


def _overlap(one: Any, other: Any) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0) * max(height, 0)
