"""From a config to the parts of a run."""

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import sbp
from sbp.training.config.batches import evaluation_batch, plan_batches, scaled_lr
from sbp.training.config.rules import SLOPE_IMAGES
from sbp.training.config.run import Config
from sbp.training.data.classes import class_names
from sbp.training.data.loading import (
    SUBSTITUTES,
    Batches,
    Images,
    TrainSampler,
    ValidationSampler,
    make_loader,
    spread_samples,
)
from sbp.training.data.resident import Crops, resident_loader
from sbp.training.data.shards import Shards
from sbp.training.data.sources import prepare
from sbp.training.engine.probes import saved_bytes_per_image
from sbp.training.engine.trainer import Trainer
from sbp.training.memory.forecast import TODAY
from sbp.training.models.optim import build_ema, build_mixup, build_optimizer, build_scheduler
from sbp.training.runtime import distributed, environment, graphs, seeding, wrapping
from sbp.training.runtime.compiling import compile_model
from sbp.training.runtime.graphs import CudaRecorder
from sbp.training.tasks.choice import task_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """What happens when: questions about a number of steps done, or of epochs done."""

    config: Config
    steps_per_epoch: int

    def probe(self, step: int) -> bool:
        """Every so many steps, and at the end of the run."""
        every, last = self.config.probe.every_steps, self.config.recipe.epochs * self.steps_per_epoch
        return self.config.sbp.enabled and every is not None and (step % every == 0 or step == last)

    def report(self, step: int) -> bool:
        return step % self.config.log_every_steps == 0 or step % self.steps_per_epoch == 0 or self.probe(step)

    def save_within_epoch(self, step: int) -> bool:
        """At an epoch's end `save` decides."""
        return self._every_steps(step) and step % self.steps_per_epoch != 0

    def _every_steps(self, step: int) -> bool:
        every = self.config.checkpoint.every_steps
        return every is not None and step % every == 0

    def evaluate(self, epoch: int) -> bool:
        return epoch % self.config.eval_every_epochs == 0 or epoch == self.config.recipe.epochs

    def save(self, epoch: int) -> bool:
        every, last = self.config.checkpoint.every_epochs, self.config.recipe.epochs
        return epoch % every == 0 or epoch == last or self._every_steps(epoch * self.steps_per_epoch)


def prepare_process(config: Config) -> torch.device:
    """The device of this process, with the number of threads and `deterministic` set.

    Raises ValueError, on all processes, for CUDA where there is none, or too few devices.
    """
    seeding.set_deterministic(config.deterministic)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = distributed.all_or_none(lambda: distributed.pick_device(config.device))
    if config.deterministic and device.type == "cuda" and not task_of(config).deterministic:
        raise ValueError(
            f"deterministic must be false with task={config.task} on CUDA: reading regions has no such algorithm"
        )
    if device.type == "cpu":
        environment.keep_freed_memory()
    return device


def check_network(config: Config) -> None:
    """Before any image is read. Raises ValueError for a network, SBP layers or batches that cannot be trained with."""
    with torch.device("meta"):
        TODAY.build(config)
    plan = plan_batches(config.global_batch_size, config.micro_batch_size, distributed.world_size())
    build_mixup(config.recipe, config.data.num_classes, plan.micro_batch_size)
    if config.parallel == "fsdp":
        wrapping.require_processes()


def load_images(config: Config, device: torch.device) -> Images:
    """Loaders of this process's share.

    Raises ValueError, on all processes, for data or batch sizes that cannot be trained with.
    """
    distributed.only_main(lambda: prepare(config.data))
    return distributed.all_or_none(lambda: _load_images(config, device))


