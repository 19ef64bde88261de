"""A run in processes of its own: one torchrun for each job that wants several devices.

A process of its own, not torch's `elastic_launch` within this one: that leaves its signal handlers behind, which raise
in whatever runs after it, where a sweep has to remember a signal and submitit to queue the job again.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from sbp.cli.sweep_table import FAILURE
from sbp.training.record.files import read_text
from sbp.training.record.status import STATUS, Preempted, read_status
from sbp.training.record.summary import SUMMARY
from sbp.training.runtime import signals

ROOT = Path(__file__).parents[2]
SIGNALS_TO_HANDLE = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # torchrun's own, and the one that SLURM is told to send
LONGEST_SHUTDOWN = 120  # seconds, not torchrun's 30, from a signal to the end of the checkpoint


class RunFailed(Exception):  # noqa: N818 - nothing is wrong here
    """The run in the child processes failed, and has written down why."""


def torchrun(processes: int, overrides: list[str], folder: Path, options: Sequence[str] = ()) -> list[str]:
    """The command that trains in `folder` with so many processes on this machine. options: of Hydra."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = ["-m", "sbp.cli", "train", *options]
    # The folder and its .hydra are there already.
    return [
        sys.executable, *launcher, f"--signals-to-handle={SIGNALS_TO_HANDLE}",
        *command, *overrides, f"run_dir={quoted(folder)}", "hydra.output_subdir=null",
    ]  # fmt: skip


def quoted(value: object) -> str:
    """A value as Hydra's command line takes it whatever its characters are."""
    return "'" + str(value).replace("'", "\\'") + "'"


def run_children(command: list[str], folder: Path) -> dict[str, Any]:
    """Runs the command to its end and returns the summary in `folder`; passes signals on to it.

    torchrun says with its exit code only whether all went well; the folder says what happened. Raises Preempted, and
    RunFailed with the run's own message.
    """
    before = _stamp(folder)
    environment = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(LONGEST_SHUTDOWN)} | os.environ
    # In a session of its own, or a Ctrl-C in the terminal would reach the run several times.
    with subprocess.Popen(command, env=environment, start_new_session=True) as process, _passing_on(process) as asked:
        code = process.wait()
    if asked and signals.listening():
        signals.remember(asked[0])  # a sweep stops then, even if this run came to its end
    status = read_status(folder) if _stamp(folder) != before else {}
    state = status.get("state")
    if code == 0 or state == "completed":
        summary: dict[str, Any] = json.loads(read_text(folder / SUMMARY))
        return summary
    if (failure := folder / FAILURE).is_file():
        raise RunFailed(read_text(failure).partition("\n\n")[0])
    if state == "preempted" or (asked and state != "failed"):
        raise Preempted(status.get("message") or f"stopped by {asked[0].name if asked else 'a signal'}")
    raise RunFailed(status.get("message") or f"its torchrun ended with {_named(code)}, and no word from the run itself")


def _stamp(folder: Path) -> int:
    path = folder / STATUS
    return path.stat().st_mtime_ns if path.is_file() else 0


def _named(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


@contextmanager
def _passing_on(process: subprocess.Popen) -> Iterator[list[signal.Signals]]:
    """Inside, this process's signals go to the other one; gives the list of those that came."""
    came: list[signal.Signals] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number))
        process.send_signal(number)

    before = {one: signal.signal(one, pass_on) for one in signals.heeded()}
    try:
        yield came
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
