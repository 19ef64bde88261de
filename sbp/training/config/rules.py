"""What must hold between the keys of a config; what holds for each alone stands at its field."""

import json
from typing import Any

import timm
import timm.scheduler
from timm.optim import get_optimizer_info

from sbp import masks
from sbp.training.config.images import DataConfig
from sbp.training.config.keys import check_limits, quoted, select
from sbp.training.config.recipe import LATER_SCHEDULERS, SCHEDULERS, RecipeConfig
from sbp.training.config.requests import BenchmarkConfig
from sbp.training.config.run import OBJECTIVES, Config

SOURCES = {
    "classification": ("digits", "cluttered_digits", "synthetic", "folder", "webdataset", "timm"),
    "detection": ("shapes", "coco"),
}
GENERATED = ("cluttered_digits", "synthetic", "shapes")
SLOPE_IMAGES = {"classification": 4, "detection": 2}  # enough to measure saved bytes per image as a slope
LEAST_CLASSES = {"classification": 2, "detection": 1}  # a detector has the background beside them


def validate(config: Config) -> Config:
    """Returns the config; raises ValueError that names the key, what is wrong and what is allowed."""
    check_limits(config)
    _check_keep_ratio(config.sbp.keep_ratio)
    _check_keep_ratio_end(config)
    for objective in config.objective if isinstance(config.objective, list) else [config.objective or "top1"]:
        _check_objective(config, objective)
    check_device(config, config.device)
    _check_source(config)
    _check_on_device(config)
    _check_classes(config)
    least = SLOPE_IMAGES["classification"] if config.task == "classification" else 1
    if config.probe.images < least:
        raise ValueError(f"probe.images must be at least {least}, got {config.probe.images}")
    _check_task(config)
    _check_warmup(config.recipe)
    _check_milestones(config.recipe)
    _check_scheduler(config.recipe.scheduler)
    _check_exact_epochs(config)
    _check_frozen(config)
    _check_rates(config)
    _check_channels(config)
    _check_optimizer(config.recipe.optimizer)
    return config


def check_new_run(config: Config) -> None:
    """Raises ValueError for keys that would do nothing. Not of a run that goes on, which has done without them."""
    if config.sbp.recompute != "none" and not config.sbp.enabled:
        raise ValueError(
            f"sbp.recompute={config.sbp.recompute} needs sbp.enabled=true; exact gradients with it are sbp.keep_ratio=1"
        )
    data = config.data
    for key in ("train_images", "val_images"):
        if data.source not in GENERATED and (value := getattr(data, key)) != getattr(DataConfig, key):
            raise ValueError(f"data.{key}={value} is for generated images ({', '.join(GENERATED)}), not {data.source}")


def _check_objective(config: Config, objective: str) -> None:
    """Raises ValueError for a figure that the run will not have."""
    of_others = {"classification": ("box_ap", "mask_ap"), "detection": ("top1", "top5", "top1_ema", "val_loss")}[
        config.task
    ]
    allowed = [one for one in OBJECTIVES if one not in of_others]
    if config.objective is not None and objective not in allowed:
        raise ValueError(
            f"objective, with task={config.task}, must be one of {', '.join(allowed)}, got {quoted(objective)}"
        )
    if objective == "top1_ema" and config.recipe.ema_decay is None:
        raise ValueError("objective=top1_ema needs recipe.ema_decay, got null")


def check_device(config: Config, device: str) -> None:
    """Raises ValueError for an objective that a run on this device will not have. device: its type, or "auto"."""
    objectives = config.objective if isinstance(config.objective, list) else [config.objective]
    if "peak_allocated" in objectives and device == "cpu":
        raise ValueError(
            "objective=peak_allocated is of CUDA's memory, and device=cpu here; saved_bytes_per_image is alike"
        )


def _check_source(config: Config) -> None:
    data, allowed = config.data, SOURCES[config.task]
    if data.source not in allowed:
        raise ValueError(
            f"data.source, with task={config.task}, must be one of {', '.join(allowed)}, got {quoted(data.source)}"
        )
    if data.source == "folder" and data.root is None:
        raise ValueError("data.root is needed: the folder that holds the image folders of training and validation")
    if data.source == "webdataset" and data.root is None:
        raise ValueError("data.root is needed: the folder that holds the shards")
    if data.shuffle == "shards" and data.source != "webdataset":
        raise ValueError(f"data.shuffle=shards needs data.source=webdataset, got {data.source}")
    if data.cache and data.source != "folder":
        raise ValueError(f"data.cache=true needs data.source=folder, got {data.source}")
    if data.source == "timm" and data.name is None:
        raise ValueError("data.name is needed: a name that timm.data.create_dataset takes, such as torch/cifar10")


