"""Where a run's figures go: metrics.jsonl in its folder, always, and the same values to wandb.

The only module that knows wandb. Whatever goes wrong there is a warning; training goes on.
"""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wandb

from sbp.training.config import LoggerConfig

INIT_TIMEOUT = 10  # seconds that an unreachable server may hold up a start


class Tracker:
    """One for each run, in the first process only."""

    def __init__(
        self, folder: Path, logger: LoggerConfig, config: dict[str, Any], run_id: str | None, step: int
    ) -> None:
        """run_id, step: of the checkpoint that the run resumes from; what was logged after it is logged again."""
        self.path = folder / "metrics.jsonl"
        self._forget_after(step)
        self.file = self.path.open("a")
        self.run: Any = None
        if logger.wandb:
            self._try(self._start, folder, logger, config, run_id)

    @property
    def run_id(self) -> str | None:
        return self.run.id if self.run is not None else None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Records values at an optimizer step."""
        line = {"step": step, **values}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.run is not None:
            self._try(self.run.log, line)

    def summarise(self, values: dict[str, Any]) -> None:
        if self.run is not None:
            self._try(self.run.summary.update, values)

    def finish(self, exit_code: int) -> None:
        self.file.close()
        if self.run is not None:
            self._try(self.run.finish, exit_code=exit_code)

    def _start(self, folder: Path, logger: LoggerConfig, config: dict[str, Any], run_id: str | None) -> None:
        self.run = wandb.init(
            project=logger.project,
            name=logger.name or folder.name,
            group=logger.group,
            dir=str(folder),
            config=config,
            id=run_id,
            resume="allow" if run_id else None,
            mode=logger.mode or ("online" if _has_key() else "offline"),
            settings=wandb.Settings(init_timeout=INIT_TIMEOUT, silent=True, console="off"),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def _try(self, call: Callable, *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:  # wandb raises many kinds, of its own and of its service's
            warnings.warn(f"wandb: {type(error).__name__}: {error}; metrics.jsonl has everything", stacklevel=3)

    def _forget_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        self.path.write_text("".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line that was cut off


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(wandb.api.api_key)
    except Exception:
        return False
