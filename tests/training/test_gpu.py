"""What a CUDA device may do otherwise than a CPU, or later: the tests of the `device` fixture, and of what it needs."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sbp
from sbp.training.benchmark.arms import ARMS
from sbp.training.benchmark.runner import Runner
from sbp.training.config.batches import plan_batches
from sbp.training.config.images import DataConfig
from sbp.training.config.requests import BenchmarkConfig, BenchmarkDataConfig
from sbp.training.data.loading import TrainSampler
from sbp.training.data.preprocessing import validation_transform
from sbp.training.data.resident import Crops, resident_loader
from sbp.training.data.sources import SyntheticImages
from sbp.training.engine import setup
from sbp.training.record.checkpoint import Checkpoints, find
from tests.conftest import (
    OPTIONAL,
    assert_same_gradients,
    cuda_only,
    gradients,
    images,
    never_waits,
    one_of,
    small_convnext,
    small_vit,
)
from tests.installed import modules_besides
from tests.training import runs
from tests.training.comparing import assert_equal

ROOT = Path(__file__).parents[2]
EAGER = {name: arm for name, arm in ARMS.items() if not (arm.compile or arm.graph or arm.release)}
SETTINGS = [
    {"recompute": recompute, "mask": mask} for recompute in ("none", "cheap", "block") for mask in ("grid", "random")
]


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("make", [small_vit, small_convnext])
def test_gradients_are_those_of_the_cpu(device, make, settings):
    model = sbp.apply(make(), **settings)
    x = images(64 if make is small_convnext else 32)
    expected = gradients(copy.deepcopy(model), x)
    loss, found = gradients(model.to(device), x.to(device))
    assert_same_gradients((loss.cpu(), {name: g.cpu() for name, g in found.items()}), expected, tolerance=1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("network", "arm"),
    [(network, name) for network in runs.BACKBONES for name in EAGER if network == "vit" or not EAGER[name].vit_only],
)
def test_a_training_step_never_waits_for_the_device(device, network, arm):
    data = BenchmarkDataConfig(image_size=32, num_classes=10)
    config = BenchmarkConfig(backbone=runs.BACKBONES[network], data=data, batch_size=4)
    runner = Runner(config, ARMS[arm], device)
    before = [p.detach().clone() for p in runner.model.parameters()]
    batch = torch.randn(4, 3, 32, 32, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    for _ in range(2):
        runner._step(batch)
    with never_waits(device):
        runner._step(batch)
    assert not all(map(torch.equal, before, runner.model.parameters()))


@pytest.mark.gpu
@pytest.mark.parametrize("backbone", runs.BACKBONES)
def test_a_step_of_a_run_waits_for_its_loss_and_the_gradients_norm_alone(device, backbone):
    """From uint8 images in pinned memory on: normalisation, erasing, mixup, gradients, clipping, averages."""
    recipe = {"mixup": 0.8, "ema_decay": 0.9, "random_erasing": 0.5, "clip_grad": 1.0}
    config = runs.configured(backbone, device=device.type, amp="bfloat16", channels_last=True, recipe=recipe)
    images = setup.load_images(config, device)
    trainer = setup.build_trainer(config, images.order, device)
    batch = next(iter(images.train))
    assert batch.images.dtype == torch.uint8
    if cuda_only(device, "memory is pinned for CUDA"):
        assert batch.images.is_pinned()
    for step in range(2):
        trainer.step(step, [batch[:2]])
    with never_waits(device):
        loss = trainer.backward(2, [batch[:2]])
    trainer.update(2)  # reads the gradient's norm
    assert loss.read() > 0


@pytest.mark.gpu
def test_images_on_a_device_are_those_on_a_cpu_and_are_not_waited_for(device):
    def loader(device):
        data = SyntheticImages(10, 2, 8, validation_transform(DataConfig(image_size=8)))
        order = TrainSampler(10, plan_batches(4, None, 1), 0)
        crops = Crops(padding=2, flip=0.5, seed=0)
        return resident_loader(data, order, seed=0, workers=0, device=device, size=8, crops=crops)

    given, expected = loader(device), list(loader(torch.device("cpu")))
    with never_waits(device):
        found = list(given)
    assert len(found) == 2
    for batch, other in zip(found, expected, strict=True):
        assert batch.images.device == batch.labels.device == device
        assert torch.equal(batch.images.cpu(), other.images) and torch.equal(batch.labels.cpu(), other.labels)


@pytest.mark.gpu
@pytest.mark.parametrize(("backbone", "amp"), one_of(2, runs.BACKBONES, ["off", "bfloat16"]))
def test_with_deterministic_algorithms_a_resumed_run_is_bitwise_the_same(tmp_path, device, backbone, amp):
    config = runs.configured(
        backbone,
        device=device.type,
        deterministic=True,
        amp=amp,
        channels_last=True,
        sbp={"mask": "random"},
        backbone={"drop_path": 0.1},
        recipe={"epochs": 2, "mixup": 0.8, "ema_decay": 0.9, "random_erasing": 0.5},
        checkpoint={"every_steps": 3, "keep": 20},
        probe={"every_steps": 5},
    )
    expected = runs.run(config, tmp_path / "whole")
    config.resume = str(Checkpoints(tmp_path / "whole" / "checkpoints").paths()[0])
    resumed = runs.run(config, tmp_path / "rest")
    assert expected["step"] == 8 and find(Path(config.resume))[1]["step"] == 3
    for key in ("state_dict", "state_dict_ema", "optimizer", "scaler", "step"):
        assert_equal(expected[key], resumed[key], key)


@pytest.mark.gpu
@pytest.mark.multiprocess
@pytest.mark.long
def test_one_process_shards_as_it_trains_alone(tmp_path, device):
    """FSDP, on CUDA over NCCL, with float16's scaler, clipping and averages."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command = [*launch, runs.__file__, tmp_path, device.type]
    result = subprocess.run(command, env=from_here(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    if cuda_only(device, "gradients of a CPU go through gloo"):
        assert "cuda:nccl" in result.stdout
    (_, expected), (_, found) = (find(tmp_path / parallel) for parallel in ("ddp", "fsdp"))
    for key in ("state_dict", "state_dict_ema"):
        for name, value in expected[key].items():
            torch.testing.assert_close(found[key][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def from_here() -> dict[str, str]:
    """An environment whose Python finds this repository first, and then what ours finds."""
    found = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found)), "OMP_NUM_THREADS": "1"}


# -- the machine that they run on


@pytest.mark.long
def test_they_are_found_with_torch_torchvision_timm_and_pytest_alone():
    """What needs more is skipped, with its reason. That no test marked gpu asks for more once it runs is what a fixture
    in `tests/conftest.py` sees to."""
    absent = modules_besides("torch", "torchvision", "timm", "pytest")
    assert {*OPTIONAL, "pytest_timeout", "xdist"} <= set(absent)
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
import pytest
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", "-rs", "-p", "no:cacheprovider", "-W", "error"]))
"""
    environment = from_here() | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "hydra is not installed" in result.stdout and "error" not in result.stdout
    found = {line.partition("::")[0] for line in result.stdout.splitlines() if "::" in line}
    marked = {
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if any(line.startswith("@pytest.mark.gpu") for line in path.read_text().splitlines())
    }
    assert found == {path.relative_to(ROOT).as_posix() for path in marked}
