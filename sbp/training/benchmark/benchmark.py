"""Compares ways to train one network, the arms, by the time and the memory of a training step.

All arms live in one process and take turns, so that a machine that slows down slows all of them; medians are taken
over the rounds. Memory is each arm's own. Nothing here needs more than torch, torchvision and timm.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._pytree import tree_leaves

import sbp
from sbp.training.benchmark import launches
from sbp.training.benchmark.authors_release import release_model
from sbp.training.config.model import SbpConfig
from sbp.training.config.recipe import RecipeConfig
from sbp.training.config.requests import BenchmarkConfig
from sbp.training.config.rules import validate_benchmark
from sbp.training.models.build import build_model
from sbp.training.models.optim import build_criterion
from sbp.training.runtime import distributed, environment, wrapping
from sbp.training.runtime.compiling import compile_model
from sbp.training.runtime.graphs import CapturedPass, CudaRecorder, Pass, Recorder
from sbp.training.runtime.precision import Casts, autocast
from sbp.training.tasks.detection import synthetic
from sbp.training.tasks.detection.detector import Detector, build_detector
from sbp.training.tasks.task import sum_of

log = logging.getLogger(__name__)

EXACT, DROPPING, SBP, RELEASE = "exact gradient", "token dropping", "SBP", "SBP, authors' release"
KINDS = (EXACT, DROPPING, SBP, RELEASE)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # of autocast
PARTS = ("forward", "backward", "optimizer")  # of a step, in this order

Batch = tuple[Tensor, Any]


@dataclass(frozen=True)
class Arm:
    """One way to train the network.

    kind: one of KINDS. sbp: arguments of `sbp.apply` besides those in the config; None for timm's model as it is.
    compile: what torch.compile is given, the "model" or its "blocks"; None for eager mode. budget: its
    activation_memory_budget, the share of the activations that it would save by itself.
    graph: forward and backward pass are captured as a CUDA graph, and replayed. cast_together: the weights are cast to
    autocast's precision in one call a step.
    """

    label: str
    kind: str = EXACT
    sbp: dict[str, Any] | None = None
    compile: str | None = None
    budget: float = 1.0
    graph: bool = False
    cast_together: bool = False
    checkpointing: bool = False
    patch_drop: float = 0.0
    vit_only: bool = False
    release: bool = False


CHEAP, QUERY, QUARTER = {"recompute": "cheap"}, {"mhsa_drop": "query"}, {"keep_ratio": 0.25}

ARMS = {  # "plain" is timm's model as anybody trains it; compiled code casts weights as it sees fit
    "plain": Arm("plain"),
    "casts": Arm("casts together", cast_together=True),
    "graph": Arm("graph", graph=True, cast_together=True),
    "checkpoint": Arm("checkpointing", checkpointing=True),
    "cheap": Arm("cheap recompute", sbp={"keep_ratio": 1.0} | CHEAP),
    "cheap_graph": Arm("cheap recompute + graph", sbp={"keep_ratio": 1.0} | CHEAP, graph=True, cast_together=True),
    "compile": Arm("compile", compile="model"),
    "compile_0.9": Arm("compile, budget 0.9", compile="model", budget=0.9),
    "compile_0.5": Arm("compile, budget 0.5", compile="model", budget=0.5),
    "compile_0.25": Arm("compile, budget 0.25", compile="model", budget=0.25),
    "compile_graph": Arm("compile + graph", compile="model", graph=True),
    "blocks": Arm("compiled blocks", compile="blocks"),
    "blocks_graph": Arm("compiled blocks + graph", compile="blocks", graph=True),
    "patch_dropout": Arm("PatchDropout 0.5", DROPPING, patch_drop=0.5, vit_only=True),
    "sbp": Arm("SBP", SBP, sbp={}),
    "sbp_casts": Arm("SBP, casts together", SBP, sbp={}, cast_together=True),
    "sbp_graph": Arm("SBP + graph", SBP, sbp={}, graph=True, cast_together=True),
    "sbp_cheap": Arm("SBP, cheap recompute", SBP, sbp=CHEAP),
    "sbp_cheap_graph": Arm("SBP, cheap recompute + graph", SBP, sbp=CHEAP, graph=True, cast_together=True),
    "sbp_25_cheap": Arm("SBP 0.25, cheap recompute", SBP, sbp=QUARTER | CHEAP),
    "sbp_block": Arm("SBP, block recompute", SBP, sbp={"recompute": "block"}),
    "sbp_query": Arm("SBP, query", SBP, sbp=QUERY, vit_only=True),
    "sbp_query_graph": Arm("SBP, query + graph", SBP, sbp=QUERY, vit_only=True, graph=True, cast_together=True),
    "query_cheap": Arm("SBP, query, cheap recompute", SBP, sbp=QUERY | CHEAP, vit_only=True),
    "query_25": Arm("SBP 0.25, query", SBP, sbp=QUERY | QUARTER, vit_only=True),
    "query_25_cheap": Arm("SBP 0.25, query, cheap recompute", SBP, sbp=QUERY | QUARTER | CHEAP, vit_only=True),
    "sbp_head": Arm("SBP, head", SBP, sbp={"mhsa_drop": "head"}, vit_only=True),
    "sbp_qkv_exact": Arm("SBP, qkv_exact", SBP, sbp={"mhsa_drop": "qkv_exact"}, vit_only=True),
    "sbp_compile": Arm("SBP + compile", SBP, sbp={}, compile="model"),
    "sbp_compile_0.5": Arm("SBP + compile, budget 0.5", SBP, sbp={}, compile="model", budget=0.5),
    "sbp_compile_graph": Arm("SBP + compile + graph", SBP, sbp={}, compile="model", graph=True),
    "sbp_blocks": Arm("SBP + compiled blocks", SBP, sbp={}, compile="blocks"),
    "sbp_blocks_graph": Arm("SBP + compiled blocks + graph", SBP, sbp={}, compile="blocks", graph=True),
    "release": Arm("authors' release", RELEASE, sbp={}, release=True),
}


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Runs the arms and returns the record: where and how, and for each arm its figures or its error.

    Times are in milliseconds, memory in bytes. Under torchrun every process runs every arm under DDP; the times are
    those of this process, the memory is the largest over the processes.

    Raises ValueError for settings that are wrong for every arm.
    """
    begin = perf_counter()
    validate_benchmark(config)
    device, detects = distributed.pick_device(config.device), config.task == "detection"
    names = _choose_arms(config, device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    batch = _batch(config, config.batch_size, device)
    records: dict[str, dict[str, Any]] = {
        name: {"label": ARMS[name].label, "kind": ARMS[name].kind, "error": None} for name in names
    }

    def time_is_up() -> bool:
        return distributed.from_main(config.seconds is not None and perf_counter() - begin > config.seconds)

    with torch._dynamo.config.patch(recompile_limit=8 * len(ARMS)):  # the arms share timm's code objects
        runners: dict[str, Runner] = {}
        for name in names:
            with _recorded(records[name]):
                runners[name] = _start(config, ARMS[name], batch, device, records[name])
        rounds = 0
        while rounds == 0 or (rounds < config.rounds and not time_is_up()):
            for name in list(runners):
                with _recorded(records[name]):
                    _add_times(records[name], runners[name].turn(batch, config.steps))
                if records[name]["error"]:
                    del runners[name]
            rounds += 1
            log.info("round %d/%d", rounds, config.rounds)
    parameters = sum(p.numel() for p in build_on(torch.device("meta"), config, ARMS["plain"]).parameters())
    runners.clear()
    torch._dynamo.reset()  # compiled code holds on to its model
    if device.type == "cuda" and distributed.world_size() == 1 and config.largest_batch:
        for name, record in records.items():
            if record["error"] is None and not time_is_up():
                with _recorded(record, "largest_batch_error"):
                    record["largest_batch"] = _largest_batch(config, ARMS[name], device, record)
                    record["largest_batch_estimated"] = _is_extrapolated(ARMS[name])

    running = [record for record in records.values() if record["error"] is None]
    for record in running:
        _summarise(record, config.batch_size * distributed.world_size())
    for record in running:
        _compare(record, records.get("plain", {}))
    return {
        "network": f"{config.detector.name}, {config.backbone.name}" if detects else config.backbone.name,
        "parameters": parameters,
        "device": environment.device_name(device),
        "device_memory": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "world_size": distributed.world_size(),
        "versions": environment.versions(),
        "amp": config.amp,
        "batch_size": config.batch_size,
        "rounds": rounds,
        "seconds": perf_counter() - begin,
        "settings": asdict(config),
        "arms": records,
    }


def _choose_arms(config: BenchmarkConfig, device: torch.device) -> list[str]:
    """The names of the arms to run. Raises ValueError for what is wrong whichever arm runs."""
    plain = build_on(torch.device("meta"), config, ARMS["plain"])
    build_on(torch.device("meta"), config, ARMS["sbp"])
    is_vit, is_detector = isinstance(plain, VisionTransformer), isinstance(plain, Detector)
    drops = sbp.supports(plain).mhsa_drops
    possible = [
        name
        for name, arm in ARMS.items()
        if (is_vit or not arm.vit_only or (arm.sbp or {}).get("mhsa_drop") in drops)
        and (config.release is not None or not arm.release)
        # a detector's images and regions differ in size and number
        if not is_detector or not (arm.compile or arm.graph or arm.cast_together or arm.release)
    ]
    graphs = device.type == "cuda" and distributed.world_size() == 1
    runnable = [name for name in possible if graphs or not ARMS[name].graph]
    names = runnable if config.arms is None else config.arms
    unknown = [name for name in names if name not in possible]
    if unknown or not names:
        raise ValueError(f"arms={unknown} must be among {', '.join(possible)} for {config.backbone.name}")
    captured = [name for name in names if name not in runnable]
    if captured:
        raise ValueError(f"arms={captured} cannot run: graph arms need CUDA, and one process; device is {device.type}")
    if config.release is not None and "release" in names:
        build_on(torch.device("cpu"), config, ARMS["release"])
    return list(dict.fromkeys(names))


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


def _batch(config: BenchmarkConfig, size: int, device: torch.device) -> Batch:
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


def _bytes(batch: Batch) -> int:
    return sum(one.nbytes for one in tree_leaves(batch) if isinstance(one, Tensor))


# -- one arm


@contextmanager
def _recorded(record: dict[str, Any], key: str = "error") -> Iterator[None]:
    """What fails inside is written to the record, and the other arms go on."""
    try:
        yield
    except Exception as error:
        record[key] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        log.warning("%s failed: %s", record["label"], record[key])
    if record.get(key):
        _free()  # outside of `except`, where the error's frames hold what they had


def _free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():  # each arm's figures count its own workspaces, of 64 MiB, not only the first one's
        torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()  # does nothing without CUDA


def _start(config: BenchmarkConfig, arm: Arm, batch: Batch, device: torch.device, record: dict[str, Any]) -> Runner:
    """The arm after its warm-up; writes its memory to the record: its own, with its batch, without other arms'.

    CUDA: what stays between steps, and the peaks of a step. What is reserved includes what lies unused beside the other
    arms' tensors: the allocator gives it to this arm, too. A graph arm is captured in between: replays allocate
    nothing, they work in the memory of the capture, so that the capture's own peak is that of every replay. What the
    graph holds on to, the batch and the gradients, is part of it. CPU: what autograd saves for the
    backward pass.
    """
    log.info("starting %s", arm.label)
    _free()
    if device.type != "cuda":
        runner = Runner(config, arm, device)
        runner.turn(batch, config.warmup)
        record["saved_bytes"] = sbp.saved_bytes(lambda: runner._forward(*batch)[0])
        record |= runner.launches(batch)
        return runner
    allocated = torch.cuda.memory_allocated(device) - _bytes(batch)
    runner = Runner(config, arm, device)
    runner.turn(batch, config.warmup)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    resident = torch.cuda.memory_allocated(device) - allocated
    if arm.graph:
        runner.capture(batch)
    runner.turn(batch, 2)
    figures = {
        "resident": resident,
        "peak_allocated": torch.cuda.max_memory_allocated(device) - allocated,
        "peak_reserved": torch.cuda.max_memory_reserved(device) - allocated,
    }
    record |= dict(zip(figures, map(int, distributed.maxima(list(figures.values()))), strict=True))
    with _recorded(record, "launches_error"):  # not every machine lets its GPU be profiled
        record |= runner.launches(batch)
    return runner


def _add_times(record: dict[str, Any], turn: list[dict[str, float]]) -> None:
    raw = record.setdefault("times_ms", {part: [] for part in (*PARTS, "step")})
    for step in turn:
        for part, milliseconds in step.items():
            raw[part].append(milliseconds)


def _summarise(record: dict[str, Any], images: int) -> None:
    """Adds medians and quartiles, and images per second for so many images in a step."""
    marks = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    times = {part: torch.tensor(raw, dtype=torch.float64) for part, raw in record["times_ms"].items()}
    quartiles = {part: values.quantile(marks).tolist() for part, values in times.items()}
    record["median_ms"] = {part: values[1] for part, values in quartiles.items()}
    record["quartiles_ms"] = {part: [values[0], values[2]] for part, values in quartiles.items()}
    record["images_per_second"] = 1000 * images / record["median_ms"]["step"]


def _compare(record: dict[str, Any], plain: dict[str, Any]) -> None:
    """Adds the ratios to the plain arm; None without one."""
    record["time_ratio"] = record["memory_ratio"] = None
    if "median_ms" in plain:
        record["time_ratio"] = record["median_ms"]["step"] / plain["median_ms"]["step"]
        record["memory_ratio"] = memory(record) / memory(plain)


def memory(record: dict[str, Any]) -> int:
    """Bytes: the peak of a step on CUDA, what is saved for the backward pass on a CPU."""
    return record["peak_allocated"] if "peak_allocated" in record else record["saved_bytes"]


# -- the largest batch


def _largest_batch(config: BenchmarkConfig, arm: Arm, device: torch.device, record: dict[str, Any]) -> int:
    """How many images fit into the config's memory: by trial in eager mode; for a compiled or captured arm,
    which would be compiled or captured anew for each size, by extrapolation from its peak.

    The arm is alone on the device. What PyTorch's allocator does not hand out, such as the CUDA context, is not
    counted.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    limit = total if config.memory_gib is None else min(total, int(config.memory_gib * 2**30))
    if _is_extrapolated(arm):
        # Weights and AdamW's averages, 12 bytes a parameter, and under autocast copies of the weights, 2 bytes.
        fixed = record["resident"] - config.batch_size * 3 * config.data.image_size**2 * 4
        fixed *= 1 if config.amp == "off" else 14 / 12
        return int((limit - fixed) / (record["peak_allocated"] - fixed) * config.batch_size)
    log.info("largest batch of %s", arm.label)
    _free()
    runner = Runner(config, arm, device)

    def peak(size: int) -> int:
        runner.turn(_batch(config, size, device), 1)
        torch.cuda.reset_peak_memory_stats(device)
        runner.turn(_batch(config, size, device), 1)
        return torch.cuda.max_memory_allocated(device)

    def fits(size: int) -> bool:
        runner.optimizer.zero_grad(set_to_none=True)
        _free()
        try:
            runner.turn(_batch(config, size, device), 2)
        except torch.OutOfMemoryError:
            return False
        return True

    small, large = max(1, config.batch_size // 2), max(2, config.batch_size)
    low, high = peak(small), peak(large)
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    try:
        return search_largest(fits, large + int((limit - high) * (large - small) / (high - low)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _is_extrapolated(arm: Arm) -> bool:
    return arm.compile is not None or arm.graph


def search_largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest size that fits, to 2 %; 0 when none does. Widens from the guess, then bisects."""
    fitting, failing, size = 0, None, max(1, guess)
    while failing is None or failing - fitting > max(1, fitting // 50):
        if fits(size):
            fitting = size
        else:
            failing = size
        if failing is None:
            size = max(fitting + 1, fitting * 21 // 20)
        elif fitting == 0:
            size = failing * 19 // 20
        else:
            size = (fitting + failing) // 2
    return fitting
