"""How far the time forecast is off wherever it was measured: python -m scripts.plan_accuracy

Writes the table of docs/plan.md, from the benchmark's records in results/gpu.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sbp.training.benchmark.arms import ARMS
from sbp.training.config.model import BackboneConfig
from sbp.training.plan.arms import arm_config, arm_times, has_forecast, recorded
from sbp.training.plan.gpus import find, matching
from sbp.training.plan.steps import Step
from sbp.training.record.files import write_text
from sbp.training.record.table import markdown

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
START, END = "<!-- from here on: python -m scripts.plan_accuracy -->", "<!-- up to here -->"
GPU, MEMORY_GIB = "h100", find("h100").memory_gib
FITTED = ("vit_base_patch16_224", "convnext_tiny")  # the others were only compared with


class Row(NamedTuple):
    """Of one arm, measured and forecast: milliseconds of its kernels and of a step, launches, bytes at the peak."""

    network: str
    batch_size: int
    arm: str
    kernel_ms: tuple[float, float]
    step_ms: tuple[float, float]
    launches: tuple[int, int]
    peak: tuple[int, int]

    @property
    def off(self) -> float:
        """The share by which the forecast of the kernels' time is too high."""
        return self.kernel_ms[1] / self.kernel_ms[0] - 1


def files() -> list[Path]:
    """Records of classifiers with kernel times on the GPU that the efficiencies are of, the newest measurement last."""
    return [path for path in sorted(RESULTS.glob("*/*.json")) if _is_comparable(path)]


def _is_comparable(path: Path) -> bool:
    if path.name.startswith("operators") or path.parent.name.endswith("-small"):
        return False
    record = json.loads(path.read_text())
    if not any(arm.get("kernel_ms") for arm in record.get("arms", {}).values()):
        return False  # no benchmark's, or one without a profiler
    gpu = matching(record["device"], MEMORY_GIB)
    return gpu is not None and gpu.name == GPU and record["settings"].get("task", "classification") == "classification"


@cache
def _step(network: str, drop_path: float, kwargs: str, arm: str, batch_size: int) -> Step:
    backbone = BackboneConfig(network, drop_path, json.loads(kwargs))
    return recorded(arm_config(backbone, arm, batch_size), batch_size)


def rows(path: Path) -> Iterator[Row]:
    record, gpu = json.loads(path.read_text()), find(GPU)
    backbone, size = record["settings"]["backbone"], record["batch_size"]
    for name, arm in record["arms"].items():
        if not arm.get("kernel_ms") or not has_forecast(ARMS[name]):
            continue
        alike = next(one for one in ARMS if ARMS[one].sbp == ARMS[name].sbp and not ARMS[one].release)
        kwargs = json.dumps(backbone["kwargs"])
        step = _step(backbone["name"], backbone["drop_path"], kwargs, alike, size)
        times = arm_times(name, step, gpu)
        yield Row(
            backbone["name"],
            size,
            name,
            (arm["kernel_ms"], 1000 * times.kernels),
            (arm["median_ms"]["step"], 1000 * times.step),
            (arm["launches"], times.launches),
            (arm["peak_allocated"], step.memory.peak),
        )


def table() -> str:
    """One line for each arm; steps of captured arms alone, as those of eager ones were the records' CPU's."""
    headings = [
        "network, batch", "arm", "kernels ms", "forecast", "off", "step ms", "forecast", "launches", "forecast",
        "peak MiB", "forecast", "off",
    ]  # fmt: skip
    known = {(row.network, row.arm): row for path in files() for row in rows(path)}
    lines = [headings]
    for row in sorted(known.values(), key=lambda row: (row.network not in FITTED, row.network)):
        peak, graph = row.peak[1] / row.peak[0] - 1, ARMS[row.arm].graph
        lines.append(
            [
                f"{row.network}, {row.batch_size}{'' if row.network in FITTED else ' (not fitted)'}",
                ARMS[row.arm].label,
                f"{row.kernel_ms[0]:.1f}",
                f"{row.kernel_ms[1]:.1f}",
                f"{100 * row.off:+.0f} %",
                f"{row.step_ms[0]:.1f}" if graph else "",
                f"{row.step_ms[1]:.1f}" if graph else "",
                str(row.launches[0]),
                str(row.launches[1]),
                f"{row.peak[0] / 2**20:.0f}",
                f"{row.peak[1] / 2**20:.0f}",
                f"{100 * peak:+.0f} %",
            ]
        )
    return markdown(lines)


def page(text: str, table: str) -> str:
    """The page's text with this table in the place of its own."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    write_text(PAGE, page(PAGE.read_text(), table()))
