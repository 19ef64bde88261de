"""The table of a sweep is what lies in its folder."""

import csv
import json
import os
import subprocess
import sys
from unittest.mock import Mock

import matplotlib.image
import pytest
from omegaconf import OmegaConf

from sbp.cli import sweep
from sbp.cli.launch import Launch
from sbp.cli.sweep import main
from sbp.cli.sweep_figure import draw
from sbp.cli.sweep_table import columns_of, read_job, read_jobs, swept_keys, table, write_table
from sbp.training.record.status import write_status

FIGURES = {"keep_ratio": 0.5, "effective_keep_ratio": 0.5, "saved_bytes_per_image": 2**20, "peak_allocated": 2**30}


def job(folder, *overrides, top1=None, **status):
    """A run's folder; complete when top1 is given."""
    path = folder / "+".join(overrides).replace("=", "-")
    (path / ".hydra").mkdir(parents=True)
    (path / ".hydra" / "overrides.yaml").write_text(json.dumps([*overrides, f"run_dir={path}"]))
    if top1 is not None:
        (path / "summary.json").write_text(json.dumps(FIGURES | {"top1": top1, "config": {}}))
    if status:
        write_status(path, **status)
    return path


@pytest.fixture
def folder(tmp_path):
    """One job in each state there is."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    job(tmp_path, "sbp.keep_ratio=0.25", "recipe.lr=10", top1=90.5, state="completed")
    job(tmp_path, "sbp.keep_ratio=0.25", "recipe.lr=9", top1=91.0)
    running = job(tmp_path, "recipe.lr=1e-3", state="running", step=10, total_steps=50)
    (running / "metrics.jsonl").write_text('{"step": 0}\n{"step": 20}\n{"step": 3')  # being written
    job(tmp_path, "recipe.lr=2", state="running", step=10, total_steps=50, pid=gone.pid)
    job(tmp_path, "recipe.lr=3", state="running", step=7, total_steps=50, pid=gone.pid, host="elsewhere")
    job(tmp_path, "recipe.lr=4", state="preempted", step=12, total_steps=50)
    job(tmp_path, "recipe.lr=5", state="failed", message="disk | full\nmore")
    refused = job(tmp_path, "recipe.lr=6", top1=50.0, state="completed")
    (refused / "failure.txt").write_text("of another run\n\nTraceback")
    job(tmp_path, "recipe.lr=7")
    (tmp_path / ".submitit").mkdir()
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_a_row_for_each_run_in_the_order_of_what_was_swept(folder):
    jobs = read_jobs(folder)
    assert swept_keys(jobs) == ["recipe.lr", "sbp.keep_ratio"] or swept_keys(jobs) == ["sbp.keep_ratio", "recipe.lr"]
    found = {job.overrides["recipe.lr"]: job.status for job in jobs}
    assert found == {
        "1e-3": "running at step 20 of 50",
        "2": "killed at step 10 of 50",
        "3": "running at step 7 of 50",
        "4": "preempted at step 12 of 50",
        "5": "failed: disk | full",
        "6": "failed: of another run",
        "7": "starting",
        "9": "done",
        "10": "done",
    }
    order = [job.overrides["recipe.lr"] for job in jobs if "sbp.keep_ratio" in job.overrides]
    assert order == ["9", "10"]
    lines = table(jobs).splitlines()
    assert len({len(line) for line in lines}) == 1 and "disk \\| full" in table(jobs)


def test_averaged_weights_have_a_column_where_there_are_any(folder):
    assert "EMA" not in table(read_jobs(folder))
    path = job(folder, "recipe.lr=11", top1=12.3)
    (path / "summary.json").write_text(json.dumps(FIGURES | {"top1": 12.3, "top1_ema": 81.0, "config": {}}))
    heading, *rows = table(read_jobs(folder)).splitlines()
    column = [cell.strip() for cell in heading.split("|")].index("top-1 % (EMA)")
    found = [row.split("|")[column].strip() for row in rows if "done" in row]
    assert sorted(found) == ["", "", "81.00"] and "box AP" not in heading


def test_the_files_hold_the_table_and_whole_numbers(folder):
    write_table(folder)
    assert (folder / "table.md").read_text() == table(read_jobs(folder)) + "\n"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert len(rows) == 9
    assert {row["top1"]: row["peak_allocated"] for row in rows if row["status"] == "done"} == {
        "90.5": "1073741824",
        "91.0": "1073741824",
    }
    assert not [name for name in os.listdir(folder) if name.startswith(".table")]


@pytest.mark.parametrize(
    ("key", "values"),
    [("sbp.keep_ratio", ("0.25", "0.5", "1.0")), ("backbone", ("vit_demo", "convnext_demo"))],
    ids=["a number", "names"],
)
def test_the_figure_has_all_finished_jobs(tmp_path, key, values):
    for i, value in enumerate(values):
        for seed in (1, 2):
            job(tmp_path, f"{key}={value}", f"seed={seed}", top1=90.0 + i)
    job(tmp_path, f"{key}={values[0]}", "seed=3", state="failed", message="no")
    draw(read_jobs(tmp_path), tmp_path / "figure.png")
    image = matplotlib.image.imread(tmp_path / "figure.png")
    assert image.shape[1] == 1350 and image[..., :3].std() > 0.05
    (tmp_path / "empty").mkdir()
    job(tmp_path / "empty", "seed=1", state="failed", message="no")
    draw(read_jobs(tmp_path / "empty"), tmp_path / "empty" / "figure.png")
    assert not (tmp_path / "empty" / "figure.png").exists()


def test_a_job_of_another_command_is_done_without_a_summary(tmp_path):
    of_eval = job(tmp_path, "checkpoint=a", state="completed")
    of_train = job(tmp_path, "seed=1", state="completed", total_steps=3)
    assert (read_job(of_eval).status, read_job(of_train).status) == ("done", "killed")


@pytest.mark.parametrize("broken", [None, OSError("no space left on the device")])
def test_the_end_of_a_sweep_names_what_failed_also_where_nothing_can_be_written(folder, monkeypatch, capsys, broken):
    if broken is not None:
        monkeypatch.setattr(sweep, "write_table", Mock(side_effect=broken))
    end = Launch()
    end.started = 0.0
    with pytest.raises(SystemExit):
        end.on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))
    said = capsys.readouterr()
    assert table(read_jobs(folder)) in said.out and "error: failed, as failure.txt" in said.err
    assert ("no space left" in said.out) == (broken is not None) != (folder / "table.csv").exists()


def test_the_command(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sbp sweep", str(folder)])
    main()
    assert capsys.readouterr().out == table(read_jobs(folder)) + "\n"
    assert not (folder / "table.csv").exists()
    monkeypatch.setattr(sys, "argv", ["sbp sweep", str(folder), "--save"])
    main()
    assert {"table.csv", "table.md", "figure.png"} <= set(os.listdir(folder))
    monkeypatch.setattr(sys, "argv", ["sbp sweep", str(folder / "notes")])
    with pytest.raises(SystemExit, match="notes holds no run"):
        main()


def test_the_columns_are_those_of_the_task():
    of_classifiers = columns_of([FIGURES | {"top1": 90.0}, {}])
    of_detectors = columns_of([{}, FIGURES | {"box_ap": 0.0, "mask_ap": 0.0}])  # as after a first epoch
    assert "top-1 %" in of_classifiers and not {"box AP", "mask AP"} & of_classifiers.keys()
    assert {"box AP", "mask AP"} <= of_detectors.keys() and "top-1 %" not in of_detectors
    assert columns_of([]) == of_classifiers
