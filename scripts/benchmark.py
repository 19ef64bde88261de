"""Compares ways to train a network by time and memory.

    python scripts/benchmark.py backbone=vit_base batch_size=64 arms=[plain,sbp]

Also under `torchrun --nproc_per_node=N`. `--help` lists every key. Writes <network>.json, .md and .png to run_dir.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # Python itself puts the folder of this file there, not the root

import hydra
from omegaconf import DictConfig

from sbp.cli.launch import join_processes, run_job
from sbp.training.benchmark.benchmark import benchmark
from sbp.training.benchmark.report import table, write
from sbp.training.config.schema import BenchmarkConfig
from sbp.training.runtime import distributed

log = logging.getLogger("benchmark")


def compare(config: BenchmarkConfig, folder: Path) -> None:
    result = benchmark(config)
    if distributed.is_main():
        write(result, folder, result["network"])
        log.info("%s: %s\n\n%s\n", folder, result["network"], table(result))


@hydra.main(version_base="1.3", config_path="../configs", config_name="benchmark")
def main(composed: DictConfig) -> None:
    run_job(composed, BenchmarkConfig, compare)


if __name__ == "__main__":
    join_processes()
    main()
