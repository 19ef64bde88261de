"""Figures about a training step that are not its loss: memory, saved activations, gradient cosine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import sbp
from sbp.training.data import seed_everything


class PeakMemory:
    """The highest memory use of this process, in bytes: of the GPU where it computes on one, else resident.

    What happens within `excluded` does not count. The resident peak is Linux's (VmHWM of /proc/self/status).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.highest: dict[str, float] = {}
        self._reset()

    def read(self) -> dict[str, float]:
        if self.device.type == "cuda":
            now = {
                "memory/peak_allocated": torch.cuda.max_memory_allocated(self.device),
                "memory/peak_reserved": torch.cuda.max_memory_reserved(self.device),
            }
        else:
            now = {"memory/peak_rss": _peak_resident()}
        self.highest = {name: max(float(value), self.highest.get(name, 0.0)) for name, value in now.items()}
        return self.highest

    @contextmanager
    def excluded(self) -> Iterator[None]:
        self.read()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # lest the probe's blocks count as reserved from now on
            self._reset()

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")


def _peak_resident() -> float:
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        import psutil

        return psutil.Process().memory_info().rss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)


def saved_bytes_per_image(model: nn.Module, images: Tensor, autocast: Callable[[], torch.autocast]) -> float:
    """Bytes that autograd saves for backward in a training pass, for each of `images` (B >= 4, 3, H, W).

    The slope between two batch sizes, so that what does not grow with the batch drops out.
    """

    def saved(batch: Tensor) -> int:
        seed_everything(0)
        with autocast():
            return sbp.saved_bytes(lambda: model(batch))

    with training_mode(model):
        return (saved(images[:4]) - saved(images[:2])) / 2


def gradient_cosine(
    model: nn.Module, images: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, float]:
    """Cosine of the SBP gradient to the exact one on this batch in full precision, total and for each layer."""
    with training_mode(model):
        seed_everything(0)
        found = sbp.gradient_cosine(model, lambda: loss(model(images), labels))
    return {"gradient_cosine/total": found.total} | {f"gradient_cosine/{k}": v for k, v in found.per_layer.items()}
