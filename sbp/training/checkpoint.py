"""Checkpoints: whole or not there, loaded without executing anything, in timm's own keys.

A file is a dict of tensors and builtins with `state_dict` (and `state_dict_ema`), which timm reads by itself.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sbp.training.config import UserError


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def save(folder: Path, step: int, content: dict[str, Any], keep: int) -> Path:
    """Writes beside the file's place, then moves it there; leaves the `keep` newest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, step)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    for old in _newest_first(folder)[keep:]:
        old.unlink()
    return path


def load(path: Path) -> dict[str, Any]:
    """Raises UserError for a file that is missing, corrupt, or no checkpoint."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} is corrupt or no checkpoint: {reason[0]}") from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(f"{path} is no checkpoint of this project: it has no state_dict")
    return content


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None; warns of those that cannot."""
    for path in _newest_first(folder):
        try:
            return load(path)
        except UserError as error:
            warnings.warn(f"{error}; trying the one before", stacklevel=2)
    return None


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Loads strictly. Raises UserError that says how the weights differ from the model."""
    weights = {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in weights.items()}
    own = model.state_dict()
    problems = [
        f"{name} is {tuple(weights[name].shape)}, here {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    for what, names in (("lacks", own.keys() - weights.keys()), ("has besides", weights.keys() - own.keys())):
        if names:
            problems.append(f"it {what} {len(names)} of the tensors, such as {min(names)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{source} is of another model or class count: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(weights, strict=True)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)
