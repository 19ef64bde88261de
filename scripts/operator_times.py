"""Times of a training step's operators on a GPU, by shapes: python -m scripts.operator_times FOLDER [NETWORK ...]

Writes FOLDER/operators-NETWORK.json for networks of scripts/gpu/networks.py: what the efficiencies of the time forecast
are fitted to.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sbp.training.benchmark.arms import ARMS
from sbp.training.benchmark.report import write_record
from sbp.training.benchmark.runner import Runner, make_batch
from sbp.training.config.requests import BenchmarkConfig
from sbp.training.runtime import distributed, environment
from scripts.gpu.networks import benchmark_config

TIMED = ("plain", "sbp", "sbp_cheap", "sbp_query")


def operators(config: BenchmarkConfig, arm: str, device: torch.device) -> list[dict[str, Any]]:
    """Of one warmed-up step: name, shapes of the inputs, calls, and microseconds of the kernels that it launched."""
    runner, batch = Runner(config, ARMS[arm], device), make_batch(config, config.batch_size, device)
    runner.turn(batch, 3)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=kinds, record_shapes=True) as profiler:
        runner.turn(batch, 1)
    averages = [one for one in profiler.key_averages(group_by_input_shape=True) if one.device_type == DeviceType.CPU]
    found = [
        {
            "name": one.key,
            "shapes": one.input_shapes,
            "calls": one.count,
            "us": one.self_device_time_total if device.type == "cuda" else one.self_cpu_time_total,
        }
        for one in averages
    ]
    return [one for one in found if one["us"] > 0]


def main(folder: Path, networks: list[str], device: torch.device) -> None:
    for network in networks:
        arms = [name for name in TIMED if network.startswith("vit") or not ARMS[name].vit_only]
        config = benchmark_config(network, arms, device.type, small=False, release=None)
        record = {
            "network": config.backbone.name,
            "batch_size": config.batch_size,
            "amp": config.amp,
            "device": environment.device_name(device),
            "versions": environment.versions(),
            "arms": {name: operators(config, name, device) for name in arms},
        }
        write_record(record, folder / f"operators-{network}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["vit_base", "convnext_tiny"], distributed.pick_device("cuda"))
