"""Measures what a plan needs to know of a GPU, on the GPU itself, in less than a minute.

The measuring runs on any device; a plan of a CPU makes no sense, though.
"""

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from sbp.training.plan.gpus import Gpu, matching
from sbp.training.plan.roofline import efficiencies
from sbp.training.runtime import distributed, environment

PRODUCT = {"cuda": 8192, "cpu": 256}  # side of the matrices
COPIED = {"cuda": 2**28, "cpu": 2**20}  # numbers in float32
TINY = 200  # kernels in a row


def pick(name: str) -> torch.device:
    """The CUDA device. Raises ValueError where there is none, or another one is asked for."""
    if name == "cpu" or not torch.cuda.is_available():
        raise ValueError(
            f"sbp plan calibrate needs a CUDA device, and device={name} is none here; gpu=NAME takes a data sheet"
        )
    return distributed.pick_device(name)


def calibrated(name: str, seconds: float) -> dict[str, Any]:
    """The content of a file that `gpus.find` takes. Raises ValueError without CUDA."""
    device = pick(name)
    properties = torch.cuda.get_device_properties(device)
    found = measure(device, seconds)
    label = environment.device_name(device)
    sheet = matching(label, properties.total_memory / 2**30)
    clock = sheet.clock_ghz if sheet is not None else float(getattr(properties, "clock_rate", 1.5e6)) / 1e6
    gpu = Gpu(
        name=label,
        tensor_tflops=_peak(found["tensor_tflops"], "product"),
        vector_tflops=found["vector_tflops"] if sheet is None else sheet.vector_tflops,
        bandwidth=found["bandwidth"] / efficiencies()["elementwise"].bandwidth,
        memory_gib=properties.total_memory / 2**30,
        sms=properties.multi_processor_count,
        clock_ghz=clock,
        launch_us=found["launch_us"],
        bfloat16=torch.cuda.is_bf16_supported(including_emulation=False),
        source="measured by sbp plan calibrate",
    )
    return {"gpu": vars(gpu), "measured": found, "versions": environment.versions()}


def _peak(rate: float, kind: str) -> float:
    """The rate that the efficiency of large kernels of this kind is a share of."""
    share = efficiencies()[kind].compute
    assert share is not None
    return rate / share


def measure(device: torch.device, seconds: float) -> dict[str, float]:
    """TFLOP/s of products, in half precision and in float32; GB/s of additions; microseconds that a launch takes."""
    each = seconds / 5
    half = torch.bfloat16 if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False) else None
    side, count = PRODUCT[device.type], COPIED[device.type]
    return {
        "tensor_tflops": _product_rate(device, side, half or torch.float16, each),
        "vector_tflops": _product_rate(device, side // 2, torch.float32, each),
        "bandwidth": _bandwidth(device, count, each),
        "launch_us": _launch(device, each),
    }


def _product_rate(device: torch.device, side: int, dtype: torch.dtype, seconds: float) -> float:
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(one)
    return 2 * side**3 / timed(lambda: torch.mm(one, other, out=out), device, seconds) / 1e12


def _bandwidth(device: torch.device, count: int, seconds: float) -> float:
    one, other = torch.randn(count, device=device), torch.randn(count, device=device)
    out = torch.empty_like(one)
    return 3 * 4 * count / timed(lambda: torch.add(one, other, out=out), device, seconds) / 1e9


def _launch(device: torch.device, seconds: float) -> float:
    """Of small layers' forward and backward pass, which a step in eager mode has: Python, autograd and the driver."""
    x = torch.randn(8, 8, device=device, requires_grad=True)

    def run() -> None:
        y: Tensor = x
        for _ in range(TINY // 2):
            y = y.sin()
        y.sum().backward()
        x.grad = None

    launches = 3 * (TINY // 2)  # a sine, and in the backward pass its cosine and a product
    return 1e6 * timed(run, device, seconds) / launches


def timed(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of a call: the best of as many rounds as there is time for, of as many calls as make it long enough."""

    def round_of(calls: int) -> float:
        _wait(device)
        begin = perf_counter()
        for _ in range(calls):
            run()
        _wait(device)
        return (perf_counter() - begin) / calls

    begin = perf_counter()
    run()
    calls = max(1, min(1000, math.ceil(0.02 / max(round_of(1), 1e-7))))
    best = round_of(calls)
    while perf_counter() - begin < seconds / 2:
        best = min(best, round_of(calls))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
