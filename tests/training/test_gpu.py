"""What only a CUDA device can show."""

import copy

import pytest
import torch

import sbp
from sbp.training.benchmark import ARMS, Runner
from sbp.training.config import BackboneConfig, BenchmarkConfig, BenchmarkDataConfig
from sbp.training.distributed import pick_device
from tests.conftest import assert_same_gradients, gradients, images, small_convnext, small_vit

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
