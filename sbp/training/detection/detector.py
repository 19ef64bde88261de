"""Mask R-CNN on a timm ConvNeXt, from torchvision's parts, with the settings of the published ConvNeXt detectors.

Those are mmdetection's (facebookresearch/ConvNeXt, object_detection/configs). Images come padded to one size; boxes are
(x1, y1, x2, y2) in pixels of the padded batch, and everything about them is float32 under autocast too: in bfloat16
a box at 1333 px is off by several pixels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models import ConvNeXt, is_model_in_modules
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from sbp.training import distributed
from sbp.training.checkpoint import load_weights
from sbp.training.config import BackboneConfig, DetectorConfig, SbpConfig
from sbp.training.models import apply_sbp, check_name, create

Target = dict[str, Tensor]
Size = tuple[int, int]

BOX_STDS = (0.1, 0.1, 0.2, 0.2)  # what the box heads' outputs are multiplied by, for x, y, width and height
ASPECT_RATIOS = (0.5, 1.0, 2.0)
PROPOSALS = 1000
MASKS_AT_ONCE = 8
LEVELS = ("0", "1", "2", "3")  # those that regions are read from; the RPN has one more


def build_detector(
    backbone: BackboneConfig, settings: SbpConfig, detector: DetectorConfig, num_classes: int
) -> "Detector":
    """The detector on the timm model, which is patched when `settings.enabled`; on the CPU, random weights.

    num_classes: of objects, without the background. Raises ValueError for a backbone that is no ConvNeXt, or has other
    strides, for what timm does not know, and for SBP settings that do not fit the backbone.
    """
    features = Pyramid(create_body(backbone), detector.fpn_channels)
    roi_heads = mask_rcnn_heads(features.strides, detector, num_classes)
    proposals = PROPOSALS
    model = Detector(features, proposal_network(features.strides, detector, proposals), roi_heads)
    apply_sbp(features.body, settings)  # rather than to the detector: `sbp.layers` are then timm's own names
    return model


def create_body(backbone: BackboneConfig) -> ConvNeXt:
    """timm's model without its head, and with it the norm before it, which nothing would train."""
    check_name(backbone.name)
    if not is_model_in_modules(backbone.name, {"convnext"}):
        raise ValueError(f"backbone.name={backbone.name} is no ConvNeXt; task=detection needs one of timm's convnext*")
    body = create(backbone, num_classes=0)
    assert isinstance(body, ConvNeXt)
    body.prune_intermediate_layers(list(range(len(body.stages))), prune_norm=True)
    return body


