"""What reads an image's regions in Mask R-CNN, and in each stage of the cascade: torchvision's, in full precision."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from sbp.training.config.model import DetectorConfig
from sbp.training.tasks.detection.target import Target

Size = tuple[int, int]  # height, width

LEVELS = ("0", "1", "2", "3")  # of the pyramid, those that regions are read from
BOX_STDS = (0.1, 0.1, 0.2, 0.2)  # of a box head's outputs for x, y, width and height, before they are normalised
MASKS_AT_ONCE = 8


def roi_stage(
    box_head: nn.Module,
    strides: list[int],
    detector: DetectorConfig,
    num_classes: int,
    iou: float = 0.5,
    stds: tuple[float, ...] = BOX_STDS,
) -> "MaskRoIHeads":
    """One box head with its mask head. iou: from which overlap on a region shows an object."""
    channels = detector.fpn_channels
    return MaskRoIHeads(
        AlignedPool(7, strides),
        box_head,
        WidePredictor(detector.hidden_size, num_classes + 1),
        fg_iou_thresh=iou,
        bg_iou_thresh=iou,
        batch_size_per_image=detector.rois_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=tuple(1 / std for std in stds),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        mask_roi_pool=AlignedPool(14, strides),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
    )


def widened(x: Tensor) -> Tensor:
    """x in float32 where it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class WidePredictor(FastRCNNPredictor):
    """torchvision's, whose scores and boxes are float32; initialised as mmdetection's."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return widened(scores), widened(deltas)


class AlignedPool(MultiScaleRoIAlign):
    """torchvision's, but pixels have their centre at 0.5, and the levels' strides are given.

    It reads a point for each pixel of the map that a bin is wide (sampling_ratio 0), as the published detectors do:
    torchvision's two would leave out most of a large object. torchvision also takes the strides from the first batch's
    images, which may be much smaller than the padded batch.
    """

    def __init__(self, output_size: int, strides: list[int]) -> None:
        super().__init__([*LEVELS], output_size, sampling_ratio=0)
        strides = strides[: len(LEVELS)]
        self.strides = strides
        self.scales = [1 / stride for stride in strides]
        self.map_levels = LevelMapper(strides[0].bit_length() - 1, strides[-1].bit_length() - 1)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[Size]) -> Tensor:
        """Reads maps for boxes, a list of (n, 4), into (sum of n, C, output_size, output_size)."""
        strides = boxes[0].new_tensor(self.strides)
        half = [strides[self.map_levels([one])][:, None] / 2 for one in boxes]  # a shift of half a pixel of its level
        return super().forward(x, [one - shift for one, shift in zip(boxes, half, strict=True)], image_shapes)


class MaskRoIHeads(RoIHeads):
    """torchvision's, with masks brought to the regions a few at a time, and their loss in float32."""

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[Size], targets: list[Target]
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As torchvision's: detections, or losses in training."""
        if self.training:
            boxes, matched, labels, box_targets = self.select_training_samples(proposals, targets)
            classifier, box_reg = fastrcnn_loss(*self.read_boxes(features, boxes, image_shapes), labels, box_targets)
            mask = self.mask_loss(features, boxes, image_shapes, labels, matched, targets)
            return [], {"loss_classifier": classifier, "loss_box_reg": box_reg, "loss_mask": mask}
        scores, deltas = self.read_boxes(features, proposals, image_shapes)
        boxes, chances, classes = self.postprocess_detections(scores, deltas, proposals, image_shapes)
        masks = self.read_masks(features, boxes, image_shapes, classes)
        return as_detections(boxes, chances, classes, masks), {}

    def read_boxes(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[Size]
    ) -> tuple[Tensor, Tensor]:
        """Class logits (n, classes + 1) and box regression (n, 4 * (classes + 1)) of all images' boxes."""
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))

    def read_masks(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[Size], labels: list[Tensor]
    ) -> Tensor:
        """Probabilities (n, 28, 28) of the label's masks in all images' boxes."""
        return self._mask_logits(features, boxes, image_shapes, torch.cat(labels)).sigmoid()

    def mask_loss(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        image_shapes: list[Size],
        labels: list[Tensor],
        matched: list[Tensor],
        targets: list[Target],
    ) -> Tensor:
        """Of sampled boxes with an object: the mean binary cross-entropy with the object's mask; else 0."""
        objects = [torch.where(label > 0)[0] for label in labels]
        boxes = [one[positive] for one, positive in zip(boxes, objects, strict=True)]
        matched = [one[positive] for one, positive in zip(matched, objects, strict=True)]
        chosen = torch.cat([one[positive] for one, positive in zip(labels, objects, strict=True)])
        logits = self._mask_logits(features, boxes, image_shapes, chosen)
        if not len(logits):
            return logits.sum()
        zipped = zip(targets, boxes, matched, strict=True)
        crops = [crop_masks(target["masks"], own, match, logits.shape[-1]) for target, own, match in zipped]
        return F.binary_cross_entropy_with_logits(logits, torch.cat(crops))

    def _mask_logits(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[Size], labels: Tensor
    ) -> Tensor:
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        return widened(logits[torch.arange(len(labels), device=labels.device), labels])


def as_detections(
    boxes: list[Tensor], scores: list[Tensor], labels: list[Tensor], masks: Tensor
) -> list[dict[str, Tensor]]:
    """What a detector returns for each image. masks: (n, 28, 28) of all images."""
    by_image = masks[:, None].split([len(one) for one in boxes])
    found = zip(boxes, scores, labels, by_image, strict=True)
    return [{"boxes": box, "scores": score, "labels": label, "masks": mask} for box, score, label, mask in found]


def paste_masks(masks: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """The masks of boxes in an image of this size (h, w): bool (n, h, w). The inverse of `crop_masks`, on the CPU.

    masks: probabilities (n, 1, M, M), read at the middle of each pixel within the box, as mmdetection does;
    torchvision's own pasting takes whole pixels for the box, and one more on each side. boxes: (n, 4).
    """
    height, width = size
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2), image in zip(masks, boxes.tolist(), pasted, strict=True):
        left, right = max(math.floor(x1), 0), min(math.ceil(x2), width)
        top, bottom = max(math.floor(y1), 0), min(math.ceil(y2), height)
        if left >= right or top >= bottom:
            continue
        x = 2 * (torch.arange(left, right) + 0.5 - x1) / max(x2 - x1, 1e-6) - 1
        y = 2 * (torch.arange(top, bottom) + 0.5 - y1) / max(y2 - y1, 1e-6) - 1
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None].to(mask.dtype)
        image[top:bottom, left:right] = F.grid_sample(mask[None], places, align_corners=False)[0, 0] >= 0.5
    return pasted


def crop_masks(masks: Tensor, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """The masks that boxes are trained to show: (n, size, size) of zeros and ones, in the boxes' dtype.

    masks: uint8 (objects, h, w). boxes: (n, 4). matched: int64 (n,), each box's object. A few masks at a time become
    floats, as all of those of an image would take more memory than most layers of the detector.
    """
    crops = boxes.new_zeros(len(boxes), size, size)
    for first in range(0, len(masks), MASKS_AT_ONCE):
        few = masks[first : first + MASKS_AT_ONCE, None].to(boxes)
        here = torch.where((matched >= first) & (matched < first + MASKS_AT_ONCE))[0]
        regions = torch.cat([(matched[here, None] - first).to(boxes), boxes[here]], dim=1)
        crops[here] = roi_align(few, regions, size, aligned=True)[:, 0]
    return (crops >= 0.5).to(boxes)
