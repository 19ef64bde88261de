"""Forecasts of memory and time for each setting and micro batch, and which of them are worth taking."""

import multiprocessing
import os
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch

from sbp.training.config.run import Config
from sbp.training.memory.forecast import support
from sbp.training.memory.phases import phases
from sbp.training.plan.gpus import Gpu
from sbp.training.plan.operators import Kernel
from sbp.training.plan.settings import Setting, accuracy, settings
from sbp.training.plan.steps import Step, alike, extrapolated, record
from sbp.training.plan.times import How, Times, times_of, transformed

SIZES = {"classification": (32, 128), "detection": (1, 2)}  # micro batches of the fake steps
_ENDLESS = 2**40  # images, where more of them need no more memory than the update


@dataclass(frozen=True)
class Line:
    """What a step of any micro batch needs, from the fake steps with two.

    later: the same of steps of the run's later phases, which have to fit into the memory as well.
    """

    small: Step
    large: Step
    later: tuple["Line", ...] = ()

    def times(
        self, micro_batch_size: int, gpu: Gpu, how: How, *, accumulation: int, recompute: bool, amp: str
    ) -> Times:
        """Of a step of so many micro batches of this size."""
        forecast = partial(times_of, gpu=gpu, how=how, accumulation=accumulation, recompute=recompute, amp=amp)
        small, large = self._kernels(how, amp)
        if [one.name for one in small] == [one.name for one in large]:
            pairs = zip((self.small, self.large), (small, large), strict=True)
            one, two = (replace(step, kernels=tuple(kernels)) for step, kernels in pairs)
            return forecast(extrapolated(one, two, micro_batch_size).kernels)
        first, second = forecast(small), forecast(large)  # of each image other operators, as in detection
        between = partial(self._between, micro_batch_size)
        return Times(
            between(first.kernels, second.kernels),
            between(first.step, second.step),
            round(between(first.launches, second.launches)),
        )

    def _kernels(self, how: How, amp: str) -> tuple[list[Kernel], list[Kernel]]:
        """What runs in both steps; where that is the same, what is alike only once."""
        key = how.compile, how.cast_together, amp
        if key not in self._known:
            small, large = (transformed(step.kernels, how, amp) for step in (self.small, self.large))
            same = [one.name for one in small] == [one.name for one in large]
            self._known[key] = alike(small, large) if same else (small, large)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[Any, tuple[list[Kernel], list[Kernel]]]:
        return {}

    def peak(self, micro_batch_size: int, accumulates: bool) -> int:
        """Bytes, of the phase whose steps need most."""
        return max(one.own_peak(micro_batch_size, accumulates) for one in (self, *self.later))

    def own_peak(self, micro_batch_size: int, accumulates: bool) -> int:
        """Of the first phase's steps alone.

        Gradients that are there already when a pass starts are there at its peak as well; and however small the batch,
        the optimizer's update needs what it needs.
        """
        one, two = self.small.memory, self.large.memory
        passes = self._between(micro_batch_size, one.passes, two.passes)
        gradients = self._between(micro_batch_size, one.passes_gradients, two.passes_gradients)
        more = max(one.all_gradients - gradients, 0) if accumulates else 0
        return round(max(passes + more, one.update))

    def largest(self, available: float, accumulates: bool) -> int:
        """The largest micro batch whose peak is at most so many bytes; 0 where there is none."""
        return min(one._largest(available, accumulates) for one in (self, *self.later))

    def _largest(self, available: float, accumulates: bool) -> int:
        def too_many(size: int) -> bool:
            return self.own_peak(size, accumulates) > available

        size = 1
        while size < _ENDLESS and not too_many(size):
            size *= 2
        return bisect_left(range(1, size), True, key=too_many)

    def _between(self, micro_batch_size: int, one: float, two: float) -> float:
        small, large = self.small.micro_batch_size, self.large.micro_batch_size
        return one + (two - one) * (micro_batch_size - small) / (large - small)


def line(config: Config) -> Line:
    """Of a run of one phase. Raises ValueError for what a run with this config would raise it for, data sets aside."""
    small, large = (record(replace(config, global_batch_size=size), size) for size in SIZES[config.task])
    return Line(small, large)


def lines(configs: Sequence[Config]) -> list[Line]:
    """Of each config, in two processes where that is possible."""
    processes = min(2, os.cpu_count() or 1, len(configs))
    if processes < 2:
        return [line(config) for config in configs]
    start = multiprocessing.get_context("fork" if _can_fork() else "spawn")
    with ProcessPoolExecutor(processes, start, torch.set_num_threads, (1,)) as pool:
        return list(pool.map(line, configs))


def _can_fork() -> bool:
    """Whether a backward pass works in a fork of this process, which starts ten seconds sooner than a new one.

    It does not once autograd has started threads, or CUDA has. When autograd does so differs from build to build, so
    that a fork is asked.
    """
    if torch.cuda.is_initialized() or "fork" not in multiprocessing.get_all_start_methods():
        return False
    asked = multiprocessing.get_context("fork").Process(target=_backward)
    asked.start()
    asked.join(timeout=30)
    if asked.is_alive():
        asked.kill()
        asked.join()
    return asked.exitcode == 0


