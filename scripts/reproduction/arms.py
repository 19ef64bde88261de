"""The ways to train that are compared: plain data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from scripts.reproduction.settings import Setting

_OF_APPLY = ("keep_ratio", "mask", "mhsa_drop", "layers", "mask_per", "rescale", "dropped")


@dataclass(frozen=True)
class Arm:
    """overrides: of train.py, in a setting. vit_only: needs attention, or tokens to leave out; convnext_only: the
    opposite. many_epochs: needs more than one; of_epochs: a multiple of so many. fine_tuning_only: needs weights that
    training starts from.

    same_as: the arm with the very same gradients, whose accuracy is taken: only what a step costs is measured.
    parts: of an arm with several kinds of steps, those of which arms they are, and their share: its step takes their
    mean time, and its peak is the largest of theirs.
    """

    label: str
    overrides: Callable[[Setting], list[str]]
    vit_only: bool = False
    convnext_only: bool = False
    many_epochs: bool = False
    of_epochs: int = 1
    fine_tuning_only: bool = False
    same_as: str | None = None
    parts: Mapping[str, float] | None = None


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
    """So many tenths of the epochs."""
    return lambda setting: [f"sbp.exact_epochs={tenths * setting.epochs // 10}"]


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
    "neighbours": Arm(
        "gradients of neighbours at dropped positions", fixed("sbp.dropped=neighbours"), convnext_only=True
    ),
    "neighbours_0.25": Arm(
        "gradients of neighbours at dropped positions, keep-ratio 0.25",
        fixed("sbp.dropped=neighbours", "sbp.keep_ratio=0.25"),
        convnext_only=True,
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
        of_epochs=10,
        parts={"sbp": 0.9, "plain": 0.1},
    ),
    "exact_end_20": Arm(
        "exact backpropagation in the last 20 % of epochs",
        exact_end(2),
        of_epochs=5,
        parts={"sbp": 0.8, "plain": 0.2},
    ),
    "rising_epochs": Arm(
        "keep-ratio rising over the epochs, 0.25 to 0.75",
        fixed("sbp.keep_ratio=0.25", "sbp.keep_ratio_end=0.75"),
        many_epochs=True,
        parts={"ratio_0.25": 0.25, "sbp": 0.5, "ratio_0.75": 0.25},
    ),
    # what else one could do
    "frozen": Arm("a frozen backbone", fixed(NONE, "backbone.frozen=true"), fine_tuning_only=True),
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


def exists(arm: str, setting: Setting) -> bool:
    """Whether it is an arm that the setting can have; gradients of parts of the batch are none."""
    one = ARMS.get(arm)
    if one is None or (one.convnext_only if setting.is_vit else one.vit_only):
        return False
    fits = setting.starts_from is not None or not one.fine_tuning_only
    if f"recipe.epochs={setting.epochs}" in one.overrides(setting):
        return False  # more or fewer of them, but not by a whole one
    return fits and setting.epochs % one.of_epochs == 0 and (setting.epochs > 1 or not one.many_epochs)


def sbp_arguments(arm: str, setting: Setting) -> dict[str, Any]:
    """The arguments of `sbp.apply` that make the arm's gradients."""
    pairs = dict(override.removeprefix("sbp.").split("=", 1) for override in ARMS[arm].overrides(setting))
    assert set(pairs) <= set(_OF_APPLY), arm
    return {key: yaml.safe_load(value) for key, value in pairs.items()}
