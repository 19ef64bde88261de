"""Fits the time forecast's efficiencies to the records of a GPU: python -m scripts.fit_efficiencies

Writes sbp/training/plan/efficiencies.json from results/gpu: times of single operators in a step of ViT-Base and
ConvNeXt-Tiny, which `python -m scripts.operator_times` measured. Other networks' records are only compared with.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbp.training.benchmark.arms import ARMS
from sbp.training.plan import fusing, roofline
from sbp.training.plan.arms import arm_config, recorded
from sbp.training.plan.gpus import find
from sbp.training.plan.operators import PASSES, Kernel
from sbp.training.plan.roofline import DATA, FITTED_ON, serial
from sbp.training.record.files import read_json, write_json
from scripts.gpu.networks import NETWORKS

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
RECORDS = {  # of which network
    "h100-a7a1e7c/operators-vit_base.json": "vit_base",
    "h100-a7a1e7c/operators-convnext_tiny.json": "convnext_tiny",
}
COMPILED = "h100-a7a1e7c/vit_base-compiled_graph.json"
EAGER = "h100-a7a1e7c/vit_base-graph_cheap.json"
HOST = (("plain", "sbp"), ("cheap", "sbp_cheap"))  # arms whose steps took as long as their launches
START_US = 2.0  # of a fused kernel, as of an element-wise one
COMPUTES = (
    "product", "attention", "attention_backward", "convolution", "convolution_backward", "stem", "stem_backward",
    "depthwise", "depthwise_backward",
)  # fmt: skip
OVERLAP = {"product": 2.0, "convolution": 2.0, "convolution_backward": 2.0}  # others: 1
SERIAL = ("norm", "norm_weights", "sum")
KINDS = (
    *COMPUTES,
    "elementwise", "broadcast", "permuted", "cat", "move", "norm", "norm_backward", "norm_weights", "sum",
    "optimizer",
)  # fmt: skip
_CUDA = {  # operators that CUDA, or an in-place addition, has under another name
    "_to_copy": "copy",
    "copy_": "copy",
    "clone": "copy",
    "add_": "add",
    "mul_": "mul",
    "stack": "cat",
    "index_select": "gather",
    "cudnn_convolution": "convolution",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "_cudnn_attention_forward": "attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "attention_backward",
    "_cudnn_attention_backward": "attention_backward",
}

Key = tuple[str, tuple[tuple[int, ...], ...]]


def key(name: str, shapes: Sequence[Sequence[int]]) -> Key:
    """What an operator of a record and one of a fake step are matched by."""
    name = name.removeprefix("aten::")
    name = _CUDA.get(name, name)
    tensors = [tuple(shape) for shape in shapes if shape]
    if name == "cat" or name.startswith("_fused"):
        return name, ()  # a record has no shapes of lists
    if name == "addmm":
        return name, tuple(shape for shape in tensors if len(shape) == 2)[:2]
    if name == "attention_backward":
        return name, (tensors[0], tensors[2])
    known = {"mm": 2, "bmm": 2, "convolution": 2, "attention": 2, "convolution_backward": 3}
    return name, tuple(tensors[: known.get(name, 1)])


def groups() -> Iterator[tuple[str, Key, list[Kernel], float]]:
    """Of each record the operators that the fake step has as well: where from, kernels, microseconds of all."""
    for path, network in RECORDS.items():
        one, size = NETWORKS[network], NETWORKS[network].batch_size
        for arm, operators in json.loads((RESULTS / path).read_text())["arms"].items():
            step = recorded(arm_config(one.backbone, arm, size), size)
            kernels: dict[Key, list[Kernel]] = defaultdict(list)
            for kernel in step.kernels:
                shapes = [] if kernel.name.startswith("_fused") else kernel.shapes
                kernels[key(kernel.name, shapes)].append(kernel)
            times: dict[Key, float] = defaultdict(float)
            for found in operators:
                if found["name"].startswith("aten::"):
                    times[key(found["name"], found["shapes"])] += found["us"]
            for name, microseconds in times.items():
                if name in kernels:
                    yield f"{network} {arm}", name, kernels[name], microseconds


class Model:
    """The efficiencies of all kinds as one vector of logarithms."""

    def __init__(self) -> None:
        self.kinds = {kind: i for i, kind in enumerate(KINDS)}
        start = torch.tensor([0.5, 0.6, 1.5, 2.0], dtype=torch.float64)  # compute, bandwidth, start_us, rows_ns
        self.logarithms = start.log().repeat(len(KINDS), 1).requires_grad_()
        self.gpu = find(FITTED_ON)

    def table(self, found: list[list[Kernel]]) -> tuple[Tensor, Tensor, Tensor]:
        """Of all kernels alike within a group: the group, the kind, and (n, 5) count, flops, bytes, rows, launches."""
        rows: dict[tuple, list[float]] = {}
        for group, kernels in enumerate(found):
            for one in kernels:
                values = (one.flops, one.bytes, serial(one.kind, one.rows, one.columns), float(one.launches))
                rows.setdefault((group, self.kinds[one.kind], *values), [0.0])[0] += 1
        keys = torch.tensor([list(row) for row in rows], dtype=torch.float64)
        counts = torch.tensor(list(rows.values()), dtype=torch.float64)
        return keys[:, 0].long(), keys[:, 1].long(), torch.cat([counts, keys[:, 2:]], 1)

    def microseconds(self, kind: Tensor, values: Tensor) -> Tensor:
        """As `roofline.seconds`, of rows of the table."""
        compute, bandwidth, start, rows = self.logarithms.exp()[kind].unbind(1)
        count, flops, size, serial_rows, launches = values.unbind(1)
        vector = torch.tensor([one.startswith("depthwise") for one in KINDS])[kind]
        peak = torch.where(vector, self.gpu.vector_tflops, self.gpu.tensor_tflops) * 1e6
        overlap = torch.tensor([OVERLAP.get(one, 1.0) for one in KINDS], dtype=torch.float64)[kind]
        computing = flops / (compute * peak) + 1e-9
        moving = size / (bandwidth * self.gpu.bandwidth * 1e3) + 1e-9
        working = (computing**overlap + moving**overlap) ** (1 / overlap)
        serial_time = serial_rows * rows * 1e-3
        at_once = kind == self.kinds["norm_weights"]
        working = torch.where(at_once, torch.maximum(working, serial_time), working + serial_time)
        return count * (launches.clamp(min=1) * start + working)

    def fit(self, found: list[list[Kernel]], measured: Tensor, steps: int = 3000) -> Tensor:
        """Minimises squared errors of the logarithm of each group's time, weighted by it; returns forecast times."""
        group, kind, values = self.table(found)
        weights = measured / measured.sum()
        optimizer = torch.optim.Adam([self.logarithms], lr=0.02)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
            optimizer.zero_grad()
            forecast = self.summed(group, kind, values, len(measured))
            error = (weights * (forecast / measured).log() ** 2).sum()
            (error + 1e-6 * (self.logarithms**2).sum()).backward()
            optimizer.step()
            with torch.no_grad():
                self.logarithms[:, :2].clamp_(max=0.0)  # no more than the peak
                self.logarithms[:, 2].clamp_(min=0.0)  # a kernel takes a microsecond at least
        return self.summed(group, kind, values, len(measured)).detach()

    def summed(self, group: Tensor, kind: Tensor, values: Tensor, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64).index_add(0, group, self.microseconds(kind, values))

    def kinds_found(self) -> dict[str, dict[str, Any]]:
        fitted = self.logarithms.detach().exp().tolist()
        return {
            kind: {
                "compute": round(compute, 4) if kind in COMPUTES else None,
                "bandwidth": round(bandwidth, 4),
                "start_us": round(start, 3),
                "rows_ns": round(rows, 3) if kind in SERIAL else 0.0,
                "overlap": OVERLAP.get(kind, 1.0),
            }
            for kind, (compute, bandwidth, start, rows) in zip(KINDS, fitted, strict=True)
        }


