"""The peak CUDA memory of one training step, forecast on a machine without a GPU.

One optimizer step runs on fake tensors (allocations.py), and the largest sum of what it holds at a time is the peak.

Not in a forecast: the CUDA context, workspaces of cuBLAS and cuDNN, fragmentation, and what torch.compile saves. It is
to be compared with `torch.cuda.max_memory_allocated`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

import sbp
from sbp.settings import RECOMPUTE
from sbp.training.config.batches import scaled_lr
from sbp.training.config.rules import validate
from sbp.training.config.run import Config
from sbp.training.memory import detection
from sbp.training.memory.allocations import HOST, PARTS, Allocations, CudaCasts, fake_cuda
from sbp.training.memory.phases import phases
from sbp.training.models.build import build_model
from sbp.training.models.optim import build_criterion, build_ema, build_mixup, build_optimizer, can_be_fused
from sbp.training.runtime.precision import autocast
from sbp.training.tasks.choice import task_of
from sbp.training.tasks.detection.detector import Detector

KEEP_RATIOS = (1.0, 0.5, 0.25)

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Forecast:
    """Bytes of CUDA memory at the peak of one optimizer step, in parts that add up to it.

    weights: parameters and buffers.
    gradients: those of the parameters that exist at the peak.
    optimizer: its state, and the moving average of the weights.
    activations: saved for the backward pass, with the weights' copies in lower precision.
    temporaries: all else, such as gradients of activations.
    Not parts of it, and the same whenever the peak is:
    saved: all that is saved when the forward pass ends.
    update: at the peak of the optimizer's update, clipping and moving average with it.
    passes: at the peak of the forward and backward pass; passes_gradients: those among it.
    all_gradients: of all parameters that have one.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int
    saved: int
    update: int
    passes: int
    passes_gradients: int
    all_gradients: int

    @property
    def peak(self) -> int:
        return sum(getattr(self, part) for part in PARTS)


class Rules:
    """How a step is run: today's way. `paper.PaperRules` has the way of the paper's authors."""

    casts: type[CudaCasts] = CudaCasts
    foreach = True  # optimizers that are not fused update all parameters at once on CUDA, with copies of their state
    images_stay = False  # on the device until the step ends
    bytes_per_parameter = 0  # of whatever else is held throughout

    def build(self, config: Config) -> nn.Module:
        if config.task == "detection":
            return detection.build(config)
        data = config.data
        return build_model(config.backbone, config.sbp, data.num_classes, data.image_size, data.train_image_size)

    def begins(self, part: str) -> None:
        """Called as each part of the step begins: clipping, optimizer, average, batch, forward, backward."""

    def keeps_gradients(self, config: Config, micro_batch_size: int, world_size: int) -> bool:
        """Whether gradients are there already when a forward pass starts: those of the micro batch before, or DDP's."""
        return world_size > 1 or config.global_batch_size > micro_batch_size


TODAY = Rules()


def forecast(config: Config, micro_batch_size: int, *, world_size: int = 1, rules: Rules = TODAY) -> Forecast:
    """That of the phase of the run whose steps need most: see `forecast_phases`."""
    found = forecast_phases(config, micro_batch_size, world_size=world_size, rules=rules)
    return max(found.values(), key=lambda one: one.peak)


def forecast_phases(
    config: Config, micro_batch_size: int, *, world_size: int = 1, rules: Rules = TODAY
) -> dict[str, Forecast]:
    """For each phase of the run, by name, a step of one of `world_size` processes.

    Simulated from an optimizer update, that of the step before, up to the next. Raises ValueError for what a run with
    this config would raise it for, data sets aside.
    """
    _check(config, micro_batch_size)
    return {name: _step(one, micro_batch_size, world_size, rules) for name, one in phases(config).items()}


def _step(config: Config, micro_batch_size: int, world_size: int, rules: Rules) -> Forecast:
    recipe, criterion = config.recipe, _criterion(config)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    keeps_gradients = rules.keeps_gradients(config, micro_batch_size, world_size)
    with torch.device("meta"):
        model = rules.build(config)

    conditions = detection.Conditions() if config.task == "detection" else nullcontext()
    with fake_cuda(rules.casts()) as allocations, conditions:
        _materialise(model, memory_format)
        if isinstance(model, Detector):
            detection.choose_as_many_as_there_may_be(model, config)
        allocations.note([*model.parameters(), *model.buffers()], "weights")
        ema = build_ema(model, recipe)
        if ema is not None:
            allocations.note([*ema.parameters(), *ema.buffers()], "optimizer")
        parameters = [p for p in model.parameters() if p.requires_grad]
        fused = rules.foreach and can_be_fused(recipe)
        optimizer = build_optimizer(model, recipe, scaled_lr(recipe, config.global_batch_size), fused=fused)
        for group in optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = rules.foreach and not fused
        for p in parameters:
            p.grad = torch.empty_like(p)
            p.register_post_accumulate_grad_hook(lambda p: allocations.note(p.grad, "gradients"))
        allocations.note([p.grad for p in parameters], "gradients")
        rules.begins("clipping")
        if recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(parameters, recipe.clip_grad)
        rules.begins("optimizer")
        optimizer.step()  # makes its state, too
        _note_state(allocations, optimizer)
        optimizer.zero_grad(set_to_none=not keeps_gradients)
        rules.begins("average")
        if ema is not None:
            ema.update(model, step=1)
        updated = len(allocations.events)
        rules.begins("batch")
        held = torch.empty(rules.bytes_per_parameter * sum(p.numel() for p in parameters), dtype=torch.uint8)
        allocations.note(held, "gradients")

        model.train()
        images, targets = _batch(config, micro_batch_size)
        images = images.to(memory_format=memory_format)  # type: ignore[call-overload]
        rules.begins("forward")
        with autocast(config.amp, _CPU):
            loss = criterion(model, images, targets)
        if not rules.images_stay:
            del images, targets
        saved = allocations.rename_temporaries("activations")
        # `loss.backward()`, within the modes above: called by that name it would leave the casts, which whatever is
        # recomputed in the backward pass needs as well.
        rules.begins("backward")
        one = torch.ones_like(loss)
        _engine_run_backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)
    passes = allocations.peak(since=updated)
    return Forecast(
        **allocations.peak(),
        saved=saved,
        update=sum(allocations.peak(until=updated).values()),
        passes=sum(passes.values()),
        passes_gradients=passes["gradients"],
        all_gradients=sum(p.nbytes for p in parameters),
    )


