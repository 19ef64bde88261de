"""Accuracy on a validation set, exact for any number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sbp
from sbp.training.data.loading import NO_IMAGES, Batches
from sbp.training.data.preprocessing import Normalize
from sbp.training.record.status import Preempted
from sbp.training.runtime import distributed, signals, wrapping
from sbp.training.runtime.precision import autocast


@dataclass(frozen=True)
class Accuracy:
    """top1, top5: percent. loss: mean cross-entropy without smoothing. images: how many were counted.

    With fewer than 5 classes, top5 counts all of them.
    """

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Batches, *, normalize: Normalize | None = None, amp: str = "off", patched: bool = False
) -> Accuracy:
    """Runs the model in evaluation mode over the images of all processes, each counted once.

    Counts are summed as whole numbers, so top-1 does not depend on how images are spread over processes.
    normalize: as in `Trainer`, on the model's device. patched, and what is raised: as for `validation_batches`.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, top-1, top-5, loss
    for images, labels in validation_batches(model, loader, patched=patched):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        images = images if normalize is None else normalize(images)
        with autocast(amp, device):
            logits = model(images)
        logits = logits[: len(labels)].float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (B, 5)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([best.new_tensor(len(labels), dtype=torch.float64), best[:, 0].sum(), best.sum(), loss])
    images_seen, top1, top5, total = distributed.sums(sums.tolist())
    return Accuracy(100 * top1 / images_seen, 100 * top5 / images_seen, total / images_seen, int(images_seen))


def validation_batches(model: nn.Module, loader: Batches, *, patched: bool) -> Iterator[tuple[Tensor, Any]]:
    """This process's batches, uint8 (B, 3, H, W) with their targets; in between, the model is in evaluation mode.

    All processes have to exhaust it. One that has no images left while others have, and all are needed for a pass of a
    sharded model, gets a black one without a target.
    patched: the model has SBP; if it evaluates as the authors do, its masks are drawn from number 0 on.
    Raises ValueError that names the unreadable images, and Preempted when a signal asks to stop.
    """
    was_training = model.training
    model.eval()
    distributed.broadcast(model.buffers())
    if patched:
        sbp.set_draw(model, 0)
    unreadable: list[str] = []
    batches = iter(loader)
    for _ in range(int(distributed.maxima([len(loader)])[0])):
        if signals.stop_requested():
            raise Preempted(f"stopped by {signals.name()} during evaluation")
        images, targets, cannot = next(batches, NO_IMAGES)
        unreadable += cannot
        if wrapping.is_sharded(model):
            shape = next((one for one in distributed.gathered(images.shape[1:]) if one), None)
            images = images if len(images) or shape is None else torch.zeros((1, *shape), dtype=torch.uint8)
        if len(images):
            yield images, targets
    model.train(was_training)
    unreadable = [name for names in distributed.gathered(unreadable) for name in names]
    if unreadable:
        some = "; ".join(unreadable[:10]) + ("; ..." if len(unreadable) > 10 else "")
        raise ValueError(f"cannot evaluate: {len(unreadable)} of the images cannot be read: {some}")
