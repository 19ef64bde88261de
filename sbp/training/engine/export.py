"""A trained model as timm's own files: safetensors with timm's keys, and timm's config beside it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import save_for_hf

from sbp.training.config.images import DataConfig
from sbp.training.config.keys import from_dict
from sbp.training.config.model import SbpConfig
from sbp.training.config.run import Config
from sbp.training.models.build import build_model
from sbp.training.record.checkpoint import choose_weights, find, load_weights
from sbp.training.tasks.choice import task_of

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Exported:
    """What was written where. name, kwargs: of timm.create_model."""

    weights: Path
    checkpoint: Path
    step: int
    averaged: bool
    name: str
    kwargs: dict[str, Any]


def export(checkpoint: Path, folder: Path, ema: bool | None = None) -> Exported:
    """Writes folder/model.safetensors and folder/config.json, which `timm.create_model("local-dir:FOLDER")` reads.

    checkpoint: a file of train.py, or a run's folder. ema: as for `choose_weights`.
    Raises ValueError for a checkpoint that is damaged, and when the files are there already.
    """
    target = folder / WEIGHTS
    if target.exists():
        raise ValueError(f"{target} exists: remove it, or take another run_dir")
    path, content = find(checkpoint)
    config = from_dict(Config, content["config"])
    if not task_of(config).exportable:
        raise ValueError(f"{path} is of a run with task={config.task}; only classifiers are models of timm's")
    averaged, weights = choose_weights(path, content, ema)
    backbone, data = config.backbone, config.data
    model = build_model(backbone, SbpConfig(enabled=False), data.num_classes, data.image_size)
    load_weights(model, weights)
    save_for_hf(
        model,
        str(folder),
        model_config={"pretrained_cfg": preprocessing(data)},
        model_args=backbone.kwargs,
        safe_serialization=True,
    )
    kwargs = {"num_classes": data.num_classes, **backbone.kwargs}
    return Exported(target, path, content["step"], averaged, backbone.name, kwargs)


def preprocessing(data: DataConfig) -> dict[str, Any]:
    """That of the evaluation, as timm writes it down; nothing is left of the original weights' own."""
    return {
        "input_size": (3, data.image_size, data.image_size),
        "test_input_size": None,
        "crop_pct": data.crop_pct,
        "test_crop_pct": None,
        "crop_mode": "center",
        "interpolation": data.interpolation,
        "mean": tuple(data.mean),
        "std": tuple(data.std),
        "num_classes": data.num_classes,
        "license": None,
        "tag": "",
    }
