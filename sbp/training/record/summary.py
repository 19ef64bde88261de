"""The final figures of a run, from its record."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from sbp.training.config.run import Config
from sbp.training.config.same_run import check_same_run
from sbp.training.record.files import read_json, write_json
from sbp.training.record.status import read_status
from sbp.training.record.tracking import METRICS, read_metrics
from sbp.training.runtime import distributed

METRIC = {"classification": "top1", "detection": "box_ap"}  # that decides which checkpoint is the best
SUMMARY = "summary.json"
RUN = "run.json"


def record_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes folder/run.json: all that is needed to repeat the run, from its start on."""
    write_json(folder / RUN, facts)


def finished(folder: Path, config: Config) -> dict[str, Any] | None:
    """The summary of a run that is complete in this folder, on all processes alike, else None.

    With config.resume="never" always None. Raises ValueError when it is a run with other settings.
    """
    if config.resume == "never":
        return None
    summary: dict[str, Any] = distributed.only_main(
        lambda: read_json(folder / SUMMARY) if read_status(folder).get("state", "completed") == "completed" else {}
    )
    if not summary:
        return None
    check_same_run(summary["config"], config)
    return summary


def is_evaluated(folder: Path, step: int) -> bool:
    """Whether metrics.jsonl has an evaluation after this step."""
    return any(
        record["step"] == step and any(name.startswith("val/") for name in record)
        for record in read_metrics(folder / METRICS)
    )


def best_step(folder: Path, task: str) -> int | None:
    """The step with the best METRIC of the task on record, the first of equals; that of the averaged weights where
    there are any.
    """
    metric = f"val/{METRIC[task]}"
    records = [record for record in read_metrics(folder / METRICS) if metric in record]
    best = max(records, key=lambda record: record.get(f"{metric}_ema", record[metric]), default=None)
    return None if best is None else best["step"]


def summarise(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes folder/summary.json and returns it: `facts`, and of metrics.jsonl the last value of each figure of an
    evaluation, the largest of each memory figure, the mean gradient cosine, and the median speed.
    """
    records = read_metrics(folder / METRICS)

    def values(name: str) -> list[float]:
        return [record[name] for record in records if name in record]

    last = {
        name.removeprefix("val/"): value
        for record in records
        for name, value in record.items()
        if name.startswith("val/")
    }
    if "loss" in last:
        last["val_loss"] = last.pop("loss")
    task = facts["config"]["task"]
    memory = {name for record in records for name in record if name.startswith("memory/")}
    summary = dict(facts) | {METRIC[task]: None} | last
    summary |= {
        "best_step": best_step(folder, task),
        "gradient_cosine": fmean(cosines) if (cosines := values("gradient_cosine/total")) else None,
        "images_per_second": median(speeds) if (speeds := values("images_per_second")) else None,
    }
    summary |= {name.removeprefix("memory/"): max(values(name)) for name in sorted(memory)}
    write_json(folder / SUMMARY, summary)
    return summary
