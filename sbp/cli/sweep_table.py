"""The table of a sweep, running or ended, from what lies in its folder.

Every folder in it that holds a run is a row, wherever that run is computed. `--save` also writes table.csv, table.md
and figure.png there, as a sweep does at its end.
"""

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sbp.training.record.files import read_json, read_text, write_text
from sbp.training.record.status import STATUS, is_alive, read_status
from sbp.training.record.summary import SUMMARY
from sbp.training.record.table import markdown
from sbp.training.record.tracking import METRICS

FAILURE = "failure.txt"
NOT_SWEPT = ("run_dir",)  # differs from job to job, and says nothing


def _number(key: str, digits: int, unit: float = 1) -> Callable[[dict[str, Any]], str]:
    return lambda summary: "" if summary.get(key) is None else f"{summary[key] / unit:.{digits}f}"


COLUMNS: dict[str, Callable[[dict[str, Any]], Any]] = {  # heading -> how a value of summary.json is shown
    "keep_ratio": lambda summary: summary["keep_ratio"],
    "effective": _number("effective_keep_ratio", 3),
    "top-1 %": _number("top1", 2),
    "top-1 % (EMA)": _number("top1_ema", 2),
    "box AP": _number("box_ap", 1),
    "box AP (EMA)": _number("box_ap_ema", 1),
    "mask AP": _number("mask_ap", 1),
    "mask AP (EMA)": _number("mask_ap_ema", 1),
    "saved MiB/image": _number("saved_bytes_per_image", 2, 2**20),
    "peak MiB": lambda s: _number("peak_allocated" if "peak_allocated" in s else "peak_rss", 0, 2**20)(s),
    "gradient cosine": _number("gradient_cosine", 3),
    "images/s": _number("images_per_second", 0),
}


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    state: "done", "failed", "preempted", "killed", "running" or "starting". detail: the reason, or how far it is.
    summary: of summary.json, {} unless done. failed_at: when, by its file system's clock; 0 when it did not fail.
    """

    name: str
    overrides: dict[str, str]
    state: str
    detail: str
    summary: dict[str, Any]
    failed_at: float = 0.0

    @property
    def status(self) -> str:
        """State and detail in one line."""
        return f"{self.state}{': ' if self.state == 'failed' else ' '}{self.detail}" if self.detail else self.state


def read_job(folder: Path) -> Job:
    """What lies in a run's folder. A failure that is written there is of the latest attempt."""
    status, failure = read_status(folder), folder / FAILURE
    state, detail, summary, failed_at = status.get("state", "starting"), "", {}, 0.0
    if failure.is_file():
        state, failed_at = "failed", failure.stat().st_mtime
        detail = next(iter(read_text(failure).splitlines()), "")
    elif state in ("starting", "completed") and (summary := read_json(folder / SUMMARY)):
        state = "done"
    elif state == "completed":  # a run whose summary a power failure took, or another command's job
        state = "killed" if "total_steps" in status else "done"
    elif state == "failed":
        detail = next(iter(str(status.get("message") or "").splitlines()), "")
    elif state in ("running", "preempted"):
        if state == "running" and is_alive(status) is False:
            state = "killed"
        step = max(status.get("step") or 0, _last_step(folder / METRICS))
        detail = f"at step {step}" + (f" of {status['total_steps']}" if status.get("total_steps") else "")
    return Job(folder.name, _overrides(folder), state, detail, summary, failed_at)


def read_jobs(folder: Path) -> list[Job]:
    """The runs in a sweep's folder, in the order of what was swept: numbers by their value."""
    marks = (STATUS, SUMMARY, FAILURE, ".hydra")
    found = [
        path for path in folder.iterdir() if not path.name.startswith(".") and any((path / m).exists() for m in marks)
    ]
    jobs = [read_job(path) for path in found]
    keys = swept_keys(jobs)
    return sorted(jobs, key=lambda job: ([_sortable(job.overrides.get(key, "")) for key in keys], _sortable(job.name)))


def swept_keys(jobs: list[Job]) -> list[str]:
    """The keys that were not given alike to all jobs."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides if key not in NOT_SWEPT)
    return [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]


def columns_of(summaries: Iterable[dict[str, Any]]) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """COLUMNS, without figures of the task, or of averaged weights, that none of these runs has."""
    figures = {key for summary in summaries for key in summary}
    other_task = ("top-1",) if "box_ap" in figures else ("box AP", "mask AP")
    averaged = "top1_ema" in figures or "box_ap_ema" in figures
    return {
        heading: show
        for heading, show in COLUMNS.items()
        if not heading.startswith(other_task) and (averaged or "EMA" not in heading)
    }


def table(jobs: list[Job]) -> str:
    """The jobs in Markdown: what was swept, the figures, the status."""
    keys = swept_keys(jobs)
    shown = columns_of(job.summary for job in jobs)
    columns = {heading: show for heading, show in shown.items() if f"sbp.{heading}" not in keys}
    named = keys or ["job"]
    lines = [[*named, *columns, "status"]]
    for job in jobs:
        cells = [str(show(job.summary)) if job.summary else "" for show in columns.values()]
        names = [job.overrides.get(key, "") for key in keys] or [job.name]
        lines.append([cell.replace("|", "\\|") for cell in (*names, *cells, job.status)])
    return markdown(lines)


def comma_separated(jobs: list[Job]) -> str:
    """The jobs as CSV, with every figure of summary.json as it is there: bytes are bytes."""
    keys = swept_keys(jobs)
    plain = [{key: value for key, value in job.summary.items() if isinstance(value, int | float | str)} for job in jobs]
    figures = list(dict.fromkeys(key for one in plain for key in one))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["job", *keys, "status", *figures])
    for job, values in zip(jobs, plain, strict=True):
        swept = [job.overrides.get(key, "") for key in keys]
        writer.writerow([job.name, *swept, job.status, *(values.get(figure, "") for figure in figures)])
    return text.getvalue()


def write_table(folder: Path) -> list[Job]:
    """Brings table.csv and table.md in a sweep's folder up to date; several processes may do so at once."""
    jobs = read_jobs(folder)
    if jobs:
        write_text(folder / "table.md", table(jobs) + "\n")
        write_text(folder / "table.csv", comma_separated(jobs))
    return jobs


def _overrides(folder: Path) -> dict[str, str]:
    """What Hydra wrote of the job's command line; {} when it was told to write nothing."""
    path = folder / ".hydra" / "overrides.yaml"
    lines = yaml.safe_load(path.read_text()) if path.is_file() else None
    parts = [str(line).lstrip("+~").partition("=") for line in lines or []]
    return {key: value for key, _, value in parts}


def _last_step(path: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0 when there is none."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(path.stat().st_size - 2**16, 0))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["step"])
    return 0


def _sortable(text: str) -> list[tuple[int, float, str]]:
    """Numbers in a text compare by their value."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)", text)
    return [(0, float(part), "") if i % 2 else (1, 0.0, part) for i, part in enumerate(parts)]
