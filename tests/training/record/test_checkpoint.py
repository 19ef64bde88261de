"""Checkpoints are whole, plain, and say what does not fit."""

import logging
import os
import stat
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from sbp.training.models.build import build_model
from sbp.training.record import checkpoint
from sbp.training.record.checkpoint import Checkpoints, load, load_weights, resume_point, save
from tests.training.configs import small

CONTENT = {"state_dict": {"weight": torch.arange(1000.0)}, "config": {"seed": 0}, "step": 3}


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "one bit": flip_a_bit,
}


def model(num_classes=10, *overrides):
    config = small(*overrides)
    data = config.data
    return build_model(config.backbone, config.sbp, num_classes, data.image_size, data.train_image_size)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_and_the_one_before_is_taken(tmp_path, damage, caplog):
    checkpoints = Checkpoints(tmp_path)
    good, bad = checkpoints.save(1, CONTENT), checkpoints.save(2, CONTENT)
    damage(bad)
    with pytest.raises(ValueError, match=f"{bad} is corrupt"):
        load(bad)
    with caplog.at_level(logging.WARNING):
        path, content = checkpoints.latest()
    assert path == good and torch.equal(content["state_dict"]["weight"], CONTENT["state_dict"]["weight"])
    assert str(bad) in caplog.text


def test_the_latest_few_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15, 100):
        checkpoints.save(step, CONTENT)
    assert [path.name for path in checkpoints.paths()] == ["step-00000015.pt", "step-00000100.pt"]


def test_older_ones_that_cannot_be_removed_cost_a_warning(tmp_path, monkeypatch, caplog):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, CONTENT)
    unlink = Path.unlink

    def refuse(path, **options):
        if path.suffix == ".pt":
            raise PermissionError("not yours")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert checkpoints.save(2, CONTENT) == checkpoints.path(2)
    assert len(checkpoints.paths()) == 2 and "cannot remove older checkpoints" in caplog.text


def test_later_ones_that_the_run_did_not_go_on_from_are_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (20, 30, 40):
        Checkpoints(tmp_path, keep=3).save(step, CONTENT)
    assert checkpoints.paths() == [checkpoints.path(step) for step in (20, 30, 40)]
    checkpoints.save(25, CONTENT)
    assert checkpoints.paths() == [checkpoints.path(25)] and checkpoints.latest() is not None


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "step-00000001.pt"
    save(path, CONTENT)
    before = path.read_bytes()
    monkeypatch.setattr(checkpoint.torch, "save", lambda content, file: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(path, CONTENT)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_file_system_that_cannot_sync_a_folder_takes_checkpoints(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    refused = []
    monkeypatch.setattr(checkpoint.os, "fsync", refuse)
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2):
        assert checkpoints.save(step, CONTENT) == checkpoints.path(step)
    assert checkpoints.paths() == [checkpoints.path(2)] and len(refused) == 2
    for descriptor in refused:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_nothing_but_tensors_and_builtins_is_loaded(tmp_path):
    torch.save(CONTENT | {"other": nn.Linear(1, 1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="corrupt or no checkpoint"):
        load(tmp_path / "x.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "y.pt")
    with pytest.raises(ValueError, match=r"not written by train\.py"):
        load(tmp_path / "y.pt")
    with pytest.raises(ValueError, match="no checkpoint"):
        load(tmp_path / "z.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_weights_of_wrapped_models_load(prefix):
    target = model()
    weights = {name: value + 1 for name, value in model().state_dict().items()}
    load_weights(target, {f"{prefix}{name}": value for name, value in weights.items()})
    assert all(torch.equal(target.state_dict()[name], value) for name, value in weights.items())


def test_what_does_not_fit_is_said():
    state = model().state_dict()
    with pytest.raises(ValueError, match="10 classes and the model 7"):
        load_weights(model(7), state)
    with pytest.raises(ValueError, match=r"another model: .*unexpected blocks"):
        load_weights(model(10, "backbone.kwargs.depth=1"), state)
    with pytest.raises(ValueError, match=r"another model: .*\(1, 16, 48\) instead of \(1, 16, 24\)"):
        load_weights(model(10, "backbone.kwargs.embed_dim=24"), state)
    with pytest.raises(ValueError, match="another model: missing"):
        load_weights(timm.create_model("convnext_atto", num_classes=10), state)


def test_where_a_run_starts(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert resume_point("never", checkpoints) is None and resume_point("auto", checkpoints) is None
    path = checkpoints.save(3, CONTENT)
    for resume in ("auto", str(path), str(tmp_path), str(tmp_path / "checkpoints")):
        assert resume_point(resume, checkpoints)[:2] == (path, True)
    other = Checkpoints(tmp_path / "other").save(9, CONTENT | {"step": 9})
    assert resume_point(str(other), checkpoints).content["step"] == 3  # a restart of a run that began there
    assert resume_point(str(other), Checkpoints(tmp_path / "new"))[:2] == (other, False)
    checkpoints.save(4, CONTENT)
    with pytest.raises(ValueError, match=r"is an earlier checkpoint of this run, which goes on from .*step-00000004"):
        resume_point(str(path), checkpoints)
    checkpoints.path(4).unlink()
    with pytest.raises(ValueError, match="resume=auto goes on"):
        resume_point("never", checkpoints)
    other.unlink()
    assert resume_point(str(other), checkpoints)[:2] == (path, True)  # it has its own by now
    with pytest.raises(ValueError, match="no checkpoint"):
        resume_point(str(other), Checkpoints(tmp_path / "new"))
    with pytest.raises(ValueError, match="no good checkpoint"):
        resume_point(str(tmp_path / "other"), Checkpoints(tmp_path / "new"))
    DAMAGES["truncated"](path)
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        resume_point("auto", checkpoints)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("backbone.name=vit_tinny",), "no timm model; near it: "),
        (("+backbone.kwargs.wings=2",), "cannot make vit_tiny_patch16_224 with"),
        (
            ("backbone.kwargs.embed_dim=100",),
            r"cannot make vit_tiny_patch16_224 with .*AssertionError: dim should",
        ),
        (("data.image_size=36",), "leaves no whole grid of 8 x 8 px patches"),
        (("data.image_size=64", "backbone.kwargs.img_size=32"), "the model is made for 32 x 32 px"),
        (("data.train_image_size=36", "+backbone.kwargs.dynamic_img_size=true"), "train_image_size=36 leaves no whole"),
        (("data.train_image_size=16",), r"train_image_size=16, but .* set \+\+backbone\.kwargs\.dynamic_img_size=true"),
        (("sbp.layers=[blocks.9]",), "layers must be"),
    ],
)
def test_a_model_that_cannot_be_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        model(10, *overrides)
