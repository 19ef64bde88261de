"""Small runs without Hydra, for machines that have torch, torchvision and timm alone.

As a program under torchrun, `runs.py FOLDER DEVICE`: float16's scaler, clipping and averages, once with the whole model
in this process and once sharded; each leaves its checkpoint in the folder of its name.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sbp.training.config.images import DataConfig
from sbp.training.config.model import BackboneConfig
from sbp.training.config.recipe import RecipeConfig
from sbp.training.config.rules import validate
from sbp.training.config.run import Config, ProbeConfig
from sbp.training.engine.run import Run
from sbp.training.record.checkpoint import find
from sbp.training.record.status import RunStatus
from sbp.training.runtime import distributed

BACKBONES = {
    "vit": BackboneConfig(
        "vit_tiny_patch16_224",
        kwargs={"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "class_token": False}
        | {"global_pool": "avg"},
    ),
    "convnext": BackboneConfig(
        "convnext_tiny", kwargs={"dims": [8, 8, 16, 16], "depths": [1, 1, 3, 1], "patch_size": 4}
    ),
}


def configured(backbone: str = "vit", /, **changes: Any) -> Config:
    """A tiny "vit" or "convnext" on 64 images of noise: an epoch of 4 steps takes a second.

    changes: keys of Config; those of a group as a dictionary, such as recipe={"mixup": 0.8}.
    """
    config = Config(
        backbone=BACKBONES[backbone],
        data=DataConfig("synthetic", image_size=32, train_images=64, val_images=8, workers=0),
        recipe=RecipeConfig(epochs=1, lr=1e-3, warmup_epochs=0),
        probe=ProbeConfig(images=8),
        global_batch_size=16,
        threads=1,
    )
    groups = {name: replace(getattr(config, name), **keys) for name, keys in changes.items() if isinstance(keys, dict)}
    return validate(replace(config, **changes | groups))


def run(config: Config, folder: Path) -> dict[str, Any]:
    """What train.py does, but for what it does when it is interrupted; returns the last checkpoint."""
    folder.mkdir(exist_ok=True)
    one = Run(config, folder, RunStatus(folder, enabled=False))
    with one.tracker:
        while one.epoch < config.recipe.epochs:
            for step, figures, _ in one.train_epoch():
                if one.when.probe(step):
                    figures |= one.gradient_cosines()
                if figures:
                    one.log(figures)
                if one.when.save_within_epoch(step):
                    one.save()
            one.save()
            one.evaluate()
        one.summarise()
    return find(folder)[1]


def main(folder: Path, device: str) -> None:
    distributed.start()
    recipe = {"clip_grad": 1.0, "ema_decay": 0.9, "epochs": 2}
    for parallel in ("ddp", "fsdp"):
        config = configured(device=device, deterministic=True, amp="float16", parallel=parallel, recipe=recipe)
        run(config, folder / parallel)
    print(dist.get_backend_config())
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
