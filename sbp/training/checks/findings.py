"""What is wrong with a data set, from what inspection.py has seen of it."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sbp.training.checks.inspection import Loading, Split
from sbp.training.config.images import DataConfig
from sbp.training.data.classes import hidden
from sbp.training.record.table import markdown

ERROR, WARNING, NOTE = LEVELS = ("error", "warning", "note")  # stops or spoils training; may; does not
IMAGENET_1K = (1_281_167, 50_000)  # images for training and for validation
IMBALANCE = 10  # of the largest class to the smallest
SHOWN = 3

MARKS = {
    "unreadable": (ERROR, "that cannot be read"),
    "unlabelled": (ERROR, "without a label"),
    "rotated": (
        WARNING,
        "with an EXIF orientation, which nothing applies: the network sees them as stored, turned or mirrored",
    ),
    "turned": (NOTE, "with an EXIF orientation, turned upright as they were annotated"),
    "not turned": (NOTE, "with an EXIF orientation, left as stored: so says the size in their annotations"),
    "in both": (WARNING, "identical to images in {other}, which then measures what was learned by heart"),
    "deep": (WARNING, "with more than 8 bits a channel; conversion to RGB turns all above 255 white"),
    "transparent": (WARNING, "with transparency; conversion to RGB drops it and shows what it hid"),
    "small": (WARNING, "with a shorter side below half of data.image_size={size}, enlarged to it"),
    "colours": (NOTE, "in other colours than RGB; converted to it, without their colour profiles"),
    "grey": (NOTE, "in grey; converted to RGB"),
    "palette": (NOTE, "with a palette; converted to RGB"),
    "misnamed": (NOTE, "of another format than the name says; what counts is the content"),
}


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing. split: "" where it concerns both. items: all the images, files or classes."""

    level: str
    split: str
    text: str
    items: list[str] = field(default_factory=list)


def findings(train: Split, val: Split, data: DataConfig, expected: tuple[int, ...] = ()) -> list[Finding]:
    """Errors first, notes last. expected: how many images the two splits have in ImageNet-1k, if this is to be it."""
    found = [one for split in (train, val) for one in _of_classes(split, data.num_classes)]
    if train.classes and val.classes and train.classes != val.classes:
        missing = [
            f"""{name or "''"} (in {one.name} only)"""
            for one, other in ((train, val), (val, train))
            for name in sorted(set(one.classes) - set(other.classes))
        ]
        how = "have different classes" if missing else "have their classes in different order"
        found.append(Finding(ERROR, "", f"{train.name} and {val.name} {how}", missing))
    for split, other in ((train, val), (val, train)):
        for kind, (level, text) in MARKS.items():
            if kind in split.marks:
                items = split.marks[kind]
                text = text.format(other=other.name, size=data.image_size)
                if kind == "unreadable":
                    text += _consequence(split is train, len(items), data.max_corrupt_images)
                found.append(Finding(level, split.name, f"{_count(len(items), 'image')} {text}", items))
        if split.unused:
            found.append(Finding(WARNING, split.name, split.unused))
        if split.ignored:
            found.append(_of_ignored(split))
        if split.read < split.length:
            text = f"only {split.read:,} of {split.length:,} images were read; nothing is known of the others"
            found.append(Finding(NOTE, split.name, text))
    for split, images in zip((train, val), expected, strict=False):
        if not split.fault:
            met = split.length == images
            text = f"{split.length:,} images, {'as in' if met else f'but {images:,} in'} ImageNet-1k"
            found.append(Finding(NOTE if met else WARNING, split.name, text))
    return sorted(found, key=lambda one: LEVELS.index(one.level))


def _of_classes(split: Split, num_classes: int) -> list[Finding]:
    if split.fault:
        return [Finding(ERROR, split.name, split.fault)]
    found = []
    names = split.classes or [f"label {label}" for label in range(num_classes)]
    if len(names) != num_classes:
        found.append(
            Finding(
                ERROR,
                split.name,
                f"{_count(len(names), 'class', 'classes')}, but data.num_classes is {num_classes}{hidden(names)}",
            )
        )
    if outside := [f"label {label}" for label in sorted(split.per_class) if label >= len(names)]:
        found.append(Finding(ERROR, split.name, f"labels that are not below {len(names)}", outside))
    if split.counted and not split.complete:
        return found  # the rest needs all labels
    if empty := [name for label, name in enumerate(names) if not split.per_class[label]]:
        level, what = (WARNING, "objects") if split.objects else (ERROR, "images")
        found.append(Finding(level, split.name, f"{_count(len(empty), 'class', 'classes')} without {what}", empty))
    if split.objects:
        return found  # which are never as many of each
    least, most = _smallest_and_largest(split)
    if most > IMBALANCE * least:
        text = f"the largest class has {most:,} images, the smallest {least:,}: top-1 says little about small classes"
        found.append(Finding(WARNING, split.name, text))
    return found


