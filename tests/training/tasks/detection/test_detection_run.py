"""Whole runs of `train` with task=detection, on generated shapes; and on photographs where there are any."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from sbp.training.config.model import DETECTORS
from sbp.training.config.requests import EvalConfig
from sbp.training.config.rules import validate
from sbp.training.engine import setup
from sbp.training.engine.evaluate import evaluate_checkpoint
from sbp.training.engine.export import export
from sbp.training.engine.train import train
from sbp.training.models.optim import build_optimizer, build_scheduler
from sbp.training.record.checkpoint import find
from sbp.training.record.tracking import read_metrics
from sbp.training.tasks.choice import task_of
from sbp.training.tasks.detection import synthetic
from tests.conftest import others_long
from tests.training.comparing import Interruption, assert_equal, interrupt_once_saved, record
from tests.training.configs import composed, small_detector_run
from tests.training.tasks.detection.coco_files import coco_folder, one_class
from tests.training.tasks.detection.few import few_images
from tests.training.wandb_side import wandb_history

CPU = torch.device("cpu")
PHOTOGRAPHS = os.environ.get("SBP_COCO")  # with images/train and annotations/instances_train.json
FOUR_IMAGES = (
    "task=detection", "data.train_images=4", "data.val_images=4", "data.val_split=train", "threads=1",
    "detector.fpn_channels=32", "detector.hidden_size=128", "detector.rois_per_image=32", "global_batch_size=4",
    "backbone.kwargs.dims=[16,32,64,64]", "+backbone.kwargs.ls_init_value=1.0", "backbone.drop_path=0",
    "recipe.augment=false", "recipe.epochs=100", "recipe.lr=2e-3",
    "eval_batch_size=4", "eval_every_epochs=100", "probe.every_steps=100",
)  # fmt: skip


@pytest.mark.long
def test_pictures_that_fail_cost_a_warning_and_no_figures(tmp_path, monkeypatch, caplog):
    def gone(*args, **kwargs):
        raise ValueError("cannot read 1 of the images")

    monkeypatch.setattr("sbp.training.tasks.detection.pictures.readable", gone)
    overrides = ("recipe.epochs=1", "eval_every_epochs=1", "probe.every_steps=null", "detector.rois_per_image=8")
    summary = train(small_detector_run(*overrides, "logger=wandb", "logger.offline=true"), tmp_path)
    assert summary["box_ap"] is not None
    assert "wandb gets no pictures of this evaluation: cannot read 1 of the images" in caplog.text


@pytest.mark.long
def test_a_detector_learns_four_images_by_heart_records_it_and_is_evaluated(tmp_path):
    summary = train(composed(*FOUR_IMAGES, "logger=wandb", "logger.offline=true"), tmp_path)
    assert summary["box_ap"] > 60 and summary["mask_ap"] > 60
    assert summary["effective_keep_ratio"] == 0.5 and 0.3 < summary["gradient_cosine"] < 1
    assert summary["saved_bytes_per_image"] > 0 and summary["best_step"] == 100
    lines = read_metrics(tmp_path / "metrics.jsonl")
    losses = [{n: v for n, v in line.items() if n.startswith("train/loss")} for line in lines if "train/loss" in line]
    parts = {f"train/loss_{name}" for name in ("objectness", "rpn_box_reg", "classifier", "box_reg", "mask")}
    assert all(one.keys() == parts | {"train/loss"} for one in losses)
    assert all(one["train/loss"] == pytest.approx(sum(one[name] for name in parts), rel=1e-5) for one in losses)
    assert losses[-1]["train/loss"] < losses[0]["train/loss"] / 2
    pictured = [name for line in wandb_history(tmp_path) for name in line if name.startswith("pictures/")]
    assert len({name.split("/")[1] for name in pictured}) == 4
    assert sum("pictures/" in name for line in lines for name in line) == 0

    result = evaluate_checkpoint(EvalConfig(checkpoint=str(tmp_path), pictures=2), tmp_path)
    figures = ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75")
    assert [result[name] for name in figures] == pytest.approx([summary[name] for name in figures])
    pictures = [Image.open(path) for path in (tmp_path / "pictures").iterdir()]
    assert len(pictures) == 2 and all(min(picture.size) == 64 for picture in pictures)
    with pytest.raises(ValueError, match="task=detection; only classifiers are models of timm's"):
        export(tmp_path, tmp_path / "exported")
    # Its backbone is timm's own.
    _, content = find(tmp_path)
    body = {name.removeprefix("backbone.body."): value for name, value in content["state_dict"].items()}
    body = {name: value for name, value in body.items() if name.split(".")[0] in ("stem", "stages")}
    plain = timm.create_model("convnext_tiny", num_classes=0, dims=[16, 32, 64, 64], depths=[1, 1, 3, 1], patch_size=4)
    assert plain.load_state_dict(body, strict=False).missing_keys == ["head.norm.weight", "head.norm.bias"]


@pytest.mark.long
@pytest.mark.parametrize("sbp", ["sbp=default", "sbp.recompute=cheap"])
def test_a_detector_on_a_swin_learns_its_images(tmp_path, sbp):
    """On a backbone of the configs; images of 64 px leave maps that windows of 4 x 4 do not divide."""
    options = [
        one for one in FOUR_IMAGES if not one.startswith(("backbone.kwargs", "+backbone.kwargs", "recipe.epochs"))
    ]
    swin = ("backbone=swin_demo", "backbone.kwargs.embed_dim=16", "sbp.mhsa_drop=query", sbp, "recipe.epochs=30")
    config = composed(*options, *swin, "eval_every_epochs=30", "logger=none")
    summary = train(config, tmp_path)
    assert summary["effective_keep_ratio"] == 0.5 and 0.3 < summary["gradient_cosine"] < 1
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert losses[-1] < losses[0] / 1.5
    result = evaluate_checkpoint(EvalConfig(checkpoint=str(tmp_path)), tmp_path)
    assert result["box_ap"] == pytest.approx(summary["box_ap"])


@pytest.mark.long
def test_mask_rcnn_on_swin_t_as_its_config_has_it():
    """A step of the published network with weights of its own, on an image of a size that pads all of its maps."""
    config = validate(composed("experiment=detection/mask_rcnn_swin_tiny_sbp", "data.root=/coco"))
    assert (config.task, config.sbp.mhsa_drop, config.recipe.lr) == ("detection", "query", 1e-4)
    model = task_of(config).build_model(config).train()
    synthetic.propose_objects(model)
    images, targets = synthetic.random(160, 224, 1, config.data.num_classes)
    sum(model(images, targets).values()).backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
    for stage in model.backbone.body.layers:
        assert [block.window_size for block in stage.blocks] == [(7, 7)] * len(stage.blocks)
        assert [block.shift_size for block in stage.blocks[:2]] == [(0, 0), (3, 3)]


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.long
def test_a_run_interrupted_within_epochs_ends_bitwise_the_same(tmp_path, monkeypatch, name):
    """Crops and sizes, sampled regions, batch norms of the cascade, drop path, random masks, an accumulated step."""
    config = small_detector_run(
        f"detector.name={name}", "recipe.epochs=2", "recipe.short_sides=[48,64]", "recipe.crop_share=0.5",
        "recipe.crop_short_sides=[64]", "recipe.crop_sides=[40,60]", "sbp.mask=random", "recipe.layer_decay=0.8",
        "recipe.scheduler=multistep", "recipe.decay_milestones=[1]", "recipe.warmup_steps=2", "micro_batch_size=4",
        "checkpoint.every_steps=2", "checkpoint.keep=9", "probe.every_steps=2", "log_every_steps=1",
        "eval_every_epochs=2",
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    train(config, whole)
    interrupt_once_saved(monkeypatch, 2, 4)  # of 3 steps an epoch
    for workers in (0, 1):
        with pytest.raises(Interruption):
            train(replace(config, data=replace(config.data, workers=workers)), parts)
    train(config, parts)
    (_, expected), (_, resumed) = find(whole), find(parts)
    for key in ("state_dict", "optimizer", "step"):
        assert_equal(expected[key], resumed[key], key)
    assert record(whole) == record(parts)


@pytest.mark.parametrize("name", others_long(DETECTORS, "mask_rcnn"))
def test_one_class_is_enough(tmp_path, name):
    """It is not counted with the background, neither by the config nor by the heads. A batch of this has an image
    without objects.
    """
    root = coco_folder(tmp_path / "data", both=one_class())
    data = ("data=coco", f"data.root={root}", "data.train_split=images/train", "data.val_split=images/val")
    sizes = ("data.num_classes=1", "data.image_size=48", "data.max_size=96", "data.workers=0")
    options = (f"detector.name={name}", "data.background=true", "global_batch_size=2", "recipe.augment=false")
    of_files = ("data.train_images=1024", "data.val_images=256")  # the defaults: how many there are to generate
    config = small_detector_run(*data, *of_files, *sizes, *options)
    summary = train(config, tmp_path)
    assert 0 <= summary["box_ap"] <= 100 and summary["gradient_cosine"] > 0
    weights = find(tmp_path)[1]["state_dict"]
    outputs = {len(value) for name, value in weights.items() if name.endswith("cls_score.bias")}
    assert outputs == {2}, "the class, and the background"
    images = setup.load_images(config, CPU)
    assert {label for i in range(3) for label in images.train.dataset.dataset[i][1]["labels"].tolist()} == {1}
    with pytest.raises(ValueError, match=r"data\.num_classes must be at least 1, got 0"):
        validate(small_detector_run("data.num_classes=0"))


def test_the_published_recipe_has_its_layers_and_steps():
    """Rates of mmdetection's constructor for ConvNeXt: `num_layers` 6 and 12, decay to the power of layers above."""
    for experiment, depth, lr, decay, layers in (
        ("mask_rcnn_convnext_tiny_sbp", 9, 1e-4, 0.95, 6),
        ("cascade_mask_rcnn_convnext_base_baseline", 27, 2e-4, 0.8, 12),
    ):
        config = composed(f"experiment=table2/{experiment}", "data.root=/coco")
        assert (config.task, config.recipe.lr, config.global_batch_size) == ("detection", lr, 16)
        with torch.device("meta"):
            model = task_of(config).build_model(config)
        optimizer = build_optimizer(model, config.recipe, config.recipe.lr)
        scheduler = build_scheduler(optimizer, config.recipe, steps_per_epoch=1000)
        scheduler.step_update(1000)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        layer_of = {"stem": 0, "stages.0": 1, "stages.1": 2, "stages.2.downsample": 3, "stages.3": layers}
        layer_of |= {f"stages.2.blocks.{block}": 3 + block // 3 for block in range(depth)}
        for name, parameter in model.named_parameters():
            own = name.removeprefix("backbone.body.")
            layer = next((at for part, at in layer_of.items() if own.startswith(f"{part}.")), layers + 1)
            assert rates[id(parameter)] == pytest.approx(lr * decay ** (layers + 1 - layer)), name
            assert (id(parameter) in decayed) == (parameter.ndim > 1), name
        highest = []
        for step in (0, 250, 500, 26_998, 27_000, 32_998, 33_000, 35_999):
            scheduler.step_update(step)
            highest.append(max(group["lr"] for group in optimizer.param_groups))
        assert highest == pytest.approx([1e-7, (lr + 1e-7) / 2, lr, lr, lr / 10, lr / 10, lr / 100, lr / 100])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=digits", "data.source, with task=detection, must be one of shapes, coco, got 'digits'"),
        ("recipe.mixup=0.8", "recipe.mixup must be 0 with task=detection, got 0.8"),
        ("compile=true", "compile must be false with task=detection"),
        (
            "backbone.name=vit_tiny_patch16_224",
            "backbone.name must be a timm ConvNeXt or Swin with task=detection, got vit_tiny_patch16_224",
        ),
        ("detector.name=yolo", "detector.name must be one of mask_rcnn, cascade_mask_rcnn, got 'yolo'"),
        ("detector.anchor_sizes=[8,16]", r"detector.anchor_sizes must have 5 values, got 2"),
        ("data.max_size=32", "data.max_size must be at least the largest shorter side, 64, got 32"),
        ("data=coco", "data.root is needed"),
        ("data.background=true", "data.background=true needs data.source=coco, got shapes"),
        ("recipe.scheduler=multistep", r"recipe.decay_milestones must be increasing epochs in \(0, 1\)"),
        ("recipe.decay_milestones=[1]", "recipe.decay_milestones needs recipe.scheduler=multistep, got cosine"),
        ("recipe.crop_sides=[9]", r"recipe.crop_sides must have 2 values, got 1"),
    ],
)
def test_what_a_detector_cannot_be_trained_with_is_refused_at_once(override, message):
    with pytest.raises(ValueError, match=message):
        validate(small_detector_run(override))


