"""Average precision of boxes and masks on a validation set, exact for any number of processes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from sbp.training.data.loading import Batches
from sbp.training.runtime import distributed
from sbp.training.runtime.precision import autocast
from sbp.training.tasks.accuracy import validation_batches
from sbp.training.tasks.detection.annotations import quiet
from sbp.training.tasks.detection.heads import paste_masks
from sbp.training.tasks.detection.target import Target

FIGURES = ("ap", "ap50", "ap75")  # the first three of COCOeval's: the mean over IoU 0.50 to 0.95, and at two of them
_PASTED = 2**24  # pixels of masks that are drawn at once: 64 MB


@torch.no_grad()
def evaluate_detection(
    model: nn.Module,
    loader: Batches,
    *,
    ground_truth: Callable[[], COCO],
    normalize: nn.Module | None = None,
    amp: str = "off",
    patched: bool = False,
) -> dict[str, float]:
    """Runs the model in evaluation mode over the images of all processes, and scores them as COCO does.

    Returns box_ap, box_ap50, box_ap75, mask_ap, ... in percent. Images that were not looked at do not count.
    ground_truth: called on the main process alone.
    normalize: called with images and targets, on the model's device; see PaddedNormalize.
    patched, and what is raised: as for `validation_batches`.
    """
    results: list[dict[str, Any]] = []
    seen: list[int] = []
    for images, targets in validation_batches(model, loader, patched=patched):
        shown = targets if len(targets) else [{"size": tuple(images.shape[2:])}]
        for detection, target in zip(detect(model, images, shown, normalize, amp), targets, strict=len(targets) > 0):
            results += coco_results(detection, target)
            seen.append(target["image_id"])
    everything = distributed.gathered_on_main((seen, results))
    images_seen = [number for one, _ in everything for number in one]
    found = [result for _, one in everything for result in one]
    return distributed.only_main(lambda: average_precision(ground_truth(), found, images_seen))


@torch.no_grad()
def detect(
    model: nn.Module, images: Tensor, targets: Sequence[Target], normalize: nn.Module | None, amp: str
) -> list[dict[str, Tensor]]:
    """What a model in evaluation mode finds in each image of uint8 (B, 3, H, W), on the CPU in float32."""
    device = next(model.parameters()).device
    images = images.to(device, non_blocking=True)
    images = images if normalize is None else normalize(images, targets)
    with autocast(amp, device):
        found = model(images, targets)
    return [
        {name: (value.float() if value.is_floating_point() else value).cpu() for name, value in one.items()}
        for one in found
    ]


def coco_results(detection: dict[str, Tensor], target: Target) -> list[dict[str, Any]]:
    """One image's detections as COCO has results, in pixels of the image's file; but "label" for the category.

    On the CPU: to paste a mask asks for each number of its box, which on a GPU is a wait for each.
    """
    height, width = target["original_size"]
    boxes = original_boxes(detection["boxes"], target)
    corners = boxes.tolist()
    codes: list[Any] = []
    at_once = max(1, _PASTED // (height * width))
    for first in range(0, len(boxes), at_once):
        some = slice(first, first + at_once)
        masks = paste_masks(detection["masks"][some], boxes[some], (height, width))
        codes += run_lengths.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
    return [
        {
            "image_id": target["image_id"],
            "label": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
            "segmentation": code,
        }
        for label, score, (x1, y1, x2, y2), code in zip(
            detection["labels"].tolist(), detection["scores"].tolist(), corners, codes, strict=True
        )
    ]


def original_boxes(boxes: Tensor, target: Target) -> Tensor:
    """Boxes (n, 4) in pixels of the resized image, in those of its file."""
    (height, width), (original_height, original_width) = target["size"], target["original_size"]
    return boxes * boxes.new_tensor([original_width / width, original_height / height] * 2)


def average_precision(ground_truth: COCO, results: list[dict[str, Any]], images: Sequence[int]) -> dict[str, float]:
    """The figures of results as `coco_results` gives them, on these images alone; label 1 is the smallest category.

    Raises ValueError when the images have no objects: then there is nothing to find.
    """
    categories = sorted(ground_truth.getCatIds())
    if not any(not row["iscrowd"] for row in ground_truth.loadAnns(ground_truth.getAnnIds(imgIds=list(images)))):
        raise ValueError(f"cannot evaluate: the {len(images)} images have no objects")
    if not results:  # which pycocotools cannot load
        return {f"{kind}_{name}": 0.0 for kind in ("box", "mask") for name in FIGURES}
    figures: dict[str, float] = {}
    with quiet():
        found = ground_truth.loadRes([row | {"category_id": categories[row["label"] - 1]} for row in results])
        for kind, measure in (("box", "bbox"), ("mask", "segm")):
            scores = COCOeval(ground_truth, found, measure)
            scores.params.imgIds = sorted(images)
            scores.evaluate()
            scores.accumulate()
            scores.summarize()
            figures |= {
                f"{kind}_{name}": 100 * float(value) for name, value in zip(FIGURES, scores.stats[:3], strict=True)
            }
    return figures
