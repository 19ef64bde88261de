"""Compares ways to train one network, the arms, by the time and the memory of a training step.

All arms live in one process and take turns, so that a machine that slows down slows all of them; medians are taken
over the rounds. Memory is each arm's own. Nothing here needs more than torch, torchvision and timm.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
from timm.models import VisionTransformer

import sbp
from sbp.training.benchmark.arms import ARMS, Arm
from sbp.training.benchmark.runner import PARTS, Batch, Runner, build_on, bytes_of, make_batch
from sbp.training.config.requests import BenchmarkConfig
from sbp.training.config.rules import validate_benchmark
from sbp.training.runtime import distributed, environment
from sbp.training.tasks.detection.detector import Detector

log = logging.getLogger(__name__)


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
    batch = make_batch(config, config.batch_size, device)
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


# -- one arm


@contextmanager
def _recorded(record: dict[str, Any], key: str = "error") -> Iterator[None]:
    """What fails inside is written to the record, and the other arms go on.

    Of several processes one that fails alone ends all of them: the others wait for it within a step.
    """
    try:
        yield
    except Exception as error:
        if distributed.world_size() > 1 and not isinstance(error, ValueError):  # which is of the settings of all
            raise
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
    arms' tensors, which the allocator gives to this arm, too, but not what their graphs hold, which it does not. A
    graph arm is captured in between: replays allocate nothing, they work in the memory of the capture, so that the
    capture's own peak is that of every replay. What the graph holds on to, the batch and the gradients, is part of it.
    CPU: what autograd saves for the backward pass.
    """
    log.info("starting %s", arm.label)
    _free()
    if device.type != "cuda":
        runner = Runner(config, arm, device)
        runner.turn(batch, config.warmup)
        record["saved_bytes"] = sbp.saved_bytes(lambda: runner._forward(*batch)[0])
        record |= runner.launches(batch)
        return runner
    allocated = torch.cuda.memory_allocated(device) - bytes_of(batch)
    reserved = allocated + unused_in_pools(torch.cuda.memory_snapshot())
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
        "peak_reserved": torch.cuda.max_memory_reserved(device) - reserved,
    }
    record |= dict(zip(figures, map(int, distributed.maxima(list(figures.values()))), strict=True))
    with _recorded(record, "launches_error"):  # not every machine lets its GPU be profiled
        record |= runner.launches(batch)
    return runner


def unused_in_pools(segments: Sequence[Mapping[str, Any]]) -> int:
    """Bytes that captured graphs hold on to and that no tensor is in now, of `torch.cuda.memory_snapshot`."""
    pools = [one for one in segments if tuple(one["segment_pool_id"]) != (0, 0)]
    return sum(one["total_size"] - one["allocated_size"] for one in pools)


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
        runner.turn(make_batch(config, size, device), 1)
        torch.cuda.reset_peak_memory_stats(device)
        runner.turn(make_batch(config, size, device), 1)
        return torch.cuda.max_memory_allocated(device)

    def fits(size: int) -> bool:
        runner.optimizer.zero_grad(set_to_none=True)
        _free()
        try:
            runner.turn(make_batch(config, size, device), 2)
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
