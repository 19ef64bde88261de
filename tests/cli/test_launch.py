"""What the entry points share, without starting a run."""

import json
import os
import re
import signal
import sys
from dataclasses import asdict, replace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from sbp.cli import launch, main
from sbp.cli.torchrun import RunFailed, quoted, run_children, torchrun
from sbp.training.config.rules import validate
from sbp.training.record.status import Preempted, write_status
from sbp.training.record.summary import finished, record_facts
from sbp.training.runtime import signals
from tests.training.configs import small


def test_a_job_is_named_by_what_the_sweep_varies(monkeypatch):
    monkeypatch.setenv("SBP_SWEPT", "sbp.keep_ratio backbone")
    given = ["run_dir=here", "seed=1", "backbone=vit_tiny", "+sbp.keep_ratio=[0.5, 1]"]
    assert re.fullmatch(r"backbone-vit_tiny\+sbp.keep_ratio-_0.5__1_-[0-9a-f]{8}", launch.job_folder(given))
    assert launch.job_folder([*given[:3], "sbp.keep_ratio=0.5"]) == "backbone-vit_tiny+sbp.keep_ratio-0.5"
    monkeypatch.setenv("SBP_SWEPT", "")
    assert launch.job_folder(given[:2]) == "seed-1"
    assert launch.job_folder([]) == "job"
    long = [launch.job_folder([f"data.root=/{'x' * 200}{end}"]) for end in "ab"]
    assert len(long[0]) == launch.LONGEST_NAME and long[0] != long[1]


@pytest.mark.parametrize(
    "jobs",
    [
        [["data.root=t/a/b"], ["data.root=t/a_b"], ["data.root=t_a_b"]],
        [["sbp.keep_ratio=[0.5,1]"], ["sbp.keep_ratio=[0.5 1]"]],
        [["backbone.name=a", "data.root=b+data.root-c"], ["backbone.name=a+data.root-b", "data.root=c"]],
        [[f"data.root={'x' * 200}/a"], [f"data.root={'x' * 200}_a"]],
        [["data.root='a'"], ['data.root="a"'], ["data.root=\u00e4"], ["data.root=\u00f6"]],
    ],
)
def test_different_jobs_have_different_folders(monkeypatch, jobs):
    monkeypatch.setenv("SBP_SWEPT", "")
    folders = [launch.job_folder(job) for job in jobs]
    assert len(set(folders)) == len(jobs) and folders == [launch.job_folder(job) for job in jobs]
    assert all(re.fullmatch(r"[A-Za-z0-9.+_-]{1,120}", folder) for folder in folders)


def test_a_complete_run_is_known_by_its_config(tmp_path):
    config = small()
    assert finished(tmp_path, config) is None
    (tmp_path / "summary.json").write_text(json.dumps({"top1": 9.0, "config": asdict(config)}))
    assert finished(tmp_path, replace(config, micro_batch_size=8, processes=2))["top1"] == 9
    with pytest.raises(ValueError, match="seed was 0 and is now 1"):
        finished(tmp_path, replace(config, seed=1))
    assert finished(tmp_path, replace(config, resume="never")) is None
    write_status(tmp_path, "running")  # started anew over the old one
    assert finished(tmp_path, config) is None


def test_what_reads_a_run_does_not_write_into_its_folder(tmp_path, monkeypatch):
    """Else the overrides and the status that lie there were those of the evaluation."""
    config = OmegaConf.create({"hydra": {"run": {"dir": str(tmp_path)}}})
    monkeypatch.setattr(launch.Launch, "trains", False)
    launch.Launch().on_run_start(config)
    record_facts(tmp_path, {})
    with pytest.raises(SystemExit, match=r"holds a training run: take another folder, such as .*eval"):
        launch.Launch().on_run_start(config)
    monkeypatch.setattr(launch.Launch, "trains", True)
    launch.Launch().on_run_start(config)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_impossible_folder_is_one_line(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"error: run_dir=.*{place} cannot be written to: "):
        launch.make_folder(tmp_path / place)
    launch.make_folder(tmp_path / "new" / "below")
    assert os.listdir(tmp_path / "new" / "below") == []


