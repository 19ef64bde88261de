"""timm models by name, with SBP."""

from collections.abc import Iterator
from typing import Any

import timm
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models import ConvNeXt
from torch import Tensor, nn

import sbp
from sbp.state import states
from sbp.training.config.model import BackboneConfig, SbpConfig


def build_model(
    backbone: BackboneConfig,
    settings: SbpConfig,
    num_classes: int,
    image_size: int,
    train_image_size: int | None = None,
) -> nn.Module:
    """The timm model, patched when `settings.enabled`; on the CPU, weights drawn from torch's generator.

    train_image_size: of images that it is to take besides those of image_size. Raises ValueError for a name or
    argument that timm does not know, for an image size that the model cannot take, and for SBP settings that do not
    fit the model.
    """
    model = create(backbone, num_classes)
    _check_image_size(model, "data.image_size", image_size, "backbone.kwargs.img_size to data.image_size")
    if train_image_size is not None:
        _check_image_size(model, "data.train_image_size", train_image_size, "++backbone.kwargs.dynamic_img_size=true")
    apply_sbp(model, settings)
    return model


def apply_sbp(model: nn.Module, settings: SbpConfig) -> None:
    """Patches the model, in place, when `settings.enabled`. Raises ValueError for settings that do not fit it."""
    if settings.enabled:
        if isinstance(model, ConvNeXt) and settings.mhsa_drop != SbpConfig.mhsa_drop:
            raise ValueError(
                f"sbp.mhsa_drop={settings.mhsa_drop} is of attention, which a ConvNeXt has not: leave it at "
                f"{SbpConfig.mhsa_drop}"
            )
        sbp.apply(
            model,
            keep_ratio=settings.keep_ratio,
            mask=settings.mask,
            mhsa_drop=settings.mhsa_drop,
            layers=settings.layers,
            seed=settings.seed,
            rank=0 if settings.shared_mask else None,
            evaluation=settings.eval,
            recompute=settings.recompute,
            mask_per=settings.mask_per,
            rescale=settings.rescale,
            dropped=settings.dropped,
            exact_recompute=settings.exact_recompute,
        )
        last, layers = settings.keep_ratio_end, states(model)[0].layers
        if isinstance(last, list) and len(last) != len(layers):
            raise ValueError(
                f"sbp.keep_ratio_end has {len(last)} values for {len(layers)} SBP layers: {', '.join(layers)}"
            )


def create(backbone: BackboneConfig, num_classes: int, name: str | None = None, **options: Any) -> nn.Module:
    """The plain timm model. name: in place of the backbone's, with another tag. Raises ValueError as `build_model`."""
    name = backbone.name if name is None else name
    check_name(name)
    arguments = {"num_classes": num_classes, "drop_path_rate": backbone.drop_path} | options
    try:
        model: Any = _create(name, **arguments, **backbone.kwargs)
    except Exception as error:  # of any kind, by what is wrong
        if options.get("pretrained"):  # then it may be the weights
            raise
        raise ValueError(f"timm cannot make {name} with {backbone.kwargs}: {type(error).__name__}: {error}") from error
    if backbone.frozen:
        model.requires_grad_(False)
        heads = model.get_classifier()
        for head in heads if isinstance(heads, tuple) else (heads,):  # a distilled model has two
            head.requires_grad_(True)
    return model


def _create(name: str, drop_path_rate: float, **arguments: Any) -> nn.Module:
    try:
        return timm.create_model(name, drop_path_rate=drop_path_rate, **arguments)
    except TypeError as error:
        if drop_path_rate or "drop_path_rate" not in str(error):
            raise
        return timm.create_model(name, **arguments)  # has no drop path


def frozen_parts(model: nn.Module) -> Iterator[nn.Module]:
    """The parts that have parameters and train none of them, each as a whole."""
    for part in model.children():
        trained = [one.requires_grad for one in part.parameters()]
        if trained and not any(trained):
            yield part
        else:
            yield from frozen_parts(part)


def running_averages(model: nn.Module) -> Iterator[Tensor]:
    """What batch norms remember of their inputs, which a forward pass in training changes."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield from (one for one in (module.running_mean, module.running_var) if one is not None)


def check_name(name: str) -> None:
    """Raises ValueError for a name that timm does not know."""
    if not timm.is_model(name):
        family = name.split("_")[0]
        near = ", ".join(timm.list_models(f"*{family}*")[:8]) or "see timm.list_models()"
        raise ValueError(f"backbone.name={name} is no timm model; near it: {near}")


def fit_position_embedding(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a ViT that was trained on another image size, for this one: timm's interpolation."""
    own, stored = getattr(model, "pos_embed", None), weights.get("pos_embed")
    if own is None or stored is None or own.shape == stored.shape or own.shape[-1] != stored.shape[-1]:
        return weights
    grid = model.patch_embed.grid_size  # type: ignore[union-attr]
    prefix = own.shape[1] - grid[0] * grid[1]  # type: ignore[index, operator]
    return weights | {"pos_embed": resample_abs_pos_embed(stored, new_size=list(grid), num_prefix_tokens=prefix)}  # type: ignore[arg-type]


def _check_image_size(model: nn.Module, key: str, image_size: int, remedy: str) -> None:
    patch_embed = getattr(model, "patch_embed", None)
    patch = getattr(patch_embed, "patch_size", None)
    if patch is None:
        return
    patch = to_2tuple(patch)
    if any(image_size % side for side in patch):
        raise ValueError(f"{key}={image_size} leaves no whole grid of {patch[0]} x {patch[1]} px patches")
    own = getattr(patch_embed, "img_size", None)
    if getattr(patch_embed, "strict_img_size", False) and own is not None and own != (image_size, image_size):
        raise ValueError(f"{key}={image_size}, but the model is made for {own[0]} x {own[1]} px; set {remedy}")
