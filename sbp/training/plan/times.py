"""How long a step takes: the kernels, or the host that launches them, whichever is slower."""

from collections.abc import Sequence
from dataclasses import dataclass

from sbp.training.plan import fusing
from sbp.training.plan.gpus import Gpu
from sbp.training.plan.operators import PASSES, Kernel
from sbp.training.plan.roofline import kernel_seconds, load
from sbp.training.plan.steps import Step


@dataclass(frozen=True)
class How:
    """compile: by torch.compile. graph: passes are captured and replayed. cast_together: weights, in one call."""

    compile: bool = False
    graph: bool = False
    cast_together: bool = False


@dataclass(frozen=True)
class Times:
    """Of one optimizer step, in seconds. launches: of kernels, by the host or a graph."""

    kernels: float
    step: float
    launches: int


def transformed(kernels: Sequence[Kernel], how: How, amp: str) -> list[Kernel]:
    """What runs of a step's kernels."""
    if how.compile:
        return fusing.fused(kernels)
    return fusing.cast_together(kernels) if how.cast_together and amp != "off" else list(kernels)


def forecast_times(
    step: Step, gpu: Gpu, how: How, *, accumulation: int = 1, recompute: bool = False, amp: str = "bfloat16"
) -> Times:
    """Of a step of so many micro batches. step: of one. recompute: its backward pass runs Python, which slows down
    launching."""
    kernels = transformed(step.kernels, how, amp)
    return times_of(kernels, gpu, how, accumulation=accumulation, recompute=recompute, amp=amp)


def times_of(kernels: Sequence[Kernel], gpu: Gpu, how: How, *, accumulation: int, recompute: bool, amp: str) -> Times:
    """As `forecast_times`, of kernels that are what runs.

    In eager mode the host launches each kernel; of a graph it launches the passes as a whole, and the optimizer's
    kernels one by one.
    """
    passes = [kernel for kernel in kernels if kernel.part in PASSES]
    once = [kernel for kernel in kernels if kernel.part not in PASSES]
    in_passes = accumulation * kernel_seconds(passes, gpu, amp=amp)
    after = kernel_seconds(once, gpu, amp=amp)
    of_passes, of_once = accumulation * fusing.launches(passes), fusing.launches(once)
    launch = gpu.launch_us * 1e-6
    slower = load()["host"]["recompute"] if recompute and not how.compile else 1.0
    if how.graph:
        time = in_passes + accumulation * launch + max(after, of_once * launch)
    else:
        time = max(in_passes + after, (of_passes * slower + of_once) * launch)
    return Times(in_passes + after, time, of_passes + of_once)
