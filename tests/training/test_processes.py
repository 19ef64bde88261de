"""The entry points as a user starts them: one process, two processes, mistakes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from sbp.cli.check_data import CheckDataConfig, DataError, check
from sbp.training.engine.train import train as train_run
from sbp.training.record.tracking import read_metrics
from tests.training.configs import BACKBONES, ROOT, composed
from tests.training.several_processes import train

TINY = ("logger=none", "data=digits", "recipe=demo", *BACKBONES["vit"], "recipe.epochs=1", "recipe.warmup_epochs=0")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

pytestmark = [pytest.mark.multiprocess, pytest.mark.long]


def run(*arguments, folder):
    """Starts python with these arguments in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    environment.pop("WANDB_API_KEY", None)
    command = [sys.executable, *(str(one) for one in arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_two_processes_train_in_one_folder_what_one_process_evaluates(tmp_path):
    accumulated = ("micro_batch_size=8", "logger=wandb", "logger.offline=true")
    result = run(*TORCHRUN, ROOT / "train.py", *TINY, *accumulated, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "32 = 2 processes x 8 images x 2 accumulated" in result.stdout
    (folder,) = (tmp_path / "outputs").iterdir()
    assert {"checkpoints", "metrics.jsonl", "summary.json", "train.log", ".hydra"} <= set(os.listdir(folder))
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl")]
    assert steps == [0, 44, 44]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["world_size"] == summary["accumulation"] == 2

    result = run(ROOT / "eval.py", f"checkpoint={folder}", "run_dir=evaluation", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "centre crop 32 px" in result.stdout
    assert json.loads((tmp_path / "evaluation" / "eval.json").read_text())["top1"] == summary["top1"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What `several_processes.train` finds in one process, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("one")
    return {backbone: train(backbone, "ddp", write=folder / f"{backbone}-ddp.pt") for backbone in BACKBONES}, folder


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ddp_and_fsdp_find_what_one_process_finds_and_take_each_others_checkpoints(tmp_path, one_process, count):
    """Gradients, weights, averaged weights, and accuracies on 101 images; see `several_processes.py`."""
    expected, alone = one_process
    script = ROOT / "tests" / "training" / "several_processes.py"
    result = run(*TORCHRUN[:-1], f"--nproc_per_node={count}", script, tmp_path, alone, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    found = [load(tmp_path / f"{rank}.pt") for rank in range(count)]
    for backbone, whole in expected.items():
        ways = {f"{way}, process {rank}": one for rank in range(count) for way, one in found[rank][backbone].items()}
        ways["one process after fsdp"] = train(backbone, "ddp", read=tmp_path / f"{backbone}-fsdp.pt")
        assert len(ways) == 6 * count + 1
        for way, findings in ways.items():
            steps = {step: whole["gradients"][step] for step in (range(2, 4) if "after" in way else range(4))}
            assert_close(findings, whole | {"gradients": steps}, f"{backbone}, {way}: ")
        for kind in ("ddp", "fsdp"):
            stored = [load(folder / f"{backbone}-{kind}.pt") for folder, kind in ((tmp_path, kind), (alone, "ddp"))]
            assert_close(*stored, f"{backbone}, checkpoint of {kind}: ")


def load(path):
    return torch.load(path, weights_only=True)


def assert_close(found, expected, path=""):
    """Nested containers of tensors and numbers, equal but for the order of sums in float64."""
    assert type(found) is type(expected), path
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for name, value in expected.items():
            assert_close(found[name], value, f"{path}{name}.")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=lambda m: f"{path} {m}")
    elif path.endswith(".loss."):
        assert found == pytest.approx(expected, rel=1e-6), path  # of float32 logits
    else:
        assert found == expected, path


@pytest.mark.slow
def test_two_processes_benchmark_and_the_first_one_writes(tmp_path):
    model = ("+backbone.kwargs.depth=2", "+backbone.kwargs.embed_dim=48", "data.image_size=32")
    tiny = (*model, "batch_size=2", "rounds=1")
    command = ("-m", "sbp.cli", "benchmark", *tiny, "device=cpu", "arms=[plain,sbp]", "run_dir=here")
    result = run(*TORCHRUN, *command, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "here" / "vit_tiny_patch16_224.json").read_text())
    assert record["world_size"] == 2 and set(record["arms"]) == {"plain", "sbp"}
    assert (tmp_path / "here" / "vit_tiny_patch16_224.md").read_text().count("\n| SBP ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROOT / "train.py", "data=imagenet", "data.root=nowhere"), "no folder nowhere/train"),
        (("-m", "sbp.cli", "train", *TINY, "+sbp.typo=1"), "Key 'typo' not in 'SbpConfig' (key: sbp.typo)"),
        ((ROOT / "eval.py", "checkpoint=nothing.pt"), "no checkpoint nothing.pt"),
        (("-m", "sbp.cli", "benchmark", "arms=[plane]"), "arms=['plane'] must be among plain, "),
    ],
    ids=["data", "key", "checkpoint", "arm"],
)
def test_a_mistake_ends_in_one_line_and_exit_code_1(tmp_path, arguments, message):
    result = run(*arguments, folder=tmp_path)
    assert result.returncode == 1
    assert f"error: {message}" in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_corrupt_image_with_any_name_ends_neither_training_nor_the_check_of_data(tmp_path, monkeypatch):
    """Nor what goes on from a checkpoint that knows of it; what is shown has backslashes for what is not UTF-8."""
    bad = os.fsdecode(b"caf\xe9.png")
    for split in ("train", "val"):
        for number, name in enumerate(("a", "b")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (32, 32), (number * 200, i, 0)).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "a" / bad).write_bytes(b"no image")
    data = ("data=imagenet", "data.root=.", "data.num_classes=2", "data.image_size=32", "data.workers=1")
    command = (*TINY, *data, "global_batch_size=8", "probe.images=4", "recipe.epochs=2")
    result = run(ROOT / "train.py", *command, "run_dir=run", folder=tmp_path)
    assert result.returncode == 0 and "Logging error" not in result.stderr, result.stderr
    monkeypatch.chdir(tmp_path)
    train_run(composed(*command, "resume=run/checkpoints/step-00000002.pt"), tmp_path / "again")
    shown = "cannot read train/a/caf\\udce9.png (not an image); another image takes its place"
    assert shown in (tmp_path / "run" / "train.log").read_text()
    assert (tmp_path / "run" / "corrupt_images.txt").read_bytes() == b"train/a/caf\xe9.png (not an image)\n"
    (tmp_path / "check").mkdir()
    with pytest.raises(DataError):
        check(composed(*data, "data.workers=0", name="check_data", kind=CheckDataConfig), tmp_path / "check")
    assert (tmp_path / "check" / "corrupt_images.txt").read_bytes() == b"train/a/caf\xe9.png (not an image)\n"
    report = json.loads((tmp_path / "check" / "data_check.json").read_text())
    (found,) = [one for one in report["findings"] if one["level"] == "error"]
    assert found["items"] == [f"train/a/{bad} (not an image)"]
