"""Images per second, and what share of the time went into waiting for data."""

import pytest

from sbp.training.record import progress
from sbp.training.record.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved on."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

        def moves(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_waiting_is_told_from_training_and_both_from_what_lies_between_steps(clock):
    def loader():
        for number in range(4):
            clock.moves(1)
            yield number

    run, batches = Progress(total_steps=8), loader()
    clock.moves(50)  # before the epoch begins
    with run.epoch("epoch 1/1", 4):
        for expected in range(4):
            assert run.wait_for(batches) == expected
            clock.moves(3)  # the step
            run.advance(32)
            if expected == 1:
                assert run.read() == {"images_per_second": 64 / 8, "data_wait_share": 0.25}
            with run.paused():
                clock.moves(1000)  # a checkpoint
    assert run.read() == {"images_per_second": 64 / 8, "data_wait_share": 0.25}
    assert run.eta.total_seconds() == 4 * 4


def test_the_line_of_an_epoch(clock):
    run = Progress(total_steps=2)
    with run.epoch("epoch 1/2", 1):
        clock.moves(2)
        run.advance(10)
        run.read()
    line = run.line(1, 2, {"train/loss": 1.23456, "val/top1": 45.678, "memory/peak_rss": 3 * 2**20})
    assert line == ("epoch 1/2, loss 1.235, top-1 45.68, 5 images/s, 0% waiting for data, peak 3 MiB, ETA 0:00:02")
