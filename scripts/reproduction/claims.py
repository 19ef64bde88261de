"""What the talk claims, and what is trained to check it: plain data.

Source of the claims: Fang et al., "An In-depth Study of Stochastic Backpropagation" (NeurIPS 2022), and its slides.
An arm is one way to train; a comparison sets two of them side by side; a claim is decided by its comparisons.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

STAGES = {"early": 0.1, "middle": 0.5, "late": 1.0}  # of training: the checkpoints on which gradients are compared


@dataclass(frozen=True)
class Setting:
    """A network and its images. Arms are trained in each setting.

    overrides: of train.py. sbp_layers: how many layers are SBP as published. other_layers: as many at the other end of
    the network.
    epochs, lr, batch_size: of the full schedule. seeds: runs of each arm; those of one seed share initial weights, the
    order of the images and the augmentation. image_size, small_size: of the images, and in the arms of lower
    resolution, in pixels.
    sbp_time: how long a step with SBP takes, relative to one without, for the arms at equal time; measured before they
    are trained.
    images, draws: of the gradient similarity: images in the batch, and masks of each method. needs_root: the images lie
    in a folder. gradients_only: nothing is trained but the network without SBP.
    """

    name: str
    label: str
    overrides: tuple[str, ...]
    sbp_layers: int
    other_layers: tuple[str, ...]
    epochs: int
    lr: float
    batch_size: int
    seeds: int
    image_size: int
    small_size: int
    sbp_time: float = 0.7
    is_vit: bool = True
    needs_root: bool = False
    images: int = 128
    draws: int = 8
    gradients_only: bool = False

    @property
    def schedule(self) -> list[str]:
        return [f"recipe.epochs={self.epochs}", f"recipe.lr={self.lr:g}", f"global_batch_size={self.batch_size}"]


@dataclass(frozen=True)
class Arm:
    """overrides: of train.py, in a setting. vit_only: needs attention, or tokens to leave out; convnext_only: the
    opposite. many_epochs: needs more than one.

    same_as: the arm with the very same gradients, whose accuracy is taken: only what a step costs is measured.
    parts: of an arm with several kinds of steps, those of which arms they are, and their share: its step takes their
    mean time, and its peak is the largest of theirs.
    """

    label: str
    overrides: Callable[[Setting], list[str]]
    vit_only: bool = False
    convnext_only: bool = False
    many_epochs: bool = False
    same_as: str | None = None
    parts: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """`better` is claimed to be better than `worse`: a lower "val_loss", or a higher gradient "cosine"."""

    better: str
    worse: str
    measure: str = "val_loss"


@dataclass(frozen=True)
class Claim:
    """comparisons: decide it. dominated_by: arms, of which none may be as lean, as fast and better than "sbp".

    context: arms that are shown beside those. published: what the talk says. shows: its figure, "differences" of pairs,
    "similarities" along training, "costs", that is loss against memory and time, or "choice".
    against_plain: arms whose accuracy is set beside that of training without SBP, the most telling first.
    """

    title: str
    published: str
    comparisons: tuple[Comparison, ...] = ()
    dominated_by: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    shows: str = "differences"
    against_plain: tuple[str, ...] = ()


NONE = "sbp=none"
HALF_TOKENS = "+backbone.kwargs.patch_drop_rate=0.5"


def fixed(*overrides: str) -> Callable[[Setting], list[str]]:
    return lambda setting: list(overrides)


def ratios(first: float, last: float) -> Callable[[Setting], list[str]]:
    """Keep-ratios that change linearly from the first SBP layer to the last."""

    def overrides(setting: Setting) -> list[str]:
        values = np.linspace(first, last, setting.sbp_layers).round(3).tolist()
        return [f"sbp.keep_ratio={values}".replace(" ", "")]

    return overrides


def other_layers(setting: Setting) -> list[str]:
    return [f"sbp.layers=[{','.join(setting.other_layers)}]"]


def lr(factor: float, *more: str) -> Callable[[Setting], list[str]]:
    return lambda setting: [*more, f"recipe.lr={factor * setting.lr:g}"]


def epochs(time: Callable[[Setting], float], *more: str) -> Callable[[Setting], list[str]]:
    """The schedule stretched to `time` times its epochs."""
    return lambda setting: [*more, f"recipe.epochs={round(setting.epochs * time(setting))}"]


def low_resolution(setting: Setting) -> list[str]:
    return [NONE, f"data.train_image_size={setting.small_size}", *any_size(setting)]


def low_throughout(setting: Setting) -> list[str]:
    return [NONE, f"data.image_size={setting.small_size}", *any_size(setting)]


def any_size(setting: Setting) -> list[str]:
    """The same initial weights, position embedding too, for images of another size."""
    size = f"backbone.kwargs.img_size={setting.image_size}"
    return [size, "+backbone.kwargs.dynamic_img_size=true"] if setting.is_vit else []


def half_batches(setting: Setting) -> list[str]:
    return [NONE, f"micro_batch_size={setting.batch_size // 2}"]


def exact_end(tenths: int) -> Callable[[Setting], list[str]]:
    """So many tenths of the epochs, at least as many epochs."""
    return lambda setting: [f"sbp.exact_epochs={max(tenths, tenths * setting.epochs // 10)}"]


def query(keep_ratio: float) -> Callable[[Setting], list[str]]:
    return fixed("sbp.mhsa_drop=query", f"sbp.keep_ratio={keep_ratio}")


def input_gradients(keep_ratio: float, *more: str) -> Callable[[Setting], list[str]]:
    return fixed("sbp.dropped=input", f"sbp.keep_ratio={keep_ratio}", *more)


ARMS = {
    "plain": Arm("no SBP", fixed(NONE)),
    "sbp": Arm("published SBP", fixed()),
    # the talk's alternatives
    "random": Arm("random mask", fixed("sbp.mask=random")),
    "ratio_0.125": Arm("keep-ratio 0.125", fixed("sbp.keep_ratio=0.125")),
    "ratio_0.25": Arm("keep-ratio 0.25", fixed("sbp.keep_ratio=0.25")),
    "ratio_0.75": Arm("keep-ratio 0.75", fixed("sbp.keep_ratio=0.75")),
    "rising": Arm("keep-ratio rising with depth, 0.25 to 0.75", ratios(0.25, 0.75)),
    "falling": Arm("keep-ratio falling with depth, 0.75 to 0.25", ratios(0.75, 0.25)),
    "query": Arm("drop on queries", fixed("sbp.mhsa_drop=query"), vit_only=True),
    "query_0.25": Arm("drop on queries, keep-ratio 0.25", query(0.25), vit_only=True),
    "query_0.125": Arm("drop on queries, keep-ratio 0.125", query(0.125), vit_only=True),
    "query_0.0625": Arm("drop on queries, keep-ratio 0.0625", query(0.0625), vit_only=True),
    "head": Arm("drop on heads", fixed("sbp.mhsa_drop=head"), vit_only=True),
    "layers_all": Arm("SBP in all layers", fixed("sbp.layers=all")),
    "layers_other": Arm("SBP in as many layers at the other end", other_layers),
    # ours
    "qkv_exact": Arm("qkv_exact", fixed("sbp.mhsa_drop=qkv_exact"), vit_only=True),
    "input": Arm("input gradients at dropped positions", input_gradients(0.5), convnext_only=True),
    "input_0.25": Arm(
        "input gradients at dropped positions, keep-ratio 0.25", input_gradients(0.25), convnext_only=True
    ),
    "input_0.125": Arm(
        "input gradients at dropped positions, keep-ratio 0.125", input_gradients(0.125), convnext_only=True
    ),
    "input_per_sample": Arm(
        "input gradients at dropped positions, a mask for each image",
        input_gradients(0.5, "sbp.mask_per=sample"),
        convnext_only=True,
    ),
    "query_input_0.25": Arm(
        "drop on queries, input gradients at dropped tokens, keep-ratio 0.25",
        input_gradients(0.25, "sbp.mhsa_drop=query"),
        vit_only=True,
    ),
    "per_sample": Arm("a mask for each image", fixed("sbp.mask_per=sample")),
    "per_half": Arm("complementary masks for two halves", fixed("sbp.mask_per=half")),
    "fixed": Arm("one mask for the whole run", fixed("sbp.fixed_mask=true")),
    "rescale": Arm("branch gradients rescaled", fixed("sbp.rescale=true")),
    "exact_end": Arm(
        "exact backpropagation in the last 10 % of epochs",
        exact_end(1),
        many_epochs=True,
        parts={"sbp": 0.9, "plain": 0.1},
    ),
    "exact_end_20": Arm(
        "exact backpropagation in the last 20 % of epochs",
        exact_end(2),
        many_epochs=True,
        parts={"sbp": 0.8, "plain": 0.2},
    ),
    "rising_epochs": Arm(
        "keep-ratio rising over the epochs, 0.25 to 0.75",
        fixed("sbp.keep_ratio=0.25", "sbp.keep_ratio_end=0.75"),
        many_epochs=True,
        parts={"ratio_0.25": 0.25, "sbp": 0.5, "ratio_0.75": 0.25},
    ),
    # what else one could do
    "patch_dropout": Arm("PatchDropout 0.5", fixed(NONE, HALF_TOKENS), vit_only=True),
    "low_resolution": Arm("lower resolution in training", low_resolution),
    "low_throughout": Arm("lower resolution throughout", low_throughout),
    "shorter": Arm("no SBP, fewer epochs", epochs(lambda s: s.sbp_time, NONE), many_epochs=True),
    "longer": Arm("SBP, more epochs", epochs(lambda s: 1 / s.sbp_time), many_epochs=True),
    "accumulation": Arm("no SBP, two micro batches", half_batches, same_as="plain"),
    "cheap": Arm("no SBP, cheap recomputation", fixed("sbp.keep_ratio=1", "sbp.recompute=cheap"), same_as="plain"),
    "block": Arm("no SBP, block recomputation", fixed("sbp.keep_ratio=1", "sbp.recompute=block"), same_as="plain"),
    "sbp_cheap": Arm("SBP, cheap recomputation", fixed("sbp.recompute=cheap"), same_as="sbp"),
    "sbp_block": Arm("SBP, block recomputation", fixed("sbp.recompute=block"), same_as="sbp"),
    "plain_lr_half": Arm("no SBP, half the learning rate", lr(0.5, NONE)),
    "plain_lr_double": Arm("no SBP, twice the learning rate", lr(2, NONE)),
    "sbp_lr_half": Arm("SBP, half the learning rate", lr(0.5)),
    "sbp_lr_double": Arm("SBP, twice the learning rate", lr(2)),
}

# Runs of the arm "sbp", evaluated as the authors' code does.
PARTIAL = {"partial": "published SBP, evaluated with partial attention"}

# Gradients that no arm is trained with: what a similarity is judged by.
NULLS = {"half": "gradient of half of the batch", "three_quarters": "gradient of three quarters of the batch"}


def both(better: str, *worse: str) -> tuple[Comparison, ...]:
    """In loss and in similarity, against each."""
    return tuple(Comparison(better, other, measure) for other in worse for measure in ("val_loss", "cosine"))


CLAIMS = {
    "1": Claim(
        "The gradient of the kept positions is highly correlated with the whole gradient",
        "“We observe that dW_keep (SBP) are highly correlated (measured by cosine similarity) with dW (SGD).” "
        "How high is not said; here it counts as high when it is nearer than the gradient of half of the batch.",
        (Comparison("sbp", "half", "cosine"),),
        shows="similarities",
    ),
    "2": Claim(
        "Grid masks beat random ones",
        "“Grid-wise mask has higher accuracy”, “Grid-wise mask has stronger correlation”.",
        both("sbp", "random"),
    ),
    "3": Claim(
        "Keep-ratio 0.5 is the sweet spot",
        "“Sweet spot at keep-ratio = 0.5”: here, that no other ratio and no other way to save memory is at least as "
        "lean, at least as fast and better.",
        dominated_by=(
            *("ratio_0.125", "ratio_0.25", "ratio_0.75", "plain", "cheap", "accumulation"),
            *("patch_dropout", "low_resolution", "low_throughout", "shorter"),
        ),
        shows="costs",
    ),
    "4": Claim(
        "Uniform keep-ratios beat ratios that change with depth",
        "“Uniform keep-ratios method has best accuracy and correlation”.",
        both("sbp", "rising", "falling"),
    ),
    "5": Claim(
        "On MHSA, dropping on QKV beats dropping on queries and on heads",
        "“Dropping gradients on all QKV has best accuracy and correlation”.",
        both("sbp", "query", "head"),
        context=("qkv_exact",),
    ),
    "6": Claim(
        "The published choice of layers is the one to take",
        "Not a claim of the talk but its setting: SBP in the last two thirds of a ViT's blocks, and in the first two "
        "thirds of a ConvNeXt's layers. Here against SBP in all layers, and in as many at the network's other end.",
        both("sbp", "layers_all", "layers_other"),
    ),
    "7": Claim(
        "Table 1: less memory, and 0.5 to 0.6 points less top-1",
        "“SBP can save up to 40% of GPU memory with 0.6% of accuracy drop”.",
    ),
}

QUESTIONS = {  # ours, answered in the same way
    "exact_attention": Claim(
        "Is `qkv_exact`, whose forward pass is the plain model's, better than `qkv`?",
        "Not in the talk.",
        (*both("qkv_exact", "sbp"), Comparison("partial", "sbp")),
    ),
    "masks": Claim(
        "Are there better masks than a fresh one for each step and all of its images?",
        "Not in the talk; published is a fresh mask for each step, the same for every image.",
        (
            *(Comparison("per_sample", "sbp"), Comparison("per_half", "sbp"), Comparison("sbp", "fixed")),
            *(Comparison("per_sample", "sbp", "cosine"), Comparison("per_half", "sbp", "cosine")),
        ),
    ),
    "gradients": Claim(
        "Does it help to rescale the gradients of the branches, or to back-propagate in full or more at the end?",
        "Not in the talk.",
        (
            *(Comparison("rescale", "sbp"), Comparison("rescale", "sbp", "cosine")),
            *(Comparison(arm, "sbp") for arm in ("exact_end", "exact_end_20", "rising_epochs")),
        ),
    ),
    "alternatives": Claim(
        "At the same memory or the same time, is SBP better than what else one could do?",
        "Not in the talk.",
        (
            *(Comparison("sbp", other) for other in ("patch_dropout", "low_resolution", "low_throughout", "shorter")),
            Comparison("longer", "plain"),
        ),
        context=("cheap", "accumulation", "sbp_cheap"),
        shows="costs",
    ),
    "choice": Claim(
        "Which setting loses least for the memory and the time that one has?",
        "Not in the talk.",
        context=("cheap", "block", "sbp_cheap", "sbp_block"),
        shows="choice",
        against_plain=(
            *("sbp", "query", "query_0.25", "ratio_0.25", "ratio_0.75", "shorter", "longer", "qkv_exact"),
            *("patch_dropout", "query_0.125", "query_0.0625", "low_resolution"),
            *("input", "input_0.25", "input_0.125", "query_input_0.25"),
        ),
    ),
    "input_gradients": Claim(
        "Does it help to pass on the gradient of a branch's input at dropped positions?",
        "Not in the talk; there dropped positions have no gradient in a branch, neither of weights nor of its input.",
        (Comparison("input", "sbp"), Comparison("input_0.25", "sbp"), Comparison("query_input_0.25", "query_0.25")),
        against_plain=(
            *("sbp", "input", "input_0.25", "per_sample", "input_per_sample", "query_0.25", "query_input_0.25"),
        ),
        shows="choice",
    ),
    "learning_rate": Claim(
        "Does SBP want another learning rate than exact training?",
        "Not in the talk, which trains both at the same.",
        (
            *(Comparison("plain_lr_half", "plain"), Comparison("plain_lr_double", "plain")),
            *(Comparison("sbp_lr_half", "sbp"), Comparison("sbp_lr_double", "sbp")),
        ),
    ),
}

ANSWERED = CLAIMS | QUESTIONS
_OF_APPLY = ("keep_ratio", "mask", "mhsa_drop", "layers", "mask_per", "rescale", "dropped")


def exists(arm: str, setting: Setting) -> bool:
    """Whether it is an arm that the setting can have; gradients of parts of the batch are none."""
    one = ARMS.get(arm)
    fits = one is not None and not (one.convnext_only if setting.is_vit else one.vit_only)
    return fits and one is not None and (setting.epochs > 1 or not one.many_epochs)


def arms_of(claims: list[Claim], setting: Setting) -> list[str]:
    """The arms that the claims need, "plain" and "sbp" first."""
    if setting.gradients_only:
        return ["plain"]
    compares = any(claim.comparisons or claim.dominated_by or claim.against_plain for claim in claims)
    named = ["plain", "sbp"] if compares else []
    for claim in claims:
        named += claim.against_plain
        named += [arm for one in claim.comparisons for arm in (one.better, one.worse)]
        named += [*claim.dominated_by, *claim.context]
    return [arm for arm in dict.fromkeys(named) if exists(arm, setting)]


def gradients_of(claims: list[Claim], setting: Setting) -> list[str]:
    """The arms whose gradients are compared with the exact ones, and "nulls".

    And "own": those of SBP on weights that were trained with it, not on those of plain training.
    """
    compared = [one for claim in claims for one in claim.comparisons if one.measure == "cosine"]
    arms = dict.fromkeys(arm for one in compared for arm in ("sbp", one.better, one.worse))
    own = any(claim.shows == "similarities" for claim in claims) and not setting.gradients_only
    return [*(["nulls"] if arms else []), *(["own"] if own else []), *(arm for arm in arms if exists(arm, setting))]


def sbp_arguments(arm: str, setting: Setting) -> dict[str, Any]:
    """The arguments of `sbp.apply` that make the arm's gradients."""
    pairs = dict(override.removeprefix("sbp.").split("=", 1) for override in ARMS[arm].overrides(setting))
    assert set(pairs) <= set(_OF_APPLY), arm
    return {key: yaml.safe_load(value) for key, value in pairs.items()}