def load_body(detector: "Detector", weights: dict[str, Tensor]) -> None:
    """A timm model's weights into the detector's backbone, strictly, but for the head that it does not have."""
    kept = {name: value for name, value in weights.items() if not name.startswith(("head.", "norm_pre."))}
    load_weights(detector.backbone.body, kept)


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """The model with statistics over all processes' RoIs, where it runs on CUDA in several; else as it is.

    Call it after `.to(device)` and before DDP. Names and parameters stay, and SBP layers too.
    """
    if distributed.world_size() == 1 or not next(model.parameters()).is_cuda:
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def widened(x: Tensor) -> Tensor:
    """x in float32 where it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Detector(nn.Module):
    """A two-stage detector. rpn and roi_heads take what torchvision's do."""

    def __init__(self, backbone: "Pyramid", rpn: RegionProposalNetwork, roi_heads: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.rpn = rpn
        self.roi_heads = roi_heads

    def forward(self, images: Tensor, targets: list[Target]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """images: (B, 3, H, W), each one in the upper left corner; H and W multiples of 32.

        targets: of each image "size" (h, w), and in training "boxes" float (n, 4), "labels" int64 (n,) from 1 on,
        and "masks" uint8 (n, h, w). Returns the losses in training, whose sum is the loss; else for each image "boxes"
        (n, 4), clipped to it, "labels" and "scores" (n,), and "masks" (n, 1, 28, 28), probabilities within the box.
        """
        sizes: list[Size] = [(int(t["size"][0]), int(t["size"][1])) for t in targets]
        features = self.backbone(images)
        proposals, rpn_losses = self.rpn(ImageList(images, sizes), features, targets)
        detections, losses = self.roi_heads(features, proposals, sizes, targets)
        return rpn_losses | losses if self.training else detections


class Pyramid(nn.Module):
    """A ConvNeXt (`body`), a norm on each stage's map, and a feature pyramid with one more level on top.

    Raises ValueError unless each stage halves the map.
    """

    def __init__(self, body: ConvNeXt, channels: int) -> None:
        super().__init__()
        stages: Any = body.feature_info
        widths: list[int] = [stage["num_chs"] for stage in stages]
        strides: list[int] = [stage["reduction"] for stage in stages]
        if any(stride != strides[0] * 2**level for level, stride in enumerate(strides)):
            raise ValueError(f"backbone.kwargs give stages of strides {strides}; in detection each has to double it")
        self.strides = [*strides, 2 * strides[-1]]
        self.body = body
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in widths)
        self.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to maps (B, channels, H / stride, W / stride) by level."""
        maps = self.body.forward_intermediates(images, intermediates_only=True)
        return self.fpn({level: norm(x) for level, norm, x in zip(LEVELS, self.norms, maps, strict=True)})


class Anchors(AnchorGenerator):
    """torchvision's, but float32 and with the pyramid's strides, where those would be read off rounded map sizes."""

    def __init__(self, sizes: list[int], strides: list[int]) -> None:
        super().__init__(tuple((size,) for size in sizes), (ASPECT_RATIOS,) * len(sizes))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        first = feature_maps[0]
        self.set_cell_anchors(torch.promote_types(first.dtype, torch.float32), first.device)
        sizes = [[*x.shape[-2:]] for x in feature_maps]
        anchors = torch.cat(self.grid_anchors(sizes, [[stride, stride] for stride in self.strides]))  # type: ignore[misc]
        return [anchors] * len(image_list.image_sizes)


class WideRPNHead(RPNHead):
    """torchvision's, whose scores and boxes are float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(x)
        return [widened(one) for one in scores], [widened(one) for one in deltas]


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

    It reads as many points in each bin as the region is wide (sampling_ratio 0), as in the published detectors:
    two would miss most of a large object. torchvision infers strides from the first batch's images, which may be much
    smaller than the padded batch.
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
        objects = [label > 0 for label in labels]
        boxes = [one[positive] for one, positive in zip(boxes, objects, strict=True)]
        matched = [one[positive] for one, positive in zip(matched, objects, strict=True)]
        chosen = torch.cat([one[positive] for one, positive in zip(labels, objects, strict=True)])
        logits = self._mask_logits(features, boxes, image_shapes, chosen)
        if not len(logits):
            return logits.sum()
        crops = [
            crop_masks(target["masks"], *one, logits.shape[-1])
            for target, one in zip(targets, zip(boxes, matched, strict=True), strict=True)
        ]
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


def proposal_network(strides: list[int], detector: DetectorConfig, in_training: int) -> RegionProposalNetwork:
    """in_training: how many proposals of an image go on; in evaluation 1000."""
    anchors = Anchors(detector.anchor_sizes, strides)
    return RegionProposalNetwork(
        anchors,
        WideRPNHead(detector.fpn_channels, len(ASPECT_RATIOS)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": in_training, "testing": PROPOSALS},
        nms_thresh=0.7,
    )


def mask_rcnn_heads(strides: list[int], detector: DetectorConfig, num_classes: int) -> MaskRoIHeads:
    box_head = TwoMLPHead(detector.fpn_channels * 7**2, detector.hidden_size)
    return roi_stage(box_head, strides, detector, num_classes)


def roi_stage(
    box_head: nn.Module,
    strides: list[int],
    detector: DetectorConfig,
    num_classes: int,
    iou: float = 0.5,
    stds: tuple[float, ...] = BOX_STDS,
) -> MaskRoIHeads:
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
