"""metrics.jsonl is the whole truth, and wandb has the same or fails with a warning."""

import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from unittest.mock import Mock

import pytest

from sbp.training.config.run import LoggerConfig
from sbp.training.record import tracking
from sbp.training.record.tracking import SENT, Tracker, read_metrics
from tests.training.wandb_side import WandbServer, newest_records, offline_folders, wandb_history

OFFLINE = LoggerConfig(name="wandb", offline=True)


def test_the_offline_wandb_file_holds_what_metrics_jsonl_holds(tmp_path):
    with Tracker(tmp_path, OFFLINE, {"seed": 0}, run_id="abc12345") as tracker:
        for step in range(1, 150):
            figures = {f"gradient_cosine/blocks.{i}": step / (i + 3) for i in range(20)}
            tracker.log(step, figures | {"train/loss": 2 / step, "lr": 1e-3})
        tracker.summarise({"top1": 97.5})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert len(lines) == 149 and wandb_history(tmp_path) == lines


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_a_wandb_run_belongs_to_its_sweep_counts_optimizer_steps_and_says_how_it_ended(tmp_path, fails):
    settings = LoggerConfig(name="wandb", offline=True, project="mine", group="ratios")
    folder = tmp_path / "keep_ratio-0.5"
    folder.mkdir()
    with suppress(ZeroDivisionError), Tracker(folder, settings, {"seed": 3}, run_id="abc12345") as tracker:
        tracker.log(7, {"lr": 1.0})
        assert not fails or 1 / 0
    run = newest_records(folder, "run")[0]
    assert (run.run_id, run.project, run.run_group, run.display_name) == ("abc12345", "mine", "ratios", folder.name)
    metrics = newest_records(folder, "metric")
    assert any(one.glob_name == "*" and one.step_metric == "step" for one in metrics)
    assert [one.exit_code for one in newest_records(folder, "exit")] == [int(fails)]


def test_lines_after_the_checkpoint_and_half_a_line_are_taken_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lr": 1.0}\n{"step": 2, "lr": 0.5}\n{"step": 3, "l')
    with Tracker(tmp_path, LoggerConfig(), {}, run_id="a", resumed_at=1) as tracker:
        tracker.log(2, {"lr": 0.25})
    assert read_metrics(path) == [{"step": 1, "lr": 1.0}, {"step": 2, "lr": 0.25}]


def test_a_run_without_a_checkpoint_starts_with_an_empty_record(tmp_path):
    for _ in range(2):
        with Tracker(tmp_path, LoggerConfig(), {}, run_id="a") as tracker:
            tracker.log(0, {"lr": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "lr": 1.0}]


@pytest.mark.parametrize("broken", [None, "truncate"], ids=["half a line is taken back", "half a line stays"])
def test_lines_that_a_full_disk_does_not_take_are_written_later(tmp_path, caplog, monkeypatch, broken):
    path = tmp_path / "metrics.jsonl"
    if broken is not None:
        monkeypatch.setattr(tracking.os, broken, Mock(side_effect=OSError("the file system is gone")))
    with Tracker(tmp_path, LoggerConfig(), {}, run_id="a") as tracker:
        tracker.log(1, {"lr": 1.0})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
        try:
            tracker.log(2, {"lr": 0.5})
            tracker.log(3, {"lr": 0.25})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
        assert [line["step"] for line in read_metrics(path)] == [1] and "lines wait in memory" in caplog.text
        tracker.log(4, {"lr": 0.125})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]


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


@pytest.mark.parametrize(
    ("variable", "value", "runs"),
    [("WANDB_MODE", "disabled", 0), ("WANDB_MODE", "offline", 1), ("WANDB_MODE", "dryrun", 1)],
)
def test_wandbs_own_settings_are_heeded(tmp_path, monkeypatch, caplog, variable, value, runs):
    """With a key, which is then not said to be missing."""
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv(variable, value)
    settings = LoggerConfig(name="wandb", init_timeout=1)
    with caplog.at_level(logging.INFO), Tracker(tmp_path, settings, {}, run_id="a") as tracker:
        tracker.log(1, {"lr": 1.0})
        assert tracker.shows == bool(runs)
    assert "not possible" not in caplog.text and "API key" not in caplog.text
    assert len(list(tmp_path.glob("wandb/*run-*"))) == runs
    assert ("wandb: off, as its own settings say" in caplog.text) == (not runs)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "lr": 1.0}]


def test_names_that_are_not_utf8_do_not_cost_the_wandb_run(tmp_path, caplog):
    config = {"data": {"root": os.fsdecode(b"caf\xe9"), "workers": 1}, "lists": [os.fsdecode(b"\xff"), 1]}
    with caplog.at_level(logging.WARNING), Tracker(tmp_path, OFFLINE, config, run_id="a") as tracker:
        tracker.log(1, {"lr": 1.0})
        tracker.summarise({"config": config})
        assert tracker.shows
    assert not caplog.text and wandb_history(tmp_path) == [{"step": 1, "lr": 1.0}]


