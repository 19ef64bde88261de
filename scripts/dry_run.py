"""Checks the experiments of Table 1, but for the data, before a cluster is asked for: python -m scripts.dry_run

    python -m scripts.dry_run --gpus 32 --nodes 4 vit_base_sbp      one experiment, on 4 nodes of 8 GPUs
    python -m scripts.dry_run --gpus 4 --memory-gib 8               micro batches whose forecast fits into 8 GiB

For each: the config that train.py would get, a micro batch that keeps the published global batch on so many GPUs, one
optimizer step on the CPU in float16 on two random images, what was built compared with the published recipe, and a
forecast of the memory. Prints a table and the torchrun commands; exit code 1 when a check fails. Neither the data, nor
CUDA, nor the talk between processes is tried.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import DropPath
from torch.utils._python_dispatch import TorchDispatchMode

import sbp
from sbp.cli.compose import composed
from sbp.training.config.batches import BatchPlan, plan_batches
from sbp.training.config.run import Config
from sbp.training.data.loading import TrainSampler
from sbp.training.engine.setup import build_trainer
from sbp.training.engine.trainer import Trainer
from sbp.training.memory.forecast import forecast
from sbp.training.record.table import markdown

CONFIGS = Path(__file__).parents[1] / "configs"
TRAIN_IMAGES = 1281167  # of ImageNet
SCALE = 256.0  # of the loss; at torch's first one, 65536, two images overflow and the step would be left out


@dataclass(frozen=True)
class Recipe:
    """What the paper trained with; the same of every network, but for the first three."""

    global_batch_size: int
    lr: float  # when the warm-up ends
    drop_path: float
    epochs: int = 300
    warmup_epochs: int = 20
    last_lr: float = 1e-6
    optimizer: str = "AdamW"
    weight_decay: float = 0.05
    amp: str = "float16"
    image_size: int = 224
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_switch: float = 0.5
    label_smoothing: float = 0.1
    ema_decay: float = 0.9999
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    random_erasing: float = 0.25
    keep_ratio: float = 0.5  # 1 without SBP


PUBLISHED = {
    "vit_tiny": Recipe(2048, 2e-3, 0.0),
    "vit_base": Recipe(4096, 4e-3, 0.3),
    "convnext_tiny": Recipe(4096, 4e-3, 0.1),
    "convnext_base": Recipe(4096, 4e-3, 0.3),
}


@dataclass(frozen=True)
class Row:
    """What is known of one experiment. peak: forecast bytes for each GPU. problem: why it must not be started."""

    name: str
    plan: BatchPlan | None = None
    lr: float | None = None
    peak: int | None = None
    command: str | None = None
    problem: str | None = None


def experiments() -> list[str]:
    return sorted(path.stem for path in (CONFIGS / "experiment" / "table1").glob("*.yaml"))


def gpu_counts(global_batch_size: int) -> list[int]:
    """The numbers of GPUs that can share a global batch evenly, in pairs of images, as mixup wants them."""
    return [n for n in range(1, global_batch_size // 2 + 1) if global_batch_size % (2 * n) == 0]


def plans(global_batch_size: int, micro_batch_size: int, gpus: int) -> list[BatchPlan]:
    """The ways to reach this global batch exactly, the largest micro batch first; at most `micro_batch_size`, and even.

    Raises ValueError when there is none.
    """
    if gpus not in (possible := gpu_counts(global_batch_size)):
        raise ValueError(
            f"global_batch_size={global_batch_size} cannot be spread over {gpus} GPUs in pairs of images; "
            f"take {', '.join(map(str, possible))}"
        )
    share = global_batch_size // gpus
    return [
        plan_batches(global_batch_size, micro, gpus)
        for micro in range(min(micro_batch_size, share), 1, -1)
        if micro % 2 == 0 and share % micro == 0
    ]


def arguments(name: str, plan: BatchPlan | None = None, seed: int = 0) -> list[str]:
    """What train.py is told."""
    micro = [] if plan is None else [f"micro_batch_size={plan.micro_batch_size}"]
    where = ["data.root=/path/to/imagenet", f"run_dir=outputs/table1/{name}"]
    return [f"experiment=table1/{name}", *micro, *where, f"seed={seed}"]


def command(name: str, plan: BatchPlan, nodes: int, seed: int = 0) -> str:
    """The command to give, on each node when there are several."""
    launcher = [f"--nproc_per_node={plan.world_size // nodes}"]
    if nodes > 1:
        rendezvous = [f"--rdzv_id={name}", "--rdzv_backend=c10d", "--rdzv_endpoint=HOST:29500"]
        launcher = [f"--nnodes={nodes}", *launcher, *rendezvous]
    return " ".join(["torchrun", *launcher, "train.py", *arguments(name, plan, seed)])


def built(config: Config, plan: BatchPlan) -> Recipe:
    """Builds all that a step needs, takes one, and reads the recipe off the result.

    Raises ValueError when the step changes less than it should.
    """
    order = TrainSampler(TRAIN_IMAGES, plan, config.seed)
    trainer = build_trainer(config, order, torch.device("cpu"))
    warm = config.recipe.warmup_epochs * order.steps_per_epoch
    take_step(trainer, warm, config)
    lr = trainer.lr
    trainer.scheduler.step_update(config.recipe.epochs * order.steps_per_epoch - 1)
    mixup, model = trainer.mixup, trainer.model
    return Recipe(
        global_batch_size=plan.world_size * plan.micro_batch_size * plan.accumulation,
        lr=lr,
        drop_path=max((one.drop_prob for one in model.modules() if isinstance(one, DropPath)), default=0.0),
        epochs=config.recipe.epochs,
        warmup_epochs=config.recipe.warmup_epochs,
        last_lr=trainer.lr,
        optimizer=type(trainer.optimizer).__name__,
        weight_decay=max(group["weight_decay"] for group in trainer.optimizer.param_groups),
        amp=trainer.amp,
        image_size=config.data.image_size,
        mixup=mixup.mixup_alpha if mixup else 0.0,
        cutmix=mixup.cutmix_alpha if mixup else 0.0,
        mixup_switch=mixup.switch_prob if mixup else 0.0,
        label_smoothing=mixup.label_smoothing if mixup else config.recipe.label_smoothing,
        ema_decay=trainer.ema.decay if trainer.ema else 0.0,
        auto_augment=config.recipe.auto_augment,
        color_jitter=config.recipe.color_jitter,
        random_erasing=config.recipe.random_erasing,
        keep_ratio=sbp.effective_keep_ratio(model) if config.sbp.enabled else 1.0,
    )


def take_step(trainer: Trainer, step: int, config: Config) -> None:
    """Optimizer step number `step` on two random images.

    Raises ValueError for a loss that is not finite, parameters without gradient, and averaged weights that stay.
    """
    size, generator = config.data.image_size, torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(config.data.num_classes, (2,), generator=generator)
    trainer.accumulation = 1
    if trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": SCALE})
    before = None if trainer.ema is None else [p.clone() for p in trainer.ema.module.parameters()]
    with _FastConvolutions():
        loss = trainer.step(step, [(images, labels)])
    if not math.isfinite(loss):
        raise ValueError(f"the loss of a step is {loss}")
    if still := [name for name, p in trainer.model.named_parameters() if p not in trainer.optimizer.state]:
        raise ValueError(f"a step leaves {len(still)} parameters as they are, {still[0]} first")
    if before is not None and all(map(torch.equal, before, trainer.ema.module.parameters())):  # type: ignore[union-attr]
        raise ValueError("a step leaves the averaged weights as they are")


class _FastConvolutions(TorchDispatchMode):
    """In float16 oneDNN's backward pass of a convolution takes up to ten times as long as torch's own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        onednn: Any = torch.backends.mkldnn
        before = onednn.enabled
        onednn.enabled = before and func.overloadpacket is not torch.ops.aten.convolution_backward
        try:
            return func(*args, **(kwargs or {}))
        finally:
            onednn.enabled = before


