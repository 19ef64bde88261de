"""Which keys may differ between the run that wrote a checkpoint and one that goes on with it: see `Key.free`."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from itertools import zip_longest
from typing import Any

from sbp.training.config.keys import from_dict
from sbp.training.config.run import Config


def check_same_run(stored: Mapping[str, Any], config: Config, own: bool = True) -> None:
    """Raises ValueError when a checkpoint's config differs from this one in what decides the result.

    own: the checkpoint is of the same run, rather than where this one starts from.
    """
    before, now = _flat(asdict(from_dict(Config, stored))), _flat(asdict(config))
    free = {"always"} if own else {"always", "elsewhere"}
    fixed = [name for name, how in _freedom(Config) if how not in free]
    changed = [
        f"{key} was {before.get(key)} and is now {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and any(f"{key}.".startswith(f"{one}.") for one in fixed)
    ]
    if changed:
        raise ValueError(f"the checkpoint to resume from is of another run: {'; '.join(changed)}")


def check_same_images(stored: Mapping[str, Any] | None, now: Mapping[str, Any], own: bool = True) -> None:
    """Raises ValueError where a run would go on with other images than those of before, wherever they may lie now.

    Each is {"images": how many there are to train on, "classes": the names of the labels}. stored: None where the
    checkpoint does not know. own: as in `check_same_run`; else there may be more images of the same classes, or fewer.
    """
    if stored is None:
        return
    differing = [pair for pair in zip_longest(stored["classes"], now["classes"]) if pair[0] != pair[1]]
    if own and stored["images"] != now["images"]:
        what = f"{stored['images']} images to train on, and now {now['images']}"
    elif differing:
        what = "class {} where now is {}".format(*differing[0])
    else:
        return
    raise ValueError(f"the run goes on with other images than before: it had {what}. Take these for a new run_dir")


def _freedom(kind: Any, path: str = "") -> list[tuple[str, str]]:
    """Each key and its `free`, or that of its group."""
    found: list[tuple[str, str]] = []
    for one in fields(kind):
        how, inner = one.metadata["key"].free, one.default_factory
        if isinstance(inner, type) and not how:
            found += _freedom(inner, f"{path}{one.name}.")
        else:
            found.append((path + one.name, how))
    return found


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {path + key: value}
    return flat
