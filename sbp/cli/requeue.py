"""Jobs that submitit has queued: a run that was asked to stop has to be queued again."""

import os
import signal
from types import FrameType


class Requeue:
    """Called after a run was preempted: queues it again where submitit asked it to stop, and ends the process.

    submitit's own handler of SIGUSR2, which SLURM sends before a job's time is over or another one takes its place,
    ends the process at once. Here the run first finishes its step and its checkpoint, as after any other signal;
    submitit then decides as always (`max_num_timeout`). After other signals, as a user's scancel, nothing is queued.
    Outside of submitit this does nothing.
    """

    def __init__(self) -> None:
        self._asked = False
        self._submitit = signal.getsignal(signal.SIGUSR2) if "SUBMITIT_EXECUTOR" in os.environ else None
        if callable(self._submitit):
            signal.signal(signal.SIGUSR2, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.raise_signal(signal.SIGUSR1)  # the sweep listens to it, and its run or torchrun takes it from here

    def __call__(self) -> None:
        if self._asked and callable(self._submitit):
            self._submitit(signal.SIGUSR2, None)
