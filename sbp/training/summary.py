"""The final figures of a run, from its record."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from sbp.training.tracking import METRICS, read_metrics

SUMMARY = "summary.json"


def summarise(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes folder/summary.json and returns it: `facts`, and of metrics.jsonl the last value of each accuracy and
    memory figure, the mean gradient cosine, and the median speed.
    """
    records = read_metrics(folder / METRICS)

    def values(name: str) -> list[float]:
        return [record[name] for record in records if name in record]

    last = {name: value for record in records for name, value in record.items() if name.startswith(("val/", "memory/"))}
    summary = dict(facts) | {
        "top1": last.get("val/top1"),
        "top5": last.get("val/top5"),
        "val_loss": last.get("val/loss"),
        "top1_ema": last.get("val/top1_ema"),
        "gradient_cosine": fmean(cosines) if (cosines := values("gradient_cosine/total")) else None,
        "images_per_second": median(speeds) if (speeds := values("images_per_second")) else None,
    }
    summary |= {name.replace("memory/", ""): value for name, value in last.items() if name.startswith("memory/")}
    temporary = folder / f"{SUMMARY}.tmp"
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(temporary, folder / SUMMARY)
    return summary
