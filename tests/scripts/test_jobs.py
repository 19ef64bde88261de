"""Several commands at once: what comes of each, and of all when they are asked to stop."""

import os
import signal
import threading
import time

import pytest

from scripts.jobs import Jobs

pytestmark = pytest.mark.multiprocess

SAY = "import os; print('gpu', os.environ.get('CUDA_VISIBLE_DEVICES'))"
WAIT = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("asked"), sys.exit(75)))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def test_each_command_has_a_log_and_what_fails_is_named(tmp_path):
    with Jobs(2) as jobs:
        assert jobs.run(["-c", SAY], tmp_path / "a" / "log.txt")
        assert not jobs.run(["-c", "raise SystemExit(3)"], tmp_path / "b.txt")
    assert (tmp_path / "a" / "log.txt").read_text() == "gpu None\n"
    (failed,) = jobs.failed
    assert "exit code 3" in failed and "b.txt" in failed


def test_a_task_that_raises_does_not_end_the_others(tmp_path):
    done = []
    with Jobs(2) as jobs:
        jobs.do("some", {"bad": lambda jobs: 1 / 0, "good": lambda jobs: done.append(1)})
    assert done == [1] and jobs.failed == ["bad (ZeroDivisionError: division by zero)"]


def test_each_of_those_that_run_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with Jobs(2, gpus=2) as jobs:
        jobs.do("two", {name: lambda jobs, name=name: str(jobs.run(["-c", SAY], tmp_path / name)) for name in "ab"})
    assert {(tmp_path / name).read_text() for name in "ab"} == {"gpu 4\n", "gpu 6\n"}


def stop_when_begun(began, act):
    def wait():
        while not began.exists():
            time.sleep(0.05)
        act()

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("how", ["signal", "minutes"])
def test_asked_to_stop_they_end_in_good_order_and_no_other_begins(tmp_path, how):
    began, ran = tmp_path / "began", []
    with Jobs(1, minutes=0.02 if how == "minutes" else None) as jobs:
        if how == "signal":
            stop_when_begun(began, lambda: os.kill(os.getpid(), signal.SIGTERM))
        waiting = {"first": lambda jobs: str(ran.append(jobs.run(["-c", WAIT, str(began)], tmp_path / "log")))}
        jobs.do("two", waiting | {"second": lambda jobs: str(ran.append("never"))})
    assert jobs.stopping and ran == [False] and not jobs.failed
    if how == "signal":
        assert (tmp_path / "log").read_text() == "asked\n"
    assert signal.getsignal(signal.SIGTERM) is not jobs.stop
