"""Keys of the other commands: evaluation, export, benchmark."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from sbp.settings import MASKS
from sbp.training.config.keys import group, key
from sbp.training.config.model import BackboneConfig, DetectorConfig
from sbp.training.config.run import AMP, DEVICES, TASKS, Config


@dataclass
class EvalSbpConfig:
    """Keys of SbpConfig."""

    eval: str | None = key(None, "exact or published")


@dataclass
class EvalDataConfig:
    """Keys of DataConfig."""

    root: str | None = key(None, "as in training")
    annotations: str | None = key(None, "as in training")
    val_split: str | None = key(None, "as in training")
    image_size: int | None = key(None, "as in training; it reaches the model, too")
    max_size: int | None = key(None, "as in training")
    crop_pct: float | None = key(None, "as in training")
    interpolation: str | None = key(None, "as in training")
    workers: int | None = key(None, "as in training")


@dataclass
class EvalBackboneConfig:
    """Keys of BackboneConfig."""

    name: str | None = key(None, "as in training")
    kwargs: dict[str, Any] = key({}, "added to the run's own")


@dataclass
class EvalConfig:
    """One evaluation of a checkpoint. null: as in the run that wrote it."""

    checkpoint: str = key("", "a file, or a run folder for its latest")
    ema: bool | None = key(None, "null takes the averaged weights when there are any, as timm does")
    pictures: int = key(
        0, "so many images with what a detector finds in them are written to run_dir/pictures", at_least=0
    )
    backbone: EvalBackboneConfig = group(EvalBackboneConfig)
    sbp: EvalSbpConfig = group(EvalSbpConfig)
    data: EvalDataConfig = group(EvalDataConfig)
    eval_batch_size: int | None = key(None, "images in one pass")
    amp: str | None = key(None, "mixed precision")
    device: str = key("auto", "auto takes CUDA where there is one")
    threads: int | None = key(None, "of torch on the CPU")
    run_dir: str = key("outputs/eval", "the folder that eval.json is written to")


@dataclass
class ExportConfig:
    """One export of a checkpoint."""

    checkpoint: str = key("", "a file, or a run folder for its latest")
    ema: bool | None = key(None, "null takes the averaged weights when there are any")
    run_dir: str = key("outputs/export", "the folder to write")


@dataclass
class BenchmarkSbpConfig:
    """Keys of SbpConfig, for every arm with SBP. The arms themselves decide on mhsa_drop and recompute."""

    keep_ratio: Any = key(0.5, "as in training")
    mask: str = key("grid", "as in training", one_of=MASKS)
    layers: Any = key(None, "as in training")
    seed: int = key(0, "as in training")


@dataclass
class BenchmarkDataConfig:
    """Random images, made on the device."""

    image_size: int = key(224, "in pixels", at_least=1)
    max_size: int = key(1333, "their longer side, of a detector")
    num_classes: int = key(1000, "of the labels")


@dataclass
class BenchmarkConfig:
    """One comparison of ways to train a network; the ways are the arms in sbp/training/benchmark/arms.py."""

    task: str = key("classification", "as in training", one_of=TASKS)
    backbone: BackboneConfig = group(BackboneConfig)
    detector: DetectorConfig = group(DetectorConfig)
    sbp: BenchmarkSbpConfig = group(BenchmarkSbpConfig)
    data: BenchmarkDataConfig = group(BenchmarkDataConfig)
    arms: list[str] | None = key(None, "null for all that the network knows")
    batch_size: int = key(64, "images in a step of one process", at_least=1)
    amp: str = key("bfloat16", "mixed precision", one_of=AMP)
    rounds: int = key(
        10, "every arm takes `steps` steps in a row, then the next arm; so many rounds of that", at_least=1
    )
    steps: int = key(2, "see rounds", at_least=1)
    warmup: int = key(3, "steps of each arm before anything is measured", at_least=1)
    seconds: float | None = key(
        None,
        "once they have passed since the start, no new round and no new search for a largest batch begins; null for no "
        "limit",
        above=0,
    )
    memory_gib: float | None = key(
        None, "the memory that the largest batch has to fit into; null for all of the device's", above=0
    )
    largest_batch: bool = key(True, "search for it (on CUDA, in one process)")
    release: str | None = key(None, "the folder of the authors' release, which makes it an arm")
    compile_backend: str = key("inductor", "torch.compile's")
    channels_last: bool = key(False, "as in training")
    seed: int = key(0, "of weights and images")
    device: str = key("auto", "auto takes CUDA where there is one", one_of=DEVICES)
    threads: int | None = key(None, "of torch on the CPU; null for its own choice", at_least=1)
    run_dir: str = key("outputs/benchmark", "the folder to write")


@dataclass
class PlanConfig(Config):
    """A training run, and the GPU it is to run on. Without keys of its own: those of `sbp train`."""

    gpu: str = key("a100-80gb", "h100, a100-40gb, a100-80gb, l40s, rtx4090, t4, or a file of `sbp plan calibrate`")
    memory_gib: float | None = key(
        None, "to fit into; null for 0.93 of the GPU's, as not all of it can be had", above=0
    )
    image_size: int | None = key(None, "in pixels, of images and model; null for data.image_size", at_least=1)
    world_size: int = key(1, "processes, each with its own GPU; what they exchange is not in the times", at_least=1)
    launch_us: float | None = key(
        None, "microseconds that the host needs to launch a kernel; null for the usual 8, or the file's", above=0
    )
    arms: list[str] | None = key(None, "of `sbp benchmark`, to forecast in place of a plan, with the keys that it has")
    batch_size: int = key(64, "images in a step of arms", at_least=1)
    json: str | None = key(None, "a file to write the forecasts to")
    figure: str | None = key(None, "a picture to write: images a second against memory")


@dataclass
class CalibrateConfig:
    """One measurement of a GPU, for the plan of it."""

    file: str = key("gpu.json", "to write; `sbp plan gpu=FILE` takes it")
    device: str = key("auto", "auto takes CUDA, and ends with an error where there is none", one_of=DEVICES)
    seconds: float = key(40.0, "about so long it may take", above=0)
    run_dir: str = key("outputs/calibrate", "the folder of its log")


def world_size(config: Any) -> int:
    """How many processes a run that is asked about has: `world_size`, or `processes`, as `sbp train` takes it.

    Raises ValueError where both are given and differ.
    """
    if config.processes is None or config.world_size in (1, config.processes):
        return config.processes or config.world_size
    raise ValueError(f"world_size={config.world_size} and processes={config.processes} are the same thing: give one")


def overridden(config: Config, request: EvalConfig) -> Config:
    """A run's config with what an evaluation asks for in place of it. A new image size reaches the model too."""
    changes = asdict(request)
    kwargs = config.backbone.kwargs | changes["backbone"].pop("kwargs")
    if request.data.image_size is not None and "img_size" in kwargs:
        kwargs["img_size"] = request.data.image_size
    groups = {group: replace(getattr(config, group), **_given(changes[group])) for group in ("backbone", "sbp", "data")}
    groups["backbone"] = replace(groups["backbone"], kwargs=kwargs)
    flat = {key: changes[key] for key in ("eval_batch_size", "amp", "device", "threads")}
    recipe = replace(config.recipe, short_sides=None)  # as the objective, of training, and may not fit what is asked
    return replace(config, **groups, **_given(flat), objective=None, recipe=recipe)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
