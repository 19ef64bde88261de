"""Keys of a training run, and of its groups logger, probe and checkpoint."""

from dataclasses import dataclass
from typing import Any

from sbp.training.config.images import DataConfig
from sbp.training.config.keys import group, key
from sbp.training.config.model import BackboneConfig, DetectorConfig, SbpConfig
from sbp.training.config.recipe import RecipeConfig

TASKS = ("classification", "detection")
AMP = ("off", "bfloat16", "float16")
COMPILE: tuple[str | bool, ...] = (False, "blocks", "model", True)  # the last one, of earlier configs, is "model"
CUDA_GRAPH: tuple[str | bool, ...] = ("auto", True, False)
LOGGERS = ("wandb", "none")
DEVICES = ("auto", "cpu", "cuda")
PARALLEL = ("ddp", "fsdp")
OBJECTIVES = (
    "top1", "top5", "top1_ema", "val_loss", "box_ap", "mask_ap",
    "images_per_second", "saved_bytes_per_image", "peak_allocated",
)  # fmt: skip


@dataclass
class LoggerConfig:
    """Where the figures of a run go besides its folder."""

    name: str = key("none", "wandb falls back to offline without a key or network", one_of=LOGGERS)
    project: str = key("sbp", "wandb's")
    entity: str | None = key(None, "wandb's")
    group: str | None = key(None, "wandb's; null: the sweep's folder")
    offline: bool = key(False, "write wandb's files and upload nothing")
    init_timeout: int = key(5, "seconds that the start waits for wandb's server", at_least=1)
    finish_timeout: int = key(
        10,
        "seconds that the end waits for it; a run that was asked to stop has 30 seconds in all before torchrun kills "
        "it",
        at_least=1,
    )


@dataclass
class ProbeConfig:
    """The cosine similarity of the SBP gradient to the exact one."""

    every_steps: int | None = key(100, "measured so often; null for never", at_least=1)
    images: int = key(
        32, "fixed training images that it is measured on, a quarter of a micro batch at once", at_least=1
    )


@dataclass
class CheckpointConfig:
    """When checkpoints are written."""

    every_epochs: int = key(1, "at the end of each so many epochs", at_least=1)
    every_steps: int | None = key(None, "also within an epoch; null for its end only", at_least=1)
    keep: int = key(2, "how many of the latest stay, beside the best", at_least=1)


@dataclass
class Config:
    """One training run."""

    task: str = key("classification", "detection: of objects with their boxes and masks", one_of=TASKS)
    backbone: BackboneConfig = group(BackboneConfig)
    detector: DetectorConfig = group(DetectorConfig)
    sbp: SbpConfig = group(SbpConfig)
    data: DataConfig = group(DataConfig)
    recipe: RecipeConfig = group(RecipeConfig)
    logger: LoggerConfig = group(LoggerConfig, free="always")
    probe: ProbeConfig = group(ProbeConfig, free="always")
    checkpoint: CheckpointConfig = group(CheckpointConfig, free="always")
    global_batch_size: int = key(32, "images in one optimizer step, over all processes", at_least=1)
    micro_batch_size: Any = key(
        None,
        "images in one forward pass of one process; null for all of its share at once; auto for what `sbp plan` says "
        "of the GPU, before the first step. The number of accumulated passes follows",
        at_least=1,
        or_one_of=("auto",),
        free="always",
    )
    eval_batch_size: int | None = key(
        None,
        "images in one pass of an evaluation; null for as many as a process takes at once in training (in `sbp eval`, "
        "where that is not known, at most 256), but in detection for one: how far an image is padded to the largest of "
        "its batch changes a little what is found in it",
        at_least=1,
        free="always",
    )
    seed: int = key(0, "of weights, images, augmentation, drop path and whatever else is random", at_least=0)
    amp: str = key("off", "mixed precision", one_of=AMP, free="elsewhere")
    channels_last: bool = key(False, "the memory format of images and convolutions", free="always")
    compile: Any = key(
        False,
        "by torch.compile: blocks (each kind of block once: seconds) or model (as a whole: minutes); true is model",
        one_of=COMPILE,
        free="always",
    )
    cuda_graph: Any = key(
        "auto",
        "after a few steps, capture the forward and backward pass of a micro batch and replay it from then on, which "
        "asks the CPU for two launches instead of a thousand: auto where that is possible, true (an error where it "
        "is not), or false. The results are the same",
        one_of=CUDA_GRAPH,
        free="always",
    )
    device: str = key("auto", "auto takes CUDA where there is one", one_of=DEVICES, free="always")
    threads: int | None = key(None, "of torch on the CPU; null for its own choice", at_least=1, free="always")
    log_every_steps: int = key(50, "figures of training are recorded so often", at_least=1, free="always")
    eval_every_epochs: int = key(1, "evaluate after so many epochs", at_least=1, free="always")
    resume: str = key(
        "auto",
        "auto (the latest good checkpoint in run_dir, else from the start), never, or the path of another run's "
        "checkpoint to start from, where amp, recipe.lr, recipe.min_lr and recipe.clip_grad may be others",
        free="always",
    )
    parallel: str = key(
        "ddp",
        "several processes each hold the whole model (ddp), or a share of each parameter (fsdp, which needs "
        "torchrun). The result is the same, and so are the checkpoints",
        one_of=PARALLEL,
        free="always",
    )
    deterministic: bool = key(
        False, "only algorithms that give the same bits each time, which on CUDA are slower", free="always"
    )
    max_skipped_steps: int = key(
        3,
        "so many steps in a row may be left out because their loss or gradient is not finite; in float16 a gradient "
        "that is not finite halves the loss scale instead, and 30 halvings end the run",
        at_least=0,
        free="always",
    )
    processes: int | None = key(
        None,
        "so many on this machine, each with a device of its own, which a torchrun of the run's own starts; null for "
        "this process alone, or for those that a torchrun around the command started",
        at_least=1,
        free="always",
    )
    objective: Any = key(
        None,
        f"what the sampler of a sweep is told of a run, or a list of such: {', '.join(OBJECTIVES)}; null for top1, "
        "or in detection box_ap",
        free="always",
    )
    run_dir: str = key("outputs/run", "the folder of the run; the same command goes on in it", free="always")
