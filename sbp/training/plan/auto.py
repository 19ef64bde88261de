"""The micro batch that a run chooses for itself, and whether its first steps are what was forecast."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from time import perf_counter

import torch

from sbp.training.config.run import Config
from sbp.training.data.resident import resident_bytes
from sbp.training.memory.advice import available_memory
from sbp.training.plan.gpus import USABLE, Gpu, find, matching
from sbp.training.plan.search import Line, Point, fastest, line, of_runs, ways
from sbp.training.plan.settings import of_run
from sbp.training.runtime import environment

LIKELY = "a100-80gb"  # whose proportions stand for those of a GPU that is not known
MARGIN = 0.15
_FIRST, _LAST = 6, 16  # steps: passes are captured after 3, and code is compiled with the first


@dataclass(frozen=True)
class Expected:
    """Of a run: its micro batch, and what is forecast of its first steps, in seconds and bytes; None where nothing is.

    run_peak: of all steps, where later ones need more.
    """

    micro_batch_size: int
    step: float | None = None
    peak: int | None = None
    run_peak: int | None = None


def gpu_of(device: torch.device) -> Gpu:
    """The data sheet of this CUDA device; of one that has none here, another one's."""
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return matching(environment.device_name(device), memory) or replace(find(LIKELY), name="unknown", memory_gib=memory)


def choose(
    config: Config,
    device: torch.device,
    world_size: int,
    *,
    gpu: Gpu | None = None,
    available: float | None = None,
    forecast: Callable[[Config], Line] = line,
) -> Expected:
    """The micro batch with which a step of this run is forecast to be fastest, of those that fit into the GPU.

    On a CPU a process's whole share. gpu, available: those of the device, where None. Raises ValueError where no micro
    batch fits, and with FSDP.
    """
    if device.type != "cuda" and gpu is None:
        return Expected(config.global_batch_size // world_size)
    if config.parallel == "fsdp":
        raise ValueError(
            "micro_batch_size=auto forecasts parallel=ddp, where each process holds the whole model; with fsdp "
            "give it a number"
        )
    known = gpu_of(device) if gpu is None else gpu
    images = resident_bytes(config.data, config.recipe)
    free = (USABLE * available_memory() if available is None else available) - images
    plain = replace(config, micro_batch_size=None)
    (found,) = of_runs([plain], lambda configs: [forecast(one) for one in configs])
    point = _point(plain, found, known, free, world_size)
    if point is None:
        raise ValueError(
            f"micro_batch_size=auto: by forecast not even the smallest one fits into {free / 2**30:.1f} GiB, as many "
            f"as are free{' beside the images' if images else ''}; `sbp plan gpu={known.name} ...` says which "
            "settings do"
        )
    # What is not in the data sheet is not expected: how fast an unknown GPU is, or processes that wait for each other.
    timed = known.name != "unknown" and world_size == 1
    first = found.own_peak(point.micro_batch_size, point.accumulation > 1 or world_size > 1)
    step, more = point.times.step if timed else None, point.peak + images if point.peak > first else None
    return Expected(point.micro_batch_size, step, first + images, more)


def _point(config: Config, found: Line, gpu: Gpu, available: float, world_size: int) -> Point | None:
    candidates = [way for way in ways(config) if way.compile == bool(config.compile)]
    return fastest(config, of_run(config), found, candidates[0], gpu, available, world_size=world_size)


def differences(expected: Expected, step: float, peak: int) -> list[str]:
    """A line for what was measured to be more than 15 % off. step in seconds, peak in bytes."""
    lines = []
    if expected.step is not None and abs(step / expected.step - 1) > MARGIN:
        lines.append(
            f"a step takes {1000 * step:.1f} ms, {100 * (step / expected.step - 1):+.0f} % from the forecast of "
            f"{1000 * expected.step:.1f} ms; where images or launches are waited for, it is not the GPU"
        )
    if expected.peak is not None and abs(peak / expected.peak - 1) > MARGIN:
        lines.append(
            f"the peak is {peak / 2**20:.0f} MiB, {100 * (peak / expected.peak - 1):+.0f} % from the forecast of "
            f"{expected.peak / 2**20:.0f} MiB"
        )
    return lines


class FirstSteps:
    """Compares the first steps of a run with what is expected. Without CUDA, or with nothing expected, it does not.

    A step's time is the median of some, so that an evaluation or a checkpoint between two of them does not count.
    peak: the bytes that training has allocated at most so far. clock: for other devices' tests.
    """

    def __init__(
        self,
        expected: Expected | None,
        device: torch.device,
        peak: Callable[[], int],
        *,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.expected = expected
        self._clock, self._peak = clock or perf_counter, peak
        self._works = expected is not None and (device.type == "cuda" or clock is not None)
        self._steps, self._ends = 0, list[float]()

    def done(self) -> list[str]:
        """To be called after each step, which has read its loss; what is off, once enough of them are done."""
        if not self._works or self.expected is None:
            return []
        self._steps += 1
        if self._steps >= _FIRST:
            self._ends.append(self._clock())
        if self._steps < _LAST:
            return []
        self._works = False
        return differences(self.expected, median(end - begin for begin, end in pairwise(self._ends)), self._peak())
