"""How fast a run goes: images per second, time spent waiting for data, and the bar that shows them."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from tqdm import tqdm

from sbp.training.runtime import distributed

log = logging.getLogger(__name__)

T = TypeVar("T")

SHOWN = {  # in the line of an epoch
    "train/loss": "loss",
    "val/top1": "top-1",
    "val/top1_ema": "top-1 (EMA)",
    "val/box_ap": "box AP",
    "val/mask_ap": "mask AP",
    "val/box_ap_ema": "box AP (EMA)",
    "val/mask_ap_ema": "mask AP (EMA)",
}


class Progress:
    """Measures the training steps, without what lies between them (evaluation, probes, checkpoints).

    A bar runs on the main process, in terminals only: a log file gets none.
    """

    def __init__(self, total_steps: int, steps_done: int = 0) -> None:
        self.total_steps, self.steps_done = total_steps, steps_done
        self.images_per_second = self.data_wait_share = 0.0
        self._bar: tqdm | None = None
        self._since = time.perf_counter()
        self._images, self._waited = 0, 0.0
        self._steps_seen, self._seconds_seen = 0, 0.0  # of all steps of this process, for the ETA

    @contextmanager
    def epoch(self, label: str, steps: int) -> Iterator[None]:
        """Shows a bar of `steps` steps inside."""
        hidden = not (distributed.is_main() and sys.stderr.isatty())
        with tqdm(total=steps, desc=label, unit="step", disable=hidden, leave=False, dynamic_ncols=True) as self._bar:
            self._since = time.perf_counter()
            yield
        self._bar = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def wait_for(self, iterator: Iterator[T]) -> T:
        """The iterator's next item; its time counts as waiting for data."""
        before = time.perf_counter()
        item = next(iterator)
        self._waited += time.perf_counter() - before
        return item

    def advance(self, images: int) -> None:
        """One more step, of so many images over all processes."""
        self.steps_done += 1
        self._steps_seen += 1
        self._images += images
        if self._bar is not None:
            self._bar.update()

    def read(self) -> dict[str, float]:
        """Figures of the steps since the last call. The device must have been waited for."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        self.images_per_second = self._images / seconds
        self.data_wait_share = self._waited / seconds
        self._seconds_seen += seconds
        self._since += seconds
        self._images, self._waited = 0, 0.0
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.images_per_second:.0f} images/s, {self.wait}, run ETA {self.eta}")
        return {"images_per_second": self.images_per_second, "data_wait_share": self.data_wait_share}

    def say(self, epoch: int, epochs: int, figures: Mapping[str, float]) -> None:
        """Logs an epoch in one line."""
        log.info("%s", self.line(epoch, epochs, figures))

    def line(self, epoch: int, epochs: int, figures: Mapping[str, float]) -> str:
        """One epoch in one line, for the log."""
        parts = [f"epoch {epoch}/{epochs}"]
        for name, label in SHOWN.items():
            if name in figures:
                parts.append(f"{label} {figures[name]:.{3 if name == 'train/loss' else 2}f}")
        peak = figures.get("memory/peak_allocated", figures.get("memory/peak_rss", 0.0))
        if self._steps_seen:
            parts += [f"{self.images_per_second:.0f} images/s", self.wait]
        parts += [f"peak {peak / 2**20:.0f} MiB", *([f"ETA {self.eta}"] if self._steps_seen else [])]
        return ", ".join(parts)

    @property
    def wait(self) -> str:
        return f"{self.data_wait_share:.0%} waiting for data"

    @property
    def eta(self) -> timedelta:
        """Training time that is left in the run."""
        per_step = self._seconds_seen / max(self._steps_seen, 1)
        return timedelta(seconds=round(per_step * (self.total_steps - self.steps_done)))
