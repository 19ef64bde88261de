"""Whether two runs are the same, bit for bit."""

import pytest
import torch

from sbp.training.record.checkpoint import Checkpoints, find
from sbp.training.record.tracking import read_metrics

MEASURED = ("images_per_second", "data_wait_share", "memory/peak_rss")  # what differs between equal runs


def record(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def assert_equal(a, b, path=""):
    """Bitwise equality of nested containers of tensors and numbers."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_equal(one, other, f"{path}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def assert_same_run(one, other):
    """Equal weights, optimizer, averaged weights, counts and logged values of the runs in two folders."""
    (_, expected), (_, found) = find(one), find(other)
    for key in expected.keys() - {"config", "run_id"}:
        assert_equal(expected[key], found[key], key)
    assert record(one) == record(other)


class Interruption(BaseException):
    pass


def interrupt_once_saved(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """From now on a run is interrupted, once each, when it has saved its checkpoints of these steps."""
    real, left = Checkpoints.save, set(steps)

    def save(self, step, content):
        path = real(self, step, content)
        if step in left:
            left.remove(step)
            raise Interruption
        return path

    monkeypatch.setattr(Checkpoints, "save", save)
