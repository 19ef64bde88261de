"""A run with micro_batch_size=auto: the plan's answer takes its place before anything else reads it."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from sbp.training.config.batches import AUTO
from sbp.training.config.rules import validate
from sbp.training.config.run import Config
from sbp.training.engine import setup
from sbp.training.plan.auto import Expected, choose
from sbp.training.record.checkpoint import Checkpoints
from sbp.training.record.files import read_json
from sbp.training.record.status import RunStatus
from sbp.training.record.summary import RUN
from sbp.training.runtime import distributed

log = logging.getLogger(__name__)

T = TypeVar("T")


def planned(run: Callable[..., T]) -> Callable[[Config, Path, RunStatus], T]:
    """A training run that is given the micro batch of the plan, and what was forecast for it: expected=...

    The number stands in the run's config from then on. A run that goes on keeps its own. Raises ValueError where
    nothing fits.
    """

    @wraps(run)
    def with_plan(config: Config, folder: Path, status: RunStatus) -> T:
        if config.micro_batch_size != AUTO:
            return run(config, folder, status)
        validate(config)
        expected = resolve(config, folder)
        return run(replace(config, micro_batch_size=expected.micro_batch_size), folder, status, expected=expected)

    return with_plan


def resolve(config: Config, folder: Path) -> Expected:
    """The micro batch of the run in this folder, the same on all processes."""
    device, world_size = setup.prepare_process(config), distributed.world_size()
    expected = distributed.only_main(lambda: kept(config, folder, world_size) or choose(config, device, world_size))
    log.info("micro batch   %d images, as %s", expected.micro_batch_size, _why(expected))
    return expected


def kept(config: Config, folder: Path, world_size: int) -> Expected | None:
    """That of a run that goes on in this folder; None for one that starts, or whose processes are too many for it."""
    if config.resume == "never" or Checkpoints(folder / "checkpoints").is_empty:
        return None
    stored: Any = read_json(folder / RUN).get("config", {}).get("micro_batch_size")
    if not isinstance(stored, int) or config.global_batch_size % (stored * world_size):
        return None
    return Expected(stored)


def _why(expected: Expected) -> str:
    if expected.peak is None:
        return "before, or without a GPU to plan for"
    step = "" if expected.step is None else f" and {1000 * expected.step:.0f} ms a step"
    more = "" if expected.run_peak is None else f", {expected.run_peak / 2**20:.0f} MiB later in the run,"
    return f"planned: {expected.peak / 2**20:.0f} MiB{step}{more} by forecast"
