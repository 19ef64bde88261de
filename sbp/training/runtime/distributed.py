"""One process or many: what `torchrun` says, and the few numbers that processes exchange."""

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # that the others wait for one, such as one that writes to a slow disk; then an error


def start() -> None:
    """Joins the other processes when torchrun started this one."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if 0 < _processes_here() <= torch.cuda.device_count():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # gloo carries the small exchanges below
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)


def stop() -> None:
    """Leaves the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def pick_device(name: str) -> torch.device:
    """ "auto", "cpu" or "cuda". Raises ValueError when CUDA is asked for and missing, or has too few devices."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not count:
        raise ValueError("device=cuda, but torch finds no CUDA device")
    if name == "cpu" or not count:
        return torch.device("cpu")
    if _processes_here() > count:
        raise ValueError(
            f"{_processes_here()} processes on a machine where torch finds {count} CUDA devices: "
            f"start it with torchrun --nproc_per_node={count}, or set device=cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _processes_here() -> int:
    """How many processes torchrun started on this machine; 0 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 0))


def from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def only_main(job: Callable[[], T]) -> T:
    """What `job()` returns on the main process, which alone runs it; the ValueError that it raises, on all."""
    outcome: Any = None
    if is_main():
        try:
            outcome = job()
        except ValueError as error:
            outcome = error
    outcome = from_main(outcome)
    if isinstance(outcome, ValueError):
        raise outcome
    return outcome


def all_or_none(job: Callable[[], T]) -> T:
    """What `job()` returns on this process, when it raises ValueError on none; else that error on all of them.

    The job must not exchange anything with the other processes.
    """
    outcome, error = None, None
    try:
        outcome = job()
    except ValueError as raised:
        error = str(raised)
    errors = gathered(error)
    if any(one is not None for one in errors):
        rank = next(rank for rank, one in enumerate(errors) if one is not None)
        raise ValueError(errors[rank] if len(set(errors)) == 1 else f"on process {rank}: {errors[rank]}")
    return outcome  # type: ignore[return-value]


def gathered(value: Any) -> list[Any]:
    """The value of each process, in the order of their ranks; anything that can be pickled."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gathered_on_main(value: Any) -> list[Any]:
    """As `gathered` on the main process; [] on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if is_main() else None
    dist.gather_object(value, values)
    return values or []


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Gives these tensors, in place, the main process's values."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def sums(values: Sequence[float]) -> list[float]:
    """Each value summed over the processes, in float64."""
    return _reduce(values, dist.ReduceOp.SUM)


def maxima(values: Sequence[float]) -> list[float]:
    """The largest of each value over the processes."""
    return _reduce(values, dist.ReduceOp.MAX)


def _reduce(values: Sequence[float], operation: Any) -> list[float]:
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return tensor.tolist()
