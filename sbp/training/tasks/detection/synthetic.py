"""Images with objects for a detector, as large as in training: of random numbers, or of tensors without values."""

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads

from sbp.training.tasks.detection.detector import Detector
from sbp.training.tasks.detection.target import Target, padded

OBJECTS = 20  # of an image; COCO's have 7 on average
SMALLEST = 16  # px; a side of a random object

Batch = tuple[Tensor, list[Target]]


def empty(short_side: int, long_side: int, size: int) -> Batch:
    """`size` lying images, and their objects, without values; on torch's current device."""
    height, width = padded(short_side), padded(max(short_side, long_side))
    targets = [
        {
            "boxes": torch.empty(OBJECTS, 4),
            "labels": torch.empty(OBJECTS, dtype=torch.int64),
            "masks": torch.empty(OBJECTS, height, width, dtype=torch.uint8),
            "size": (height, width),
        }
        for _ in range(size)
    ]
    return torch.empty(size, 3, height, width), targets


def random(short_side: int, long_side: int, size: int, num_classes: int) -> Batch:
    """As `empty`, of random numbers: objects are rectangles, and their sides at most half of the image's."""
    images, targets = empty(short_side, long_side, size)
    for target in targets:
        height, width = target["size"]
        sides = SMALLEST + torch.rand(OBJECTS, 2) * (torch.tensor([width, height]) / 2 - SMALLEST)
        corners = torch.rand(OBJECTS, 2) * (torch.tensor([width, height]) - sides)
        target["boxes"] = torch.cat([corners, corners + sides], 1)
        target["labels"].random_(1, num_classes + 1)
        x, y = torch.arange(width), torch.arange(height)[:, None]
        x1, y1, x2, y2 = target["boxes"][:, :, None, None].unbind(1)
        target["masks"] = ((x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)).byte()
    return images.normal_(), targets


def propose_objects(detector: Detector) -> None:
    """From now on each image's proposals hold its objects' boxes, so often that the samples are full of them.

    As those of a trained detector do. A random one's hardly hit any, and the few regions that the mask heads then read
    need less memory.
    """
    detector.roi_heads.register_forward_pre_hook(_with_objects)


def _with_objects(heads: nn.Module, args: tuple) -> tuple:
    features, proposals, sizes, targets = args
    samplers = [stage.fg_bg_sampler for stage in heads.modules() if isinstance(stage, RoIHeads)]
    enough = max(int(one.batch_size_per_image * one.positive_fraction) for one in samplers)
    found = []
    for boxes, target in zip(proposals, targets, strict=True):
        objects = target["boxes"].to(boxes)
        found.append(torch.cat([boxes, objects.repeat(2 * enough // len(objects) + 1, 1)]))  # the cascade drops some
    return features, found, sizes, targets
