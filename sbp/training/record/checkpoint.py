"""Checkpoints: whole or not at all, of tensors and builtins only, with timm's own names for the weights."""

import logging
import os
import pickle
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from sbp.training.runtime import distributed

log = logging.getLogger(__name__)

_BROKEN = (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile)


class Checkpoints:
    """The folder of a run's checkpoints: step-00000042.pt and so on, of which the latest `keep` stay, and best.pt."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        self.best = folder / "best.pt"

    def paths(self) -> list[Path]:
        """Oldest first, without the best."""
        return sorted(self.folder.glob("step-*.pt"))

    @property
    def is_empty(self) -> bool:
        """Whether there are none, the best included."""
        return not (self.paths() or self.best.is_file())

    def newest(self) -> Path | None:
        return self.paths()[-1] if self.paths() else None

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.pt"

    def own(self, path: Path) -> bool:
        return path.resolve().parent == self.folder.resolve()

    def save(self, step: int, content: dict[str, Any]) -> Path | None:
        """Writes a checkpoint, then removes those beyond the latest `keep`, and those of later steps, which the run has
        not gone on from: they are damaged.

        Where it cannot be written (a full disk), that is a warning, the others stay, and None is returned.
        Raises ValueError when a weight is not finite: then nothing is written.
        """
        for name, value in content["state_dict"].items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(
                    f"after step {step} {name} is not finite, so nothing was saved. "
                    f"Last good checkpoint: {self.newest() or 'none yet'}"
                )
        path = self.path(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob("*.tmp*"):  # of a process that was killed while it wrote
                left_over.unlink()
            save(path, content)
        except (OSError, RuntimeError) as error:  # torch.save raises the latter when the disk is full
            log.warning("cannot write %s (%s); the newest checkpoint is %s", path, _first_line(error), self.newest())
            return None
        try:
            paths = self.paths()
            now = paths.index(path)
            for other in (*paths[: max(now + 1 - self.keep, 0)], *paths[now + 1 :]):
                other.unlink(missing_ok=True)
        except (OSError, ValueError) as error:  # a network file system may not show the new file yet
            log.warning("cannot remove older checkpoints in %s (%s)", self.folder, error)
        return path

    def keep_best(self, step: int) -> None:
        """Makes the checkpoint of `step` best.pt, without a second copy where the file system can link."""
        temporary = self.best.with_suffix(".tmp")
        try:
            temporary.unlink(missing_ok=True)
            try:
                os.link(self.path(step), temporary)
            except OSError:
                shutil.copyfile(self.path(step), temporary)
            os.replace(temporary, self.best)
        except OSError as error:
            log.warning("cannot write %s (%s)", self.best, error)

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The latest good one and its content, or, when no other is good, the best; None when there is none.

        Bad ones are named in a warning.
        """
        for path in [*reversed(self.paths()), *([self.best] if self.best.is_file() else [])]:
            try:
                return path, load(path)
            except ValueError as error:
                log.warning("%s; trying the one before it", error)
        return None


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes next to `path` first, so that `path` is never half a file, whatever stops the process."""
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _keep_renamed(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _keep_renamed(folder: Path) -> None:
    """Else a power failure can undo the renaming. Not every file system does that for a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: Path) -> dict[str, Any]:
    """The content on the CPU. Raises ValueError for a file that is missing, damaged, or not one of ours."""
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load checks no checksums
            damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        raise ValueError(f"{path} is corrupt or no checkpoint ({type(error).__name__}: {error})") from None
    if damaged:
        raise ValueError(f"{path} is corrupt: wrong checksum of {damaged}")
    if not isinstance(content, dict) or not {"state_dict", "config"} <= content.keys():
        raise ValueError(f"{path} was not written by train.py: it lacks state_dict or config")
    return content


class Origin(NamedTuple):
    """Where a run goes on from: a checkpoint, whether it is the run's own (rather than another run's), its content."""

    path: Path
    own: bool
    content: dict[str, Any]


def resume_point(resume: str, checkpoints: Checkpoints) -> Origin | None:
    """The checkpoint to go on from, or None to start afresh.

    resume: "never", "auto" (the latest good one of this run, if any), or the path of another run's, which counts as
    long as this run has none of its own. The main process chooses, the others read the same file.
    Raises ValueError, on all processes, for a path without a good checkpoint where one is needed, when "never" would
    overwrite those of an earlier run, for an own checkpoint that is not the latest, and when all are damaged.
    """
    path = distributed.only_main(lambda: _choose(resume, checkpoints))
    if path is None:
        return None
    content = distributed.all_or_none(lambda: load(path))
    log.info("resuming from %s at step %d", path, content["step"])
    return Origin(path, checkpoints.own(path), content)


def _choose(resume: str, checkpoints: Checkpoints) -> Path | None:
    there = not checkpoints.is_empty
    if resume == "never" and there:
        raise ValueError(
            f"{checkpoints.folder} holds checkpoints of a run: resume=auto goes on with it; or take another run_dir"
        )
    if not there:
        return None if resume in ("never", "auto") else find(Path(resume))[0]
    found = checkpoints.latest()
    if found is None:
        raise ValueError(f"every checkpoint in {checkpoints.folder} is damaged: remove them to start afresh")
    given = Path(resume)  # of another run it may be gone by now
    if given.is_file() and checkpoints.own(given) and not given.samefile(found[0]):
        raise ValueError(
            f"resume={resume} is an earlier checkpoint of this run, which goes on from {found[0]} with resume=auto. "
            "To try another way from there, take another run_dir; to go back, remove the later checkpoints"
        )
    return found[0]


def find(path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint by its file, its folder, or the folder of its run (the latest good one). Raises ValueError."""
    if not path.is_dir():
        return path, load(path)
    for folder in (path, path / "checkpoints"):
        if found := Checkpoints(folder).latest():
            return found
    raise ValueError(f"no good checkpoint in {path}")


def choose_weights(path: Path, content: dict[str, Any], ema: bool | None) -> tuple[bool, dict[str, Tensor]]:
    """Whether the weights are the averaged ones (ema=None: when there are any, as timm does), and the weights.

    Raises ValueError when ema is true and there are none.
    """
    if ema and "state_dict_ema" not in content:
        raise ValueError(f"ema=true, but {path} has no averaged weights (its run had recipe.ema_decay=null)")
    averaged = "state_dict_ema" in content if ema is None else ema
    return averaged, content["state_dict_ema" if averaged else "state_dict"]


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads strictly. Raises ValueError that says whether the classes or the network differ, and where."""
    state = clean_state_dict(state)  # without the prefixes of DDP and torch.compile
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(f"the checkpoint is of another model: {_some('missing', missing, 'unexpected', unexpected)}")
    other = {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in own}
    other = {name: shapes for name, shapes in other.items() if shapes[0] != shapes[1]}
    if other and all(name.startswith(("head.", "head_dist.")) for name in other):
        name, (stored, wanted) = next(iter(other.items()))
        raise ValueError(f"the checkpoint has {stored[0]} classes and the model {wanted[0]} ({name})")
    if other:
        shapes = [f"{name} {stored} instead of {wanted}" for name, (stored, wanted) in other.items()]
        raise ValueError(f"the checkpoint is of another model: {_some('', shapes)}")
    model.load_state_dict(state)


def _some(*labels_and_names: Any) -> str:
    """The first few names of each list."""
    parts = []
    for label, names in zip(labels_and_names[::2], labels_and_names[1::2], strict=True):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{label} {', '.join(names[:3])}{more}".strip())
    return "; ".join(parts)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
