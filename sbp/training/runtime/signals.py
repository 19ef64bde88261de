"""Being asked to stop: by a cluster's scheduler, by torchrun, or by Ctrl-C."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sbp.training.runtime import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_SECOND_PRESS = 2.0  # seconds; torchrun passes one Ctrl-C on a moment after the terminal has sent it

received: signal.Signals | None = None
_since = 0.0
_owner = 0


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal is only noted, until the run asks; a second Ctrl-C, some time later, stops at once."""
    before = listen()
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        if before:
            remember(None)


def listen() -> dict[signal.Signals, Any]:
    """Notes signals from now on; returns who got them before, {} where nothing changes."""
    global _owner
    if listening() or threading.current_thread() is not threading.main_thread():  # Python allows it nowhere else
        return {}
    remember(None)
    _owner = os.getpid()
    return {one: signal.signal(one, _note) for one in heeded()}


def heeded() -> list[signal.Signals]:
    """SIGNALS, but for a SIGHUP that is ignored: what was started with nohup is to outlive its terminal."""
    return [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]


def listening() -> bool:
    return signal.getsignal(signal.SIGTERM) is _note


def remember(one: signal.Signals | None) -> None:
    """Sets what `stop_requested` and `name` tell."""
    global received
    received = one


def ignore() -> None:
    """For the processes that load images: the run itself ends them when it has written its checkpoint."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)


def _note(number: int, frame: FrameType | None) -> None:
    global received, _since
    if os.getpid() != _owner:
        return  # a child that has not yet called `ignore`
    now = time.monotonic()
    if number == signal.SIGINT and received == signal.SIGINT and now - _since > _SECOND_PRESS:
        raise KeyboardInterrupt
    if received is None:
        received, _since = signal.Signals(number), now


def stop_requested() -> bool:
    """Whether any process was asked to stop. All processes have to ask together."""
    return distributed.maxima([float(received is not None)])[0] > 0


def name() -> str:
    """Of the signal that this process has received; "another process" when it was another one."""
    return "another process" if received is None else received.name
