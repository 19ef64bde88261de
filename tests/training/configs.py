"""Composes the shipped configs, as the entry points do, and shrinks them."""

from pathlib import Path

from hydra import compose, initialize_config_dir

from sbp.cli.compose import typed
from sbp.training.config.run import Config

ROOT = Path(__file__).parents[2]
BACKBONES = {
    "vit": ("backbone=vit_demo", "backbone.kwargs.depth=2", "backbone.kwargs.embed_dim=48"),
    "convnext": ("backbone=convnext_demo", "backbone.kwargs.dims=[8,8,16,16]"),
}


def composed(*overrides: str, name: str = "train", kind: type = Config):
    """The config that `python train.py *overrides` runs with. Raises what Hydra and the schema raise."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return typed(compose(name, list(overrides)), kind)


def small(*overrides: str, backbone: str = "vit") -> Config:
    """A tiny "vit" or "convnext" on the digits: an epoch takes a second."""
    demo = ("data=digits", "recipe=demo", "recipe.epochs=1", "recipe.warmup_epochs=0", "logger=none")
    return composed(*demo, *BACKBONES[backbone], *overrides)


def small_detector_run(*overrides: str) -> Config:
    """A tiny detector on generated shapes of 64 px: an epoch of 24 images takes two seconds."""
    shapes = ("task=detection", "data.train_images=24", "data.val_images=7", "logger=none", "threads=1")
    tiny = ("backbone.kwargs.dims=[8,8,16,16]", "detector.fpn_channels=8", "detector.hidden_size=16")
    few = ("detector.rois_per_image=16", "recipe.epochs=1", "recipe.warmup_epochs=0", "probe.images=1")
    return composed(*shapes, *tiny, *few, *overrides)
