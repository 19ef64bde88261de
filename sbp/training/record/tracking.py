"""The record of a run: metrics.jsonl, which is the whole truth, and the same figures in wandb."""

import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any, Literal

from sbp.training.config.run import LoggerConfig
from sbp.training.record.files import open_text, read_json, read_text, shown, write_text

try:
    import wandb
except ImportError:  # a GPU machine without a network may lack it, and logger=none needs it not
    wandb = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
SENT = "wandb/sent.json"


def new_run_id() -> str:
    """Not from Python's generators, which every run seeds alike."""
    return uuid.uuid4().hex[:8]


class Tracker:
    """Writes figures to folder/metrics.jsonl and, when asked for, to wandb; to be used in a `with` statement.

    What wandb cannot do is one warning, never an error. Without a key or a network it writes an offline run. Where
    wandb's own settings, such as WANDB_MODE, ask for an offline run or none, there is that.
    resumed_at: the number of steps of the checkpoint; later lines of an interrupted run are taken out first, and the
        wandb run, which goes on with the same id, gets the earlier lines that it lacks.
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
        self._unwritten = ""  # lines
        self._run: Any = None
        self._uses_wandb = enabled and settings.name == "wandb" and wandb is not None
        if not enabled:
            return
        if settings.name == "wandb" and wandb is None:
            log.warning("wandb is not installed; going on without it. %s has everything", self.path)
        kept = [record for record in read_metrics(self.path) if record["step"] <= resumed_at > 0]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        if self._uses_wandb:
            self._run = _start_wandb(folder, settings, config, run_id)
            self._try("log the earlier lines", lambda: _log_lacking(self._run, folder / SENT, kept))

    def log(self, step: int, figures: Mapping[str, float], pictures: Sequence[tuple[str, Any]] = ()) -> None:
        """One line, and one wandb record, with the number of optimizer steps done.

        pictures: names and PIL images, which wandb alone shows, as pictures/NAME.
        """
        if not self.enabled:
            return
        record = {"step": step, **figures}
        finite = {name: one for name, one in record.items() if math.isfinite(one)}  # JSON has no other numbers
        self._unwritten += json.dumps(finite, allow_nan=False) + "\n"
        self.flush()
        self._try(
            "log",
            lambda: self._run.log(record | {f"pictures/{shown(name)}": wandb.Image(one) for name, one in pictures}),
        )

    def flush(self) -> bool:
        """Writes the lines that wait for a disk that was full; returns whether none wait any more."""
        if not self._unwritten:
            return True
        size = None
        try:
            size = self.path.stat().st_size if self.path.is_file() else 0
            with open_text(self.path, "a") as file:
                file.write(self._unwritten)
            self._unwritten = ""
            return True
        except OSError as error:  # the next call tries again
            log.warning("cannot write %s (%s); its latest lines wait in memory", self.path, error)
        try:
            if size is not None:
                os.truncate(self.path, size)
        except OSError:
            self._unwritten = "\n" + self._unwritten.lstrip("\n")  # half a line may have been written
        return False

    @property
    def shows(self) -> bool:
        """Whether there is a wandb run, which alone shows pictures."""
        return self._run is not None

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """The run's final figures, shown by wandb in its table of runs."""
        if self.enabled:
            self._try("take the summary", lambda: self._run.summary.update(shown(dict(summary))))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._try("finish", lambda: self._run.finish(exit_code=0 if kind is None else 1))
        if self._uses_wandb:
            _end_wandb()

    def _try(self, what: str, action: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:  # wandb raises anything from its own errors to ConnectionResetError
            log.warning(
                "wandb could not %s (%s); going on without it. %s has everything; `%s` uploads what wandb has got",
                what,
                error,
                self.path,
                _sync_command(self._run),
            )
            self._run = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without a line that an interruption cut off; [] when there is no file."""
    records = []
    lines = read_text(path).splitlines() if path.is_file() else []
    for line in filter(None, lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: left out an incomplete line", path)
    return records


def _start_wandb(folder: Path, settings: LoggerConfig, config: Mapping[str, Any], run_id: str) -> Any:
    """A run, online if that works within settings.init_timeout seconds, else offline, else None."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else wandb waits, at the end, to report to its makers
    mode = _asked_for()
    if mode == "disabled":
        log.info("wandb: off, as its own settings say (WANDB_MODE=disabled, or `wandb disabled`)")
        return None
    offline = settings.offline or mode in ("offline", "dryrun")
    modes: tuple[Literal["online", "offline"], ...] = ("offline",) if offline else ("online", "offline")
    for mode in modes:
        try:
            wandb.setup(wandb.Settings(silent=True))  # else login asks the server for the user's name
            if mode == "online" and not wandb.login(prompt=False, verify=False):  # init would ask, and wait for a key
                raise wandb.errors.UsageError("no API key: `wandb login` takes one")
            run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                group=settings.group,
                name=shown(folder.name),
                id=run_id,
                resume="allow",  # what is there stays: offline, that is for the upload
                dir=folder,
                config=shown(dict(config)),
                mode=mode,
                settings=wandb.Settings(
                    init_timeout=settings.init_timeout,
                    finish_timeout=settings.finish_timeout,
                    finish_timeout_raises=True,
                    console="off",
                    silent=True,
                ),
            )
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
        except Exception as error:  # no key, no network, no service: all kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("wandb %s is not possible (%s)", mode, reason)
            _end_wandb()  # the service would refuse the id that has failed
            continue
        log.info("wandb: %s", f"offline; upload it with `{_sync_command(run)}`" if mode == "offline" else run.url)
        return run
    return None


def _asked_for() -> str:
    """The mode that wandb's own variables and files ask for: online, offline, disabled, ..."""
    try:
        return wandb.setup(wandb.Settings(silent=True)).settings.mode
    except Exception as error:  # what is wrong with them is said where a run is tried
        log.debug("wandb's settings: %r", error)
        return "online"


def _end_wandb() -> None:
    """Ends wandb's service and what it has not finished; the next run in this process starts its own."""
    try:
        wandb.teardown()
    except (Exception, SystemExit) as error:  # one that was killed
        log.debug("wandb's service: %r", error)
    wandb.run = None  # which a run without a service leaves behind, and login then refuses


def _sync_command(run: Any) -> str:
    """Uploads a run's folder, after what the server already has of the run."""
    return f"wandb sync {'' if run.offline else '--include-online '}{quote(str(Path(run.dir).parent))}"


def _log_lacking(run: Any, sent: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Logs those of a resumed run's records, all of metrics.jsonl, that wandb lacks.

    The server says how many lines it has. The file `sent` says how many it had when the latest online attempt began,
    and which record that attempt logged first. Without it, all are logged: twice rather than never, which does no
    harm where `step` is the x axis. An offline run always gets them all, as the file of an attempt that was killed can
    be empty: the newest offline run is the one to upload.
    """
    there, first = run.starting_step, 0
    if there and (before := read_json(sent)):
        first = max(0, min(len(records), before["first"] + there - before["there"]))
    if not run.offline:
        write_text(sent, json.dumps({"there": there, "first": first}))
    for record in records[first:]:
        run.log(dict(record))
