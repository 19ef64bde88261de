"""The training step."""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

import sbp
from sbp.state import states
from sbp.training.data.loading import moved
from sbp.training.data.preprocessing import Normalize
from sbp.training.models.build import frozen_parts, running_averages
from sbp.training.runtime import distributed, seeding, wrapping
from sbp.training.runtime.graphs import Graphs, Pass, Recorder
from sbp.training.runtime.precision import DTYPES, Casts, autocast
from sbp.training.tasks.task import sum_of

Targets = Any  # labels (B,), or in detection a list of B dictionaries


class Trainer:
    """All that an optimizer step changes or needs.

    model: on its device, patched or not; sharded or, when there are several processes, wrapped in DDP here. The result
    of a step depends on the state of the trainer, the number of the step and its images alone: random erasing, mixup,
    drop path and masks take their random numbers from (seed, step, micro batch, process).
    criterion: the loss of the model's outputs and the labels; None for a model that takes both images and targets in
        training, and returns its losses by name.
    normalize: what uint8 images go through on the device; None for images that the model takes as they are.
    fixed_mask: mask number 0 in every step. exact_from: the step from which backpropagation is exact; None for never.
    keep_ratio_at: what a step keeps, as `sbp.set_keep_ratio` takes it; None where that does not change.
    recorder: captures forward and backward passes to replay them, as CUDA graphs do; None to run each one anew.
    cast_together: under `amp`, cast the weights in one call a pass rather than one by one. Not for a compiled model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: Scheduler,
        criterion: nn.Module | None,
        *,
        normalize: Normalize | None = None,
        mixup: Mixup | None = None,
        ema: ModelEmaV3 | None = None,
        amp: str = "off",
        clip_grad: float | None = None,
        accumulation: int = 1,
        patched: bool = True,
        hold_mask: bool = False,
        fixed_mask: bool = False,
        exact_from: int | None = None,
        keep_ratio_at: Callable[[int], float | list[float]] | None = None,
        channels_last: bool = False,
        recorder: Callable[[], Recorder] | None = None,
        cast_together: bool = False,
        seed: int = 0,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.criterion, self.mixup, self.ema = criterion, mixup, ema
        self.amp, self.clip_grad, self.accumulation = amp, clip_grad, accumulation
        self.patched, self.hold_mask, self.seed = patched, hold_mask, seed
        self.fixed_mask, self.exact_from, self.keep_ratio_at = fixed_mask, exact_from, keep_ratio_at
        self.device = next(model.parameters()).device
        self.frozen = list(frozen_parts(model))
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.normalize = None if normalize is None else normalize.to(self.device)
        # A captured pass cannot exchange gradients while it computes them, so they are averaged after it, without DDP.
        self.wrapped = wrapping.wrap(model) if recorder is None else wrapping.same_everywhere(model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "float16")
        self.casts = Casts(model, DTYPES[amp]) if cast_together and amp in DTYPES else None
        self._averages = list(running_averages(model))
        self._averages_before = [one.clone() for one in self._averages]  # before the step that is under way
        self.eager = Pass(self._forward, self._backward)
        self.graphs = (
            None if recorder is None else Graphs(self.eager, list(model.parameters()), recorder, list(model.buffers()))
        )

    def step(self, step: int, micro_batches: Iterable[tuple[Tensor, Targets]]) -> float:
        """Optimizer step number `step`, over `accumulation` micro batches; this process's mean loss."""
        loss = self.backward(step, micro_batches)
        self.update(step)
        return loss.read()

    def begin_training(self) -> None:
        """Training mode, but for frozen parts: their batch norms and drop paths are those of evaluation."""
        self.model.train()
        for part in self.frozen:
            part.eval()

    def backward(self, step: int, micro_batches: Iterable[tuple[Tensor, Targets]]) -> "PendingFigures":
        """The gradients of step number `step`, averaged over micro batches and processes; returns the mean loss."""
        self.begin_training()
        if self._averages:
            torch._foreach_copy_(self._averages_before, self._averages)
        self.scheduler.step_update(step)
        exact = self.is_exact(step)
        keep_ratio = None if self.keep_ratio_at is None else self.keep_ratio_at(step)
        if keep_ratio is not None:
            sbp.set_keep_ratio(self.model, keep_ratio)
        if self.graphs is not None:
            self.graphs.begin_step(kind=(exact, None if exact else keep_ratio))
        mean: Tensor | float = 0.0  # of the loss and its parts
        for micro, (images, targets) in enumerate(micro_batches):
            last = micro == self.accumulation - 1
            seeding.seed_everything(self.seed, seeding.STEP, step, micro, distributed.rank())
            with ExitStack() as stack:
                if not last:
                    stack.enter_context(wrapping.no_sync(self.wrapped))
                if exact:
                    stack.enter_context(sbp.disabled(self.model))  # for the backward pass too, which may recompute
                if self.casts is not None:
                    stack.callback(self.casts.remove)
                inputs = self._prepared(images, targets)
                run = self.eager if self.graphs is None else self.graphs.pass_for(inputs, adds=micro > 0)
                run.take(inputs)
                del inputs  # a captured pass has its own
                if self.patched:
                    sbp.set_draw(self.model, self._draw(step, micro))
                mean += run.forward() / self.accumulation
                if last:
                    figures = PendingFigures(mean, self.parts)
                run.backward()
        if self.graphs is not None:
            wrapping.average_gradients(self.model)
        return figures

    def update(self, step: int) -> "Update":
        """Changes the weights by the gradients, unscaled and clipped once, and the averaged weights by the new ones.

        Where the gradient's norm is not finite, all stay as they are, in all processes alike.
        """
        norm, before = self._clipped_norm(), self.scaler.get_scale()
        if norm is not None and not math.isfinite(norm):
            self.skip()
            return Update(norm, before, before)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        scale = self.scaler.get_scale()
        if self.ema is not None and scale >= before:  # else the weights are as before
            self.ema.update(self.model, step=step + 1)
        return Update(norm, before, scale)

    def _clipped_norm(self) -> float | None:
        """The norm of the whole gradient before it is clipped, here; None in float16, where the scaler looks itself."""
        parameters = list(self.model.parameters())
        norm: Tensor | None = None
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        elif not self.scaler.is_enabled():
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return None if norm is None or self.scaler.is_enabled() else wrapping.number(norm)

    def skip(self) -> None:
        """Forgets the gradients: weights and running averages are as before the step, only the schedule goes on."""
        self.optimizer.zero_grad()
        if self._averages:
            torch._foreach_copy_(self._averages, self._averages_before)

    def is_exact(self, step: int) -> bool:
        """Whether backpropagation is exact in a step of a patched model."""
        return self.patched and self.exact_from is not None and step >= self.exact_from

    def scale(self) -> dict[str, float]:
        """loss_scale of the next step, in float16."""
        return {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}

    def kept(self, step: int) -> dict[str, float]:
        """keep_ratio of the step, mean over SBP layers, 1 where it is exact; empty where it never changes."""
        if self.exact_from is None and self.keep_ratio_at is None:
            return {}
        ratios = [ratio for state in states(self.model) for ratio in state.keep_ratios]
        return {"keep_ratio": 1.0 if self.is_exact(step) else fmean(ratios)}

    def _draw(self, step: int, micro: int) -> int:
        """The number of a micro batch's mask."""
        if self.fixed_mask:
            return 0
        return step if self.hold_mask else step * self.accumulation + micro

    def _prepared(self, images: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """What the model is given of a micro batch."""
        inputs = self.to_device(images, targets, erase=True)
        inputs = inputs if self.mixup is None else self.mixup(*inputs)
        if self.graphs is None:
            return inputs
        given = [one.untyped_storage().data_ptr() for one in (images, targets) if isinstance(one, Tensor)]
        images, targets = (one.clone() if one.untyped_storage().data_ptr() in given else one for one in inputs)
        return images, targets  # a capture keeps them and writes to them, so they are nobody else's

    def _forward(self, images: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """The loss to back-propagate, scaled; and what to report of it: itself and its parts, (1 + P,)."""
        if self.casts is not None:
            self.casts.put()
        loss, parts = self._loss(images, targets)
        self.parts = list(parts)
        return self.scaler.scale(loss / self.accumulation), torch.stack([loss, *parts.values()]).detach()

    def _loss(self, images: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the parts that a model with losses of its own adds it up from."""
        with autocast(self.amp, self.device):
            if self.criterion is not None:
                return self.criterion(self.wrapped(images), targets), {}
            parts = self.wrapped(images, targets)
            return sum_of(parts), parts

    def _backward(self, loss: Tensor) -> None:
        loss.backward()
        if self.casts is not None:
            self.casts.remove()

    def make_room(self) -> None:
        """For what runs between steps: where the device has less memory left than captured passes hold, they go.

        They are captured again when training goes on.
        """
        if self.graphs is not None and self.graphs.captured and self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            if free < held:
                self.graphs.release()

    def plain_loss(self, images: Tensor, targets: Targets) -> Tensor:
        """The loss of the model, not wrapped, that probes measure: without mixup and label smoothing."""
        with autocast(self.amp, self.device):
            if self.criterion is not None:
                return F.cross_entropy(self.model(images), targets)
            return sum_of(self.model(images, targets))

    def to_device(self, images: Tensor, targets: Targets, *, erase: bool = False) -> tuple[Tensor, Targets]:
        """Images (B, 3, H, W) and their targets where the model is; images in its memory format and normalised."""
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        if self.normalize is not None:
            images = self.normalize(images, targets, erase=erase)
        return images, moved(targets, self.device)

    def wait(self) -> None:
        """Until the device has done all that it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def sharded(self) -> bool:
        """Whether each process has a share of the model only, so that every pass needs all of them (FSDP)."""
        return wrapping.is_sharded(self.model)

    @property
    def collective(self) -> bool:
        """Whether a training pass exchanges anything with the other processes besides gradients."""
        return self.sharded or any(isinstance(module, nn.SyncBatchNorm) for module in self.model.modules())

    @property
    def lr(self) -> float:
        """The learning rate of the last step, the largest of its parameter groups."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and builtins; the weights under the names that timm reads by itself.

        All processes have to call it; the main process's is the one to save.
        """
        state = {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.ema is not None:
            state["state_dict_ema"] = self.ema.module.state_dict()
        return wrapping.whole(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` returned to the main process, whatever the number of processes was."""
        self.model.load_state_dict(state["state_dict"])
        wrapping.load_optimizer(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:  # empty from a run without float16
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["state_dict_ema"])


class Update(NamedTuple):
    """norm: of the gradient, before clipping; not finite where nothing was changed, None in float16.

    scale_before, scale: of the loss of this step and of the next: 1 but in float16, where a gradient that was not
    finite changes nothing but halves it.
    """

    norm: float | None
    scale_before: float
    scale: float


class PendingFigures:
    """A loss that the device has yet to compute, and its parts.

    values: (1 + P,), the loss and what the P names stand for. Reading them waits for these, not for what was asked of
    the device later.
    """

    def __init__(self, values: Tensor, names: list[str]) -> None:
        self.names = names
        self._values = values.to("cpu", non_blocking=True)  # into pinned memory
        self._ready = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def read(self) -> float:
        """The loss."""
        return self.read_all()["loss"]

    def read_all(self) -> dict[str, float]:
        """The loss and its parts, by name."""
        if self._ready is not None:
            self._ready.synchronize()
        return dict(zip(["loss", *self.names], self._values.tolist(), strict=True))
