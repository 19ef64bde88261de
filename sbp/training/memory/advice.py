"""What would have fitted, where a training step does not."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch

from sbp.settings import RECOMPUTE
from sbp.training.config.batches import plan_batches
from sbp.training.config.run import Config
from sbp.training.data.resident import resident_bytes
from sbp.training.memory.forecast import KEEP_RATIOS, forecast, support, with_sbp
from sbp.training.runtime import distributed

P = ParamSpec("P")
T = TypeVar("T")


def advice(config: Config, micro_batch_size: int, available: int, *, world_size: int = 1) -> str:
    """Lines that name the settings with which a step fits into `available` bytes, by forecast."""

    def needed(config: Config, micro_batch_size: int = micro_batch_size) -> int:
        return forecast(config, micro_batch_size, world_size=world_size).peak

    step = needed(config)
    lines = [f"forecast: {step / 2**20:.1f} MiB at the peak; available: {available / 2**20:.1f} MiB"]
    if step <= available:
        lines.append("so the step should have fitted; an evaluation takes less with a smaller eval_batch_size")
    options: list[tuple[str, int]] = []
    enable, sbp = "" if config.sbp.enabled else "sbp.enabled=true ", config.sbp
    exact = {} if sbp.enabled else {"keep_ratio": 1.0}
    can_be_sbp = bool(support(config))
    for mode in RECOMPUTE[RECOMPUTE.index(sbp.recompute) + 1 :] if can_be_sbp else ():
        keys = "".join(f"sbp.{key}={value} " for key, value in exact.items())
        changed = with_sbp(config, enabled=True, recompute=mode, **exact)
        options.append((f"{enable}{keys}sbp.recompute={mode}", needed(changed)))
    if sbp.exact_epochs:
        known = sbp.recompute if sbp.exact_recompute is None else sbp.exact_recompute
        for mode in RECOMPUTE[RECOMPUTE.index(known) + 1 :]:
            options.append((f"sbp.exact_recompute={mode}", needed(with_sbp(config, exact_recompute=mode))))
    largest = max(sbp.keep_ratio) if isinstance(sbp.keep_ratio, list) else sbp.keep_ratio
    for ratio in KEEP_RATIOS[1:] if can_be_sbp else ():
        if not sbp.enabled or ratio < largest:
            changed = with_sbp(config, enabled=True, keep_ratio=ratio)
            options.append((f"{enable}sbp.keep_ratio={ratio}", needed(changed)))
    share = config.global_batch_size // world_size
    unit = 2 if config.recipe.mixes else 1
    for smaller in sorted((n for n in range(unit, micro_batch_size, unit) if share % n == 0), reverse=True):
        try:
            options.append((f"micro_batch_size={smaller} (same global_batch_size)", needed(config, smaller)))
        except ValueError:  # a batch norm of one value a channel
            break
        if options[-1][1] <= available:
            break
    fitting = [f"  {keys:<50} {size / 2**20:.1f} MiB" for keys, size in options if size <= available]
    return "\n".join(
        [*lines, "these would have fitted:" if fitting else "no single change would have fitted", *fitting]
    )


def advised(run: Callable[Concatenate[Config, P], T]) -> Callable[Concatenate[Config, P], T]:
    """A training run that ends with advice, as a ValueError, where it would end with an out-of-memory error of CUDA."""

    @wraps(run)
    def advising(config: Config, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return run(config, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            world_size = distributed.world_size()
            plan = plan_batches(config.global_batch_size, config.micro_batch_size, world_size)
            try:
                available = available_memory() - resident_bytes(config.data, config.recipe)
                lines = advice(config, plan.micro_batch_size, available, world_size=world_size)
            except ValueError as reason:
                lines = f"no forecast of what would have fitted: {reason}"
            raise ValueError(f"out of memory with micro_batch_size={plan.micro_batch_size}\n{lines}") from error

    return advising


def available_memory() -> int:
    """Bytes of CUDA memory that this process has or could have now."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
