"""Whole runs of `train`, in this process, on the digits."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import timm
from PIL import Image
from timm.models import load_checkpoint

from sbp.training.config.requests import EvalConfig
from sbp.training.engine import setup
from sbp.training.engine.evaluate import evaluate_checkpoint
from sbp.training.engine.train import train
from sbp.training.record.checkpoint import Checkpoints, find, load
from sbp.training.record.tracking import read_metrics
from sbp.training.runtime.distributed import pick_device
from tests.conftest import others_long
from tests.training.comparing import Interruption, assert_equal, interrupt_once_saved, record
from tests.training.configs import BACKBONES, QUICK, small

CPU = pick_device("cpu")


@pytest.mark.long
def test_a_short_training_learns_and_records_it(tmp_path):
    config = small(
        "recipe.epochs=6", "recipe.lr=2e-3", "global_batch_size=16", "recipe.ema_decay=0.99", "probe.every_steps=89"
    )
    summary = train(config, tmp_path)
    assert summary["top1"] > 65 and summary["top1_ema"] > 65
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["keep_ratio"] == summary["effective_keep_ratio"] == 0.5
    assert 0.3 < summary["gradient_cosine"] < 1
    assert summary["saved_bytes_per_image"] > 0 and summary["peak_rss"] > 2**20
    assert summary["images_per_second"] > 0 and summary["lr"] == 2e-3 and summary["versions"]["torch"]

    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    names = {name for line in lines for name in line}
    assert {"train/loss", "lr", "val/top1", "val/top5", "val/loss", "val/top1_ema", "epoch"} <= names
    assert {"memory/peak_rss", "saved_bytes_per_image", "effective_keep_ratio", "gradient_cosine/total"} <= names
    assert {"gradient_cosine/blocks.1", "images_per_second", "data_wait_share"} <= names

    # Its checkpoint: eval.py finds the same accuracy, and timm reads the file by itself.
    result = evaluate_checkpoint(EvalConfig(checkpoint=str(tmp_path), ema=False), tmp_path)
    assert result["top1"] == summary["top1"] and result["images"] == 360
    assert evaluate_checkpoint(EvalConfig(checkpoint=str(tmp_path)), tmp_path)["top1"] == summary["top1_ema"]
    path, content = find(tmp_path)
    plain = timm.create_model(config.backbone.name, num_classes=10, **config.backbone.kwargs)
    load_checkpoint(plain, str(path), use_ema=False)
    assert_equal(dict(plain.state_dict()), dict(content["state_dict"]))


def test_published_evaluation_is_another_one_and_repeats_itself(tmp_path):
    train(small(*QUICK, "sbp.keep_ratio=0.25"), tmp_path)
    request = EvalConfig(checkpoint=str(tmp_path))
    request.sbp.eval = "published"
    published = [evaluate_checkpoint(request, tmp_path)["loss"] for _ in range(2)]
    request.sbp.eval = "exact"
    assert published[0] == published[1] != evaluate_checkpoint(request, tmp_path)["loss"]


def test_a_vit_is_evaluated_at_another_image_size(tmp_path):
    """Its position embedding is interpolated as timm does, which at its own size changes nothing."""
    summary = train(small(*QUICK), tmp_path)
    request = EvalConfig(checkpoint=str(tmp_path))
    assert evaluate_checkpoint(request, tmp_path)["top1"] == summary["top1"]
    request.data.image_size = 48
    result = evaluate_checkpoint(request, tmp_path)
    assert result["preprocessing"]["image_size"] == 48 and result["images"] == 8


def test_bad_requests_of_an_evaluation_are_refused(tmp_path):
    config = small("sbp=none")
    trainer = setup.build_trainer(config, setup.load_images(config, CPU).order, CPU)
    content = {"config": asdict(config), "step": 0}
    path = Checkpoints(tmp_path).save(0, trainer.state_dict() | content)
    with pytest.raises(ValueError, match="has no averaged weights"):
        evaluate_checkpoint(EvalConfig(checkpoint=str(path), ema=True), tmp_path)
    request = EvalConfig(checkpoint=str(path))
    request.sbp.eval = "published"
    with pytest.raises(ValueError, match="pictures must be at least 0, got -1"):
        evaluate_checkpoint(EvalConfig(checkpoint="none", pictures=-1), tmp_path)
    with pytest.raises(ValueError, match="was trained without SBP"):
        evaluate_checkpoint(request, tmp_path)
    request = EvalConfig(checkpoint=str(path))
    request.backbone.name = "convnext_atto"
    with pytest.raises(ValueError, match="cannot make convnext_atto"):
        evaluate_checkpoint(request, tmp_path)


# Everything that draws random numbers: augmentation, erasing, mixup, drop path, random masks, an accumulated step.
RANDOM = (
    "data=synthetic", "data.num_classes=10", "data.image_size=32", "data.train_images=352",
    "data.val_images=64", "data.workers=0",
    "recipe.epochs=2", "recipe.augment=true", "recipe.auto_augment=rand-m9-mstd0.5-inc1", "sbp.mask=random",
    "recipe.random_erasing=0.5", "recipe.mixup=0.8", "recipe.cutmix=1.0", "recipe.ema_decay=0.9",
    "recipe.layer_decay=0.7",
    "global_batch_size=32", "micro_batch_size=16", "checkpoint.every_steps=4", "checkpoint.keep=20",
    "probe.every_steps=5", "probe.images=8", "log_every_steps=3", "sbp.eval=published", "recipe.warmup_epochs=1",
)  # fmt: skip


@pytest.mark.parametrize("backbone", others_long(BACKBONES, "vit"))
def test_a_run_interrupted_within_epochs_ends_bitwise_the_same(tmp_path, monkeypatch, backbone):
    config = small(*RANDOM, backbone=backbone)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    train(config, whole)

    interrupt_once_saved(monkeypatch, 4, 16)  # of 11 steps an epoch: within the first and within the second
    for workers in (0, 2):
        with pytest.raises(Interruption):
            train(replace(config, resume="auto", data=replace(config.data, workers=workers)), parts)
    train(replace(config, resume="auto"), parts)

    (_, expected), (_, resumed) = find(whole), find(parts)
    for key in ("state_dict", "state_dict_ema", "optimizer", "scaler", "step"):
        assert_equal(expected[key], resumed[key], key)
    assert record(whole) == record(parts)


def test_a_run_is_neither_overwritten_nor_gone_on_with_as_another(tmp_path):
    train(small(*QUICK), tmp_path)
    with pytest.raises(ValueError, match="resume=auto goes on"):
        train(small(*QUICK, "resume=never"), tmp_path)
    with pytest.raises(ValueError, match=r"sbp\.keep_ratio was 0\.5 and is now 0\.25"):
        train(small(*QUICK, "sbp.keep_ratio=0.25", "resume=auto"), tmp_path)
    before = find(tmp_path)[1]["state_dict"]
    assert train(small(*QUICK, "resume=auto"), tmp_path)["top1"] is not None  # finished: nothing is left to do
    assert_equal(dict(find(tmp_path)[1]["state_dict"]), dict(before))


def test_a_run_goes_on_with_the_images_that_it_had_wherever_they_lie(tmp_path):
    def folders(root, classes=("a", "b"), count=8):
        for split in ("train", "val"):
            for number, name in enumerate(classes):
                (tmp_path / root / split / name).mkdir(parents=True)
                for place in range(count):
                    Image.new("RGB", (32, 32), (100 * number, 9 * place, 0)).save(
                        tmp_path / root / split / name / f"{place}.png"
                    )
        given = ("data=imagenet", f"data.root={tmp_path / root}", "data.num_classes=2", "data.image_size=32")
        return small(*given, "global_batch_size=8", "recipe.epochs=2", "probe.every_steps=null", "data.workers=0")

    def interrupted():
        for name in ("summary.json", "status.json", "checkpoints/step-00000004.pt", "checkpoints/best.pt"):
            (tmp_path / "run" / name).unlink()

    config = folders("here")
    config.checkpoint.keep = 9
    train(config, tmp_path / "run")
    interrupted()
    with pytest.raises(ValueError, match="other images than before: it had 16 images to train on, and now 20"):
        train(folders("more", count=10), tmp_path / "run")
    with pytest.raises(ValueError, match="other images than before: it had class b where now is c"):
        train(others := folders("others", classes=("a", "c")), tmp_path / "run")
    others.resume = str(tmp_path / "run" / "checkpoints" / "step-00000002.pt")
    with pytest.raises(ValueError, match="other images than before: it had class b where now is c"):
        train(others, tmp_path / "another run")
    assert train(folders("copied"), tmp_path / "run")["top1"] is not None
    request = EvalConfig(checkpoint=str(tmp_path / "run"))
    request.data.root = str(tmp_path / "others")
    with pytest.raises(ValueError, match=r"the run of .* and what it is to be evaluated on have different classes: b"):
        evaluate_checkpoint(request, tmp_path)


def test_a_run_starts_from_a_checkpoint_of_another_one_with_what_helps_one_that_diverged(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    quick = (*QUICK, "log_every_steps=1")
    train(small(*quick, "checkpoint.every_steps=2", "checkpoint.keep=9"), one)
    start = Checkpoints(one / "checkpoints").path(2)
    train(small(*quick, f"resume={start}", "recipe.lr=1e-4", "recipe.clip_grad=1", "amp=float16"), other)
    assert min(line["step"] for line in record(other)) > 2 and record(other)[0]["lr"] < 1e-4
    content = find(other)[1]
    assert content["step"] == 4 and content["run_id"] != find(one)[1]["run_id"] and content["scaler"]
    with pytest.raises(ValueError, match=r"sbp\.keep_ratio was 0\.5 and is now 0\.25"):
        train(small(*quick, f"resume={start}", "sbp.keep_ratio=0.25"), tmp_path / "third")
    last = Checkpoints(one / "checkpoints").path(4)
    with pytest.raises(ValueError, match=r"step-00000004.pt stands at step 4, and this run ends at 4: nothing is left"):
        train(small(*quick, f"resume={last}", "recipe.lr=1e-4"), tmp_path / "fourth")


def test_of_two_copies_of_the_last_checkpoint_the_good_one_stays(tmp_path):
    """As they are after a run's folder was copied: best.pt is the file of a step no more."""
    train(small(*QUICK), tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    for name in ("summary.json", "status.json"):
        (tmp_path / "copy" / name).unlink()
    damaged = Checkpoints(tmp_path / "copy" / "checkpoints").path(4)
    damaged.write_bytes(damaged.read_bytes()[:5000])
    assert train(small(*QUICK), tmp_path / "copy")["best_step"] == 4
    for path in (damaged, damaged.with_name("best.pt")):
        assert_equal(dict(load(path)["state_dict"]), dict(find(tmp_path / "one")[1]["state_dict"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.name=vit_tinny_patch16_224", "backbone.name=vit_tinny_patch16_224"),
        ("sbp.layers=[blocks.99]", r"got \['blocks.99'\]"),
        ("recipe.mixup=0.8 global_batch_size=9", "micro_batch_size must be even, got 9"),
        ("parallel=fsdp", "start it with torchrun"),
    ],
)
def test_what_is_wrong_with_the_network_or_the_batch_is_said_before_any_image_is_read(
    tmp_path, monkeypatch, override, message
):
    monkeypatch.setattr(setup, "load_images", None)
    with pytest.raises(ValueError, match=message):
        train(small(*override.split()), tmp_path)


def test_what_a_run_is_about_to_do_is_said_and_kept(tmp_path, caplog):
    """What an accuracy that falls short is looked for in: the batch, the learning rate, and what images go through."""
    config = small(
        *QUICK,
        "recipe.lr_base_batch_size=64",
        "recipe.layer_decay=0.7",
        "global_batch_size=16",
        "micro_batch_size=4",
        "data.crop_pct=0.9",
    )
    with caplog.at_level("INFO"):
        summary = train(config, tmp_path)
    said = {line.split()[0]: " ".join(line.split()) for line in caplog.messages if line.strip()}
    base = config.recipe.lr
    assert "global batch 16 = 1 processes x 4 images x 4 accumulated; 4 steps per epoch" in said["global"]
    assert f"lr {base / 4:g} ({base:g} for a batch of 64), of the classifier; times 0.7 for each layer" in said["lr"]
    assert said["images"] == (
        "images 64, preprocessing: shorter side to 35 px (bicubic), centre crop 32 px, "
        "mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225]"
    )
    assert "keep_ratio 0.5 (effective 0.500), grid mask, mhsa_drop qkv" in said["sbp"]
    assert (summary["lr"], summary["base_lr"], summary["accumulation"]) == (base / 4, base, 4)
    assert summary["preprocessing"]["crop_pct"] == 0.9


def test_without_sbp_there_is_no_cosine(tmp_path):
    summary = train(small(*QUICK, "sbp=none", "probe.every_steps=2"), tmp_path)
    assert summary["gradient_cosine"] is None and summary["effective_keep_ratio"] == 1.0
