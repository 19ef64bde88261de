"""What a detector finds, drawn on the images: boxes, masks, classes and scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_area
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from sbp.training.data.loading import SeededDataset, readable, spread
from sbp.training.data.naming import path
from sbp.training.tasks.detection.augmentation import collate
from sbp.training.tasks.detection.evaluation import detect
from sbp.training.tasks.detection.heads import paste_masks

FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")  # torchvision has none to scale
COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe")


def predicted(
    model: nn.Module,
    dataset: Any,
    count: int,
    *,
    normalize: nn.Module | None = None,
    amp: str = "off",
    threshold: float = 0.5,
) -> list[tuple[str, Image.Image]]:
    """Name and picture of `count` images at equal distances in a validation set, as the model sees and finds them.

    All processes have to call it where the model's parameters are shared among them. Raises ValueError for an
    unreadable image.
    """
    was_training = model.training
    model.eval()
    try:
        return _predicted(model, dataset, spread(len(dataset), count), normalize, amp, threshold)
    finally:
        model.train(was_training)


def _predicted(
    model: nn.Module, dataset: Any, indices: Sequence[int], normalize: nn.Module | None, amp: str, threshold: float
) -> list[tuple[str, Image.Image]]:
    pictures: list[tuple[str, Image.Image]] = []
    seeded = SeededDataset(dataset, 0)
    for index in indices:
        images, targets = readable(collate([seeded[0, index]]))
        (found,) = detect(model, images, targets, normalize, amp)
        height, width = targets[0]["size"]
        picture = draw(images[0, :, :height, :width], found, dataset.classes, threshold)
        name = Path(path(dataset, index)).stem
        taken = any(name == other for other, _ in pictures)  # of a file of the same name in another folder
        pictures.append((f"{name}-{index}" if taken else name, to_pil_image(picture)))
    return pictures


def draw(image: Tensor, found: dict[str, Tensor], classes: Sequence[str], threshold: float = 0.5) -> Tensor:
    """uint8 (3, h, w), with the objects that are at least as sure as `threshold`.

    found: as a detector gives it, in pixels of the image; or a target of training, which has no scores.
    classes: the names of label 1, 2, ...
    """
    if "scores" in found:
        sure = found["scores"] >= threshold
        found = {name: value[sure] for name, value in found.items()}
    if not len(found["boxes"]):
        return image
    smaller = box_area(found["boxes"]).argsort(descending=True)  # lies upon what is larger
    boxes, masks, labels = (found[name][smaller] for name in ("boxes", "masks", "labels"))
    if masks.ndim == 4:
        masks = paste_masks(masks, boxes, (image.shape[1], image.shape[2]))
    names = [classes[label - 1] for label in labels.tolist()]
    if "scores" in found:
        names = [f"{name} {score:.0%}" for name, score in zip(names, found["scores"][smaller].tolist(), strict=True)]
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(labels))]
    on_top = masks.flip(0).cumsum(0, dtype=torch.int16).flip(0) == 1  # torchvision paints black what masks share
    image = draw_segmentation_masks(image, masks.bool() & on_top, alpha=0.5, colors=colours)
    size = max(10, min(image.shape[1:]) // 40)
    return draw_bounding_boxes(image, boxes, names, colours, width=2, font=FONT, font_size=size, fill_labels=True)
