"""The table at the end of a sweep: a Hydra callback that reads each job's summary.json."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from sbp.training import distributed
from sbp.training.summary import SUMMARY
from sbp.training.table import markdown
from scripts.launch import FAILURE

COLUMNS = {  # heading -> how a value of summary.json is shown
    "keep_ratio": lambda s: s["keep_ratio"],
    "effective": lambda s: f"{s['effective_keep_ratio']:.3f}",
    "top-1 %": lambda s: f"{s['top1']:.2f}",
    "saved MiB/image": lambda s: f"{s['saved_bytes_per_image'] / 2**20:.2f}",
    "peak MiB": lambda s: f"{s.get('peak_allocated', s.get('peak_rss', 0)) / 2**20:.0f}",
    "gradient cosine": lambda s: "" if s["gradient_cosine"] is None else f"{s['gradient_cosine']:.3f}",
    "images/s": lambda s: f"{s['images_per_second']:.0f}",
}
HEADINGS = ["job", *COLUMNS, "status"]


class SweepTable(Callback):
    """Keeps table.md and table.csv in the sweep's folder up to date, and prints the table at the end."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.failed = 0

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        assert job_return.hydra_cfg is not None
        hydra_config = job_return.hydra_cfg.hydra
        if hydra_config.mode != RunMode.MULTIRUN or not distributed.is_main():
            return
        folder = Path(hydra_config.runtime.output_dir)
        failure = folder / FAILURE
        if failure.is_file():
            self.failed += 1
            reason = failure.read_text().splitlines()[0]
            self.rows.append([folder.name, *[""] * len(COLUMNS), f"failed: {reason}"])
        else:
            summary = json.loads((folder / SUMMARY).read_text())
            self.rows.append([folder.name, *(str(show(summary)) for show in COLUMNS.values()), "done"])
        (folder.parent / "table.md").write_text(markdown([HEADINGS, *self.rows]) + "\n")
        with (folder.parent / "table.csv").open("w", newline="") as file:
            csv.writer(file).writerows([HEADINGS, *self.rows])

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if self.rows:
            print(f"\n{markdown([HEADINGS, *self.rows])}\n\nin {config.hydra.sweep.dir}")
        if self.failed:
            print(f"{self.failed} of {len(self.rows)} jobs failed; see {FAILURE} in their folders", file=sys.stderr)
            raise SystemExit(1)
