"""How long a GPU takes for a kernel: the rooflines of a few kinds of kernels, whose efficiencies were fitted once.

A kernel needs its operations at a share of the peak rate, its bytes at a share of the bandwidth, and a moment to start;
sums and norms work through their rows as well. efficiencies.json holds the shares, `python -m
scripts.fit_efficiencies` makes it from the records of an H100.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sbp.training.plan.gpus import Gpu, find
from sbp.training.plan.operators import Kernel
from sbp.training.record.files import read_text

DATA = Path(__file__).with_name("efficiencies.json")
FITTED_ON = "h100"
WHOLE = 65536  # rows from which on the gradients of a norm's weights are summed up by all multiprocessors


@dataclass(frozen=True)
class Efficiency:
    """Of a kind of kernels.

    compute, bandwidth: shares of the peaks, None where it does not count. start_us: microseconds of a kernel that has
    nothing to do. rows_ns: nanoseconds for each of `serial(kernel)`, on the GPU of the records. overlap: of operations
    and bytes, 1 for one after the other, more for at once.
    """

    compute: float | None
    bandwidth: float
    start_us: float
    rows_ns: float
    overlap: float


def serial(kind: str, rows: float, columns: float) -> float:
    """What a kernel works through one after another: a norm its vectors; a sum the root of its rows, as more of them
    keep more multiprocessors busy. With 192 columns it was seen to take 2.4 times as long, we do not know why."""
    if kind == "norm":
        return rows
    if kind == "norm_weights":
        return rows if rows <= WHOLE else 0.0
    if kind == "sum" and columns > 1:
        return rows**0.5 * (2.4 if columns == 192 else 1)
    return 0.0


def seconds(kernel: Kernel, gpu: Gpu, one: Efficiency, *, amp: str = "bfloat16") -> float:
    """The time of all of the kernel's launches. one: of its kind."""
    peak = _peak_tflops(kernel.kind, gpu, amp)
    computing = 0.0 if one.compute is None else kernel.flops / (one.compute * peak * 1e12)
    moving = kernel.bytes / (one.bandwidth * gpu.bandwidth * 1e9)
    working = (computing**one.overlap + moving**one.overlap) ** (1 / one.overlap)
    rows = serial(kernel.kind, kernel.rows, kernel.columns) * one.rows_ns * 1e-9 * _pace() / gpu.pace
    working = max(working, rows) if kernel.kind == "norm_weights" else working + rows
    return kernel.count * (max(kernel.launches, 1) * one.start_us * 1e-6 + working)


def _peak_tflops(kind: str, gpu: Gpu, amp: str) -> float:
    """In float32 PyTorch lets convolutions round to TF32, at half of the rate, and not products."""
    if kind.startswith("depthwise"):
        return gpu.vector_tflops
    if amp != "off":
        return gpu.tensor_tflops
    rounded = gpu.bfloat16 and kind.startswith(("convolution", "stem"))  # as of the same generation on
    return gpu.tensor_tflops / 2 if rounded else gpu.vector_tflops


@cache
def _pace() -> float:
    return find(FITTED_ON).pace


@cache
def load() -> dict[str, Any]:
    """efficiencies.json."""
    return json.loads(read_text(DATA))


@cache
def efficiencies() -> dict[str, Efficiency]:
    return {kind: Efficiency(**values) for kind, values in load()["kinds"].items()}


def kernel_seconds(kernels: Iterable[Kernel], gpu: Gpu, *, amp: str = "bfloat16") -> float:
    """The sum of the kernels' times."""
    known = efficiencies()
    return sum(seconds(kernel, gpu, known[kernel.kind], amp=amp) for kernel in kernels)
