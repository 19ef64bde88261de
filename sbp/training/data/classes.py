"""What a data set says of its classes before an image is read, and whether training and validation mean the same.

A class that one split lacks moves the numbers of those after it, and nothing would fail: the network would be measured
with other labels than it has learned.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sbp.training.data.naming import path


def class_names(dataset: Any) -> list[str]:
    """The names in label order; [] where the data set has none."""
    reader: Any = getattr(dataset, "reader", None)
    named = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    listed = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", None)  # as iNaturalist has them
    return list(listed or sorted(named, key=lambda name: named[name]))


def labels(dataset: Any) -> np.ndarray | None:
    """The label of each image (N,), of whatever type it is; None where only reading the images would tell."""
    reader: Any = getattr(dataset, "reader", None)
    if hasattr(reader, "label_key"):  # Parquet files and the like: one column of a table
        return np.asarray(reader.dataset.with_format("numpy")[reader.label_key][:])
    if isinstance(getattr(reader, "samples", None), list):
        return np.asarray([label for _, label in reader.samples])
    for holder in (reader, dataset):
        for name in ("targets", "labels"):
            if hasattr(holder, name):
                found = np.asarray(getattr(holder, name))
                found = found[:, 0] if found.ndim == 2 and hasattr(dataset, "compat") else found  # QMNIST
                return found if found.ndim == 1 else None
    if getattr(dataset, "target_type", None) == ["full"]:  # iNaturalist
        return np.asarray([label for label, _ in dataset.index])
    return None


def hidden(names: Iterable[Any]) -> str:
    """What an error adds where classes are hidden folders, which some programs leave in each folder that they show."""
    found = [name for name in names if isinstance(name, str) and name.startswith(".")]
    return f"; {', '.join(found)} is counted among them, a hidden folder, hardly a class: remove it" if found else ""


def check_labels(dataset: Any, place: str, num_classes: int, training: bool) -> None:
    """Raises ValueError unless the classes are `num_classes`, and each image has the number of one as its label.

    place: what the error names. training: without names, each class must also be there: then nothing else would tell
    that num_classes is another data set's.
    """
    names, numbers = class_names(dataset), labels(dataset)
    if names and len(names) != num_classes:
        raise ValueError(f"{place} has {len(names)} classes, but data.num_classes is {num_classes}{hidden(names)}")
    if numbers is None or not len(numbers):
        return
    if numbers.dtype.kind not in "iu":
        wrong = int(np.argmax([label is None or label != label for label in numbers]))  # else the first one
        raise ValueError(
            f"{place}: {path(dataset, wrong)} has the label {numbers[wrong]}, which is no integer from 0 to "
            f"{num_classes - 1}"
        )
    outside = np.flatnonzero((numbers < 0) | (numbers >= num_classes))
    if len(outside):
        one = int(outside[0])
        raise ValueError(
            f"{place}: {len(outside)} of {len(numbers)} images have labels that are not in 0 to {num_classes - 1} "
            f"(data.num_classes is {num_classes}); the first one is {path(dataset, one)} with {numbers[one]}"
        )
    present = np.unique(numbers)
    if training and not names and len(present) != num_classes:
        raise ValueError(
            f"{place} has {len(present)} classes with numbers from {present[0]} to {present[-1]}, "
            f"but data.num_classes is {num_classes}"
        )


def check_same_classes(one: Sequence[str], other: Sequence[str], places: tuple[str, str]) -> None:
    """Raises ValueError where both name their classes, in the order of the labels, and names or order differ."""
    if not one or not other or one == other:
        return
    if differing := sorted(map(str, set(one) ^ set(other))):
        one_only = f"{differing[0]} is in one of them only{hidden(differing)}"
        raise ValueError(f"{' and '.join(places)} have different classes: {one_only}")
    raise ValueError(f"{' and '.join(places)} have their classes in different order")
