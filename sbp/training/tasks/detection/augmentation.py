"""What an image and its objects go through in a loader process: flips, crops, sizes, and padding to one batch.

A target has boxes float32 (n, 4) as x1, y1, x2, y2 in pixels, labels int64 (n,) and masks uint8 (n, h, w), all of the
image as it is at that point; n may be 0. Without them, as in evaluation, only the image changes. Random numbers come
from `random`, which SeededDataset seeds for each image.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sbp.training.config.images import DataConfig
from sbp.training.config.recipe import RecipeConfig
from sbp.training.data.loading import NO_IMAGES, Batch, Sample
from sbp.training.data.preprocessing import Normalize
from sbp.training.tasks.detection.target import Target, padded


@dataclass(frozen=True)
class DetectionPreprocessing:
    """What an image goes through in evaluation."""

    image_size: int
    max_size: int
    interpolation: str
    mean: list[float]
    std: list[float]

    @classmethod
    def of(cls, data: DataConfig) -> "DetectionPreprocessing":
        return cls(data.image_size, data.max_size, data.interpolation, list(data.mean), list(data.std))

    def __str__(self) -> str:
        return (
            f"shorter side to {self.image_size} px, longer one at most {self.max_size} px ({self.interpolation}), "
            f"mean {self.mean}, std {self.std}"
        )

    def __call__(self, image: Image.Image, target: Target) -> tuple[Tensor, Target]:
        """uint8 (3, h, w), and the target with "size", (h, w), and "original_size", the same before resizing."""
        original = (image.height, image.width)
        image, target = resize(image, target, self.image_size, self.max_size, self.interpolation)
        return _finished(image, target | {"original_size": original})


@dataclass(frozen=True)
class TrainTransform:
    """Flip, for some images a crop, and a random size; resizing only when `recipe.augment` is false."""

    data: DataConfig
    recipe: RecipeConfig

    def __call__(self, image: Image.Image, target: Target) -> tuple[Tensor, Target]:
        """uint8 (3, h, w), and the target of what is left of the image, with "size", (h, w)."""
        data, recipe = self.data, self.recipe
        short_side = data.image_size
        if recipe.augment:
            if random.random() < recipe.flip:
                image, target = flip(image, target)
            if random.random() < recipe.crop_share:
                first = random.choice(recipe.crop_short_sides)
                image, target = resize(image, target, first, data.max_size, data.interpolation)
                image, target = random_crop(image, target, *recipe.crop_sides)
            short_side = random.choice(recipe.short_sides or [short_side])
        return _finished(*resize(image, target, short_side, data.max_size, data.interpolation))


def _finished(image: Image.Image, target: Target) -> tuple[Tensor, Target]:
    return pil_to_tensor(image), target | {"size": (image.height, image.width)}


def resize(
    image: Image.Image, target: Target, short_side: int, longest: int, interpolation: str
) -> tuple[Image.Image, Target]:
    """The shorter side to `short_side` pixels, or to less where the longer one would exceed `longest`.

    interpolation: one of Pillow's, whose filters widen when an image shrinks. A pixel of a mask takes the value of the
    one that its centre falls into: masks stay whole numbers, and are not shifted.
    """
    height, width = image.height, image.width
    scale = min(short_side / min(height, width), longest / max(height, width))
    new_height, new_width = (max(1, int(side * scale + 0.5)) for side in (height, width))
    image = image.resize((new_width, new_height), Image.Resampling[interpolation.upper()])
    if "boxes" in target:
        scales = torch.tensor([new_width / width, new_height / height] * 2)
        masks = target["masks"]
        if len(masks):  # which F.interpolate asks for
            masks = F.interpolate(masks[None], (new_height, new_width), mode="nearest-exact")[0]
        else:
            masks = masks.new_empty(0, new_height, new_width)
        target = target | {"boxes": target["boxes"] * scales, "masks": masks}
    return image, target


def flip(image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
    """Left and right exchanged."""
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    boxes = torch.stack([image.width - x2, y1, image.width - x1, y2], 1)
    target = target | {"boxes": boxes, "masks": target["masks"].flip(2)}
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), target


def random_crop(image: Image.Image, target: Target, low: int, high: int) -> tuple[Image.Image, Target]:
    """A part of the image at a random place, each of its sides from `low` to `high` pixels where the image has them."""
    height, width = (random.randint(min(side, low), min(side, high)) for side in (image.height, image.width))
    return crop(
        image, target, random.randint(0, image.height - height), random.randint(0, image.width - width), height, width
    )


def crop(
    image: Image.Image, target: Target, top: int, left: int, height: int, width: int
) -> tuple[Image.Image, Target]:
    """Boxes are clipped, as published, and not drawn anew around what is left of the masks.

    Objects whose boxes keep less than 1 px of width or height go.
    """
    boxes = target["boxes"] - torch.tensor([left, top, left, top])
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    keep = wide_enough(boxes)
    target = target | {
        "boxes": boxes[keep],
        "labels": target["labels"][keep],
        "masks": target["masks"][keep, top : top + height, left : left + width],
    }
    return image.crop((left, top, left + width, top + height)), target


def wide_enough(boxes: Tensor) -> Tensor:
    """Which boxes (n, 4) have at least 1 px of width and height: bool (n,)."""
    return (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)


def collate(samples: Sequence[Sample]) -> Batch:
    """Images in the upper left corner of uint8 (B, 3, H, W), H and W multiples of 32, and a list of their targets.

    Lists the images that could not be read, as that of classification.
    """
    there = [sample for sample in samples if sample.image is not None]
    unreadable = [name for sample in samples for name in sample.unreadable]
    images = [sample.image for sample in there if sample.image is not None]
    if not images:
        return Batch(NO_IMAGES.images, [], unreadable)
    height, width = (padded(max(image.shape[side] for image in images)) for side in (1, 2))
    together = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for place, image in zip(together, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return Batch(together, [sample.label for sample in there], unreadable)


class PaddedNormalize(Normalize):
    """As in classification; and what lies beyond each image's "size" becomes zero, which normalisation has changed."""

    def forward(self, images: Tensor, targets: Any = None, *, erase: bool = False) -> Tensor:
        """targets: one for each image. erase: means nothing here."""
        images = super().forward(images)
        for image, target in zip(images, targets, strict=True):
            height, width = target["size"]
            image[:, height:] = 0
            image[:, :, width:] = 0
        return images
