"""What only a CUDA device can show."""

import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import sbp
from sbp.training import setup
from sbp.training.checkpoint import Checkpoints, find
from sbp.training.config import BackboneConfig, BenchmarkConfig, BenchmarkDataConfig
from sbp.training.costs.benchmark import ARMS, Runner
from sbp.training.distributed import pick_device
from tests.conftest import assert_same_gradients, gradients, images, small_convnext, small_vit
from tests.training.configs import BACKBONES, ROOT, small
from tests.training.test_run import assert_equal
from train import train

pytestmark = pytest.mark.gpu

SETTINGS = [
    {"recompute": recompute, "mask": mask} for recompute in ("none", "cheap", "block") for mask in ("grid", "random")
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("make", [small_vit, small_convnext])
def test_gradients_are_those_of_the_cpu(make, settings):
    model = sbp.apply(make(), **settings)
    x = images(64 if make is small_convnext else 32)
    expected = gradients(copy.deepcopy(model), x)
    loss, found = gradients(model.cuda(), x.cuda())
    assert_same_gradients((loss.cpu(), {name: g.cpu() for name, g in found.items()}), expected, tolerance=1e-8)


@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.budget is None and not arm.release])
@pytest.mark.parametrize("network", ["vit_tiny_patch16_224", "convnext_atto"])
def test_a_training_step_never_waits_for_the_device(network, arm):
    if ARMS[arm].vit_only and not network.startswith("vit"):
        pytest.skip("a ViT's arm")
    device = pick_device("cuda")
    config = BenchmarkConfig(BackboneConfig(network), data=BenchmarkDataConfig(num_classes=10), batch_size=4)
    runner = Runner(config, ARMS[arm], device)
    batch = torch.randn(4, 3, 224, 224, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    for _ in range(2):
        runner._step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner._step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_of_a_run_waits_for_its_loss_alone():
    """From uint8 images in pinned memory on: normalisation, erasing, mixup, gradients, clipping, averages."""
    random = ("recipe.mixup=0.8", "recipe.ema_decay=0.9", "recipe.augment=true", "recipe.random_erasing=0.5")
    config = small("device=cuda", "amp=bfloat16", "recipe.clip_grad=1", "channels_last=true", *random)
    device = pick_device("cuda")
    images = setup.load_images(config, device)
    trainer = setup.build_trainer(config, images.order, device)
    batch = next(iter(images.train))
    assert batch.images.is_pinned() and batch.images.dtype == torch.uint8
    for step in range(2):
        trainer.step(step, [batch[:2]])
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = trainer.backward(2, [batch[:2]])
        trainer.update(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.read() > 0


@pytest.mark.parametrize("amp", ["off", "bfloat16"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_with_deterministic_algorithms_a_resumed_run_is_bitwise_the_same(tmp_path, backbone, amp):
    random = ("backbone.drop_path=0.1", "sbp.mask=random", "recipe.mixup=0.8", "recipe.ema_decay=0.9")
    random += ("recipe.augment=true", "recipe.random_erasing=0.5", "channels_last=true")
    saved = ("checkpoint.every_steps=4", "checkpoint.keep=20", "probe.every_steps=6", "probe.images=8")
    config = small("device=cuda", "deterministic=true", f"amp={amp}", *random, *saved, backbone=backbone)
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    whole.mkdir()
    rest.mkdir()
    train(config, whole)
    train(replace(config, resume=str(Checkpoints(whole / "checkpoints").paths()[0])), rest)
    (_, expected), (_, resumed) = find(whole), find(rest)
    for key in ("state_dict", "state_dict_ema", "optimizer", "scaler", "step"):
        assert_equal(expected[key], resumed[key], key)


@pytest.mark.multiprocess
def test_one_process_shards_as_it_trains_alone(tmp_path):
    """FSDP over NCCL, with float16's scaler, clipping and averages."""
    tiny = ("logger=none", "data=digits", "recipe=demo", *BACKBONES["vit"], "recipe.epochs=1", "recipe.warmup_epochs=0")
    options = ("device=cuda", "deterministic=true", "amp=float16", "recipe.clip_grad=1", "recipe.ema_decay=0.9")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", ROOT / "train.py"]
    for parallel in ("ddp", "fsdp"):
        command = [*launch, *tiny, *options, f"parallel={parallel}", f"run_dir={tmp_path / parallel}"]
        result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    (_, expected), (_, found) = (find(tmp_path / parallel) for parallel in ("ddp", "fsdp"))
    for key in ("state_dict", "state_dict_ema"):
        for name, value in expected[key].items():
            torch.testing.assert_close(found[key][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
