"""The state of a run in its folder, for whoever looks at it from outside: a requeueing script, a sweep's table."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from sbp.training.config.run import Config
from sbp.training.record.files import read_json, write_json
from sbp.training.runtime import distributed, signals

log = logging.getLogger(__name__)

T = TypeVar("T")

STATUS = "status.json"
LOCK = "lock"
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
EXIT_INTERRUPTED = 130  # a shell's, for Ctrl-C
EXIT_CODES = {"completed": 0, "preempted": EXIT_PREEMPTED, "failed": 1}  # none while "running"
_PATIENCE = 10  # seconds


class Preempted(Exception):  # noqa: N818 - the name says what happened
    """The run was asked to stop and has written what it needs to go on; its process ends with EXIT_PREEMPTED."""


class FolderTaken(ValueError):  # noqa: N818 - the name says what is wrong
    """Another process trains in the folder."""


class RunStatus:
    """Keeps folder/status.json: to be used in a `with` statement around the run, whose end it writes down.

    A run that was killed stays "running", of a process (`host`, `pid`) that is no more. enabled: False on all
    processes but the main one, which write nothing.
    """

    def __init__(self, folder: Path, enabled: bool = True) -> None:
        self.folder, self.enabled = folder, enabled
        self.facts: dict[str, Any] = {}

    def update(self, **facts: Any) -> None:
        """Adds facts, such as step and total_steps, and writes the file."""
        self.facts |= facts
        self._write("running")

    def __enter__(self) -> "RunStatus":
        self._write("running")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        state = "completed" if kind is None else "preempted" if kind is Preempted else "failed"
        if error is not None:
            self.facts["message"] = str(error) or type(error).__name__
        if kind is KeyboardInterrupt:
            self.facts["exit_code"] = EXIT_INTERRUPTED
        self._write(state)

    def _write(self, state: str) -> None:
        if self.enabled:
            write_status(self.folder, state, **self.facts)


def recorded(run: Callable[[Config, Path, RunStatus], T]) -> Callable[[Config, Path], T]:
    """Gives a run its status, the folder for itself, and ears for signals.

    Raises FolderTaken when another process trains in that folder.
    """

    @wraps(run)
    def recorded_run(config: Config, folder: Path) -> T:
        with ExitStack() as stack:
            distributed.only_main(lambda: stack.enter_context(only_run_in(folder)))
            stack.enter_context(signals.deferred())  # until the status says how it ended
            status = stack.enter_context(RunStatus(folder, enabled=distributed.is_main()))
            return run(config, folder, status)

    return recorded_run


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Inside, no other process can enter with the same folder. Raises FolderTaken when one is there already.

    The lock is the kernel's and ends with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        for attempt in range(_PATIENCE + 1):
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if attempt == _PATIENCE:
                    one = read_status(folder)
                    raise FolderTaken(
                        f"process {one.get('pid')} on {one.get('host')} trains in {folder}: "
                        "stop it first, or take another run_dir"
                    ) from None
                time.sleep(1)  # one that was told to stop may be about to end
            except OSError:
                break  # a file system without locks
        yield


def is_taken(folder: Path) -> bool:
    """Whether another process is in `only_run_in(folder)`. The one that is must not ask: it would lose its lock."""
    try:
        with (folder / LOCK).open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # no such file, or a file system without locks
        pass
    return False


def write_status(folder: Path, state: str, **facts: Any) -> None:
    """Replaces the folder's status.json. Where that fails there is a warning."""
    writer = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    status = {"state": state, "exit_code": EXIT_CODES.get(state), **writer, **facts}
    try:
        write_json(folder / STATUS, status)
    except OSError as error:  # the run is worth more than its description
        log.warning("cannot write %s (%s)", folder / STATUS, error)


def read_status(folder: Path) -> dict[str, Any]:
    """The folder's status.json: state ("running" or one of EXIT_CODES), exit_code, step, total_steps, message, host,
    pid and time, as far as known; {} when there is none.
    """
    return read_json(folder / STATUS)


def is_alive(status: Mapping[str, Any]) -> bool | None:
    """Whether the process that wrote this status is still there; None for one on another machine."""
    if status.get("host") != socket.gethostname():
        return None
    try:
        os.kill(status["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
