"""What one process can show of several; the rest is in `test_processes.py`."""

import pytest
import timm
import torch

from sbp.training.engine import setup
from sbp.training.runtime import distributed, wrapping
from tests.training.configs import small


def test_fsdp_needs_torchrun():
    config = small("parallel=fsdp")
    device = setup.prepare_process(config)
    with pytest.raises(ValueError, match=r"parallel=fsdp .* start it with torchrun"):
        setup.build_trainer(config, setup.load_images(config, device).order, device)


def test_more_processes_than_cuda_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for processes in ("1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert distributed.pick_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"4 processes .* 2 CUDA devices: .* --nproc_per_node=2, or set device=cpu"):
        distributed.pick_device("auto")
    assert distributed.pick_device("cpu") == torch.device("cpu")


def test_an_optimizer_goes_on_in_this_process_s_own_way():
    """A CPU's checkpoint says fused=None, with which AdamW on CUDA would lose its one kernel, and float16 its step."""
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    before = torch.optim.AdamW([weight], lr=0.5)
    before.step()
    after = torch.optim.AdamW([weight], fused=True)
    wrapping.load_optimizer(after, before.state_dict())
    (group,) = after.param_groups
    assert group["fused"] is True and group["lr"] == 0.5
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    scaler.step(after)
    assert after.state[weight]["step"] == 2


def test_batch_norms_over_all_processes_compute_the_same(monkeypatch):
    """timm's batch norms have an activation, which torch's own conversion leaves out without a word."""
    model, images = timm.create_model("test_efficientnet").eval(), torch.randn(2, 3, 64, 64)
    before = model(images)
    monkeypatch.setattr("sbp.training.runtime.distributed.world_size", lambda: 2)
    converted = wrapping.synchronise_batch_norm(model, torch.device("cuda"))
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in converted.modules())
    assert torch.equal(converted(images), before)
