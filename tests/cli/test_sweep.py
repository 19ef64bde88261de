"""Sweeps as a user starts them: what fails, what is left out when they start again, what they leave behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sbp.training.record.checkpoint import find
from sbp.training.record.status import read_status
from tests.training.configs import BACKBONES, ROOT
from tests.training.data.test_loading import image_folders

TINY = ("logger=none", "data=digits", "recipe=demo", *BACKBONES["vit"], "recipe.epochs=1", "recipe.warmup_epochs=0")
SWEEP = ROOT / "tests" / "cli" / "sweep.py"

pytestmark = pytest.mark.multiprocess


def run(*arguments, folder, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *(str(one) for one in arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def begun(result):
    return begun_in(result.stdout)


def begun_in(text):
    return [line.removeprefix("runs ") for line in text.splitlines() if line.startswith("runs seed")]


@pytest.mark.long
def test_a_sweep_goes_on_after_a_failed_job_and_ends_with_a_table(tmp_path):
    result = run(ROOT / "train.py", "-m", *TINY, "run_dir=sweep", "sbp.keep_ratio=2,0.5", folder=tmp_path)
    assert result.returncode == 1
    assert "error: failed, as failure.txt in the folder says:\n  sbp.keep_ratio-2\n" in result.stderr
    folder = tmp_path / "sweep"
    failed, done = (folder / f"sbp.keep_ratio-{ratio}" for ratio in ("2", "0.5"))
    assert (failed / "failure.txt").read_text().startswith("sbp.keep_ratio must be a number in (0, 1], got 2\n")
    assert read_status(failed)["message"] == "sbp.keep_ratio must be a number in (0, 1], got 2"
    assert find(done)[1]["step"] == 44
    assert json.loads((done / "summary.json").read_text())["config"]["logger"]["group"] == "sweep"
    table = (folder / "table.md").read_text()
    assert table in result.stdout and "failed: sbp.keep_ratio must be" in table
    assert len((folder / "table.csv").read_text().splitlines()) == 3
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_failed_jobs_leave_no_model_and_the_next_start_does_the_rest(tmp_path):
    command = (SWEEP, "-m", "seed=0,1,2,3,0", "run_dir=sweep")
    result = run(*command, folder=tmp_path)
    assert result.returncode == 75, result.stderr
    assert begun(result) == ["seed 0", "seed 1", "seed 2", "seed 3"]
    failed, broken, stopped = (tmp_path / "sweep" / f"seed-{seed}" for seed in (1, 2, 3))
    assert (failed / "failure.txt").read_text().startswith("out of memory\n")
    failure = (broken / "failure.txt").read_text()
    assert failure.startswith("RuntimeError: broken\n") and 'raise RuntimeError("broken")' in failure  # the traceback
    assert not (stopped / "failure.txt").exists()
    table = (tmp_path / "sweep" / "table.md").read_text()
    assert table in result.stdout and "preempted at step 3 of 4" in table and "goes on from here" in result.stdout

    result = run(*command, folder=tmp_path)
    assert result.returncode == 1
    assert begun(result) == ["seed 1", "seed 2", "seed 3"]
    assert "seed-0 done, top-1 0.00 %" in result.stdout
    assert result.stderr.endswith("says:\n  seed-1\n  seed-2\n")

    result = run(SWEEP, "-m", "seed=0,3", "recipe.epochs=7", "run_dir=sweep", folder=tmp_path)
    assert result.returncode == 1 and begun(result) == []  # complete, but not the runs that were asked for
    assert (tmp_path / "sweep" / "table.md").read_text().count("recipe.epochs was 20 and is now 7") == 2
    result = run(SWEEP, "-m", "seed=0,3", "run_dir=sweep", folder=tmp_path)
    assert result.returncode == 0 and begun(result) == []  # no failure from before, and the runs are as they were


@pytest.mark.long
def test_what_only_one_process_cannot_find_ends_the_job_in_all_of_them(tmp_path):
    image_folders(tmp_path / "0")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py")
    data = ("data=imagenet", "data.num_classes=2", "data.image_size=32", "data.root=${oc.env:RANK}", "data.workers=0")
    result = run(*launch, "-m", *TINY, *data, "seed=1,2", "global_batch_size=2", "run_dir=sweep", folder=tmp_path)
    assert result.returncode == 1
    for seed in (1, 2):
        failure = (tmp_path / "sweep" / f"seed-{seed}" / "failure.txt").read_text()
        assert failure.startswith("on process 1: no folder 1/train"), result.stderr


@pytest.mark.parametrize(("seeds", "code"), [("4,0", 130), ("5,0", 75)], ids=["Ctrl-C", "signal between jobs"])
@pytest.mark.long
def test_a_sweep_that_is_stopped_ends_with_its_table_on_disk(tmp_path, seeds, code):
    result = run(SWEEP, "-m", f"seed={seeds}", "run_dir=sweep", folder=tmp_path)
    assert result.returncode == code
    assert len(begun(result)) == 1 and "Traceback" not in result.stderr
    assert (tmp_path / "sweep" / "table.csv").read_text().startswith("job,status")


@pytest.mark.slow
def test_each_job_has_a_torchrun_of_its_own(tmp_path):
    """A mistake that only the children can see fails alone, with its message; a user's own configs are found there."""
    for folder, group in (("mine", "sbp"), ("more", "logger")):
        (tmp_path / folder / group).mkdir(parents=True)
        (tmp_path / folder / group / "own.yaml").write_text("defaults: [none]\n")
    shutil.copytree(ROOT / "configs", tmp_path / "copy")
    recipe = tmp_path / "copy" / "recipe" / "demo.yaml"
    recipe.write_text(recipe.read_text().replace("weight_decay: 0.05", "weight_decay: 0.07"))
    found = (f"--config-path={tmp_path / 'copy'}", "--config-dir=mine", "-m", "hydra.searchpath=[file://more]")
    given = (*TINY[1:], "sbp=own", "logger=own", "processes=2", "run_dir=sweep", "global_batch_size=32,33")
    result = run(ROOT / "train.py", *found, *given, folder=tmp_path)
    assert result.returncode == 1
    done, failed = (tmp_path / "sweep" / f"global_batch_size-{size}" for size in (32, 33))
    assert json.loads((done / "summary.json").read_text())["world_size"] == 2
    assert json.loads((done / "summary.json").read_text())["config"]["recipe"]["weight_decay"] == 0.07
    assert "cannot be spread evenly over 2 processes" in (failed / "failure.txt").read_text().splitlines()[0]
    assert "failed: global_batch_size=33 cannot be spread" in (tmp_path / "sweep" / "table.md").read_text()
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_jobs_of_submitit_run_in_the_folders_that_the_command_names(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10")
    command = (SWEEP, "-m", *launcher, "seed=0,1,6", "run_dir=sweep")
    result = run(*command, folder=tmp_path)
    assert result.returncode == 1, result.stderr
    assert {"seed-0", "seed-1", "seed-6", "table.csv", "figure.png"} <= set(os.listdir(tmp_path / "sweep"))
    assert (tmp_path / "sweep" / "table.md").read_text() in result.stdout
    assert result.stderr.endswith("says:\n  seed-1\n")


@pytest.mark.slow
def test_submitit_queues_a_job_again_when_it_asked_it_to_stop(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = (SWEEP, "-m", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=2", "seed=8", "run_dir=sweep")
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(run, *command, folder=tmp_path)
        job = tmp_path / "sweep" / "seed-8"
        while read_status(job).get("state") != "running":
            assert not ended.done(), ended.result().stderr
            time.sleep(0.1)
        os.kill(read_status(job)["pid"], signal.SIGUSR2)
    assert ended.result().returncode == 0, ended.result().stderr
    assert read_status(job)["state"] == "completed"
    (log,) = (tmp_path / "sweep" / ".submitit").glob("*/*.out")
    assert begun_in(log.read_text()) == ["seed 8", "seed 8"] and "Requeued job" in log.read_text()


@pytest.mark.slow
def test_what_sbatch_gets(tmp_path):
    """The launcher's own script, as a stand-in for sbatch sees it."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for name, text in (("sbatch", f'cat "$1" > {tmp_path}/script; exit 1'), ("srun", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    launcher = ("hydra/launcher=slurm", "hydra.launcher.partition=gpu", "processes=4")
    path = f"{tmp_path}:{os.environ['PATH']}"
    run(ROOT / "train.py", "-m", *TINY, *launcher, "seed=1,2", "run_dir=sweep", folder=tmp_path, PATH=path)
    lines = (tmp_path / "script").read_text().splitlines()
    wanted = ("array=0-1%2", "partition=gpu", "gpus-per-task=4", "ntasks-per-node=1", "signal=USR2@120", "time=1440")
    assert {f"#SBATCH --{one}" for one in wanted} <= set(lines)


@pytest.mark.slow
def test_optuna_is_told_the_accuracy_and_survives_failures(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    sweeper = ("hydra/sweeper=study", "hydra.sweeper.n_trials=6", "run_dir=sweep")
    result = run(SWEEP, "-m", *sweeper, "seed=choice(0,1,2,7)", folder=tmp_path)
    assert result.returncode == 1, result.stderr
    results = (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    assert "best_value: 7.0" in results and "seed: 7" in results
    assert begun(run(SWEEP, "-m", *sweeper, "seed=choice(0,7)", folder=tmp_path)) == []  # all complete