@pytest.mark.parametrize("answers", [False, None], ids=["refuses", "never answers"])
def test_a_server_out_of_reach_means_an_offline_run(tmp_path, monkeypatch, caplog, answers):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{9 if answers is False else silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        settings = LoggerConfig(name="wandb", init_timeout=1)
        with caplog.at_level(logging.WARNING), Tracker(tmp_path, settings, {}, run_id="a") as tracker:
            tracker.log(1, {"lr": 1.0})
    assert "wandb online is not possible (" in caplog.text and "wandb offline" not in caplog.text
    assert wandb_history(tmp_path) == [{"step": 1, "lr": 1.0}]


@pytest.fixture
def server(monkeypatch):
    server = WandbServer()
    with server.reachable():
        pass
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


def attempt(folder, steps, resumed_at=0, **settings):
    """One start of the run "abcd1234"."""
    settings = LoggerConfig(name="wandb", **settings)
    with Tracker(folder, settings, {"seed": 0}, run_id="abcd1234", resumed_at=resumed_at) as tracker:
        for step in steps:
            tracker.log(step, {"lr": 1 / step})


def sync(*arguments, cwd):
    """What a user types to upload; it leaves a log in `cwd`."""
    command = [sys.executable, "-m", "wandb", "sync", *arguments]
    environment = os.environ | {"WANDB_ERROR_REPORTING": "false"}
    subprocess.run(command, env=environment, cwd=cwd, capture_output=True, check=True, timeout=60)


def test_a_resumed_online_run_gets_the_lines_that_it_lacks(tmp_path, server):
    with server.reachable():
        attempt(tmp_path, range(1, 11))
        assert server.lines("abcd1234") == read_metrics(tmp_path / "metrics.jsonl")
        del server.history["abcd1234"][6:]  # the rest never arrived
        attempt(tmp_path, range(9, 13), resumed_at=8)
        assert server.lines("abcd1234") == read_metrics(tmp_path / "metrics.jsonl")

        attempt(tmp_path, range(11, 14), resumed_at=10)  # it has more than the checkpoint: 11 and 12 come once more
        assert [line["step"] for line in server.lines("abcd1234")] == [*range(1, 13), 11, 12, 13]
        del server.history["abcd1234"][13:]
        attempt(tmp_path, [14], resumed_at=13)
        assert [line["step"] for line in server.lines("abcd1234")] == [*range(1, 13), 11, 12, 13, 14]

        (tmp_path / SENT).unlink()  # nothing is known: all comes once more
        attempt(tmp_path, [], resumed_at=14)
        assert server.lines("abcd1234")[16:] == read_metrics(tmp_path / "metrics.jsonl")


def test_a_server_lost_midway_holds_the_end_for_the_timeout_only(tmp_path, server, caplog):
    with server.reachable():
        tracker = Tracker(tmp_path, LoggerConfig(name="wandb", finish_timeout=1), {}, run_id="abcd1234")
    with caplog.at_level(logging.WARNING), tracker:
        for step in range(1, 10):
            tracker.log(step, {"lr": 1 / step})
    (warning,) = [record.getMessage() for record in caplog.records if record.name == tracking.__name__]
    assert "wandb could not finish (Timed out" in warning
    command = re.search("`wandb sync (--include-online) (.*)`", warning)
    with server.reachable():
        sync(*command.groups(), cwd=tmp_path)
    assert server.lines("abcd1234") == read_metrics(tmp_path / "metrics.jsonl")


def test_each_offline_run_has_the_whole_record_and_all_of_them_upload_as_one_run(tmp_path, server, caplog):
    attempt(tmp_path, range(1, 7), offline=True)
    (first,) = offline_folders(tmp_path)
    next(first.glob("run-*.wandb")).write_bytes(b"")  # as SIGKILL can leave it
    with caplog.at_level(logging.INFO):
        attempt(tmp_path, range(5, 9), resumed_at=4, offline=True)
    newest = offline_folders(tmp_path)[-1]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert newest != first and wandb_history(tmp_path) == lines
    assert f"upload it with `wandb sync {newest}`" in caplog.text
    with server.reachable():
        sync(newest, cwd=tmp_path)
        assert server.lines("abcd1234") == lines
        attempt(tmp_path, [9], resumed_at=8)  # online from now on
        assert {line["step"] for line in server.lines("abcd1234")} == set(range(1, 10))
    assert list(server.history) == ["abcd1234"]


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


def test_without_wandb_installed_a_run_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "wandb", None)
    with Tracker(tmp_path, LoggerConfig("wandb"), {}, run_id="abc") as tracker:
        tracker.log(1, {"train/loss": 2.0})
        tracker.summarise({"top1": 50.0})
    assert "wandb is not installed" in caplog.text
    assert tracking.read_metrics(tmp_path / tracking.METRICS) == [{"step": 1, "train/loss": 2.0}]