def largest_micro_batch(config: Config, gib: float, *, world_size: int = 1, rules: Rules = TODAY) -> int:
    """The largest micro batch size whose forecast is at most `gib` GiB; 0 when not even the smallest one fits.

    The forecast is nearly affine in the batch size: each try is where the line through the last ones meets `gib`.
    """
    if not gib > 0:
        raise ValueError(f"memory_gib must be above 0, got {gib}")
    budget = gib * 2**30
    unit = 2 if config.recipe.mixes else 1  # images in pairs
    fits, too_many, n = 0, None, 8
    at_fits: float = 0
    while too_many is None or too_many - fits > 1:
        one = forecast(config, n * unit, world_size=world_size, rules=rules)
        if fits == 0:
            at_fits = one.weights + one.optimizer
        per_unit = max((one.peak - at_fits) / (n - fits), 1)
        if one.peak <= budget:
            fits, at_fits = n, one.peak
        else:
            too_many = n
        n = max(fits + 1, fits + int((budget - at_fits) / per_unit))
        n = n if too_many is None else min(n, too_many - 1)
    return fits * unit


def keep_ratio_table(
    config: Config, micro_batch_size: int, *, world_size: int = 1, rules: Rules = TODAY
) -> dict[str, dict[float, Forecast]]:
    """For each way of recomputing the forecasts of the keep-ratios; at ratio 1 backpropagation is exact.

    Of steps that are alike all run long. Where there is no SBP (`support`), of plain training alone.
    """
    config = with_sbp(config, enabled=True, keep_ratio_end=None, exact_epochs=0, exact_recompute=None)
    if not support(config, rules):
        plain = with_sbp(config, enabled=False, recompute="none")
        return {"none": {1.0: forecast(plain, micro_batch_size, world_size=world_size, rules=rules)}}
    return {
        mode: {
            ratio: forecast(
                with_sbp(config, keep_ratio=ratio, recompute=mode),
                micro_batch_size,
                world_size=world_size,
                rules=rules,
            )
            for ratio in KEEP_RATIOS
        }
        for mode in (RECOMPUTE if rules is TODAY else ("none",))
    }


def support(config: Config, rules: Rules = TODAY) -> sbp.Support:
    """What SBP can do to a run's network, which is built on no device; false where the backbone is frozen.

    Raises ValueError for one that cannot be built.
    """
    if config.backbone.frozen:
        return sbp.Support(reason="the backbone is frozen")
    with torch.device("meta"):
        return sbp.supports(rules.build(with_sbp(config, enabled=False)))


def with_sbp(config: Config, **changes: Any) -> Config:
    """The config with these keys of its group `sbp`."""
    return replace(config, sbp=replace(config.sbp, **changes))


def _check(config: Config, micro_batch_size: int) -> None:
    generated = task_of(config).generated  # a forecast reads no images
    no_images = replace(config.data, source=generated, cache=False, shuffle="full", background=False)
    validate(replace(config, data=no_images, micro_batch_size=micro_batch_size))
    build_mixup(config.recipe, config.data.num_classes, micro_batch_size)


def _batch(config: Config, size: int) -> tuple[Tensor, Any]:
    """The images and targets of a micro batch."""
    data, side = config.data, config.data.size_in_training
    if config.task == "detection":
        return detection.batch(config, size)
    labels = torch.empty(size, data.num_classes) if config.recipe.mixes else torch.empty(size).long()
    return torch.empty(size, 3, side, side), labels


def _criterion(config: Config) -> Callable[[Any, Tensor, Any], Tensor]:
    """The loss of a model on images and targets."""
    if config.task == "detection":
        return detection.loss
    criterion = build_criterion(config.recipe)
    return lambda model, images, labels: criterion(model(images), labels)


def _materialise(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Gives a model on the meta device fake memory."""

    def fake(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, memory_format=memory_format if t.ndim == 4 else None)

    model._apply(fake)
    for module in model.modules():
        state = vars(module).get("sbp_state")
        if state is not None:
            state.draw = torch.zeros((), dtype=torch.int64)


def _note_state(allocations: Allocations, optimizer: Optimizer) -> None:
    for tensor in tree_leaves(list(optimizer.state.values())):
        if isinstance(tensor, Tensor):
            allocations.note(tensor, "optimizer" if tensor.ndim else HOST)  # step counters stay in CPU memory
