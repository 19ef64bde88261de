"""Optimizer, learning rate, loss, mixup and moving average: timm's, set up from a recipe."""

from typing import Any

from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import MultiStepLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from sbp.training.config.recipe import RecipeConfig


def can_be_fused(recipe: RecipeConfig) -> bool:
    """Whether the optimizer's step on CUDA can be one kernel."""
    return recipe.optimizer.lower() in ("adam", "adamw")


def build_optimizer(model: nn.Module, recipe: RecipeConfig, lr: float, fused: bool = False) -> Optimizer:
    """Without weight decay on norms, biases, layer scale, class token and position embedding.

    With recipe.layer_decay a parameter group for each layer, as timm counts them, whose lr_scale the scheduler heeds.
    fused: where the optimizer can, without temporary copies of all weights; on CUDA.
    """
    options: dict[str, Any] = {"fused": True} if fused and can_be_fused(recipe) else {}
    try:
        return create_optimizer_v2(
            model,
            opt=recipe.optimizer,
            lr=lr,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            **options,
        )
    except ValueError as error:
        raise ValueError(f"recipe.optimizer={recipe.optimizer}: {error}") from None


def build_scheduler(optimizer: Optimizer, recipe: RecipeConfig, steps_per_epoch: int) -> Scheduler:
    """Linear warm-up, then the schedule over the epochs that are left; a pure function of the step number.

    With recipe.warmup_steps the warm-up takes the place of the schedule's first steps. Raises ValueError for a warm-up
    that is not over when the run is, or when the rate is to fall for the first time.
    """
    _check_warmup(recipe, steps_per_epoch)
    within = recipe.warmup_steps is not None
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.scheduler,
        num_epochs=recipe.epochs if within else recipe.epochs - recipe.warmup_epochs,
        warmup_epochs=recipe.warmup_steps / steps_per_epoch if within else recipe.warmup_epochs,  # type: ignore[arg-type, operator]
        warmup_prefix=not within and recipe.scheduler != "multistep",  # whose milestones are epochs of the run
        decay_milestones=recipe.decay_milestones or (),  # type: ignore[arg-type]
        decay_rate=recipe.decay_rate,
        warmup_lr=recipe.warmup_lr,
        min_lr=recipe.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    assert scheduler is not None
    if isinstance(scheduler, MultiStepLRScheduler):
        scheduler.decay_t = [step + 1 for step in scheduler.decay_t]  # timm's come a step early
    return scheduler


def _check_warmup(recipe: RecipeConfig, steps_per_epoch: int) -> None:
    steps, total = recipe.warmup_steps, recipe.epochs * steps_per_epoch
    if steps is None:
        return
    if steps >= total:
        raise ValueError(
            f"recipe.warmup_steps must be less than the {total} steps of the run ({recipe.epochs} epochs of "
            f"{steps_per_epoch}), got {steps}"
        )
    milestones = recipe.decay_milestones
    if milestones and steps >= milestones[0] * steps_per_epoch:
        raise ValueError(
            f"recipe.warmup_steps must be less than the {milestones[0] * steps_per_epoch} steps to the first of "
            f"recipe.decay_milestones, epoch {milestones[0]}, got {steps}"
        )


def build_mixup(recipe: RecipeConfig, num_classes: int, micro_batch_size: int) -> Mixup | None:
    """timm's Mixup, which mixes an image with its mirror in the batch, or None when the recipe has none."""
    if not recipe.mixes:
        return None
    if micro_batch_size % 2:
        raise ValueError(f"mixup and cutmix mix pairs: micro_batch_size must be even, got {micro_batch_size}")
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        switch_prob=recipe.mixup_switch,
        label_smoothing=recipe.label_smoothing,
        num_classes=num_classes,
    )


def build_criterion(recipe: RecipeConfig) -> nn.Module:
    """Cross-entropy with label smoothing; with mixup the smoothing is in the targets already."""
    if recipe.mixes:
        return SoftTargetCrossEntropy()
    return nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)


def build_ema(model: nn.Module, recipe: RecipeConfig) -> ModelEmaV3 | None:
    """A moving average that starts fast and slows to the recipe's decay, so that short runs profit too.

    A decay of 0.9999 is reached after 10,000 steps, early in the published runs.
    """
    if recipe.ema_decay is None:
        return None
    return ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True, warmup_power=1.0)
