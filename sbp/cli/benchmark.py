"""sbp benchmark [backbone=NAME] [key=value] ...: compares ways to train a network by time and memory.

    sbp benchmark backbone=vit_base batch_size=64 arms=[plain,sbp]

Also under `torchrun --nproc_per_node=N -m sbp.cli`. `--help` lists every key. Writes <network>.json, .md and .png to
run_dir.
"""

import logging
from pathlib import Path
from typing import Any

from sbp.cli.launch import command
from sbp.training.benchmark.benchmark import benchmark
from sbp.training.benchmark.report import table, write
from sbp.training.config.requests import BenchmarkConfig
from sbp.training.runtime import distributed

log = logging.getLogger("benchmark")


def compare(config: BenchmarkConfig, folder: Path) -> None:
    result = benchmark(config)
    if distributed.is_main():
        write(result, folder, result["network"])
        log.info("%s: %s\n\n%s\n", folder, result["network"], table(result))


def main() -> Any:
    return command("benchmark", BenchmarkConfig, compare)
