"""What is exported is read by timm, and nothing changes on the way."""

import pytest
import timm
import torch
from timm.data import resolve_data_config

from sbp.training.engine import setup
from sbp.training.engine.export import export
from sbp.training.engine.train import train
from sbp.training.record.checkpoint import find
from sbp.training.runtime.distributed import pick_device
from tests.training.configs import BACKBONES, small


@pytest.fixture(scope="module", params=BACKBONES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    few = ("probe.every_steps=null", "recipe.ema_decay=0.9", "global_batch_size=512", "data.std=[0.4,0.5,0.6]")
    train(small(*few, backbone=request.param), folder)
    return folder


@pytest.mark.parametrize("ema", [None, False])
def test_timm_reads_it_both_ways_with_equal_outputs(folder, tmp_path, ema):
    done = export(folder, tmp_path, ema)
    assert done.averaged is (ema is None)
    _, content = find(folder)
    x = torch.randn(2, 3, 32, 32)
    plain = timm.create_model(done.name, **done.kwargs).eval()
    plain.load_state_dict(content["state_dict_ema" if done.averaged else "state_dict"])
    for model in (
        timm.create_model(done.name, checkpoint_path=done.weights, **done.kwargs),
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True),
    ):
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
        assert torch.equal(model.eval()(x), plain(x))
    found = resolve_data_config(model=model)
    assert tuple(found["input_size"]) == (3, 32, 32)
    assert found["crop_pct"] == 1.0 and found["interpolation"] == "bicubic"
    assert (tuple(found["mean"]), tuple(found["std"])) == ((0.5, 0.5, 0.5), (0.4, 0.5, 0.6))


def test_nothing_is_overwritten_and_bad_requests_are_refused(folder, tmp_path):
    export(folder, tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors exists"):
        export(folder, tmp_path)
    with pytest.raises(ValueError, match="no good checkpoint in"):
        export(tmp_path, tmp_path / "other")


def test_without_averaged_weights_the_raw_ones_are_exported(tmp_path):
    config = small("sbp=none")
    device = pick_device("cpu")
    trainer = setup.build_trainer(config, setup.load_images(config, device).order, device)
    from dataclasses import asdict

    from sbp.training.record.checkpoint import save

    save(tmp_path / "x.pt", trainer.state_dict() | {"config": asdict(config), "step": 0})
    with pytest.raises(ValueError, match="has no averaged weights"):
        export(tmp_path / "x.pt", tmp_path / "out", ema=True)
    assert not export(tmp_path / "x.pt", tmp_path / "out").averaged
