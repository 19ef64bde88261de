"""Weights that a run starts from: those of a file, or those that timm downloads."""

import json
import logging
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict, split_model_name_tag
from torch import Tensor, nn

from sbp.training.config.images import DataConfig
from sbp.training.config.keys import from_dict
from sbp.training.config.model import BackboneConfig
from sbp.training.config.run import Config
from sbp.training.models.build import check_name, create
from sbp.training.record.checkpoint import load_weights
from sbp.training.runtime import distributed

log = logging.getLogger(__name__)

_FILES = (".pt", ".pth", ".bin", ".safetensors", ".npz")
_AUTHORS_NESTED = ("model_state", "module")  # where files of Hiera's and of EVA's authors have the weights
_AUTHORS_CLASSIFIERS = ("head.", "head.projection.")  # of ConvNeXt's authors, and of Hiera's


def starting_weights(backbone: BackboneConfig, data: DataConfig, classifier: bool = True) -> dict[str, Tensor] | None:
    """The state dict that `backbone.pretrained` names, on the CPU; without the classifier if that is of other classes.

    classifier: False for a model without one, which takes its place on no account.

    timm reads it: weights in the format of the network's authors become timm's, and a position embedding is
    interpolated to the model's image size. A warning says where they were trained on images prepared in another way.
    None without `backbone.pretrained`. Raises ValueError, on all processes, for a name that timm does not know, for
    what cannot be read or downloaded, and unless every weight of the model comes from there.
    """
    if backbone.pretrained is None:
        return None
    return distributed.all_or_none(lambda: _read(backbone, data, classifier))


def load_starting_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Strictly, but for a classifier that is not among them: that stays as it is."""
    classifier = {name: value for name, value in model.state_dict().items() if name.startswith(_classifiers(model))}
    load_weights(model, classifier | weights)


def _read(backbone: BackboneConfig, data: DataConfig, classifier: bool) -> dict[str, Tensor]:
    check_name(backbone.name)
    path = Path(backbone.pretrained or "")
    trained, source = _from_file(backbone, path) if path.is_file() else _from_timm(backbone)
    weights = trained.state_dict()
    classes = int(trained.num_classes)  # type: ignore[arg-type]
    if classifier and classes == data.num_classes:
        log.info("weights       %s, with its classifier of %d classes", source, classes)
    else:
        weights = {name: value for name, value in weights.items() if not name.startswith(_classifiers(trained))}
        before = f"that of {classes} is left out" if classes else "it has none"
        new = f"a new classifier for {data.num_classes} classes ({before})" if classifier else "without its classifier"
        log.info("weights       %s; %s", source, new)
    preprocessing: Any = _preprocessing_beside(path) if path.is_file() else trained.pretrained_cfg
    for difference in preprocessing_differences(preprocessing, data):
        log.warning("backbone.pretrained=%s was trained with %s", backbone.pretrained, difference)
    return weights


def _from_timm(backbone: BackboneConfig) -> tuple[nn.Module, str]:
    name = timm_name(backbone)
    known = timm.get_pretrained_cfg(name)
    assert known is not None
    return _trained(backbone, name, known.num_classes, {}), name


def timm_name(backbone: BackboneConfig) -> str:
    """The full name, with its tag, of the weights that `backbone.pretrained` names if it is no file.

    Raises ValueError that lists what timm has for `backbone.name`.
    """
    asked = backbone.pretrained or ""
    architecture, own_tag = split_model_name_tag(backbone.name)
    there = timm.list_pretrained(f"{architecture}.*")
    if asked in ("timm", architecture):
        default = timm.get_pretrained_cfg(architecture)
        asked = own_tag or (default.tag if default else None) or ""
    name = f"{architecture}.{asked.removeprefix(f'{architecture}.')}"
    if name in there:
        return name
    if "/" in asked or asked.endswith(_FILES):
        raise ValueError(f"backbone.pretrained={asked} is no file")
    choices = ", ".join(["timm", *(one.removeprefix(f"{architecture}.") for one in there)]) if there else "nothing"
    raise ValueError(
        f"backbone.pretrained={backbone.pretrained} is neither a file nor what timm has for {architecture}: {choices}"
    )


def _from_file(backbone: BackboneConfig, path: Path) -> tuple[nn.Module, str]:
    if path.suffix == ".npz":
        raise ValueError(
            f"backbone.pretrained={path} is a NumPy file, which is not read here; timm has most such weights under a "
            "name: backbone.pretrained=timm, or one of its tags"
        )
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load checks no checksums
                if damaged := archive.testzip():
                    raise ValueError(f"wrong checksum of {damaged}")
        state = load_state_dict(str(path))
    except Exception as error:  # of pickle, zipfile, safetensors and torch
        raise ValueError(f"backbone.pretrained={path} cannot be read: {_shortened(error)}") from None
    nested = (state.get(key) for key in _AUTHORS_NESTED)
    state = next((one for one in nested if isinstance(one, dict)), state)
    known = timm.get_pretrained_cfg(split_model_name_tag(backbone.name)[0])
    own = _prefixes(known.classifier if known else None)
    names = (f"{name}weight" for name in (*own, *_AUTHORS_CLASSIFIERS))
    classifier = next((state[name] for name in names if name in state), None)
    classes = 0 if classifier is None else len(classifier)
    return _trained(backbone, backbone.name, classes, {"state_dict": state, "num_classes": classes}), str(path)


def _trained(backbone: BackboneConfig, name: str, num_classes: int, overlay: dict[str, Any]) -> nn.Module:
    """A plain model with the weights, and with as many classes as those: then timm loads them strictly.

    timm itself makes exceptions, such as ConvNeXt V2's `fcmae` weights without a last norm, and logs what they lack.
    """
    try:
        return create(backbone, num_classes, name=name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # of torch for other names and shapes, of huggingface_hub and its HTTP client
        raise ValueError(
            f"backbone.pretrained={backbone.pretrained} cannot be loaded into {name}: {_shortened(error)}"
        ) from None


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """What the names of the classifier's parameters begin with."""
    return _prefixes(model.pretrained_cfg.get("classifier"))  # type: ignore[union-attr, operator]


def _prefixes(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names or ()))


def _preprocessing_beside(path: Path) -> dict[str, Any]:
    """What is known of the images that a file was trained on: from a run's checkpoint, or timm's config.json."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # no such file, or not timm's
        return json.loads((path.parent / "config.json").read_text())["pretrained_cfg"]
    with suppress(Exception):  # any other file
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["config"]
        return vars(from_dict(Config, stored).data)
    return {}


def preprocessing_differences(trained: dict[str, Any], data: DataConfig) -> list[str]:
    """What differs from `data`, as "data.mean=[0.5,0.5,0.5], and this run has ...", with what to set instead."""
    differences = []
    for key in ("mean", "std", "interpolation"):
        there, here = trained.get(key), getattr(data, key)
        if there is not None and (there if isinstance(there, str) else list(there)) != here:
            value = there if isinstance(there, str) else str(list(there)).replace(" ", "")
            differences.append(f"data.{key}={value}, and this run has {here}")
    return differences


def _shortened(error: Exception) -> str:
    """One line: of each line of the message, such as torch's of missing and of unexpected names, the beginning."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()] or [type(error).__name__]
    return " ".join(line if len(line) <= 200 else f"{line[:200]} ..." for line in lines[:4])