def differences(found: Recipe, published: Recipe) -> list[str]:
    """What is not as published. Numbers may differ by a thousandth: the last lr is one step from the end's."""
    pairs = [(one.name, getattr(found, one.name), getattr(published, one.name)) for one in fields(Recipe)]
    return [f"{key} is {own}, published {other}" for key, own, other in pairs if not _same(own, other)]


def _same(one: Any, other: Any) -> bool:
    return one == other or (isinstance(one, float) and math.isclose(one, other, rel_tol=1e-3))


def published(name: str) -> Recipe:
    """The recipe of an experiment of Table 1. Raises ValueError for another name."""
    if name not in experiments():
        raise ValueError(f"no experiment {name} in configs/experiment/table1; there are {', '.join(experiments())}")
    network, arm = name.rsplit("_", 1)
    return replace(PUBLISHED[network], keep_ratio=0.5 if arm == "sbp" else 1.0)


def fitting(config: Config, gpus: int, memory_gib: float | None) -> tuple[BatchPlan, int]:
    """The plan with the largest micro batch, at most the config's, whose forecast fits; and that forecast in bytes.

    Raises ValueError when none does, or when the GPUs cannot share the batch.
    """
    assert config.micro_batch_size is not None  # the published one
    for plan in plans(config.global_batch_size, config.micro_batch_size, gpus):
        peak = forecast(config, plan.micro_batch_size, world_size=gpus).peak
        if memory_gib is None or peak <= memory_gib * 2**30:
            return plan, peak
    raise ValueError(f"forecast: {peak / 2**20:.0f} MiB for 2 images at once, and a GPU has {memory_gib:g} GiB")