@pytest.mark.parametrize(("rank", "restarts", "line"), [("0", "0", True), ("1", "0", False), ("0", "1", False)])
def test_an_elastic_torchrun_needs_a_named_folder_and_says_so_once(monkeypatch, rank, restarts, line):
    for name, value in {"MAX_RESTARTS": "3", "RESTART_COUNT": restarts}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1"])
    with pytest.raises(SystemExit) as ended:
        launch.join_processes()
    assert ended.value.code == (
        "error: torchrun --max-restarts needs run_dir=NAME: a restart goes on in that folder" if line else 1
    )


@pytest.mark.parametrize("folder", ["/a b/c", "/it's", "/x{y}[z],w=$1", "/back\\slash"])
def test_any_folder_gets_through_hydras_command_line(folder):
    command = torchrun(2, ["seed=1"], folder)
    (parsed,) = OverridesParser.create().parse_overrides([f"run_dir={quoted(folder)}"])
    assert f"run_dir={quoted(folder)}" in command and parsed.value() == folder
    assert command.index("seed=1") < command.index(f"run_dir={quoted(folder)}")  # which wins


CHILD = """
import json, os, signal, sys, time
from pathlib import Path
folder, how = Path(sys.argv[1]), sys.argv[2]
def write_status(folder, state, **facts):  # that of sbp would import torch
    (folder / "status.json").write_text(json.dumps({"state": state, **facts}))
def stop(*_):
    write_status(folder, "preempted", message="stopped by a signal")
    sys.exit(1)
if how == "hangs up":
    os.kill(os.getppid(), signal.SIGHUP)
    time.sleep(0.1)
if how == "waits":
    signal.signal(signal.SIGUSR1, stop)
    os.kill(os.getppid(), signal.SIGUSR1)
    time.sleep(60)
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "fails":
    (folder / "failure.txt").write_text("no good\\n\\nTraceback")
    write_status(folder, "failed", message="in the wake")
    sys.exit(1)
write_status(folder, "completed")
(folder / "summary.json").write_text(json.dumps({"top1": 1.0}))
"""


def test_what_a_command_lacks_is_named(monkeypatch):
    """As after `pip install .`, which brings the method alone."""

    def lacks(name):
        raise ModuleNotFoundError("No module named 'hydra.core'", name="hydra.core")

    monkeypatch.setattr(main, "import_module", lacks)
    monkeypatch.setattr("sys.argv", ["sbp", "train"])
    with pytest.raises(SystemExit, match=r"error: sbp train needs hydra, which comes with: pip install .*\[train\]"):
        main.main()


def test_what_became_of_the_children(tmp_path):
    def outcome(how):
        return run_children([sys.executable, "-c", CHILD, str(tmp_path), how], tmp_path)

    before = signal.getsignal(signal.SIGUSR1)
    write_status(tmp_path, "preempted", message="of the attempt before")
    with pytest.raises(RunFailed, match="ended with signal SIGKILL, and no word from the run"):
        outcome("killed")
    with pytest.raises(Preempted, match="stopped by a signal"):
        outcome("waits")
    assert outcome("works") == {"top1": 1.0}
    with pytest.raises(RunFailed, match=r"^no good$"):
        outcome("fails")
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("ignored", [True, False])
def test_a_terminal_that_is_closed_stops_what_nohup_has_not_started(tmp_path, ignored):
    command = [sys.executable, "-c", CHILD, str(tmp_path), "hangs up"]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        if ignored:
            assert run_children(command, tmp_path) == {"top1": 1.0}
        else:
            with pytest.raises(Preempted, match="stopped by SIGHUP"):
                run_children(command, tmp_path)
        heeded = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1} | (set() if ignored else {signal.SIGHUP})
        with signals.deferred():
            assert {one for one in signals.SIGNALS if signal.getsignal(one) == signals._note} == heeded
    finally:
        signal.signal(signal.SIGHUP, before)


def test_objectives_are_figures_of_the_summary():
    validate(small("objective=[top1,saved_bytes_per_image]"))
    for wrong, message in {
        "objective=top2": r"objective, with task=classification, must be one of top1, .*, got 'top2'",
        "objective=box_ap": r"with task=classification, must be one of .*, got 'box_ap'",
        "objective=[top1,top1_ema]": r"objective=top1_ema needs recipe\.ema_decay, got null",
        "task=detection data=shapes objective=val_loss": r"with task=detection, must be one of .*, got 'val_loss'",
        "objective=peak_allocated device=cpu": "objective=peak_allocated is of CUDA's memory, and device=cpu",
    }.items():
        with pytest.raises(ValueError, match=message):
            validate(small(*wrong.split()))