def _check_on_device(config: Config) -> None:
    """Raises ValueError for augmentation that needs images on the host."""
    recipe = config.recipe
    if not (config.data.on_device and recipe.augment):
        return
    needed: dict[str, Any] = {"auto_augment": None, "color_jitter": 0}
    for key, neutral in needed.items():
        if (value := getattr(recipe, key)) != neutral:
            raise ValueError(f"recipe.{key} must be {json.dumps(neutral)} with data.on_device=true, got {value}")
    if recipe.crop_padding is None:
        raise ValueError(
            "data.on_device=true crops at an image's own scale: recipe.crop_padding must be at least 0, got null"
        )


def _check_scheduler(name: str) -> None:
    if name in LATER_SCHEDULERS and not hasattr(timm.scheduler, "WSDLRScheduler"):
        others = ", ".join(one for one in SCHEDULERS if one not in LATER_SCHEDULERS)
        raise ValueError(
            f"recipe.scheduler={name} needs a later timm than {timm.__version__}, which has {others}; update timm"
        )


def _check_warmup(recipe: RecipeConfig) -> None:
    if recipe.warmup_steps is not None and recipe.warmup_epochs:
        raise ValueError(
            f"recipe.warmup_steps={recipe.warmup_steps} is in place of recipe.warmup_epochs, which must then be 0, got "
            f"{recipe.warmup_epochs}"
        )
    if recipe.scheduler == "rsqrt" and not (recipe.warmup_epochs or recipe.warmup_steps):
        raise ValueError(
            "recipe.warmup_epochs or recipe.warmup_steps must be above 0 with recipe.scheduler=rsqrt, whose fall is as "
            "slow as the warm-up"
        )
    if recipe.warmup_epochs >= recipe.epochs:
        raise ValueError(
            f"recipe.warmup_epochs must be less than recipe.epochs, got {recipe.warmup_epochs} and {recipe.epochs}"
        )


def _check_exact_epochs(config: Config) -> None:
    sbp, epochs = config.sbp, config.recipe.epochs
    if sbp.exact_epochs > epochs:
        raise ValueError(f"sbp.exact_epochs must lie in [0, {epochs}] (recipe.epochs), got {sbp.exact_epochs}")
    if sbp.exact_epochs and not sbp.enabled:
        raise ValueError(
            f"sbp.exact_epochs={sbp.exact_epochs} needs sbp.enabled=true; without SBP all epochs are exact"
        )
    if sbp.exact_recompute is not None and not sbp.exact_epochs:
        raise ValueError(
            f"sbp.exact_recompute={sbp.exact_recompute} is of exact epochs and needs sbp.exact_epochs in [1, {epochs}] "
            f"(recipe.epochs), got {sbp.exact_epochs}; what all epochs recompute is sbp.recompute"
        )


def _check_frozen(config: Config) -> None:
    if config.backbone.frozen and config.sbp.enabled:
        raise ValueError(
            "backbone.frozen=true back-propagates through no layer of the backbone, so that SBP has nothing to drop: "
            "take sbp=none"
        )


def _check_keep_ratio_end(config: Config) -> None:
    """Raises ValueError for a keep-ratio that cannot change to where it is to end."""
    sbp, recipe = config.sbp, config.recipe
    first, last = sbp.keep_ratio, sbp.keep_ratio_end
    if last is None:
        return
    _check_keep_ratio(last, "keep_ratio_end")
    if not sbp.enabled:
        raise ValueError(f"sbp.keep_ratio_end={last} needs sbp.enabled=true")
    if isinstance(first, list) and isinstance(last, list) and len(first) != len(last):
        raise ValueError(
            f"sbp.keep_ratio_end must be one number, or {len(first)} as sbp.keep_ratio, got a list of {len(last)}"
        )
    epochs = recipe.epochs - sbp.exact_epochs
    if epochs < 2:
        raise ValueError(
            f"sbp.keep_ratio_end={last} needs at least 2 epochs with SBP (recipe.epochs less sbp.exact_epochs), got "
            f"{epochs}"
        )
    if sbp.eval == "published":
        raise ValueError(
            f"sbp.keep_ratio_end={last} needs sbp.eval=exact: sbp.eval=published evaluates with one keep-ratio"
        )


def _check_rates(config: Config) -> None:
    """Raises ValueError for those of timm's own names that leave nothing to learn from."""
    for name, rate in config.backbone.kwargs.items():
        is_rate = name.endswith("drop_rate") or name == "drop_path_rate"
        if is_rate and isinstance(rate, int | float) and not 0 <= rate < 1:
            raise ValueError(f"backbone.kwargs.{name} must lie in [0, 1), got {rate}")


