"""Several commands at once, which stop in good order."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Timer
from types import TracebackType
from typing import Any

from tqdm import tqdm

from sbp.cli.torchrun import ROOT
from sbp.training.runtime import signals


class Jobs:
    """Runs commands of this project, `at_once` of them, each with one of `gpus` GPUs; to be used in a `with` statement.

    Signals and the end of `minutes` ask those that run to stop, as a cluster would, and let no other begin.
    failed: what ended with another exit code than 0 without being asked to, and where its output lies.
    """

    def __init__(self, at_once: int, gpus: int = 0, minutes: float | None = None) -> None:
        self.at_once, self.stopping = at_once, False
        self.failed: list[str] = []
        self._running: set[subprocess.Popen] = set()
        self._slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(at_once):
            self._slots.put(slot % max(gpus, 1))
        self._on_gpus = gpus > 0
        self._timer = None if minutes is None else Timer(60 * minutes, self.stop)

    def __enter__(self) -> "Jobs":
        self._before = {one: signal.signal(one, self.stop) for one in signals.heeded()}
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        if self._timer is not None:
            self._timer.cancel()

    def stop(self, *_: Any) -> None:
        self.stopping = True
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)

    def do(self, what: str, tasks: dict[str, Callable[["Jobs"], str | None]]) -> None:
        """Runs the tasks, each of which calls `run`, and shows how far they are, with the line that each returns."""
        with ThreadPoolExecutor(self.at_once) as pool, tqdm(total=len(tasks), desc=what, disable=not tasks) as bar:

            def one(name: str) -> None:
                try:
                    said = None if self.stopping else tasks[name](self)
                    if said is not None:
                        bar.write(f"{name}: {said}")
                except Exception as error:
                    self.failed.append(f"{name} ({type(error).__name__}: {error})")
                bar.update()

            list(pool.map(one, tasks))

    def run(self, command: list[str], log: Path) -> bool:
        """Runs a Python command to its end, its output in `log`; returns whether it did all that it had to."""
        slot = self._slots.get()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        if self._on_gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot] if visible else str(slot)
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("a") as file:  # in a session of its own: a Ctrl-C reaches it through `stop` alone
                process = subprocess.Popen(
                    [sys.executable, *command], env=environment, stdout=file, stderr=file, start_new_session=True
                )
            self._running.add(process)
            if self.stopping:  # came between the two
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            self._running.discard(process)
        finally:
            self._slots.put(slot)
        if code != 0 and not self.stopping:
            self.failed.append(f"{' '.join(command)}\n    exit code {code}: {log}")
        return code == 0