def _load_images(config: Config, device: torch.device) -> Images:
    plan = plan_batches(config.global_batch_size, config.micro_batch_size, distributed.world_size())
    task = task_of(config)
    train_set, validation_set = task.build_datasets(config)
    shards = train_set.counts if isinstance(train_set, Shards) and config.data.shuffle == "shards" else None
    order = TrainSampler(len(train_set), plan, config.seed, distributed.rank(), shards)  # type: ignore[arg-type]
    batch_size = evaluation_batch(config, plan.micro_batch_size)
    validation = ValidationSampler(
        len(validation_set),  # type: ignore[arg-type]
        batch_size,
        distributed.rank(),
        plan.world_size,
    )
    probe = spread_samples(train_set, config.probe.images, config.seed, task.collate)
    common: dict[str, Any] = {"seed": config.seed, "workers": config.data.workers, "device": device}
    train: Batches
    evaluated: Batches
    if config.data.on_device:
        unchanged = replace(config, recipe=replace(config.recipe, augment=False))
        size, crops = config.data.size_in_training, Crops.of(config.recipe, config.seed)
        train = resident_loader(task.build_datasets(unchanged)[0], order, size=size, crops=crops, **common)
        evaluated = resident_loader(validation_set, validation, size=config.data.image_size, **common)
    else:
        common |= {"prefetch": config.data.prefetch, "collate": task.collate}
        train = make_loader(train_set, order, substitutes=SUBSTITUTES, **common)
        evaluated = make_loader(validation_set, validation, **common)
    return Images(train, order, evaluated, probe, class_names(train_set))


