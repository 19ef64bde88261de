"""Composes the shipped configs, as the entry points do, and shrinks them."""

from copy import deepcopy
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from sbp.cli.compose import typed
from sbp.training.config.run import Config

ROOT = Path(__file__).parents[2]
BACKBONES = {
    "vit": ("backbone=vit_demo", "backbone.kwargs.depth=2", "backbone.kwargs.embed_dim=48"),
    "convnext": ("backbone=convnext_demo", "backbone.kwargs.dims=[8,8,16,16]"),
}

QUICK = (  # for `small`: 4 steps an epoch, on noise
    "data=synthetic", "data.num_classes=10", "data.image_size=32", "data.train_images=64", "data.val_images=8",
    "data.workers=0", "global_batch_size=16", "backbone.drop_path=0.1", "probe.every_steps=null", "probe.images=8",
)  # fmt: skip


@cache
def chosen(name: str, *choices: str) -> DictConfig:
    """What Hydra composes of choices of groups, most of which many tests share: it takes a third of a second."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose(name, list(choices))


def composed(*overrides: str, name: str = "train", kind: type = Config):
    """The config that `python train.py *overrides` runs with. Raises what Hydra and the schema raise.

    Single keys are set last, by the same function of Hydra that sets them last in `compose`.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    choices = [one for one in parsed if (ROOT / "configs" / one.key_or_group).is_dir()]
    given = deepcopy(chosen(name, *(one.input_line for one in choices)))
    ConfigLoaderImpl._apply_overrides_to_config([one for one in parsed if one not in choices], given)
    return typed(given, kind)


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
