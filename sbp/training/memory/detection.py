"""What a forecast needs of a detector: a step in which as many anchors and regions are chosen as there may be.

Which of them a real step chooses depends on numbers, and fake tensors have none. Here the sampled anchors of an image
are half with an object, its regions a quarter, and the regions lie on the four levels alike. Matching and the choice of
proposals allocate for a moment, long before the peak, and are left out.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.models.detection.roi_heads import RoIHeads

from sbp.training.config.run import Config
from sbp.training.tasks.detection import synthetic
from sbp.training.tasks.detection.detector import PROPOSALS, Detector, build_detector
from sbp.training.tasks.detection.synthetic import Batch
from sbp.training.tasks.detection.target import Target
from sbp.training.tasks.task import sum_of

SHARE = 4  # of the entries of a condition one in so many holds: regions with an object, and those of a level


def build(config: Config) -> Detector:
    """As training builds it."""
    return build_detector(config.backbone, config.sbp, config.detector, config.data.num_classes)


def batch(config: Config, size: int) -> Batch:
    """Images of the largest training size, lying, and their objects."""
    data, recipe = config.data, config.recipe
    short = max(recipe.short_sides or [0]) if recipe.augment else 0
    return synthetic.empty(short or data.image_size, data.max_size, size)


def loss(model: Detector, images: Tensor, targets: list[Target]) -> Tensor:
    return sum_of(model(images, targets))  # type: ignore[arg-type]


def choose_as_many_as_there_may_be(model: Detector, config: Config) -> None:
    """Puts fixed numbers in the place of what depends on boxes, in place."""
    rpn: Any = model.rpn
    rpn.anchor_generator.cell_anchors = [torch.empty(one.shape) for one in rpn.anchor_generator.cell_anchors]
    proposals, anchors, regions = PROPOSALS[config.detector.name], rpn.fg_bg_sampler, config.detector.rois_per_image

    def filter_proposals(self: Any, boxes: Tensor, *_: Any) -> tuple[list[Tensor], list[Tensor]]:
        return [boxes.new_empty(proposals, 4) for _ in boxes], [boxes.new_empty(proposals) for _ in boxes]

    def assign_targets_to_anchors(self: Any, of_images: list[Tensor], _: Any) -> tuple[list[Tensor], list[Tensor]]:
        return [one.new_empty(len(one)) for one in of_images], [torch.empty_like(one) for one in of_images]

    def compute_loss(
        self: Any, scores: Tensor, deltas: Tensor, labels: list[Tensor], targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        sampled = indices(anchors.batch_size_per_image * len(labels))
        objects = sampled[: int(len(sampled) * anchors.positive_fraction)]
        box_loss = F.smooth_l1_loss(deltas[objects], torch.cat(targets)[objects], beta=1 / 9, reduction="sum")
        return F.binary_cross_entropy_with_logits(scores.flatten()[sampled], torch.cat(labels)[sampled]), box_loss

    def subsample(self: Any, labels: list[Tensor]) -> list[Tensor]:
        return [indices(regions) for _ in labels]

    for method in (filter_proposals, assign_targets_to_anchors, compute_loss):
        setattr(rpn, method.__name__, MethodType(method, rpn))
    for module in model.modules():
        if isinstance(module, RoIHeads):
            module.subsample = MethodType(subsample, module)  # type: ignore[method-assign]


def indices(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64)


class Conditions(TorchFunctionMode):
    """Within it, one in SHARE entries of a condition (n,) holds, whose values are not known."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.where and len(args) == 1:
            return (self._where(*args),)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and getattr(args[1], "dtype", None) is torch.bool:
            args = (args[0], self._where(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))

    def _where(self, condition: Tensor) -> Tensor:
        return indices(len(condition) // SHARE)
