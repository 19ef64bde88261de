"""sbp forecast [group=choice] [key=value] ...: the peak CUDA memory of a training step, on a machine without a GPU.

    sbp forecast backbone=vit_base sbp.keep_ratio=0.5 global_batch_size=64 amp=bfloat16

Takes the groups and keys of `sbp train`, and memory_gib, world_size and rules (configs/forecast.yaml). Its micro
batch is the run's: micro_batch_size, or a process's share of global_batch_size. Writes forecast.json to run_dir.
"""

import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sbp.cli.compose import register
from sbp.cli.launch import command
from sbp.training.config.batches import plan_batches
from sbp.training.config.keys import check_limits, key
from sbp.training.config.requests import world_size
from sbp.training.config.run import Config
from sbp.training.memory import forecast as forecasts
from sbp.training.memory.allocations import PARTS
from sbp.training.memory.forecast import TODAY, Forecast
from sbp.training.memory.paper import PAPER
from sbp.training.record.files import write_json
from sbp.training.record.table import markdown
from sbp.training.runtime import environment

log = logging.getLogger("forecast")

RULES = {"today": TODAY, "paper": PAPER}


@dataclass
class ForecastConfig(Config):
    """A training run, and the GPU it is to run on."""

    memory_gib: float = key(24, "of the GPU; the largest micro batch is to fit into it", above=0)
    world_size: int = key(1, "processes, each with its own GPU", at_least=1)
    rules: str = key(
        "today", "paper: torch 1.8 and the authors' layers, for experiment=table1/...", one_of=tuple(RULES)
    )


register("forecast", ForecastConfig)


def report(config: ForecastConfig, folder: Path) -> None:
    """Prints the forecast and writes forecast.json. Raises ValueError for what the user got wrong."""
    check_limits(config)
    run = Config(**{field.name: getattr(config, field.name) for field in fields(Config)})
    processes = world_size(config)
    plan = plan_batches(run.global_batch_size, run.micro_batch_size, processes)
    batch = plan.micro_batch_size
    how: Any = {"world_size": processes, "rules": RULES[config.rules]}

    of_phases = forecasts.forecast_phases(run, batch, **how)
    name, one = max(of_phases.items(), key=lambda pair: pair[1].peak)
    sbp = f"SBP, keep_ratio {run.sbp.keep_ratio}" if run.sbp.enabled else "no SBP"
    log.info("forecast   %s, %s, amp %s, rules of %s", run.backbone.name, sbp, run.amp, config.rules)
    log.info("batch      %d images at once, %d accumulated", batch, plan.accumulation)
    if run.parallel == "fsdp":
        log.info("parallel   ddp, where each process holds the whole model: fsdp needs less than this")
    if len(of_phases) > 1:
        log.info("phases     %s", ", ".join(f"{each}: {mib(found.peak):.1f} MiB" for each, found in of_phases.items()))
    log.info("peak       %8.1f MiB%s, of which", mib(one.peak), f" ({name})" if len(of_phases) > 1 else "")
    for part in PARTS:
        log.info("           %8.1f MiB %s", mib(getattr(one, part)), part)
    log.info("           cuDNN's and cuBLAS's workspaces, fragmentation and the CUDA context come on top")
    largest = forecasts.largest_micro_batch(run, config.memory_gib, **how)
    log.info("largest    micro_batch_size=%d fits into memory_gib=%g", largest, config.memory_gib)
    table = forecasts.keep_ratio_table(run, batch, **how)
    log.info("peak MiB at this batch, by keep_ratio and recompute:\n%s", show(table))
    result = {
        "peak": one.peak,
        **asdict(one),
        "peak_by_phase": {each: found.peak for each, found in of_phases.items()},
        "micro_batch_size": batch,
        "memory_gib": config.memory_gib,
        "largest_micro_batch_size": largest,
        "peak_by_recompute_and_keep_ratio": {
            mode: {str(ratio): cell.peak for ratio, cell in row.items()} for mode, row in table.items()
        },
        "versions": environment.versions(),
        "config": asdict(config),
    }
    write_json(folder / "forecast.json", result)
    log.info("%s", folder / "forecast.json")


def show(table: dict[str, dict[float, Forecast]]) -> str:
    ratios = list(next(iter(table.values())))
    rows = [[mode, *(f"{mib(cell.peak):.1f}" for cell in row.values())] for mode, row in table.items()]
    return markdown([["recompute", *(f"keep_ratio {ratio}" for ratio in ratios)], *rows])


def mib(size: int) -> float:
    return size / 2**20


def main() -> Any:
    return command("forecast", ForecastConfig, report)
