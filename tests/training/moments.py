"""Runs train.py, and at an exact moment something happens: python moments.py MOMENT COUNT WHAT [train.py's overrides]

MOMENT: "step" (before the weights change), "evaluate" (between two batches), "save" (in the middle of the file).
COUNT: which such moment of this process. WHAT: a signal that the process sends to itself, such as SIGKILL; or "nan",
a loss that is not finite from this step on. MOMENTS_RANK in the environment: only in this process of several;
MOMENTS_ONCE: a file, only when it does not exist yet.
"""

import os
import runpy
import signal
import sys
from itertools import count
from pathlib import Path

import torch

from sbp.training.engine import trainer
from sbp.training.record import checkpoint
from sbp.training.tasks import accuracy

ROOT = Path(__file__).parents[2]


def main() -> None:
    moment, number, what, *overrides = sys.argv[1:]
    sys.argv = [str(ROOT / "train.py"), *overrides]
    once = os.environ.get("MOMENTS_ONCE")
    if os.environ.get("RANK", "0") == os.environ.get("MOMENTS_RANK", "0") and not (once and Path(once).exists()):
        MOMENTS[moment](int(number), what, once)
    runpy.run_path(sys.argv[0], run_name="__main__")


def happen(what: str, once: str | None) -> None:
    if once:
        Path(once).touch()
    os.kill(os.getpid(), getattr(signal, what))


def at_a_step(number: int, what: str, once: str | None) -> None:
    real, steps = trainer.Trainer._loss, count(1)

    def loss(self, *args):
        (value, parts), now = real(self, *args), next(steps)
        if what == "nan":
            return value * float("nan") if now >= number else value, parts
        if now == number:
            happen(what, once)
        return value, parts

    trainer.Trainer._loss = loss


def in_evaluation(number: int, what: str, once: str | None) -> None:
    real, batches = accuracy.autocast, count(1)

    def autocast(*args):
        if next(batches) == number:
            happen(what, once)
        return real(*args)

    accuracy.autocast = autocast


def in_a_checkpoint(number: int, what: str, once: str | None) -> None:
    real, files = torch.save, count(1)

    def save(content, file):
        if next(files) == number:
            file.write(b"half a checkpoint")
            file.flush()
            happen(what, once)
            file.seek(0)
            file.truncate()
        real(content, file)

    checkpoint.torch.save = save


MOMENTS = {"step": at_a_step, "evaluate": in_evaluation, "save": in_a_checkpoint}

if __name__ == "__main__":
    main()