def _check_channels(config: Config) -> None:
    channels = config.backbone.kwargs.get("in_chans", 3)
    if channels != 3:
        raise ValueError(f"backbone.kwargs.in_chans must be 3, as images are RGB, got {channels}")


def _check_optimizer(name: str) -> None:
    """Raises ValueError for one that timm does not know, or that needs more than gradients."""
    try:
        info = get_optimizer_info(name.lower().removeprefix("lookahead_"))
    except ValueError as error:
        raise ValueError(f"recipe.optimizer={name}: {error}") from None
    if info.second_order:
        raise ValueError(f"recipe.optimizer={name} needs second derivatives, which are not computed; take another one")


def _check_milestones(recipe: RecipeConfig) -> None:
    milestones = recipe.decay_milestones
    if recipe.scheduler != "multistep":
        if milestones is not None:
            raise ValueError(f"recipe.decay_milestones needs recipe.scheduler=multistep, got {recipe.scheduler}")
        return
    first = recipe.warmup_epochs
    if not milestones or milestones != sorted({one for one in milestones if first < one < recipe.epochs}):
        raise ValueError(
            f"recipe.decay_milestones must be increasing epochs in ({first}, {recipe.epochs}) (recipe.warmup_epochs, "
            f"recipe.epochs) with recipe.scheduler=multistep, got {milestones}"
        )


_CLASSIFICATION_ONLY: dict[str, Any] = {  # keys that have no effect on a detector, and their values without effect
    "recipe.mixup": 0,
    "recipe.cutmix": 0,
    "recipe.label_smoothing": 0,
    "recipe.color_jitter": 0,
    "recipe.auto_augment": None,
    "recipe.random_erasing": 0,
    "recipe.crop_padding": None,
    "data.train_image_size": None,
    "data.on_device": False,
    "compile": False,  # training images have other sizes in each step
}
_DETECTION_ONLY: dict[str, Any] = {"recipe.short_sides": None, "recipe.crop_share": 0, "data.background": False}


def _check_task(config: Config) -> None:
    """Raises ValueError for what the task would leave aside, or cannot work with."""
    detection = config.task == "detection"
    for key, neutral in (_CLASSIFICATION_ONLY if detection else _DETECTION_ONLY).items():
        value = select(config, key)
        if value != neutral:
            raise ValueError(f"{key} must be {json.dumps(neutral)} with task={config.task}, got {value}")
    if not detection:
        return
    detector, data, recipe = config.detector, config.data, config.recipe
    if min(detector.anchor_sizes) < 1:
        raise ValueError(f"detector.anchor_sizes must be 5 sizes in pixels, got {detector.anchor_sizes}")
    if not config.backbone.name.startswith(("convnext", "swin_", "swinv2_")):
        raise ValueError(
            f"backbone.name must be a timm ConvNeXt or Swin with task=detection, got {config.backbone.name}"
        )
    if data.background and data.source != "coco":
        raise ValueError(f"data.background=true needs data.source=coco, got {data.source}")
    if data.source == "coco" and data.root is None:
        raise ValueError("data.root is needed: the folder that holds the image folders and the annotation files")
    for key in ("short_sides", "crop_short_sides", "crop_sides"):
        sides = getattr(recipe, key)
        if sides is not None and (not sides or min(sides) < 1):
            raise ValueError(f"recipe.{key} must be sizes in pixels, got {sides}")
    if recipe.crop_sides[0] > recipe.crop_sides[1]:
        raise ValueError(f"recipe.crop_sides must be a smallest and a largest side, got {recipe.crop_sides}")
    largest = max([data.image_size, *(recipe.short_sides or [])])
    if largest > data.max_size:
        raise ValueError(f"data.max_size must be at least the largest shorter side, {largest}, got {data.max_size}")


def validate_benchmark(config: BenchmarkConfig) -> BenchmarkConfig:
    """Returns the config; raises ValueError as `validate` does. The arms are checked where they are defined."""
    check_limits(config)
    _check_keep_ratio(config.sbp.keep_ratio)
    _check_classes(config)
    return config


def _check_classes(config: Config | BenchmarkConfig) -> None:
    least = LEAST_CLASSES[config.task]
    if config.data.num_classes < least:
        raise ValueError(f"data.num_classes must be at least {least}, got {config.data.num_classes}")


def _check_keep_ratio(keep_ratio: Any, key: str = "keep_ratio") -> None:
    for ratio in keep_ratio if isinstance(keep_ratio, list) else [keep_ratio]:
        try:
            masks.check_keep_ratio(ratio)
        except ValueError as error:
            raise ValueError(f"sbp.{key}{str(error).removeprefix('keep_ratio')}") from None
