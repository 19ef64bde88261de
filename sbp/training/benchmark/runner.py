"""An arm with its model and optimizer, and the steps that are measured."""

from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._pytree import tree_leaves

from sbp.training.benchmark import launches
from sbp.training.benchmark.arms import Arm
from sbp.training.benchmark.authors_release import release_model
from sbp.training.config.model import SbpConfig
from sbp.training.config.recipe import RecipeConfig
from sbp.training.config.requests import BenchmarkConfig
from sbp.training.models.build import build_model
from sbp.training.models.optim import build_criterion
from sbp.training.runtime import wrapping
from sbp.training.runtime.compiling import compile_model
from sbp.training.runtime.graphs import CapturedPass, CudaRecorder, Pass, Recorder
from sbp.training.runtime.precision import Casts, autocast
from sbp.training.tasks.detection import synthetic
from sbp.training.tasks.detection.detector import Detector, build_detector
from sbp.training.tasks.task import sum_of

PARTS = ("forward", "backward", "optimizer")  # of a step, in this order
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # of autocast

Batch = tuple[Tensor, Any]


def build_on(device: torch.device, config: BenchmarkConfig, arm: Arm) -> nn.Module:
    """The arm's model in training mode, before torch.compile and DDP."""
    backbone, settings = config.backbone, SbpConfig(enabled=False)
    if arm.patch_drop:
        backbone = replace(backbone, kwargs=backbone.kwargs | {"patch_drop_rate": arm.patch_drop})
    if arm.sbp is not None:
        settings = SbpConfig(**asdict(config.sbp) | arm.sbp)
    with device:  # weights of a large model take seconds to draw on a CPU
        if config.task == "detection":
            detector = build_detector(backbone, settings, config.detector, config.data.num_classes)
            synthetic.propose_objects(detector)
            model: nn.Module = detector
        else:
            model = build_model(backbone, settings, config.data.num_classes, config.data.image_size)
        if arm.release:
            model = release_model(Path(config.release or ""), model, backbone.drop_path)
    if arm.checkpointing:
        model.set_grad_checkpointing()  # type: ignore[operator]
    return model.train()


class Runner:
    """An arm with its model and optimizer."""

    def __init__(self, config: BenchmarkConfig, arm: Arm, device: torch.device) -> None:
        self.amp, self.device, self.compiled = config.amp, device, arm.compile is not None
        torch.manual_seed(config.seed)
        model = wrapping.synchronise_batch_norm(build_on(device, config, arm), device)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if arm.compile is not None:
            fixed = {"dynamic": False} if arm.compile == "model" else {}  # blocks are always compiled so
            compile_model(model, arm.compile, backend=_backend(config.compile_backend, arm.budget), **fixed)
        together = arm.cast_together and config.amp in _DTYPES
        self.casts = Casts(model, _DTYPES[config.amp]) if together else None
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=cuda)
        self.criterion = None if isinstance(model, Detector) else build_criterion(RecipeConfig())
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        self.model = wrapping.wrap(model)
        self.run: Pass | CapturedPass = Pass(self._forward, self._backward)

    def capture(self, batch: Batch, recorder: Recorder | None = None) -> None:
        """Captures the pass of a graph arm, which has to be warmed up; from then on steps replay it.

        recorder: None for CUDA graphs. Raises ValueError where there is no CUDA for them.
        """
        if recorder is None:
            if self.device.type != "cuda":
                raise ValueError(f"graph arms need CUDA; device is {self.device.type}")
            recorder = CudaRecorder()
        assert isinstance(self.run, Pass)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            self.run = CapturedPass(self.run, recorder, list(self.model.parameters()), batch)

    def _forward(self, *batch: Any) -> tuple[Tensor, Tensor]:
        if self.casts is not None:
            self.casts.put()
        loss = self.loss((batch[0], batch[1]))
        return loss, loss.detach()

    def _backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()
        if self.casts is not None:
            self.casts.remove()

    def loss(self, batch: Batch) -> Tensor:
        with autocast(self.amp, self.device):
            if self.criterion is None:
                return sum_of(self.model(*batch))
            return self.criterion(self.model(batch[0]), batch[1])

    def turn(self, batch: Batch, steps: int) -> list[dict[str, float]]:
        """Runs steps in a row; for each the milliseconds of its PARTS and of the whole "step".

        The device is waited for at the end only, so that the CPU may run ahead as it does in training.
        """
        marks = [self._step(batch) for _ in range(steps)]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [
            {part: _milliseconds(*pair) for part, pair in zip(PARTS, pairwise(one), strict=True)}
            | {"step": _milliseconds(one[0], one[-1])}
            for one in marks
        ]

    def _step(self, batch: Batch) -> list[Any]:
        marks = [self._mark(), self._forward_backward(batch), self._mark()]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(self._mark())
        return marks

    def _forward_backward(self, batch: Batch) -> Any:
        """Leaves the gradients; returns the mark between the two passes."""
        self.run.take(batch)
        self.run.forward()
        between = self._mark()
        self.run.backward()
        return between

    def launches(self, batch: Batch) -> dict[str, float]:
        """The kernels of a warmed-up step, see `launches.count`; none for compiled code on a CPU, which no dispatch
        mode sees. A CPU's optimizer is not the fused one, whose few kernels are left out there."""
        if self.device.type == "cuda":
            return launches.count(lambda: self._step(batch), self.device)
        if self.compiled:
            return {}
        try:
            return launches.count(lambda: self._forward_backward(batch), self.device)
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _milliseconds(start: Any, end: Any) -> float:
    return (end - start) * 1000 if isinstance(start, float) else start.elapsed_time(end)


def _backend(name: str, budget: float) -> Callable[..., Any]:
    """A torch.compile backend with an activation_memory_budget.

    A new function for each arm: under one and the same backend an arm would take over the code that was compiled for
    another one, as both run the same Python code.
    """
    compile_graph = lookup_backend(name)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return compile_graph(graph, inputs)

    return backend


def make_batch(config: BenchmarkConfig, size: int, device: torch.device) -> Batch:
    data = config.data
    targets: Any
    with device:
        if config.task == "detection":
            torch.manual_seed(config.seed)  # how many regions there are depends on the boxes
            images, targets = synthetic.random(data.image_size, data.max_size, size, data.num_classes)
        else:
            images, targets = torch.randn(size, 3, *[data.image_size] * 2), torch.randint(data.num_classes, (size,))
    if config.channels_last:
        images = images.to(memory_format=torch.channels_last)
    return images, targets


def bytes_of(batch: Batch) -> int:
    return sum(one.nbytes for one in tree_leaves(batch) if isinstance(one, Tensor))
