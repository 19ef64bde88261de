"""metrics.jsonl is the whole truth, and wandb has the same or fails with a warning."""

import json
import logging
import struct
import time

import pytest
from wandb.proto import wandb_internal_pb2

from sbp.training import tracking
from sbp.training.config import LoggerConfig
from sbp.training.tracking import Tracker, read_metrics

OFFLINE = LoggerConfig(name="wandb", offline=True)


def wandb_records(path):
    """The records of a .wandb file: a LevelDB-style log of protobuf messages."""
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, last
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def wandb_history(folder):
    """What the one offline run in `folder` logged."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(100):  # wandb's service writes on for a moment after finish()
        records = list(wandb_records(path))
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    items = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    history = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in item} for item in items]
    return [{name: value for name, value in line.items() if not name.startswith("_")} for line in history]


def test_the_offline_wandb_file_holds_what_metrics_jsonl_holds(tmp_path):
    with Tracker(tmp_path, OFFLINE, {"seed": 0}, run_id="abc12345") as tracker:
        for step in range(1, 400):
            figures = {f"gradient_cosine/blocks.{i}": step / (i + 3) for i in range(20)}
            tracker.log(step, figures | {"train/loss": 2 / step, "lr": 1e-3})
        tracker.summarise({"top1": 97.5})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert len(lines) == 399 and wandb_history(tmp_path) == lines


def test_lines_after_the_checkpoint_and_half_a_line_are_taken_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lr": 1.0}\n{"step": 2, "lr": 0.5}\n{"step": 3, "l')
    with Tracker(tmp_path, LoggerConfig(), {}, run_id="a", resumed_at=1) as tracker:
        tracker.log(2, {"lr": 0.25})
    assert read_metrics(path) == [{"step": 1, "lr": 1.0}, {"step": 2, "lr": 0.25}]


def test_other_processes_write_nothing(tmp_path):
    with Tracker(tmp_path, OFFLINE, {}, run_id="a", enabled=False) as tracker:
        tracker.log(1, {"lr": 1.0})
        tracker.summarise({})
    assert not list(tmp_path.iterdir())


def test_no_key_means_an_offline_run_and_no_question(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with caplog.at_level(logging.WARNING), Tracker(tmp_path, LoggerConfig(name="wandb"), {}, run_id="a") as tracker:
        tracker.log(1, {"lr": 1.0})
    assert "wandb online is not possible (no API key" in caplog.text
    assert wandb_history(tmp_path) == [{"step": 1, "lr": 1.0}]


def test_no_network_means_an_offline_run(tmp_path, monkeypatch, caplog):
    real = tracking.wandb.init

    def init(**kwargs):
        if kwargs["mode"] == "online":
            raise tracking.wandb.errors.CommError("Run initialization has timed out after 10.0 sec.")
        return real(**kwargs)

    monkeypatch.setattr(tracking.wandb, "login", lambda **kwargs: True)
    monkeypatch.setattr(tracking.wandb, "init", init)
    with caplog.at_level(logging.WARNING), Tracker(tmp_path, LoggerConfig(name="wandb"), {}, run_id="a") as tracker:
        tracker.log(1, {"lr": 1.0})
    assert "wandb online is not possible (Run initialization has timed out" in caplog.text
    assert wandb_history(tmp_path) == [{"step": 1, "lr": 1.0}]


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_wandb_never_stops_a_run(tmp_path, monkeypatch, caplog, broken):
    class Run:
        dir = "x/files"

        def __getattr__(self, name):
            def call(*args, **kwargs):
                if name == broken:
                    raise ConnectionResetError("service killed")

            return call

    def init(**kwargs):
        if broken == "init":
            raise TimeoutError("no network")
        return Run()

    monkeypatch.setattr(tracking.wandb, "init", init)
    with caplog.at_level(logging.WARNING), Tracker(tmp_path, OFFLINE, {}, run_id="a") as tracker:
        tracker.log(1, {"lr": 1.0})
        tracker.log(2, {"lr": 0.5})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2 and "wandb" in caplog.text
