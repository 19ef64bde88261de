"""A small detector in float64, and images with rectangles to detect."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from sbp.training.config.model import BackboneConfig, DetectorConfig, SbpConfig
from sbp.training.tasks.detection.detector import Detector, build_detector
from tests.conftest import randomise

BACKBONE = BackboneConfig(name="convnext_tiny", kwargs={"depths": (2, 1, 3, 1), "dims": (8, 12, 16, 32)})
SWIN = BackboneConfig(
    name="swin_tiny_patch4_window7_224",
    kwargs={"depths": (2, 1, 3, 1), "embed_dim": 8, "num_heads": (1, 2, 2, 4), "window_size": 4},
)
CLASSES = 3
Target = dict[str, Tensor]


def small_swin_detector(backbone: str = SWIN.name, **settings) -> Detector:
    """Mask R-CNN on a Swin with depths 2, 1, 3, 1, 8 to 64 channels and windows of 4 x 4."""
    return small_detector(backbone=replace(SWIN, name=backbone), **settings)


def small_detector(name: str = "mask_rcnn", backbone: BackboneConfig = BACKBONE, **settings) -> Detector:
    """Depths 2, 1, 3, 1 with 8 to 32 channels; without SBP unless `settings` has any of it."""
    torch.manual_seed(0)
    config = DetectorConfig(name, fpn_channels=8, hidden_size=16, rois_per_image=32, anchor_sizes=[8, 16, 32, 64, 128])
    model = build_detector(backbone, SbpConfig(enabled=bool(settings), **settings), config, CLASSES)
    randomise(model.backbone.body)
    for layer in model.modules():
        if hasattr(layer, "bbox_pred"):  # boxes that move, and scores that differ
            nn.init.normal_(layer.bbox_pred.weight, std=0.05)
    return model.double().train()


def rectangles(size: tuple[int, int], count: int, seed: int = 0) -> Target:
    """An image of this size (h, w) with so many objects."""
    height, width = size
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([width - 16, height - 16])
    sides = 8 + torch.rand(count, 2, generator=generator) * (torch.tensor([width - 8, height - 8]) - corners)
    boxes = torch.cat([corners, corners + sides], dim=1)
    masks = torch.zeros(count, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
        mask[(y1 + y2) // 2 :, (x1 + x2) // 2 :] = 0
    labels = torch.randint(1, CLASSES + 1, (count,), generator=generator)
    return {"boxes": boxes, "labels": labels, "masks": masks, "size": size, "image_id": seed}


def batch(height: int = 64, width: int = 96) -> tuple[Tensor, list[Target]]:
    """Two images, one of them smaller, with zeros around it."""
    sizes = [(height - 4, width), (height - 20, width - 40)]
    images = torch.zeros(2, 3, height, width, dtype=torch.float64)
    for image, (h, w) in zip(images, sizes, strict=True):
        image[:, :h, :w] = torch.randn(3, h, w, generator=torch.Generator().manual_seed(h), dtype=torch.float64)
    return images, [rectangles(size, count, seed) for seed, (size, count) in enumerate(zip(sizes, (3, 2), strict=True))]


def losses(model: nn.Module, images: Tensor, targets: list[Target], seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)  # which anchors and regions are drawn
    return model(images, targets)


def gradients(model: nn.Module, images: Tensor, targets: list[Target]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and each parameter's gradient, as `tests.conftest.gradients` has them."""
    model.zero_grad()
    loss = sum(losses(model, images, targets).values())
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}
