"""Peak memory: of training alone, and of the process that needs most."""

import torch

from sbp.training.engine.probes import PeakMemory
from sbp.training.runtime import distributed


def test_the_peak_of_training_outlives_what_is_excluded(monkeypatch):
    now, peak = {}, PeakMemory(torch.device("cpu"))
    monkeypatch.setattr(peak, "_now", lambda: {"memory/peak_allocated": now["bytes"]})
    now["bytes"] = 5  # a step
    with peak.excluded():
        now["bytes"] = 900  # a probe
    now["bytes"] = 3  # another step
    assert peak.allocated() == 5


def test_the_peak_is_that_of_the_process_that_needs_most(monkeypatch):
    peak = PeakMemory(torch.device("cpu"))
    monkeypatch.setattr(peak, "_now", lambda: {"memory/peak_allocated": 5, "memory/peak_reserved": 8})
    monkeypatch.setattr(distributed, "maxima", lambda values: [max(pair) for pair in zip(values, (7, 6), strict=True)])
    assert peak.read() == {"memory/peak_allocated": 7, "memory/peak_reserved": 8}
    assert peak.allocated() == 5  # its own


def test_a_run_starts_with_the_memory_that_it_has_then():
    """Not with what an earlier job of the sweep, or the start of the program, has had and given back."""
    block = torch.ones(2**26)  # 256 MiB, touched
    with_block = PeakMemory(torch.device("cpu")).read()["memory/peak_rss"]
    del block
    assert PeakMemory(torch.device("cpu")).read()["memory/peak_rss"] < with_block - 2**27
