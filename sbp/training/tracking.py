"""The record of a run: metrics.jsonl, which is the whole truth, and the same figures in wandb."""

import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import wandb

from sbp.training.config import LoggerConfig

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


def new_run_id() -> str:
    """Not from Python's generators, which every run seeds alike."""
    return uuid.uuid4().hex[:8]


class Tracker:
    """Writes figures to folder/metrics.jsonl and, when asked for, to wandb; to be used in a `with` statement.

    What wandb cannot do is a warning, never an error. Without a key or a network it writes an offline run.
    resumed_at: the number of steps of the checkpoint; later lines of an interrupted run are taken out first.
    enabled: False on all processes but the main one: nothing is written.
    """

    def __init__(
        self,
        folder: Path,
        settings: LoggerConfig,
        config: Mapping[str, Any],
        *,
        run_id: str,
        resumed_at: int = 0,
        enabled: bool = True,
    ) -> None:
        self.path = folder / METRICS
        self.enabled = enabled
        self._run: Any = None
        if not enabled:
            return
        _write_lines(self.path, [record for record in read_metrics(self.path) if record["step"] <= resumed_at])
        if settings.name == "wandb":
            self._run = _start_wandb(folder, settings, config, run_id)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """One line, and one wandb record, with the number of optimizer steps done."""
        if not self.enabled:
            return
        record = {"step": step, **figures}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._try("log", lambda: self._run.log(record))

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """The run's final figures, shown by wandb in its table of runs."""
        if self.enabled:
            self._try("take the summary", lambda: self._run.summary.update(dict(summary)))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._try("finish", lambda: self._run.finish(exit_code=0 if kind is None else 1))

    def _try(self, what: str, action: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:  # wandb raises anything from its own errors to ConnectionResetError
            log.warning("wandb could not %s (%s); going on without it, %s has everything", what, error, self.path)
            self._run = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without a line that an interruption cut off; [] when there is no file."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: left out an incomplete line", path)
    return records


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(temporary, path)


def _start_wandb(folder: Path, settings: LoggerConfig, config: Mapping[str, Any], run_id: str) -> Any:
    """A run, online if that works, else offline, else None."""
    modes: tuple[Literal["online", "offline"], ...] = ("offline",) if settings.offline else ("online", "offline")
    for mode in modes:
        try:
            if mode == "online" and not wandb.login(prompt=False, verify=False):  # init would ask, and wait for a key
                raise wandb.errors.UsageError("no API key: `wandb login` takes one")
            run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                group=settings.group,
                name=folder.name,
                id=run_id,
                resume="allow" if mode == "online" else None,
                dir=folder,
                config=dict(config),
                mode=mode,
                settings=wandb.Settings(init_timeout=settings.init_timeout, console="off", silent=True),
            )
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
        except Exception as error:  # no key, no network, no service: all kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("wandb %s is not possible (%s)", mode, reason)
            continue
        where = run.url if mode == "online" else f"offline; upload it with `wandb sync {Path(run.dir).parent}`"
        log.info("wandb: %s", where)
        return run
    return None
