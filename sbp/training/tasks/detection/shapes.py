"""Circles, rectangles and triangles on noise: generated images with objects, for tests and trials on a laptop."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import masks_to_boxes

from sbp.training.tasks.detection.annotations import as_coco
from sbp.training.tasks.detection.target import Target

CLASSES = ["circle", "rectangle", "triangle"]
SMALLEST = 32  # px; below it a shape is a few pixels
MOST = 4  # objects in an image
SIDES = 3 / 4, 5 / 4  # of an image, as a share of image_size
RADII = 1 / 8, 1 / 4  # of an object, as a share of image_size
LEAST_SEEN = 1 / 4  # of an object: one that others hide more of is none
NOISE = 16.0  # standard deviation, of 255


class Shapes(Dataset):
    """Images with one to four objects, which may hide parts of each other; as `transform(image, target)` gives them.

    Image number i is a function of image_size, stream and i alone. Raises ValueError for an image_size below
    `SMALLEST`, and for a num_classes that is not 3.
    """

    def __init__(
        self, stream: int, length: int, image_size: int, num_classes: int, transform: Any, training: bool
    ) -> None:
        if image_size < SMALLEST:
            raise ValueError(f"data.image_size must be at least {SMALLEST} for shapes, got {image_size}")
        if num_classes != len(CLASSES):
            raise ValueError(f"data.num_classes must be {len(CLASSES)} for shapes, got {num_classes}")
        self.classes = CLASSES
        self.stream, self.length, self.image_size = stream, length, image_size
        self.transform, self.training = transform, training

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        pixels, labels, masks = generate(self.stream, index, self.image_size)
        target: Target = {"image_id": index}
        if self.training:
            there = torch.from_numpy(masks)
            target |= {"boxes": _boxes(there), "labels": torch.from_numpy(labels), "masks": there}
        return self.transform(Image.fromarray(pixels), target)

    def ground_truth(self) -> COCO:
        """What pycocotools scores with."""
        images, annotations = [], []
        for index in range(self.length):
            pixels, labels, masks = generate(self.stream, index, self.image_size)
            images.append({"id": index, "height": pixels.shape[0], "width": pixels.shape[1]})
            codes = run_lengths.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
            for label, box, code, mask in zip(
                labels, _boxes(torch.from_numpy(masks)).tolist(), codes, masks, strict=True
            ):
                annotations.append(
                    {
                        "image_id": index,
                        "category_id": int(label),
                        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                        "segmentation": code,
                        "area": int(mask.sum()),
                    }
                )
        categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
        return as_coco({"images": images, "annotations": annotations, "categories": categories})


def generate(stream: int, index: int, image_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels uint8 (h, w, 3), labels int64 (n,) and masks uint8 (n, h, w), what is seen of each object."""
    rng = np.random.default_rng([stream, index])
    height, width = (int(side) for side in (rng.uniform(*SIDES, 2) * image_size).round())
    y, x = np.mgrid[:height, :width]
    pixels = np.tile(rng.uniform(0, 255, 3), (height, width, 1))
    labels: list[tuple[int, int]] = []
    masks: list[np.ndarray] = []
    for _ in range(rng.integers(1, MOST + 1)):
        radius = rng.uniform(*RADII) * image_size
        right, down = x - rng.uniform(radius, width - radius), y - rng.uniform(radius, height - radius)
        label = int(rng.integers(len(CLASSES)))
        if label == 0:
            inside = right**2 + down**2 <= radius**2
        elif label == 1:
            inside = (abs(right) <= radius) & (abs(down) <= radius * rng.uniform(0.5, 1))
        else:
            inside = (down <= radius) & (2 * abs(right) <= radius + down)
        masks = [mask & ~inside for mask in masks]
        pixels[inside] = rng.uniform(0, 255, 3)
        labels.append((label + 1, inside.sum()))
        masks.append(inside)
    pixels += NOISE * rng.standard_normal(pixels.shape)
    seen = [place for place, (_, area) in enumerate(labels) if masks[place].sum() >= LEAST_SEEN * area]
    found = np.array([labels[place][0] for place in seen]), np.stack([masks[place] for place in seen]).astype(np.uint8)
    return pixels.round().clip(0, 255).astype(np.uint8), *found


def _boxes(masks: Tensor) -> Tensor:
    """float32 (n, 4) around masks (n, h, w); the last pixel's far edge is in."""
    return masks_to_boxes(masks) + torch.tensor([0.0, 0, 1, 1])
