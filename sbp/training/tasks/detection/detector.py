"""Mask R-CNN on a timm ConvNeXt or Swin, from torchvision's parts, with the settings of the published detectors.

Those are mmdetection's (facebookresearch/ConvNeXt, object_detection/configs;
SwinTransformer/Swin-Transformer-Object-Detection). Images come padded to one size; boxes are (x1, y1, x2, y2) in pixels
of the padded batch, and everything about them is float32 under autocast too: in bfloat16 a box at 1333 px is off by
several pixels. They differ in that Mask R-CNN's box losses are torchvision's smooth L1, anchors that cross the image's
border are trained as well, and low-quality matches of anchors have no least overlap.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models import is_model_in_modules
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from sbp.training.config.model import BackboneConfig, DetectorConfig, SbpConfig
from sbp.training.models.build import apply_sbp, check_name, create
from sbp.training.record.checkpoint import load_weights
from sbp.training.tasks.detection.cascade import cascade_heads
from sbp.training.tasks.detection.heads import LEVELS, Size, roi_stage, widened
from sbp.training.tasks.detection.target import Target

ASPECT_RATIOS = (0.5, 1.0, 2.0)
BLOCKS_A_LAYER = 3
SWIN = {"swin_transformer", "swin_transformer_v2"}  # modules of timm
OBJECTS_AT_ONCE = 8
PROPOSALS = {"mask_rcnn": 1000, "cascade_mask_rcnn": 2000}  # of an image in training


def build_detector(
    backbone: BackboneConfig, settings: SbpConfig, detector: DetectorConfig, num_classes: int
) -> "Detector":
    """The detector on the timm model, which is patched when `settings.enabled`; on the CPU, random weights.

    num_classes: of objects, without the background. Raises ValueError for a backbone that is neither ConvNeXt nor Swin,
    or has other strides, for what timm does not know, and for SBP settings that do not fit the backbone.
    """
    features = Pyramid(create_body(backbone), detector.fpn_channels)
    if detector.name == "cascade_mask_rcnn":
        roi_heads: nn.Module = cascade_heads(features.strides, detector, num_classes)
    else:
        box_head = TwoMLPHead(detector.fpn_channels * 7**2, detector.hidden_size)
        roi_heads = roi_stage(box_head, features.strides, detector, num_classes)
    apply_sbp(features.body, settings)  # rather than to the detector: `sbp.layers` are then timm's own names
    return Detector(features, proposal_network(features.strides, detector), roi_heads)


def create_body(backbone: BackboneConfig) -> nn.Module:
    """timm's model without its head, and with it the norm before it, which nothing would train.

    A Swin takes images of any size, and its windows are those of `backbone.kwargs` however small a map is.
    """
    check_name(backbone.name)
    if not is_model_in_modules(backbone.name, {"convnext", *SWIN}):
        raise ValueError(
            f"backbone.name={backbone.name} is neither ConvNeXt nor Swin; task=detection needs one of timm's "
            "convnext*, swin_* or swinv2_*"
        )
    is_swin = is_model_in_modules(backbone.name, SWIN)
    options: dict[str, Any] = {"strict_img_size": False, "always_partition": True} if is_swin else {}
    body: Any = create(backbone, num_classes=0, **options)
    if is_swin:
        body.norm = nn.Identity()
    else:
        body.norm_pre = nn.Identity()
    body.head = nn.Identity()  # older timm's `prune_intermediate_layers` leaves a ConvNeXt's norm
    return body


def load_body(detector: "Detector", weights: dict[str, Tensor]) -> None:
    """A timm model's weights into the detector's backbone, strictly, but for the head that it does not have."""
    kept = {name: value for name, value in weights.items() if not name.startswith(("head.", "norm_pre.", "norm."))}
    load_weights(detector.backbone.body, kept)


def proposal_network(strides: list[int], detector: DetectorConfig) -> RegionProposalNetwork:
    rpn = RegionProposalNetwork(
        Anchors(detector.anchor_sizes, strides),
        WideRPNHead(detector.fpn_channels, len(ASPECT_RATIOS)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},  # of each level
        post_nms_top_n={"training": PROPOSALS[detector.name], "testing": 1000},
        nms_thresh=0.7,
    )
    rpn.box_similarity = overlaps
    return rpn


def overlaps(objects: Tensor, anchors: Tensor) -> Tensor:
    """torchvision's box_iou, (objects, anchors), a few objects at a time: else a crowd's make the step's peak."""
    return torch.cat([box_iou(few, anchors) for few in objects.split(OBJECTS_AT_ONCE)])


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

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters that timm does not decay, by their names here."""
        own: set[str] = getattr(self.backbone.body, "no_weight_decay", set)()
        return {f"backbone.body.{name}" for name in own}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Of the backbone, as timm's models have it."""
        self.backbone.body.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The layers of layer-wise learning rate decay, as timm asks for them: the stem, the first two stages, each
        three blocks of the third one, the fourth one, and the detector on top; published: `num_layers` 6 for
        ConvNeXt-Tiny and 12 for ConvNeXt-Base.
        """
        body: Any = self.backbone.body
        stages = body.layers if hasattr(body, "layers") else body.stages
        fourth = 3 + -(-len(stages[2].blocks) // BLOCKS_A_LAYER)
        return partial(layer_of, fourth_stage=fourth)


def layer_of(name: str, fourth_stage: int) -> int:
    """The layer of a parameter, counted from the stem; that of the third stage's downsampling is its first blocks'."""
    parts = name.removeprefix("backbone.body.").split(".")
    if parts[0] in ("stem", "patch_embed"):
        return 0
    if parts[0] not in ("stages", "layers") or not name.startswith("backbone.body."):
        return fourth_stage + 1
    stage = int(parts[1])
    if stage == 2 and parts[2] == "blocks":
        return 3 + int(parts[3]) // BLOCKS_A_LAYER
    return fourth_stage if stage == 3 else stage + 1


class Pyramid(nn.Module):
    """A ConvNeXt or Swin (`body`), a norm on each stage's map, and a feature pyramid with one more level on top.

    Raises ValueError unless each stage halves the map.
    """

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        stages: Any = body.feature_info
        widths: list[int] = [stage["num_chs"] for stage in stages]
        strides: list[int] = [stage["reduction"] for stage in stages]
        if any(stride != strides[0] * 2**level for level, stride in enumerate(strides)):
            raise ValueError(f"backbone.kwargs give stages of strides {strides}; in detection each has to double it")
        self.strides = [*strides, 2 * strides[-1]]
        self.body: Any = body
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
