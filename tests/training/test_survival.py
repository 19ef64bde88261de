"""The real train.py as a process, and all that can happen to it: it ends as if nothing had happened."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sbp.training.record.checkpoint import Checkpoints
from sbp.training.record.incidents import CORRUPT_IMAGES, SKIPPED_STEPS
from sbp.training.record.status import EXIT_PREEMPTED, read_status
from sbp.training.record.tracking import read_metrics
from tests.training.comparing import assert_same_run, record
from tests.training.configs import BACKBONES, ROOT
from tests.training.data.test_loading import image_folders
from tests.training.wandb_side import WandbServer, offline_folders, wandb_history

MOMENTS = ROOT / "tests" / "training" / "moments.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# 3 epochs of 11 steps, with all that draws random numbers, and a checkpoint every 4 steps.
RUN = (
    "logger=none", "data=digits", "recipe=demo", *BACKBONES["vit"], "recipe.epochs=3", "recipe.warmup_epochs=1",
    "recipe.augment=true", "recipe.mixup=0.8", "recipe.ema_decay=0.9", "sbp.mask=random", "global_batch_size=128",
    "checkpoint.every_steps=4", "log_every_steps=3", "probe.every_steps=10", "probe.images=8", "eval_batch_size=64",
)  # fmt: skip

pytestmark = [pytest.mark.survival, pytest.mark.multiprocess]


def start(*arguments, folder, **environment):
    """python with these arguments, writing to pipes."""
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"}
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *(str(one) for one in arguments)]
    return subprocess.Popen(
        command, cwd=folder, env=inherited | settings | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*arguments, folder, **environment):
    """Runs python to its end: exit code, stdout, stderr."""
    process = start(*arguments, folder=folder, **environment)
    out, err = process.communicate(timeout=250)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def train(name, *overrides, folder, launcher=(), at=(), **environment):
    """train.py in folder/name; `at` is a moment of `moments.py`."""
    script = (MOMENTS, *at) if at else (ROOT / "train.py",)
    return run(*launcher, *script, *RUN, f"run_dir={name}", *overrides, folder=folder, **environment)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    result = train("whole", folder=folder)
    assert result.returncode == 0, result.stderr
    assert read_status(folder / "whole")["state"] == "completed"
    return folder / "whole"


def test_signals_end_in_a_checkpoint_and_the_next_start_goes_on(tmp_path, whole):
    """SIGTERM, SIGUSR1 and Ctrl-C, in training, in evaluation and while a checkpoint is written, one by one."""
    stops = [
        (("step", 6, "SIGTERM"), 6),  # number of the step -> steps done when it stops
        (("evaluate", 3, "SIGUSR1"), 11),
        (("save", 1, "SIGINT"), 13),  # the checkpoint of step 12 is finished, then the step that noticed it
        (("evaluate", 1, "SIGTERM"), 22),
        (("save", 2, "SIGUSR1"), 29),
    ]
    for at, steps in stops:
        result = train("parts", folder=tmp_path, at=at)
        assert result.returncode == EXIT_PREEMPTED, result.stderr
        assert f"stopped by {at[2]}" in result.stdout and "Traceback" not in result.stderr
        status = read_status(tmp_path / "parts")
        assert (status["state"], status["exit_code"], status["step"]) == ("preempted", EXIT_PREEMPTED, steps)
    result = train("parts", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_run(whole, tmp_path / "parts")

    result = train("parts", folder=tmp_path)  # done: nothing is left to do
    assert result.returncode == 0 and "holds this run, complete" in result.stdout


def test_two_processes_agree_to_stop(tmp_path):
    """torchrun passes SIGTERM on by itself, SIGUSR1 when told so, and SIGHUP, of a terminal that is closed, under nohup
    too; it exits 1, the status file says the rest.
    """
    handled = (*TORCHRUN, "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    result = train("whole", folder=tmp_path, launcher=TORCHRUN)
    assert result.returncode == 0, result.stderr
    for launcher, number in ((TORCHRUN, signal.SIGTERM), (handled, signal.SIGUSR1), (TORCHRUN, signal.SIGHUP)):
        before = read_status(tmp_path / "parts").get("step", 0)
        own = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does, which torchrun does not heed
        process = start(*launcher, ROOT / "train.py", *RUN, "run_dir=parts", folder=tmp_path)
        signal.signal(signal.SIGHUP, own)
        wait_until(lambda: read_status(tmp_path / "parts").get("step", 0) > before, process)  # noqa: B023
        process.send_signal(number)
        _, err = process.communicate(timeout=100)
        assert process.returncode == 1
        assert read_status(tmp_path / "parts")["state"] == "preempted", err
    assert train("parts", folder=tmp_path, launcher=TORCHRUN).returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_to_loader_workers_too_costs_nothing(tmp_path, whole):
    """As SLURM and a terminal send it: to every process of the job."""
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *RUN, "run_dir=parts", "data.workers=2"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until(lambda: read_status(tmp_path / "parts").get("step", 0) > 0, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2, "no workers"
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=100)
    assert process.returncode == EXIT_PREEMPTED and "Traceback" not in err, err
    assert read_status(tmp_path / "parts")["state"] == "preempted"
    assert train("parts", folder=tmp_path).returncode == 0
    assert_same_run(whole, tmp_path / "parts")


def wait_until(happened, process):
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def test_a_worker_dies_and_torchrun_starts_all_again_from_disk(tmp_path):
    elastic = (*TORCHRUN, "--max-restarts=2")
    assert train("whole", folder=tmp_path, launcher=TORCHRUN).returncode == 0
    died = tmp_path / "died"
    moment = {"MOMENTS_RANK": "1", "MOMENTS_ONCE": str(died), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    result = train("parts", folder=tmp_path, launcher=elastic, at=("step", 10, "SIGKILL"), **moment)
    assert result.returncode == 0, result.stderr
    assert died.exists()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_soak_killed_at_random_moments(tmp_path, whole):
    """At least 20 times SIGKILL: in steps, in evaluations, in half-written checkpoints, and at any time at all."""
    chance, killed = random.Random(0), 0
    while killed < 20 or not (tmp_path / "parts" / "summary.json").exists():
        moment = chance.choice(["step", "evaluate", "save", "time"]) if killed < 20 else None
        if moment == "time":
            process = start(ROOT / "train.py", *RUN, "run_dir=parts", folder=tmp_path)
            time.sleep(chance.uniform(0, 20))
            process.kill()
            process.communicate()
        else:
            at = (moment, chance.randint(1, 6), "SIGKILL") if moment else ()
            result = train("parts", folder=tmp_path, at=at)
            assert result.returncode in (0, -signal.SIGKILL), result.stderr
        killed += 1
        if killed < 20 and (tmp_path / "parts" / "summary.json").exists():
            assert_same_run(whole, tmp_path / "parts")
            (tmp_path / "parts").rename(tmp_path / f"done_{killed}")
    assert_same_run(whole, tmp_path / "parts")
    assert not list((tmp_path / "parts" / "checkpoints").glob("*.tmp*"))


def test_a_full_disk_costs_a_checkpoint_not_the_run(tmp_path, whole):
    """A limit on the size of files stands for the disk: checkpoints do not fit, all else does."""
    size = next((whole / "checkpoints").glob("step-*.pt")).stat().st_size
    code = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, resource.RLIM_INFINITY)); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    assert train("parts", folder=tmp_path, at=("step", 6, "SIGTERM")).returncode == EXIT_PREEMPTED
    (good,) = Checkpoints(tmp_path / "parts" / "checkpoints").paths()[-1:]
    result = run("-c", code, ROOT / "train.py", *RUN, "run_dir=parts", folder=tmp_path)
    assert result.returncode == 1
    assert "cannot write" in result.stdout and "all 33 steps are done, but their checkpoint could not" in result.stderr
    assert Checkpoints(tmp_path / "parts" / "checkpoints").paths()[-1] == good
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert train("parts", folder=tmp_path).returncode == 0
    assert_same_run(whole, tmp_path / "parts")


@pytest.mark.parametrize("damage", ["truncated", "one bit"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, whole, damage):
    assert train("parts", folder=tmp_path, at=("step", 15, "SIGTERM")).returncode == EXIT_PREEMPTED
    path = Checkpoints(tmp_path / "parts" / "checkpoints").paths()[-1]
    data = bytearray(path.read_bytes())
    if damage == "one bit":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    result = train("parts", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{path.name} is corrupt" in result.stdout and "trying the one before it" in result.stdout
    assert_same_run(whole, tmp_path / "parts")


def test_a_loss_that_is_not_finite_stops_the_run_with_all_that_is_known(tmp_path):
    result = train("run", "max_skipped_steps=2", folder=tmp_path, at=("step", 7, "nan"))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "the loss is nan in step 9; 3 steps in a row had to be left out (max_skipped_steps=2)" in result.stderr
    assert "Last good checkpoint: " in result.stderr and "step-00000008.pt" in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / SKIPPED_STEPS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 8, 9] and all(len(line["images"]) == 128 for line in lines)
    assert read_status(tmp_path / "run")["state"] == "failed"
    assert record(tmp_path / "run")[-1]["step"] == 6


def test_two_runs_do_not_share_a_folder(tmp_path):
    first = start(ROOT / "train.py", *RUN, "run_dir=run", "recipe.epochs=50", folder=tmp_path)
    wait_until(lambda: read_status(Path(tmp_path) / "run").get("step", 0) > 0, first)
    second = train("run", folder=tmp_path)
    assert second.returncode == 1 and f"process {first.pid} on " in second.stderr
    first.terminate()
    first.communicate()
    assert first.returncode == EXIT_PREEMPTED


def test_corrupt_images_are_replaced_in_training_and_an_error_in_evaluation(tmp_path):
    root = image_folders(tmp_path / "data", count=20)
    bad = [root / "train" / "a" / "3.png", root / "train" / "b" / "7.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:200])
    data = ("data=imagenet", f"data.root={root}", "data.num_classes=2", "data.image_size=32", "data.workers=1")
    few = ("global_batch_size=8", "recipe.mixup=0")
    result = train("run", *data, *few, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    listed = (tmp_path / "run" / CORRUPT_IMAGES).read_text().splitlines()
    assert len(listed) == 2 and all(any(str(path) in line for line in listed) for path in bad)
    assert record(tmp_path / "run")[-2]["corrupt_images"] == 2

    result = train("strict", *data, *few, "data.max_corrupt_images=1", folder=tmp_path)
    assert result.returncode == 1 and "data.max_corrupt_images=1 are allowed" in result.stderr

    broken = root / "val" / "a" / "1.png"
    broken.write_bytes(b"")
    result = train("evaluated", *data, *few, folder=tmp_path)
    assert result.returncode == 1 and str(broken) in result.stderr
    assert "cannot evaluate: 1 of the images" in result.stderr
    assert Checkpoints(tmp_path / "evaluated" / "checkpoints").paths()  # the epoch before it is not lost


def wandb_services(pid):
    """The wandb services that a process has started and that are still there."""
    found = subprocess.run(["pgrep", "-f", f"wandb-core .*--pid {pid}$"], capture_output=True, text=True, check=False)
    return [int(one) for one in found.stdout.split()]


def test_killing_wandbs_service_costs_one_warning(tmp_path, whole):
    process = start(ROOT / "train.py", *RUN, "run_dir=run", "logger=wandb", "logger.offline=true", folder=tmp_path)
    wait_until(lambda: read_status(tmp_path / "run").get("step", 0) > 0, process)
    (service,) = wandb_services(process.pid)
    os.kill(service, signal.SIGKILL)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    assert out.count("wandb could not") == 1 and "going on without it" in out
    assert "Traceback" not in err
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
def test_a_killed_run_goes_on_as_the_same_wandb_run_with_what_that_lacks(tmp_path, whole, offline):
    server, logger = WandbServer(), ("logger=wandb", f"logger.offline={offline}")
    with server.reachable():
        for at in (("step", 6, "SIGKILL"), ("evaluate", 3, "SIGKILL"), ()):
            script = (MOMENTS, *at) if at else (ROOT / "train.py",)
            process = start(*script, *RUN, "run_dir=run", *logger, folder=tmp_path, **server.environment)
            _, err = process.communicate(timeout=250)
            assert process.returncode == (-signal.SIGKILL if at else 0), err
            while wandb_services(process.pid):  # it notices on its own
                time.sleep(0.02)
    expected = read_metrics(tmp_path / "run" / "metrics.jsonl")
    if offline:
        assert len({folder.name.split("-")[-1] for folder in offline_folders(tmp_path / "run")}) == 1  # the id
        assert len(offline_folders(tmp_path / "run")) == 3 and wandb_history(tmp_path / "run") == expected
    else:
        (run_id,) = server.history
        there = server.lines(run_id)
        assert all(line in there for line in expected)
    assert_same_run(whole, tmp_path / "run")
