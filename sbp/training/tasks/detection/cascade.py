"""The three stages of Cascade Mask R-CNN (Cai and Vasconcelos, 2019), each on the boxes that the one before refined.

As in the published ConvNeXt detectors (mmdetection's CascadeRoIHead with class-specific boxes and the GIoU loss).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss

from sbp.training.config.model import DetectorConfig
from sbp.training.tasks.detection.heads import MaskRoIHeads, Size, as_detections, roi_stage
from sbp.training.tasks.detection.target import Target

IOUS = (0.5, 0.6, 0.7)
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
STAGE_WEIGHTS = (1.0, 0.5, 0.25)
BOX_WEIGHT = 10.0


def cascade_heads(strides: list[int], detector: DetectorConfig, num_classes: int) -> "CascadeHeads":
    """strides: of the pyramid's levels, in pixels. Each box head has four convolutions and one more layer."""

    def box_head() -> nn.Module:
        channels = detector.fpn_channels
        widths, hidden = [channels] * 4, [detector.hidden_size]
        return FastRCNNConvFCHead((channels, 7, 7), widths, hidden, norm_layer=nn.BatchNorm2d)

    stages = zip(IOUS, STDS, strict=True)
    return CascadeHeads([roi_stage(box_head(), strides, detector, num_classes, iou, stds) for iou, stds in stages])


class Sample(NamedTuple):
    """The regions of each image that train a stage.

    boxes: (n, 4). labels: (n,), 0 for background. matched: (n,), the object of each region that has one.
    added: bool (n,), regions that are an object's own box.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    matched: list[Tensor]
    added: list[Tensor]


class CascadeHeads(nn.Module):
    """Takes and returns what torchvision's `RoIHeads` does; the losses are weighted, with the stage in their names."""

    stages: Any  # a ModuleList of MaskRoIHeads

    def __init__(self, stages: list[MaskRoIHeads]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[Size], targets: list[Target]
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        losses = {}
        for number, (stage, weight) in enumerate(zip(self.stages, STAGE_WEIGHTS, strict=True), 1):
            sample = draw_sample(stage, proposals, targets)
            scores, deltas = stage.read_boxes(features, sample.boxes, image_shapes)
            labels = torch.cat(sample.labels)
            mask = stage.mask_loss(features, sample.boxes, image_shapes, sample.labels, sample.matched, targets)
            losses[f"loss_classifier_{number}"] = (
                weight * F.cross_entropy(scores, labels, reduction="sum") / max(len(labels), 1)
            )
            losses[f"loss_box_reg_{number}"] = weight * BOX_WEIGHT * box_loss(stage, deltas, sample, targets)
            losses[f"loss_mask_{number}"] = weight * mask
            classes = torch.where(labels > 0, labels, likeliest(scores))
            refined = refine(stage, deltas, sample.boxes, classes, image_shapes)
            proposals = [boxes[~added] for boxes, added in zip(refined, sample.added, strict=True)]
        return [], losses

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[Size]
    ) -> list[dict[str, Tensor]]:
        """Boxes of the last stage, with the mean of all stages' logits and of all mask heads' probabilities."""
        logits = []
        for stage in self.stages:
            boxes = proposals
            scores, deltas = stage.read_boxes(features, boxes, image_shapes)
            logits.append(scores)
            proposals = refine(stage, deltas, boxes, likeliest(scores), image_shapes)
        mean = torch.stack(logits).mean(0)
        boxes, chances, classes = stage.postprocess_detections(mean, deltas, boxes, image_shapes)
        masks = [stage.read_masks(features, boxes, image_shapes, classes) for stage in self.stages]
        return as_detections(boxes, chances, classes, torch.stack(masks).mean(0))


def draw_sample(stage: MaskRoIHeads, proposals: list[Tensor], targets: list[Target]) -> Sample:
    """Regions for a stage at random, from the proposals and the objects' own boxes, by the overlap that it asks for."""
    objects = [target["boxes"].to(boxes) for target, boxes in zip(targets, proposals, strict=True)]
    boxes = stage.add_gt_proposals(proposals, objects)
    matched, labels = stage.assign_targets_to_proposals(boxes, objects, [target["labels"] for target in targets])
    drawn = stage.subsample(labels)
    added = [index >= len(own) for index, own in zip(drawn, proposals, strict=True)]  # they come last

    def chosen(each: list[Tensor]) -> list[Tensor]:
        return [one[index] for one, index in zip(each, drawn, strict=True)]

    return Sample(chosen(boxes), chosen(labels), chosen(matched), added)


def box_loss(stage: MaskRoIHeads, deltas: Tensor, sample: Sample, targets: list[Target]) -> Tensor:
    """GIoU loss of the decoded boxes of regions with an object, summed, over the number of all regions."""
    labels = torch.cat(sample.labels)
    boxes = decode(stage, deltas, torch.cat(sample.boxes), labels)[labels > 0]
    zipped = zip(targets, sample.labels, sample.matched, strict=True)
    objects = [target["boxes"][matched[label > 0]] for target, label, matched in zipped]
    return generalized_box_iou_loss(boxes, torch.cat(objects).to(boxes), reduction="sum") / max(len(labels), 1)


def refine(
    stage: MaskRoIHeads, deltas: Tensor, boxes: list[Tensor], classes: Tensor, image_shapes: list[Size]
) -> list[Tensor]:
    """The boxes that a stage makes of its regions if these show objects of `classes`, clipped, without gradient."""
    refined = decode(stage, deltas.detach(), torch.cat(boxes), classes).split([len(one) for one in boxes])
    return [clip_boxes_to_image(one, shape) for one, shape in zip(refined, image_shapes, strict=True)]


def decode(stage: MaskRoIHeads, deltas: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
    """Boxes (n, 4) from regions (n, 4) and the part for `classes` (n,) of a stage's outputs (n, 4 * all classes)."""
    own = deltas.unflatten(1, (-1, 4))[torch.arange(len(classes), device=classes.device), classes]
    return stage.box_coder.decode_single(own, boxes)


def likeliest(scores: Tensor) -> Tensor:
    """The class (n,) other than the background with the highest score. scores: (n, classes + 1)."""
    return scores[:, 1:].argmax(1) + 1