def _class(split: Split, label: int) -> str:
    return split.classes[label] if label < len(split.classes) else f"label {label}"


def _of_ignored(split: Split) -> Finding:
    suffixes = Counter(Path(name).suffix.lower() or "no suffix" for name in split.ignored)
    pictures = suffixes.keys() & Image.registered_extensions().keys()
    kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in suffixes.most_common(5))
    text = f"{_count(len(split.ignored), 'file')} left out, by the suffix or as outside of all class folders ({kinds})"
    return Finding(WARNING if pictures else NOTE, split.name, text, split.ignored)


def _consequence(training: bool, count: int, allowed: int) -> str:
    if not training:
        return "; evaluation fails"
    if count > allowed:
        return f"; training stops, as they are more than data.max_corrupt_images={allowed}"
    return f"; in training another takes the place of each (up to data.max_corrupt_images={allowed})"


def _smallest_and_largest(split: Split) -> tuple[int, int]:
    """Images in a class that has any."""
    counts = [count for count in split.per_class.values() if count]
    return (min(counts), max(counts)) if counts else (0, 0)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def table(splits: list[Split]) -> str:
    """Those that could be opened, side by side; there must be one."""
    rows = [{"": split.name} | _row(split) for split in splits if not split.fault]
    return markdown([[heading, *(row[heading] for row in rows)] for heading in rows[0]])


def _row(split: Split) -> dict[str, str]:
    least, most = _smallest_and_largest(split)
    sizes = np.array(split.sizes) if split.sizes else np.zeros(1, int)
    return {
        "images": f"{split.length:,}",
        "read": "all" if split.complete else f"{split.read:,}",
        "cannot be read": f"{len(unreadable(split)):,}",
        "classes": f"{len(split.classes) or len(split.per_class):,}",
        f"{'objects' if split.objects else 'images'} in a class": _range(least, most),
        "shorter side": f"{_range(*np.quantile(sizes, (0, 1)))} px, median {np.median(sizes):.0f}",
        "formats": _shares(split.formats),
        "colours": _shares(split.modes),
    }


def _range(least: float, most: float) -> str:
    return f"{least:,.0f} to {most:,.0f}" if most > least else f"{most:,.0f}"


def _shares(counts: Counter[str]) -> str:
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{name} {n:,}" for name, n in counts.most_common())


def meaning(loading: Loading, images: int) -> str:
    """What the loader's speed means for a run. images: in the training set."""
    rate, workers, cores = loading.images_per_second, loading.workers, _count(loading.cores, "core")
    epoch = timedelta(seconds=round(images / max(rate, 1e-9)))
    advice = ""
    if workers > loading.cores:
        advice = f"; there are only {cores} here"
    elif workers < loading.cores:
        advice = f"; there are {cores} here, so more data.workers may help"
    return (
        f"one training process with data.workers={workers} gets {rate:,.0f} augmented images/s: an epoch of "
        f"{images:,} images takes {epoch} or more, and a GPU that could train faster waits{advice}"
    )


def unreadable(split: Split) -> list[str]:
    """With reasons."""
    return split.marks.get("unreadable", [])


def conclusion(found: list[Finding]) -> str:
    return ", ".join(_count(sum(one.level == level for one in found), level) for level in LEVELS)


def summary(split: Split) -> dict[str, Any]:
    """For data_check.json; what the findings list is not in it again."""
    plain = {key: getattr(split, key) for key in ("name", "place", "fault", "length", "read", "seconds", "complete")}
    per_class = {_class(split, label): count for label, count in sorted(split.per_class.items())}
    return plain | {"per_class": per_class, "formats": split.formats, "colours": split.modes}


def listing(found: list[Finding]) -> str:
    """For reading: each finding with the first few of its items."""
    lines = []
    for one in found:
        where = f"{one.split}: " if one.split else ""
        lines.append(f"{one.level:<8} {where}{one.text}")
        lines += [f"             {item}" for item in one.items[:SHOWN]]
        if len(one.items) > SHOWN:
            lines.append(f"             and {len(one.items) - SHOWN:,} more")
    return "\n".join(lines)