def _backward() -> None:
    try:
        torch.zeros((), requires_grad=True).backward()
    except RuntimeError:
        sys.exit(1)


def of_runs(configs: Sequence[Config], forecast: Callable[[Sequence[Config]], list[Line]]) -> list[Line]:
    """Of each config the line of its first phase, with those of its later ones. What is alike is forecast once."""
    runs = [list(phases(config).values()) for config in configs]
    different: list[Config] = []
    for one in chain.from_iterable(runs):
        if one not in different:
            different.append(one)
    found = forecast(different)
    lines = [[found[different.index(one)] for one in run] for run in runs]
    return [replace(first, later=tuple(later)) for first, *later in lines]


@dataclass(frozen=True)
class Point:
    """A setting with its batches, and what is forecast for it. peak in bytes, times in seconds."""

    name: str
    setting: Setting
    how: How
    micro_batch_size: int
    accumulation: int
    largest: int
    peak: int
    times: Times
    images_per_second: float
    accuracy: str

    def overrides(self, config: Config) -> list[str]:
        """What to give `sbp train` for it."""
        compile_key = (
            [f"compile={'blocks' if self.how.compile else 'false'}"] if config.task == "classification" else []
        )
        batches = [f"global_batch_size={config.global_batch_size}", f"micro_batch_size={self.micro_batch_size}"]
        return [*self.setting.overrides(config), *compile_key, *batches, f"amp={config.amp}"]


def micro_batches(config: Config, world_size: int = 1) -> list[int]:
    """The micro batches that a process's share of the global batch can be cut into, the largest first."""
    if config.global_batch_size % world_size:
        raise ValueError(
            f"global_batch_size={config.global_batch_size} cannot be spread evenly over {world_size} processes; take a "
            f"multiple of {world_size}"
        )
    share = config.global_batch_size // world_size
    unit = 2 if config.recipe.mixes else 1
    found = [size for size in range(share, 0, -1) if share % size == 0 and size % unit == 0]
    if not found:
        raise ValueError(
            f"mixup and cutmix mix pairs: a process's share of global_batch_size must be even, got {share}"
        )
    return found


def fastest(
    config: Config, setting: Setting, found: Line, how: How, gpu: Gpu, available: float, *, world_size: int = 1
) -> Point | None:
    """The point with the micro batch with which a step is fastest, of those that fit; None where none does."""
    sizes = micro_batches(config, world_size)
    share, best = sizes[0], None
    for size in sizes:
        accumulation = share // size
        peak = found.peak(size, accumulation > 1 or world_size > 1)
        if peak > available:
            continue
        times = found.times(
            size, gpu, how, accumulation=accumulation, recompute=setting.recompute != "none", amp=config.amp
        )
        if best is None or times.step < 0.99 * best.times.step:
            name = f"{setting.name}{'_compile' if how.compile else ''}"
            largest = found.largest(available, world_size > 1)
            speed = config.global_batch_size / times.step
            best = Point(name, setting, how, size, accumulation, largest, peak, times, speed, "")
        elif times.step > 1.1 * best.times.step:
            break
    return best


def ways(config: Config) -> list[How]:
    """How a step can be run: what a run does by itself, and with its blocks compiled."""
    if config.task == "detection":
        return [How()]
    graph = config.cuda_graph is not False
    return [How(graph=graph, cast_together=True), How(compile=True, graph=graph)]


def plan(
    config: Config,
    gpu: Gpu,
    available: float,
    *,
    world_size: int = 1,
    forecast: Callable[[Sequence[Config]], list[Line]] = lines,
) -> list[Point]:
    """Of each setting the fastest point that fits into so many bytes; the fastest one first.

    Raises ValueError for a network or batches that cannot be trained with.
    """
    chosen = list(settings(support(config)))
    points = []
    for setting, found in zip(chosen, of_runs([one.applied(config) for one in chosen], forecast), strict=True):
        for how in ways(config):
            if how.compile and setting.recompute == "cheap":  # torch.compile chooses that by itself
                continue
            point = fastest(config, setting, found, how, gpu, available, world_size=world_size)
            if point is not None:
                points.append(replace(point, accuracy=accuracy(config, setting)))
    return sorted(points, key=lambda point: point.times.step)


def undominated(points: Iterable[Point]) -> list[Point]:
    """Those that no other point beats in time and memory whose gradient is exact, or the same."""
    points = list(points)

    def beats(one: Point, other: Point) -> bool:
        alike = (one.setting.keep_ratio, one.setting.mhsa_drop) == (other.setting.keep_ratio, other.setting.mhsa_drop)
        better = (one.times.step, one.peak) < (other.times.step, other.peak)
        return (alike or one.setting.exact) and better and one.peak <= other.peak

    return [point for point in points if not any(beats(other, point) for other in points if other is not point)]
