"""The state of a run in its folder, for whoever looks at it from outside: a requeueing script, a sweep's table."""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STATUS = "status.json"
STATES = ("running", "completed", "preempted", "failed")
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
EXIT_CODES = {"completed": 0, "preempted": EXIT_PREEMPTED, "failed": 1}


class Preempted(Exception):  # noqa: N818 - the name says what happened
    """The run was asked to stop and has written what it needs to go on; its process ends with EXIT_PREEMPTED."""


def write_status(folder: Path, state: str, **facts: Any) -> None:
    """Replaces folder/status.json.

    state: one of STATES. A run that was killed stays "running", of a process (`host`, `pid`) that is no more.
    facts: such as step, total_steps, message, signal; `exit_code` and the time are added.
    """
    assert state in STATES
    status = {
        "state": state,
        "exit_code": EXIT_CODES.get(state),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    status |= {"host": socket.gethostname(), "pid": os.getpid(), **facts}
    write_text(folder / STATUS, json.dumps(status, indent=2) + "\n")


def read_status(folder: Path) -> dict[str, Any]:
    """What `write_status` wrote last; {} when there is nothing."""
    path = folder / STATUS
    return json.loads(path.read_text()) if path.is_file() else {}


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole: whatever stops the process, it holds the old text or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