def build_trainer(
    config: Config, order: TrainSampler, device: torch.device, weights: dict[str, Tensor] | None = None
) -> Trainer:
    """Model, optimizer and all else that a step needs. Weights that are not given are drawn from the run's seed.

    Raises ValueError for settings that do not fit the model, and for `parallel=fsdp` without torchrun.
    """
    task, recipe, plan, sharded = task_of(config), config.recipe, order.plan, config.parallel == "fsdp"
    exact = recipe.epochs - config.sbp.exact_epochs  # the first epoch that is
    keep_ratios = keep_ratios_of(config)
    seeding.seed_everything(config.seed, seeding.WEIGHTS)
    model = task.build_model(config)
    if weights is not None:
        task.load_starting_weights(model, weights)
    model = wrapping.synchronise_batch_norm(model, device)
    if not sharded:
        model = model.to(device)
    if config.channels_last and not sharded:  # which takes contiguous weights only; the images are channels-last
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = build_ema(model, recipe)
    if sharded:
        wrapping.shard(model, device, ema)
    if config.compile:
        ratios = 1 if keep_ratios is None else len({str(one) for one in keep_ratios})
        compile_model(model, "blocks" if config.compile == "blocks" else "model", keep_ratios=ratios)
    lr = scaled_lr(recipe, plan.global_batch_size)
    optimizer = build_optimizer(model, recipe, lr, fused=device.type == "cuda")
    captured = _reason_against_graphs(config, model, device) is None
    return Trainer(
        model,
        optimizer,
        build_scheduler(optimizer, recipe, order.steps_per_epoch),
        task.build_criterion(config),
        normalize=task.normalize(config),
        mixup=build_mixup(recipe, config.data.num_classes, plan.micro_batch_size),
        ema=ema,
        amp=config.amp,
        clip_grad=recipe.clip_grad,
        accumulation=plan.accumulation,
        patched=config.sbp.enabled,
        hold_mask=config.sbp.hold_mask,
        fixed_mask=config.sbp.fixed_mask,
        exact_from=exact * order.steps_per_epoch if config.sbp.exact_epochs else None,
        keep_ratio_at=None if keep_ratios is None else lambda step: keep_ratios[step // order.steps_per_epoch],
        channels_last=config.channels_last,
        recorder=CudaRecorder if captured else None,
        cast_together=task.same_shapes and not (config.compile or sharded),
        seed=config.seed,
    )


def keep_ratios_of(config: Config) -> list[float | list[float]] | None:
    """Of each epoch of a run, those that are exact too, where they keep the last ratio; None where it never changes."""
    settings, epochs = config.sbp, config.recipe.epochs - config.sbp.exact_epochs
    if not settings.enabled or settings.keep_ratio_end is None:
        return None
    found = [sbp.keep_ratio_at(one, epochs, settings.keep_ratio, settings.keep_ratio_end) for one in range(epochs)]
    return found + found[-1:] * config.sbp.exact_epochs


def _reason_against_graphs(config: Config, model: nn.Module, device: torch.device) -> str | None:
    """Why passes are not captured; None where they are. Raises ValueError where they must be and cannot."""
    if config.cuda_graph is False:
        return "cuda_graph=false"
    reason = graphs.reason_against(model, device, same_shapes=task_of(config).same_shapes)
    if reason and config.cuda_graph is True:
        raise ValueError(f"cuda_graph=true is not possible here: {reason}; take cuda_graph=auto")
    return reason


def describe(config: Config, images: Images, trainer: Trainer) -> dict[str, Any]:
    """What summary.json says of a run besides its results. Runs a few images to count saved bytes."""
    plan, settings = images.order.plan, config.sbp
    few = images.some(SLOPE_IMAGES[config.task])
    saved = saved_bytes_per_image(trainer, *few)  # first: the effective ratio is known after a training pass
    return {
        "backbone": config.backbone.name,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "keep_ratio": settings.keep_ratio if settings.enabled else 1.0,
        "keep_ratio_end": settings.keep_ratio_end,
        "effective_keep_ratio": sbp.effective_keep_ratio(trainer.model) if settings.enabled else 1.0,
        "sbp": settings.enabled,
        "mask": settings.mask,
        "mhsa_drop": settings.mhsa_drop,
        "saved_bytes_per_image": saved,
        "data": config.data.name or config.data.source,
        "train_images": images.order.length,
        "preprocessing": asdict(task_of(config).preprocessing(config.data)),
        "epochs": config.recipe.epochs,
        "steps_per_epoch": images.order.steps_per_epoch,
        **asdict(plan),
        "base_lr": config.recipe.lr,
        "lr": scaled_lr(config.recipe, plan.global_batch_size),
        "amp": config.amp,
        "cuda_graph": _reason_against_graphs(config, trainer.model, trainer.device) or True,
        "seed": config.seed,
        "device": environment.device_name(trainer.device),
        "versions": environment.versions(),
        "config": asdict(config),
    }


def announce(config: Config, facts: dict[str, Any]) -> None:
    """Prints what a run is about to do, before it does."""
    base = config.recipe.lr_base_batch_size
    log.info("model         %s, %.1f M parameters", facts["backbone"], facts["parameters"] / 1e6)
    if facts["sbp"]:
        log.info(
            "sbp           keep_ratio %s (effective %.3f), %s mask, mhsa_drop %s",
            facts["keep_ratio"],
            facts["effective_keep_ratio"],
            facts["mask"],
            facts["mhsa_drop"],
        )
    else:
        log.info("sbp           off: exact backpropagation")
    keep_ratios = keep_ratios_of(config)
    if keep_ratios is not None:
        different = list(dict.fromkeys(str(one) for one in keep_ratios))
        log.info("keep_ratio    %s over %d epochs", " to ".join(different), len(keep_ratios) - config.sbp.exact_epochs)
    if config.sbp.exact_epochs:
        again = config.sbp.exact_recompute or config.sbp.recompute
        log.info(
            "exact         in the last %d of %d epochs, with recompute %s%s",
            config.sbp.exact_epochs,
            facts["epochs"],
            again,
            ", which need more memory" if again == config.sbp.recompute else "",
        )
    log.info("saved         %.2f MiB of activations per image", facts["saved_bytes_per_image"] / 2**20)
    log.info("images        %d, preprocessing: %s", facts["train_images"], task_of(config).preprocessing(config.data))
    if config.data.train_image_size is not None:
        log.info("              training at %d px", config.data.train_image_size)
    log.info(
        "global batch  %d = %d processes x %d images x %d accumulated; %d steps per epoch",
        *(facts[key] for key in ("global_batch_size", "world_size", "micro_batch_size", "accumulation")),
        facts["steps_per_epoch"],
    )
    origin = "absolute" if base is None else f"{facts['base_lr']:g} for a batch of {base}"
    decay = config.recipe.layer_decay
    layers = "" if decay is None else f", of the {task_of(config).top}; times {decay:g} for each layer below it"
    log.info("lr            %g (%s)%s", facts["lr"], origin, layers)
    log.info("device        %s, amp %s", facts["device"], facts["amp"])
    captured = facts["cuda_graph"]
    how = f"forward and backward pass, after {graphs.WARM_UP} steps" if captured is True else f"no: {captured}"
    log.info("cuda_graph    %s", how)