def test_a_detector_starts_from_the_weights_of_a_classifier(tmp_path):
    config = small_detector_run()
    torch.manual_seed(1)
    trained = timm.create_model(config.backbone.name, num_classes=3, **config.backbone.kwargs)
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    config = replace(config, backbone=replace(config.backbone, pretrained=str(tmp_path / "trained.pth")))
    task = task_of(config)
    model = task.build_model(config)
    task.load_starting_weights(model, task.starting_weights(config.backbone, config.data))
    own = {name: value for name, value in trained.state_dict().items() if not name.startswith("head.")}
    assert_equal(dict(model.backbone.body.state_dict()), own)


def test_all_processes_take_part_in_a_probe_where_batch_norms_do():
    """Else the main process would wait in the probe for statistics that the others never send."""
    config = small_detector_run("detector.name=cascade_mask_rcnn")
    trainer = setup.build_trainer(config, setup.load_images(config, CPU).order, CPU)
    assert not trainer.collective
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(trainer.model)
    assert trainer.collective


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(PHOTOGRAPHS is None, reason="SBP_COCO names no folder of photographs in COCO's layout")
@pytest.mark.parametrize("sbp", ["default", "none"])
@pytest.mark.parametrize("name", DETECTORS)
def test_eight_photographs_can_be_learned_by_heart(tmp_path, name, sbp):
    few_images(Path(PHOTOGRAPHS), tmp_path / "data", split="train")
    config = composed(
        "task=detection", "data=coco", f"data.root={tmp_path / 'data'}", "data.train_split=train",
        "data.val_split=train", "data.image_size=256", "data.max_size=512", "data.workers=0", f"sbp={sbp}",
        "detector=small", f"detector.name={name}", "detector.anchor_sizes=[16,32,64,128,256]", "logger=none",
        "+backbone.kwargs.ls_init_value=1.0", "backbone.drop_path=0", "recipe.augment=false", "recipe.epochs=100",
        "recipe.warmup_epochs=5", "global_batch_size=4", "eval_every_epochs=100", "probe.every_steps=null",
    )  # fmt: skip
    summary = train(config, tmp_path / "run")
    print(json.dumps({key: summary[key] for key in ("box_ap", "box_ap50", "mask_ap", "mask_ap50")}))
    assert summary["box_ap"] > 50 and summary["mask_ap"] > 50
