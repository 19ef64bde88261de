"""What a run can be told: plain dataclasses, the single source of every default, and their validation."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from timm.optim import get_optimizer_info

from sbp import masks
from sbp.recompute import MODES
from sbp.state import EVALUATIONS
from sbp.vit import MHSA_DROPS

TASKS = ("classification", "detection")
DETECTORS = ("mask_rcnn", "cascade_mask_rcnn")
SOURCES = {
    "classification": ("digits", "cluttered_digits", "synthetic", "folder", "webdataset", "timm"),
    "detection": ("shapes", "coco"),
}
SHUFFLES = ("full", "shards")
AMP = ("off", "bfloat16", "float16")
COMPILE: tuple[str | bool, ...] = (False, "blocks", "model", True)  # the last one, of earlier configs, is "model"
CUDA_GRAPH: tuple[str | bool, ...] = ("auto", True, False)
LOGGERS = ("wandb", "none")
DEVICES = ("auto", "cpu", "cuda")
PARALLEL = ("ddp", "fsdp")
SCHEDULERS = ("cosine", "tanh", "poly", "multistep", "wsd", "rsqrt", "constant")  # that need only the step's number
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
OBJECTIVES = (
    *("top1", "top5", "top1_ema", "val_loss", "box_ap", "mask_ap"),
    *("images_per_second", "saved_bytes_per_image", "peak_allocated"),
)
SLOPE_IMAGES = {"classification": 4, "detection": 2}  # enough to measure saved bytes per image as a slope
LEAST_CLASSES = {"classification": 2, "detection": 1}  # a detector has the background beside them

T = TypeVar("T")


@dataclass
class BackboneConfig:
    """A timm model. kwargs go to `timm.create_model` as they are.

    pretrained: the weights that training starts from: a file (of timm, of train.py, or of the network's authors),
        "timm" for timm's default ones, or one of its tags or full names, such as augreg_in21k_ft_in1k or
        vit_tiny_patch16_224.augreg_in21k_ft_in1k. Not read again when a run goes on; null for random weights.
    """

    name: str = "???"  # has to be given
    drop_path: float = 0.0
    kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: str | None = None


@dataclass
class DetectorConfig:
    """What stands on the backbone where task=detection; the defaults are the published ones.

    name: "mask_rcnn" (He et al., 2017), or "cascade_mask_rcnn" (Cai and Vasconcelos, 2019) with three box stages.
    fpn_channels: of each level of the feature pyramid, and of the convolutions of the mask heads and of the cascade's
        box heads.
    hidden_size: of the fully connected layers of the box heads.
    rois_per_image: how many regions of an image train the box heads, a quarter of them with an object.
    anchor_sizes: in pixels, one for each of the five levels.
    """

    name: str = "mask_rcnn"
    fpn_channels: int = 256
    hidden_size: int = 1024
    rois_per_image: int = 512
    anchor_sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])


@dataclass
class SbpConfig:
    """The arguments of `sbp.apply`, and:

    enabled: False trains the plain timm model.
    hold_mask: one mask for a whole optimizer step instead of one for each micro batch.
    shared_mask: one mask for all processes instead of one for each. With both, and mask_per "batch", a global batch has
        the same gradient however it is split over processes and micro batches.
    fixed_mask: one mask for the whole run (of each process, without shared_mask) instead of fresh ones.
    exact_epochs: so many epochs at the end of the run use exact backpropagation.
    eval: "exact", or "published" for the authors' evaluation with masks and partial attention.
    mask_per: "half" and "sample" go by an image's place in its micro batch, which is one process's.
    """

    enabled: bool = True
    keep_ratio: Any = 0.5  # one number, or one for each SBP layer
    mask: str = "grid"
    mhsa_drop: str = "qkv"
    layers: Any = None  # null (published), "all", or a list of names
    seed: int = 0
    hold_mask: bool = False
    shared_mask: bool = False
    fixed_mask: bool = False
    exact_epochs: int = 0
    eval: str = "exact"
    recompute: str = "none"
    mask_per: str = "batch"
    rescale: bool = False


@dataclass
class DataConfig:
    """Where the images come from, and how they are brought to the size and range that the network sees.

    source: "digits" (scikit-learn's, no download), "cluttered_digits" (a digit among pieces of others, generated),
        "synthetic" (generated noise), "folder" (root/split/class/image),
        "webdataset" (tar shards in root; the splits are patterns such as train-{0000..1023}.tar, or names from
        root/_info.json), or "timm" (any name that `timm.data.create_dataset` takes, streams aside). For detection:
        "coco" (root/split/image and the annotation files), or "shapes" (generated).
    annotations: the annotation file of a split, in COCO's format, below root; {split} stands for the last part of
        train_split or val_split.
    background: in detection, train also on images of which the annotation file has nothing, so that all that is found
        in them is wrong.
    image_size, max_size: in detection the shorter side becomes image_size pixels, the longer one at most max_size.
    train_image_size: of training images, where it is not image_size, that of evaluation and of the model; a ViT needs
        backbone.kwargs.dynamic_img_size=true for it.
    crop_pct: in evaluation the shorter side is resized to image_size / crop_pct, then the centre is cropped.
    workers: loader processes for each training process. prefetch: batches that each of them reads ahead.
    shuffle: "full", or "shards" to read webdataset shards a few at a time, for disks that seek slowly.
    cache: each loader process keeps what it has decoded, which a small set of image files is read faster with.
    max_corrupt_images: so many different unreadable images are replaced by others in training, and listed; one
        more ends the run. In evaluation each is an error.
    num_classes: of the labels; in detection without the background, so that one is enough.
    train_images, val_images: how many a generated data set has.
    """

    source: str = "digits"
    name: str | None = None
    root: str | None = None
    annotations: str = "annotations/instances_{split}.json"
    background: bool = False
    train_split: str = "train"
    val_split: str = "val"
    download: bool = False
    num_classes: int = 10
    image_size: int = 224
    max_size: int = 1333
    train_image_size: int | None = None
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    workers: int = 4
    prefetch: int = 4
    shuffle: str = "full"
    cache: bool = False
    max_corrupt_images: int = 100
    train_images: int = 1024
    val_images: int = 256

    @property
    def size_in_training(self) -> int:
        return self.image_size if self.train_image_size is None else self.train_image_size


@dataclass
class RecipeConfig:
    """How to train.

    lr: the peak learning rate at a global batch of lr_base_batch_size, scaled linearly to the actual one;
        absolute when lr_base_batch_size is null.
    layer_decay: the learning rate of each layer is that of the next one times this, counted from the classifier down
        to the stem, each block a layer; null for one rate. In detection the layers are the stem, the first two stages,
        each three blocks of the third one, the fourth one, and the detector on top.
    scheduler: "multistep" multiplies the rate by decay_rate at each of decay_milestones, epochs of the run, warm-up and
        all; the others end at min_lr, "poly" with the power decay_rate.
    warmup_steps: in place of warmup_epochs, and then part of the epochs.
    augment: False leaves resizing and normalisation only.
    crop_scale: smallest area of the random crop, as a share of the image.
    crop_padding: in its place, a crop of the image's own scale, padded by so many black pixels on each side, as is
        usual for images of 32 pixels; null for none.
    short_sides: detection: a training image's shorter side becomes one of these, at random; null for data.image_size.
    crop_share: detection: so many of the training images are first resized to one of crop_short_sides and cropped to
        sides within crop_sides, at random.
    mixup, cutmix: alphas, 0 for none.
    ema_decay: null for no moving average of the weights.
    """

    epochs: int = 300
    optimizer: str = "adamw"
    lr: float = 4e-3
    lr_base_batch_size: int | None = None
    weight_decay: float = 0.05
    layer_decay: float | None = None
    scheduler: str = "cosine"
    decay_milestones: list[int] | None = None
    decay_rate: float = 0.1
    warmup_epochs: int = 20
    warmup_steps: int | None = None
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    clip_grad: float | None = None
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_switch: float = 0.5
    ema_decay: float | None = None
    augment: bool = True
    crop_scale: float = 0.08
    crop_padding: int | None = None
    short_sides: list[int] | None = None
    crop_share: float = 0.0
    crop_short_sides: list[int] = field(default_factory=lambda: [400, 500, 600])
    crop_sides: list[int] = field(default_factory=lambda: [384, 600])
    flip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0


@dataclass
class LoggerConfig:
    """name: "wandb", which falls back to offline without a key or network, or "none".

    init_timeout, finish_timeout: seconds that the start, or the end, waits for wandb's server. A run that was asked to
        stop has 30 seconds in all before torchrun kills it.
    """

    name: str = "none"
    project: str = "sbp"
    entity: str | None = None
    group: str | None = None  # null: the sweep's folder
    offline: bool = False
    init_timeout: int = 5
    finish_timeout: int = 10


@dataclass
class ProbeConfig:
    """Gradient cosine on `images` fixed training images every `every_steps` steps; null for never."""

    every_steps: int | None = 100
    images: int = 32


@dataclass
class CheckpointConfig:
    """keep: how many of the latest stay, beside the best. every_steps: also within an epoch; null for its end only."""

    every_epochs: int = 1
    every_steps: int | None = None
    keep: int = 2


@dataclass
class Config:
    """One training run.

    task: "classification", or "detection" of objects with their masks.
    global_batch_size: images in one optimizer step, over all processes. micro_batch_size: images in one forward
        pass of one process; null for all of a process's share at once. The number of accumulated passes follows.
    eval_batch_size: images in one pass of an evaluation; null for as many as in training, but in detection for one:
        how far an image is padded to the largest of its batch changes a little what is found in it.
    resume: "auto" (the latest good checkpoint in run_dir, else from the start), "never", or the path of another run's
        checkpoint to start from, where amp, recipe.lr, recipe.min_lr and recipe.clip_grad may be others.
    compile: by torch.compile: false, "blocks" (each kind of block once: seconds), or "model" (as a whole: minutes).
    cuda_graph: after a few steps, capture the forward and backward pass of a micro batch and replay it from then on,
        which asks the CPU for two launches instead of a thousand: "auto" where that is possible, true (an error where
        it is not), or false. The results are the same.
    parallel: several processes each hold the whole model ("ddp"), or a share of each parameter ("fsdp", which needs
        torchrun). The result is the same, and so are the checkpoints.
    deterministic: only algorithms that give the same bits each time, which on CUDA are slower.
    max_skipped_steps: so many steps in a row may be left out because their loss or gradient is not finite.
    threads: of torch on the CPU; null for its own choice.
    processes: so many on this machine, each with a device of its own, which a torchrun of the run's own starts; null
        for this process alone, or for those that a torchrun around the command started.
    objective: what the sampler of a sweep is told of a run: one of OBJECTIVES, or a list of them; null for top1, or in
        detection box_ap.
    """

    task: str = "classification"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    sbp: SbpConfig = field(default_factory=SbpConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    global_batch_size: int = 32
    micro_batch_size: int | None = None
    eval_batch_size: int | None = None
    seed: int = 0
    amp: str = "off"
    channels_last: bool = False
    compile: Any = False
    cuda_graph: Any = "auto"
    device: str = "auto"
    threads: int | None = None
    log_every_steps: int = 50
    eval_every_epochs: int = 1
    resume: str = "auto"
    parallel: str = "ddp"
    deterministic: bool = False
    max_skipped_steps: int = 3
    processes: int | None = None
    objective: Any = None
    run_dir: str = "outputs/run"


@dataclass
class EvalSbpConfig:
    """eval: "exact", "published", or null."""

    eval: str | None = None


@dataclass
class EvalDataConfig:
    """Keys of DataConfig."""

    root: str | None = None
    annotations: str | None = None
    val_split: str | None = None
    image_size: int | None = None
    max_size: int | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    workers: int | None = None


@dataclass
class EvalBackboneConfig:
    """Keys of BackboneConfig; kwargs are added to the run's own."""

    name: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvalConfig:
    """One evaluation of a checkpoint. null: as in the run that wrote it.

    checkpoint: a file, or a run folder for its latest. ema: null takes the averaged weights when there are any,
    as timm does. pictures: so many images with what a detector finds in them are written to run_dir/pictures.
    """

    checkpoint: str = ""
    ema: bool | None = None
    pictures: int = 0
    backbone: EvalBackboneConfig = field(default_factory=EvalBackboneConfig)
    sbp: EvalSbpConfig = field(default_factory=EvalSbpConfig)
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    eval_batch_size: int | None = None
    amp: str | None = None
    device: str = "auto"
    threads: int | None = None
    run_dir: str = "outputs/eval"


@dataclass
class ExportConfig:
    """One export of a checkpoint. checkpoint, ema: as in EvalConfig. run_dir: the folder to write."""

    checkpoint: str = ""
    ema: bool | None = None
    run_dir: str = "outputs/export"


@dataclass
class BenchmarkSbpConfig:
    """Keys of SbpConfig, for every arm with SBP. The arms themselves decide on mhsa_drop and recompute."""

    keep_ratio: Any = 0.5
    mask: str = "grid"
    layers: Any = None
    seed: int = 0


@dataclass
class BenchmarkDataConfig:
    """Random images, made on the device. max_size: their longer side, of a detector."""

    image_size: int = 224
    max_size: int = 1333
    num_classes: int = 1000


@dataclass
class BenchmarkConfig:
    """One comparison of ways to train a network; the ways are the arms in sbp/training/benchmark/benchmark.py.

    task, detector: as in Config.
    arms: null for all that the network knows.
    batch_size: images in a step of one process.
    rounds, steps: every arm takes `steps` steps in a row, then the next arm; so many rounds of that.
    warmup: steps of each arm before anything is measured.
    seconds: once they have passed since the start, no new round and no new search for a largest batch begins; null
        for no limit.
    memory_gib: the memory that the largest batch has to fit into; null for all of the device's.
    largest_batch: whether to search for it (on CUDA, in one process).
    release: the folder of the authors' release, which makes it an arm.
    """

    task: str = "classification"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    sbp: BenchmarkSbpConfig = field(default_factory=BenchmarkSbpConfig)
    data: BenchmarkDataConfig = field(default_factory=BenchmarkDataConfig)
    arms: list[str] | None = None
    batch_size: int = 64
    amp: str = "bfloat16"
    rounds: int = 10
    steps: int = 2
    warmup: int = 3
    seconds: float | None = None
    memory_gib: float | None = None
    largest_batch: bool = True
    release: str | None = None
    compile_backend: str = "inductor"
    channels_last: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    run_dir: str = "outputs/benchmark"


def from_dict(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """The dataclass that `asdict` turned into `values`. Raises ValueError for a key it does not have."""
    types = get_type_hints(kind)
    unknown = [path + key for key in values if key not in types]
    if unknown:
        raise ValueError(f"unknown config key: {', '.join(unknown)}; there are {', '.join(types)}")
    return kind(
        **{
            key: from_dict(types[key], value, f"{path}{key}.") if is_dataclass(types[key]) else value
            for key, value in values.items()
        }
    )


def overridden(config: Config, request: EvalConfig) -> Config:
    """A run's config with what an evaluation asks for in place of it. A new image size reaches the model too."""
    changes = asdict(request)
    kwargs = config.backbone.kwargs | changes["backbone"].pop("kwargs")
    if request.data.image_size is not None and "img_size" in kwargs:
        kwargs["img_size"] = request.data.image_size
    groups = {group: replace(getattr(config, group), **_given(changes[group])) for group in ("backbone", "sbp", "data")}
    groups["backbone"] = replace(groups["backbone"], kwargs=kwargs)
    flat = {key: changes[key] for key in ("eval_batch_size", "amp", "device", "threads")}
    return replace(config, **groups, **_given(flat))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def validate(config: Config) -> Config:
    """Returns the config; raises ValueError that names the key, what is wrong and what is allowed."""
    sbp, data, recipe = config.sbp, config.data, config.recipe
    _one_of("sbp.mask", sbp.mask, masks.KINDS)
    _one_of("sbp.mhsa_drop", sbp.mhsa_drop, MHSA_DROPS)
    _one_of("sbp.eval", sbp.eval, EVALUATIONS)
    _one_of("sbp.recompute", sbp.recompute, MODES)
    _one_of("sbp.mask_per", sbp.mask_per, masks.PER)
    _one_of("task", config.task, TASKS)
    _one_of(f"data.source, with task={config.task},", data.source, SOURCES[config.task])
    _one_of("data.interpolation", data.interpolation, INTERPOLATIONS)
    _one_of("recipe.scheduler", recipe.scheduler, SCHEDULERS)
    _one_of("data.shuffle", data.shuffle, SHUFFLES)
    _one_of("parallel", config.parallel, PARALLEL)
    _one_of("amp", config.amp, AMP)
    _one_of("compile", config.compile, COMPILE)
    _one_of("cuda_graph", config.cuda_graph, CUDA_GRAPH)
    _one_of("device", config.device, DEVICES)
    _one_of("logger.name", config.logger.name, LOGGERS)
    for objective in config.objective if isinstance(config.objective, list) else [config.objective or "top1"]:
        _one_of("objective", objective, OBJECTIVES)
    _check_keep_ratio(sbp.keep_ratio)
    for key in ("mean", "std"):
        if len(getattr(data, key)) != 3:
            raise ValueError(f"data.{key} must have 3 values, got {len(getattr(data, key))}")
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
    _at_least(config, 0, "seed", "sbp.seed", "data.workers", "recipe.warmup_epochs", "recipe.mixup", "recipe.cutmix")
    _at_least(config, 0, "data.max_corrupt_images", "max_skipped_steps", "recipe.warmup_steps", "recipe.crop_padding")
    _at_least(config, 1, "data.prefetch", "logger.init_timeout", "logger.finish_timeout")
    _at_least(config, 1, "global_batch_size", "micro_batch_size", "eval_batch_size", "threads", "log_every_steps")
    _at_least(config, 1, "processes")
    _at_least(config, 1, "eval_every_epochs", "probe.every_steps", "checkpoint.every_epochs")
    _at_least(config, 1, "checkpoint.every_steps", "checkpoint.keep", "recipe.epochs", "recipe.lr_base_batch_size")
    _at_least(config, 1, "data.image_size", "data.train_image_size", "data.train_images", "data.val_images")
    _at_least(config, LEAST_CLASSES[config.task], "data.num_classes")
    _at_least(config, SLOPE_IMAGES["classification"] if config.task == "classification" else 1, "probe.images")
    _above_zero(config, "recipe.decay_rate", "recipe.lr", "recipe.clip_grad", "data.crop_pct", "recipe.crop_scale")
    _check_task(config)
    _check_milestones(recipe)
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
    if not 0 <= sbp.exact_epochs <= recipe.epochs:
        raise ValueError(f"sbp.exact_epochs must lie in [0, {recipe.epochs}] (recipe.epochs), got {sbp.exact_epochs}")
    if sbp.exact_epochs and not sbp.enabled:
        raise ValueError(
            f"sbp.exact_epochs={sbp.exact_epochs} needs sbp.enabled=true; without SBP all epochs are exact"
        )
    if recipe.ema_decay is not None and not 0 < recipe.ema_decay < 1:
        raise ValueError(f"recipe.ema_decay must be null or lie in (0, 1), got {recipe.ema_decay}")
    if recipe.layer_decay is not None and not 0 < recipe.layer_decay <= 1:
        raise ValueError(f"recipe.layer_decay must be null or lie in (0, 1], got {recipe.layer_decay}")
    for key in ("flip", "random_erasing", "mixup_switch"):
        if not 0 <= getattr(recipe, key) <= 1:
            raise ValueError(f"recipe.{key} must lie in [0, 1], got {getattr(recipe, key)}")
    _check_rates(config)
    _check_optimizer(recipe.optimizer)
    return config


def _check_rates(config: Config) -> None:
    """Raises ValueError for those that leave nothing to learn from: at 1 all is dropped, or all classes are alike."""
    rates = {"backbone.drop_path": config.backbone.drop_path, "recipe.label_smoothing": config.recipe.label_smoothing}
    for name, value in config.backbone.kwargs.items():
        if name.endswith("drop_rate") or name == "drop_path_rate":  # timm's names
            rates[f"backbone.kwargs.{name}"] = value
    for key, rate in rates.items():
        if isinstance(rate, (int, float)) and not 0 <= rate < 1:
            raise ValueError(f"{key} must lie in [0, 1), got {rate}")


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
    "compile": False,  # training images have other sizes in each step
}
_DETECTION_ONLY: dict[str, Any] = {"recipe.short_sides": None, "recipe.crop_share": 0, "data.background": False}


def _check_task(config: Config) -> None:
    """Raises ValueError for what the task would leave aside, or cannot work with."""
    detection = config.task == "detection"
    for key, neutral in (_CLASSIFICATION_ONLY if detection else _DETECTION_ONLY).items():
        value = _select(config, key)
        if value != neutral:
            raise ValueError(f"{key} must be {json.dumps(neutral)} with task={config.task}, got {value}")
    if not detection:
        return
    detector, data, recipe = config.detector, config.data, config.recipe
    _one_of("detector.name", detector.name, DETECTORS)
    _at_least(config, 1, "detector.fpn_channels", "detector.hidden_size", "detector.rois_per_image", "data.max_size")
    if len(detector.anchor_sizes) != 5 or min(detector.anchor_sizes) < 1:
        raise ValueError(f"detector.anchor_sizes must be 5 sizes in pixels, got {detector.anchor_sizes}")
    if not config.backbone.name.startswith("convnext"):
        raise ValueError(f"backbone.name must be a timm ConvNeXt with task=detection, got {config.backbone.name}")
    if data.background and data.source != "coco":
        raise ValueError(f"data.background=true needs data.source=coco, got {data.source}")
    if data.source == "coco" and data.root is None:
        raise ValueError("data.root is needed: the folder that holds the image folders and the annotation files")
    if not 0 <= recipe.crop_share <= 1:
        raise ValueError(f"recipe.crop_share must lie in [0, 1], got {recipe.crop_share}")
    for key in ("short_sides", "crop_short_sides", "crop_sides"):
        sides = getattr(recipe, key)
        if sides is not None and (not sides or min(sides) < 1):
            raise ValueError(f"recipe.{key} must be sizes in pixels, got {sides}")
    if len(recipe.crop_sides) != 2 or recipe.crop_sides[0] > recipe.crop_sides[1]:
        raise ValueError(f"recipe.crop_sides must be a smallest and a largest side, got {recipe.crop_sides}")
    largest = max([data.image_size, *(recipe.short_sides or [])])
    if largest > data.max_size:
        raise ValueError(f"data.max_size must be at least the largest shorter side, {largest}, got {data.max_size}")


def validate_benchmark(config: BenchmarkConfig) -> BenchmarkConfig:
    """Returns the config; raises ValueError as `validate` does. The arms are checked where they are defined."""
    _check_keep_ratio(config.sbp.keep_ratio)
    _one_of("task", config.task, TASKS)
    _one_of("detector.name", config.detector.name, DETECTORS)
    _one_of("sbp.mask", config.sbp.mask, masks.KINDS)
    _one_of("amp", config.amp, AMP)
    _one_of("device", config.device, DEVICES)
    _at_least(config, 1, "batch_size", "rounds", "steps", "warmup", "threads", "data.image_size")
    _at_least(config, LEAST_CLASSES[config.task], "data.num_classes")
    _above_zero(config, "seconds", "memory_gib")
    return config


@dataclass(frozen=True)
class BatchPlan:
    """How the images of one optimizer step are spread over processes and forward passes."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    accumulation: int


def plan_batches(global_batch_size: int, micro_batch_size: int | None, world_size: int) -> BatchPlan:
    """Derives the number of accumulated forward passes.

    Raises ValueError unless global = processes x micro x accumulation can hold exactly.
    """
    if micro_batch_size is None:
        if global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size={global_batch_size} cannot be spread evenly over {world_size} processes; "
                f"take a multiple of {world_size}"
            )
        micro_batch_size = global_batch_size // world_size
    at_once = micro_batch_size * world_size
    if global_batch_size % at_once:
        raise ValueError(
            f"global_batch_size={global_batch_size} cannot be reached: {world_size} processes with "
            f"micro_batch_size={micro_batch_size} take {at_once} images at once, and accumulation must be whole; "
            f"take a multiple of {at_once}, or another micro_batch_size"
        )
    return BatchPlan(global_batch_size, micro_batch_size, world_size, global_batch_size // at_once)


def evaluation_batch(config: Config, micro_batch_size: int | None = None) -> int:
    """Images in one pass of an evaluation. micro_batch_size: of training, where it is not the config's."""
    in_training = micro_batch_size or config.micro_batch_size or config.global_batch_size
    return config.eval_batch_size or (1 if config.task == "detection" else in_training)


def scaled_lr(recipe: RecipeConfig, global_batch_size: int) -> float:
    """The peak learning rate for this global batch: linear in it, or absolute without lr_base_batch_size."""
    if recipe.lr_base_batch_size is None:
        return recipe.lr
    return recipe.lr * global_batch_size / recipe.lr_base_batch_size


# Keys that may differ between the run that wrote a checkpoint and the one that goes on with it: where things lie,
# what is recorded, and how the same global batch is computed.
_FREE = (
    *("data.root", "data.download", "data.workers", "data.prefetch", "data.cache", "data.max_corrupt_images"),
    *("logger", "probe"),
    *("checkpoint", "log_every_steps", "parallel", "deterministic", "max_skipped_steps"),
    *(
        "sbp.recompute",
        "micro_batch_size",
        "eval_batch_size",
        "eval_every_epochs",
        "channels_last",
        "compile",
        "cuda_graph",
    ),
    *("device", "threads", "processes", "objective", "resume", "run_dir"),
)


# And those that may differ between a run and another one that starts from its checkpoint: what helps one that diverged.
_FREE_ELSEWHERE = ("amp", "recipe.lr", "recipe.min_lr", "recipe.clip_grad")


def check_same_run(stored: Mapping[str, Any], config: Config, own: bool = True) -> None:
    """Raises ValueError when a checkpoint's config differs from this one in what decides the result.

    own: the checkpoint is of the same run, rather than where this one starts from.
    """
    before, now = _flat(asdict(from_dict(Config, stored))), _flat(asdict(config))
    free = _FREE if own else _FREE + _FREE_ELSEWHERE
    changed = [
        f"{key} was {before.get(key)} and is now {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(f"{key}.".startswith(f"{one}.") for one in free)
    ]
    if changed:
        raise ValueError(f"the checkpoint to resume from is of another run: {'; '.join(changed)}")


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {path + key: value}
    return flat


def _check_keep_ratio(keep_ratio: Any) -> None:
    for ratio in keep_ratio if isinstance(keep_ratio, list) else [keep_ratio]:
        try:
            masks.check_keep_ratio(ratio)
        except ValueError as error:
            raise ValueError(f"sbp.{error}") from None


def _one_of(key: str, value: Any, allowed: Collection[str | bool]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} must be one of {', '.join(map(_shown, allowed))}, got {_shown(value)!r}")


def _shown(value: Any) -> Any:
    """true and false as one writes them."""
    return json.dumps(value) if isinstance(value, bool) else value


def _select(config: Any, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _at_least(config: Config | BenchmarkConfig, least: int, *keys: str) -> None:
    for key in keys:
        value = _select(config, key)
        if value is not None and value < least:
            raise ValueError(f"{key} must be at least {least}, got {value}")


def _above_zero(config: Config | BenchmarkConfig, *keys: str) -> None:
    for key in keys:
        value = _select(config, key)
        if value is not None and not value > 0:
            raise ValueError(f"{key} must be above 0, got {value}")
