"""Builds the model of a run: timm's, patched or not."""

import difflib

import timm
from torch import nn

import sbp
from sbp.training.config import BackboneConfig, SBPConfig, UserError


def build_model(backbone: BackboneConfig, num_classes: int, image_size: int) -> nn.Module:
    """A timm model with random weights. Raises UserError for an unknown name or argument."""
    if not timm.is_model(backbone.name):
        close = ", ".join(difflib.get_close_matches(backbone.name, timm.list_models(), 5)) or "see timm.list_models()"
        raise UserError(f"backbone.name={backbone.name} is no timm model; did you mean {close}?")
    arguments = {"num_classes": num_classes, "drop_path_rate": backbone.drop_path_rate} | dict(backbone.kwargs)
    try:
        try:
            return timm.create_model(backbone.name, img_size=image_size, **arguments)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return timm.create_model(backbone.name, **arguments)  # a ConvNeXt takes any size
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"timm cannot build backbone.name={backbone.name} with {arguments}: {error}") from None


def apply_sbp(model: nn.Module, config: SBPConfig, seed: int) -> nn.Module:
    """Patches the model in place. Raises UserError for what `sbp.apply` refuses."""
    try:
        return sbp.apply(
            model,
            keep_ratio=config.keep_ratio,
            mask=config.mask,
            mhsa_drop=config.mhsa_drop,
            layers=config.layers,
            seed=config.seed if config.seed is not None else seed,
            evaluation=config.eval,
        )
    except ValueError as error:
        raise UserError(f"sbp: {error}") from None
