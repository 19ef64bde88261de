"""Accuracy on a set of images, exact on any number of processes."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sbp.training.distributed import Processes


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    processes: Processes,
    autocast: Callable[[], torch.autocast],
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, float]:
    """top1 and top5 in percent, mean cross-entropy loss, and how many images they are of.

    batches: (images (B, 3, H, W), labels (B,)) of this process; sums are taken over all processes.
    """
    model.eval()
    device = processes.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # top-1 hits, top-5 hits, loss, images
    for images, labels in batches:
        images = images.to(device, non_blocking=True, memory_format=memory_format)
        labels = labels.to(device, non_blocking=True)
        with autocast():
            logits = model(images)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        count = torch.tensor(len(labels), device=device)
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss.double(), count])
    top1, top5, total_loss, count = processes.sum(sums).tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": total_loss / count, "images": count}