def fit() -> dict[str, Any]:
    """The content of efficiencies.json."""
    torch.manual_seed(0)
    origins, names, found, times = zip(*groups(), strict=True)
    measured = torch.tensor(times, dtype=torch.float64)
    model = Model()
    forecast = model.fit(list(found), measured)
    for name in dict.fromkeys(origins):
        mine = torch.tensor([origin == name for origin in origins])
        print(f"{name:<26} {measured[mine].sum() / 1000:8.2f} ms measured, {forecast[mine].sum() / 1000:8.2f} fitted")
    worst = ((forecast - measured).abs()).argsort(descending=True)[:25]
    for i in worst.tolist():
        print(f"{origins[i]:<24} {times[i]:8.0f} us measured, {forecast[i]:8.0f} fitted, {found[i][0].kind} {names[i]}")
    record, kinds = read_json(RESULTS / next(iter(RECORDS))), model.kinds_found()
    return {
        "source": {
            "device": record["device"],
            "gpu": FITTED_ON,
            "versions": {name: record["versions"][name] for name in ("torch", "timm")},
            "records": [f"results/gpu/{path}" for path in (*RECORDS, COMPILED, EAGER)],
            "made_by": "python -m scripts.fit_efficiencies",
            "passes": list(PASSES),
        },
        "kinds": kinds | {fusing.FUSED: compiled(kinds)},
        "host": host(),
    }


def compiled(kinds: dict[str, Any]) -> dict[str, Any]:
    """Of fused kernels: the bandwidth with which the compiled arms' kernels take as long as measured."""
    known = {kind: roofline.Efficiency(**values) for kind, values in kinds.items()}
    gpu, one = find(FITTED_ON), NETWORKS["vit_base"]
    shares = []
    for name, record in read_json(RESULTS / COMPILED)["arms"].items():
        if ARMS[name].compile is None:
            continue
        kernels = fusing.fused(recorded(arm_config(one.backbone, name, one.batch_size), one.batch_size).kernels)
        rest = sum(roofline.seconds(k, gpu, known[k.kind]) for k in kernels if k.kind != fusing.FUSED)
        groups = [k for k in kernels if k.kind == fusing.FUSED]
        left = record["kernel_ms"] / 1000 - rest - len(groups) * START_US * 1e-6
        shares.append(sum(k.bytes for k in groups) / left / gpu.bandwidth / 1e9)
        print(f"compiled {name}: {len(groups)} groups, bandwidth {shares[-1]:.3f}")
    bandwidth = round(sum(shares) / len(shares), 4)
    return {"compute": None, "bandwidth": bandwidth, "start_us": START_US, "rows_ns": 0.0, "overlap": 1.0}


def host() -> dict[str, Any]:
    """Of the records' machine: microseconds of a launch, and how much slower it was with what is computed again."""
    arms = read_json(RESULTS / EAGER)["arms"]
    plain, again = ([arms[name]["median_ms"]["step"] / arms[name]["launches"] for name in names] for names in HOST)
    launch, slower = sum(plain) / len(plain), sum(again) / len(again)
    return {"launch_us": round(1000 * launch, 1), "recompute": round(slower / launch, 2)}


if __name__ == "__main__":
    write_json(DATA, fit())
