"""How a job fails: what is said of it, what its folder keeps, and how one of several processes ends."""

import logging
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from omegaconf.errors import OmegaConfBaseException

from sbp.cli.sweep_table import FAILURE
from sbp.cli.torchrun import RunFailed
from sbp.training.record.files import open_text
from sbp.training.record.status import read_status, write_status
from sbp.training.runtime import distributed

log = logging.getLogger(__name__)

_FORESEEN = (RunFailed, ValueError, OmegaConfBaseException, torch.OutOfMemoryError)
_ENDS_THE_SWEEP = (
    "\nunder one torchrun the other processes cannot go on without this one: the sweep ends here. With processes=N in "
    "place of torchrun each job has its own, and fails alone"
)


@dataclass(frozen=True)
class Failure:
    """What an exception says, without its frames, which hold the model.

    foreseen: the message suffices, as the user or the machine is to blame, not the code. alone: the other processes
    do not fail with the same error.
    """

    message: str
    foreseen: bool
    alone: bool

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        foreseen = isinstance(error, _FORESEEN)
        message = _one_line(error) if foreseen else f"{type(error).__name__}: {_one_line(error)}"
        return cls(message, foreseen, alone=not foreseen or _ran_out_of_memory(error))

    @property
    def told(self) -> str:
        """The message, with the process that it is of where the others have none."""
        return on_this_process(self.message) if self.alone else self.message

    def last_words(self, sweeping: bool) -> str:
        """Of a process that the others cannot go on without; to be called where the exception is handled."""
        if not (self.foreseen or sweeping):
            return traceback.format_exc()
        return f"error: {self.told}{_ENDS_THE_SWEEP if sweeping else ''}"


def write_failure(folder: Path, message: str, before: dict[str, Any] | None) -> None:
    """Why this attempt failed; the first process that fails writes it, as the others fail in its wake.

    before: the status before this attempt, None where a run goes on in another process, which stays as it is. So does
    a status that says so already, and that of a complete run.
    """
    if before is None:
        return
    try:
        with open_text(folder / FAILURE, "x") as file:
            file.write(f"{message}\n\n{traceback.format_exc()}")
    except FileExistsError:
        return
    except OSError as error:
        log.warning("cannot write %s (%s)", folder / FAILURE, error)
    status = read_status(folder)
    if status.get("state") == "running" or (status == before and status.get("state") != "completed"):
        steps = {key: status[key] for key in ("step", "total_steps") if key in status}
        write_status(folder, "failed", message=message, **steps)


def leave(code: int, message: str = "") -> NoReturn:
    """Ends this process. As one of several it does so at once: to leave them in good order waits for the others, who
    wait for this one.
    """
    if distributed.world_size() == 1:
        sys.exit(message or code)
    print(message, file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def on_this_process(message: str) -> str:
    return message if distributed.is_main() else f"on process {distributed.rank()}: {message}"


def _one_line(error: BaseException) -> str:
    if isinstance(error, OmegaConfBaseException):
        return f"{str(error).splitlines()[0]} (key: {error.full_key})"
    return str(error)


def _ran_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or isinstance(error.__cause__, torch.OutOfMemoryError)
