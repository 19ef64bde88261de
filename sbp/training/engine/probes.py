"""What a run measures besides loss and accuracy: peak memory, saved activations, gradient cosine.

The probes run a compiled model eagerly: their small batches would be compiled anew.
"""

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import sbp
from sbp.state import states
from sbp.training.engine.trainer import Targets, Trainer
from sbp.training.runtime import distributed, seeding


class PeakMemory:
    """The largest memory of training so far, in bytes: allocated and reserved on CUDA, resident on a CPU.

    Making one resets the peak. What runs inside `excluded` does not count. A captured pass is counted when it is
    captured: then the allocator hands out what every replay uses again, where it was.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: dict[str, float] = {}
        self._reset()

    def read(self) -> dict[str, float]:
        """The maximum over the processes, so all of them have to call it."""
        self._before = self._largest()
        return dict(zip(self._before, distributed.maxima(list(self._before.values())), strict=True))

    def allocated(self) -> int:
        """That of this process, on CUDA."""
        return int(self._largest()["memory/peak_allocated"])

    @contextmanager
    def excluded(self) -> Iterator[None]:
        self._before = self._largest()
        yield
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # else what ran inside stays reserved
        self._reset()

    def _largest(self) -> dict[str, float]:
        return {key: max(value, self._before.get(key, 0)) for key, value in self._now().items()}

    def _now(self) -> dict[str, float]:
        if self.device.type == "cuda":
            return {
                "memory/peak_allocated": torch.cuda.max_memory_allocated(self.device),
                "memory/peak_reserved": torch.cuda.max_memory_reserved(self.device),
            }
        return {"memory/peak_rss": peak_resident_bytes()}

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError, AttributeError):  # not Linux, or not allowed: then the peak is that of the process
                ctypes.CDLL(None).malloc_trim(0)  # what earlier jobs of a sweep have freed goes back first
                Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """This process's largest resident memory since it was last reset."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def saved_bytes_per_image(trainer: Trainer, images: Tensor, targets: Targets) -> float:
    """Bytes that autograd saves for each further image: the slope between half of these images and all of them.

    images: (B, 3, H, W), B even. The weights' copies under autocast cancel out. Random numbers and buffers stay; masks
    are drawn.
    """
    images, targets = trainer.to_device(images, targets)
    half = len(images) // 2
    trainer.begin_training()

    def saved(count: int) -> int:
        return sbp.saved_bytes(lambda: trainer.plain_loss(images[:count], targets[:count]))

    devices = [trainer.device] if trainer.device.type == "cuda" else []
    before = [buffer.clone() for buffer in trainer.model.buffers()]  # averages of batch norms
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        slope = (saved(2 * half) - saved(half)) / half
    for buffer, value in zip(trainer.model.buffers(), before, strict=True):
        buffer.copy_(value)
    return slope


def gradient_cosines(trainer: Trainer, images: Tensor, targets: Targets, draw: int, at_once: int) -> dict[str, float]:
    """gradient_cosine/total, gradient_cosine/<layer> and gradient_norm_ratio (of the gradient with SBP to the exact
    one) on these images, with mask number `draw` of the main process.

    at_once: so many images go through the model in one pass, as the exact one needs far more memory than a step; with
    one mask for all of them, or for `sbp.mask_per=sample` or half with others in each pass, as in a step. Where a
    training pass is `collective`, all processes are needed for it, with the same images; else any one can do it
    alone. What is found depends on the weights, the images, the run's seed, `draw` and, where drop paths or more than
    one mask are drawn, `at_once` only.
    """
    trainer.begin_training()
    scale = trainer.scaler.get_scale()  # without it float16 gradients vanish; it cancels out of a cosine

    def loss(part: slice) -> Tensor:
        share = len(images[part]) / len(images)
        return trainer.plain_loss(*trainer.to_device(images[part], targets[part])) * scale * share

    parts = [partial(loss, slice(first, first + at_once)) for first in range(0, len(images), at_once)]
    own = sbp.mask_state(trainer.model)
    sbp.load_mask_state(trainer.model, own | {"rank": 0, "draw": draw})
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    of_batch = all(state.settings.mask_per == "batch" for state in states(trainer.model))
    held = sbp.hold_mask(trainer.model) if of_batch else nullcontext()
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), held:
        seeding.seed_everything(trainer.seed, seeding.PROBE, draw)
        cosine = sbp.gradient_cosine(trainer.model, parts)
    sbp.load_mask_state(trainer.model, own)
    layers = {f"gradient_cosine/{name}": value for name, value in cosine.per_layer.items()}
    return {"gradient_cosine/total": cosine.total, "gradient_norm_ratio": cosine.norm_ratio} | layers