def check(name: str, gpus: int, nodes: int = 1, memory_gib: float | None = None, seed: int = 0) -> Row:
    """The dry run of one experiment on `gpus` GPUs in all; what goes wrong is the row's problem."""
    row = Row(name)
    try:
        target = published(name)
        if nodes < 1 or gpus < 1 or gpus % nodes:
            raise ValueError(f"each node needs the same number of GPUs, got {gpus} on {nodes} nodes")
        plan, peak = fitting(composed(arguments(name, seed=seed)), gpus, memory_gib)
        row = replace(row, plan=plan, peak=peak)
        found = built(composed(arguments(name, plan, seed)), plan)
        row = replace(row, lr=found.lr, command=command(name, plan, nodes, seed))
        return replace(row, problem="; ".join(differences(found, target)) or None)
    except Exception as error:  # any at all: to find it is what this is for, and the other experiments have their turn
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return replace(row, problem=kind + (str(error).splitlines() or [""])[0])


def dry_run(
    names: Sequence[str], gpus: int = 8, nodes: int = 1, memory_gib: float | None = None, seed: int = 0
) -> list[Row]:
    """A row for each experiment, by its name in configs/experiment/table1. gpus: in all, over `nodes` nodes.

    memory_gib: of one GPU; the micro batch shrinks until its forecast fits. Nothing of a model outlives its row.
    """
    return [check(name, gpus, nodes, memory_gib, seed) for name in names]


def table(rows: Sequence[Row]) -> str:
    return markdown(
        [["experiment", "GPUs x micro x accumulation", "peak lr", "forecast MiB", "checks"], *map(_cells, rows)]
    )


def _cells(row: Row) -> list[str]:
    plan = row.plan
    return [
        row.name,
        f"{plan.world_size} x {plan.micro_batch_size} x {plan.accumulation} = {plan.global_batch_size}" if plan else "",
        f"{row.lr:g}" if row.lr is not None else "",
        f"{row.peak / 2**20:.0f}" if row.peak is not None else "",
        row.problem or "ok",
    ]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="experiment", help="of configs/experiment/table1; all by default")
    parser.add_argument("--gpus", type=int, default=8, help="in all, over all nodes (default: 8)")
    parser.add_argument("--nodes", type=int, default=1, help="that the GPUs are on, equally many each (default: 1)")
    parser.add_argument("--memory-gib", type=float, help="of a GPU: shrinks the micro batch until its forecast fits")
    parser.add_argument("--seed", type=int, default=0, help="of the runs (default: 0)")
    options = parser.parse_args(given)
    rows = dry_run(options.names or experiments(), options.gpus, options.nodes, options.memory_gib, options.seed)
    print(table(rows))
    if options.nodes > 1:
        print("\nthe same on each node; HOST is one of them, and run_dir has to lie where all see it")
    for row in rows:
        if row.command and not row.problem:
            print(f"\n{row.command}")
    if any(row.problem for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
