"""Keys of the network: the timm model, the detector on top, and SBP."""

from dataclasses import dataclass
from typing import Any

from sbp.settings import DROPPED, EVALUATIONS, MASK_PER, MASKS, MHSA_DROPS, RECOMPUTE
from sbp.training.config.keys import key

DETECTORS = ("mask_rcnn", "cascade_mask_rcnn")


@dataclass
class BackboneConfig:
    """A timm model."""

    name: str = key("???", "name of the timm model; has to be given")
    drop_path: float = key(0.0, "drop path rate of the last block; that of the others rises to it", at_least=0, below=1)
    kwargs: dict[str, Any] = key({}, "go to `timm.create_model` as they are")
    pretrained: str | None = key(
        None,
        "the weights that training starts from: a file (of timm, of `sbp train`, or of the network's authors), "
        "`timm` for timm's default ones, or one of its tags or full names, such as augreg_in21k_ft_in1k or "
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k; not read again when a run goes on; null for random weights",
    )
    frozen: bool = key(
        False, "only what stands on the backbone is trained (the classifier: linear probing); needs sbp=none"
    )


@dataclass
class DetectorConfig:
    """What stands on the backbone where task=detection; the defaults are the published ones."""

    name: str = key(
        "mask_rcnn",
        "Mask R-CNN (He et al., 2017), or Cascade Mask R-CNN (Cai and Vasconcelos, 2019) with three box stages",
        one_of=DETECTORS,
    )
    fpn_channels: int = key(
        256,
        "of each level of the feature pyramid, and of the convolutions of the mask heads and of the cascade's box "
        "heads",
        at_least=1,
    )
    hidden_size: int = key(1024, "of the fully connected layers of the box heads", at_least=1)
    rois_per_image: int = key(
        512, "how many regions of an image train the box heads, a quarter of them with an object", at_least=1
    )
    anchor_sizes: list[int] = key([32, 64, 128, 256, 512], "in pixels, one for each of the levels", length=5)


@dataclass
class SbpConfig:
    """The arguments of `sbp.apply`, and what a run makes of them."""

    enabled: bool = key(True, "false trains the plain timm model")
    keep_ratio: Any = key(
        0.5, "the share of positions that is kept, in (0, 1]: one number, or a list with one for each SBP layer"
    )
    keep_ratio_end: Any = key(
        None,
        "keep_ratio changes evenly over the epochs, to this (a number, or a list) in the last epoch with SBP; in steps "
        "of 1/8 between the first and the last one; null for no change",
    )
    mask: str = key("grid", "kept positions lie on a regular grid, or anywhere", one_of=MASKS)
    mhsa_drop: str = key("qkv", "what attention drops; `qkv` is the published method", one_of=MHSA_DROPS)
    layers: Any = key(None, "null for the published ones, `all`, or a list of names")
    seed: int = key(0, "of the masks", at_least=0)
    hold_mask: bool = key(False, "one mask for a whole optimizer step instead of one for each micro batch")
    shared_mask: bool = key(
        False,
        "one mask for all processes instead of one for each; with hold_mask, and mask_per=batch, a global batch has "
        "the same gradient however it is split over processes and micro batches",
    )
    fixed_mask: bool = key(
        False, "one mask for the whole run (of each process, without shared_mask) instead of fresh ones"
    )
    exact_epochs: int = key(0, "so many epochs at the end of the run use exact backpropagation", at_least=0)
    exact_recompute: str | None = key(
        None,
        "the `recompute` of those epochs, which would else save more for the backward pass; null for the same",
        one_of=RECOMPUTE,
        free="always",
    )
    eval: str = key(
        "exact", "`published` is the authors' evaluation, with masks and partial attention", one_of=EVALUATIONS
    )
    recompute: str = key(
        "none", "what is computed again in the backward pass instead of being saved", one_of=RECOMPUTE, free="always"
    )
    mask_per: str = key(
        "batch",
        "who has a mask of its own; `half` and `sample` go by an image's place in its micro batch, which is one "
        "process's",
        one_of=MASK_PER,
    )
    rescale: bool = key(False, "multiply the gradient that enters a branch at kept positions by N / K")
    dropped: str = key(
        "none",
        "what dropped positions have of the gradient. `input`: pointwise branches pass that of their input on, for 3 "
        "bytes a channel; `neighbours`: the mean of the kept ones around, in a ConvNeXt; see docs/method.md",
        one_of=DROPPED,
    )
