"""Annotation files in COCO's format: what is read, and what is wrong with it, said before anything is trained.

pycocotools checks nothing. Run lengths of another size than their image shift each mask, and where they do not add up
it reads memory that nobody has written.
"""

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

_KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "bbox", "segmentation"),
    "categories": ("id", "name"),
}
_LEAST_COORDINATES = 6  # a polygon of fewer than three points has no area; pycocotools takes four numbers for a box
_FARTHEST = 1e6  # a coordinate; pycocotools ends the process without a word at larger ones

Row = dict[str, Any]


def read_annotations(file: Path) -> dict[str, Any]:
    """The content of an annotation file. An "area" or "iscrowd" of null counts as missing, and is taken out.

    Raises ValueError, with the id of the first annotation that is wrong, for a file that is not as COCO's are.
    """
    if not file.is_file():
        raise ValueError(f"no annotation file {file}; data.annotations says where it lies below data.root")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    for part, keys in _KEYS.items():
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f'{file} has no list "{part}"; expected an annotation file of COCO\'s instances')
        for key in keys:
            missing = sum(key not in row for row in rows)
            if missing:
                raise ValueError(f'{file}: {missing} of {len(rows)} {part} have no "{key}"')
    for part, key in (("images", "image_id"), ("categories", "category_id")):
        known = {row["id"] for row in content[part] if isinstance(row["id"], (int, str))}
        if not content[part]:
            raise ValueError(f"{file} has no {part}")
        if len({type(one) for one in known}) != 1 or len(known) < len({str(row["id"]) for row in content[part]}):
            raise ValueError(f"{file}: the ids of the {part} must be whole numbers, or all be texts")
        if len(known) < len(content[part]):
            raise ValueError(f"{file}: several {part} have the same id")
        for row in content["annotations"]:
            if not isinstance(row[key], (int, str)) or row[key] not in known:
                raise ValueError(f"{file}: an annotation has {key} {row[key]}, which is not among the {part}")
    for row in content["annotations"]:
        for key in ("area", "iscrowd"):
            if row.get(key, 0) is None:
                del row[key]
    _each(file, "images", content["images"], _image_fault)
    _each(file, "categories", content["categories"], _category_fault)
    sizes = {row["id"]: (row["height"], row["width"]) for row in content["images"]}
    _each(file, "annotations", content["annotations"], lambda row: annotation_fault(row, sizes[row["image_id"]]))
    return content


def _each(file: Path, part: str, rows: Iterable[Row], fault: Callable[[Row], str]) -> None:
    """Raises ValueError where there is a fault in a row, with the first one and how many there are."""
    found = []
    for number, row in enumerate(rows, 1):
        if said := fault(row):
            found.append((f"number {number}" if row.get("id") is None else row["id"], said))
    if found:
        also = f" ({len(found)} {part} have such faults)" if len(found) > 1 else ""
        one = {"categories": "category"}.get(part, part.removesuffix("s"))
        raise ValueError(f"{file}: {one} {found[0][0]}: {found[0][1]}{also}")


def _image_fault(row: Row) -> str:
    for side in ("height", "width"):
        if type(row[side]) is not int or row[side] < 1:
            return f'its "{side}" is {_short(row[side])}, and must be a whole number of pixels'
    return "" if isinstance(row["file_name"], str) else f'its "file_name" is {_short(row["file_name"])}, and no text'


def _category_fault(row: Row) -> str:
    return "" if isinstance(row["name"], str) else f'its "name" is {_short(row["name"])}, and no text'


def annotation_fault(row: Row, size: tuple[int, int]) -> str:
    """What is wrong with an annotation of an image of this size (height, width); "" where nothing is."""
    if not _numbers(row["bbox"]) or len(row["bbox"]) != 4:
        return f'its "bbox" is {_short(row["bbox"])}, and must be x, y, width, height'
    if min(row["bbox"][2:]) < 0:
        return f'its "bbox" is {_short(row["bbox"])}, and width and height must not be negative'
    if not _numbers([row.get("area", 0)]):
        return f'its "area" is {_short(row["area"])}, and must be a number'
    if row.get("iscrowd", 0) not in (0, 1):
        return f'its "iscrowd" is {_short(row["iscrowd"])}, and must be 0 or 1'
    segmentation = row["segmentation"]
    if isinstance(segmentation, dict):
        return _run_lengths_fault(segmentation, size)
    if segmentation is None:
        return ""
    if not isinstance(segmentation, list) or not all(_numbers(one) and len(one) % 2 == 0 for one in segmentation):
        return (
            f'its "segmentation" is {_short(segmentation)}, and must be a list of polygons, each a list x, y, x, y, '
            "..., or run lengths"
        )
    farthest = max((max(max(polygon), -min(polygon)) for polygon in segmentation if polygon), default=0)
    if farthest > _FARTHEST:
        return f'its "segmentation" has the coordinate {farthest:g}, far from any image'
    return ""


def _numbers(values: Any) -> bool:
    """Whether this is a list of finite numbers."""
    try:
        return isinstance(values, list) and math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _run_lengths_fault(segmentation: Row, size: tuple[int, int]) -> str:
    if "size" not in segmentation or "counts" not in segmentation:
        return 'its run lengths must have "size" and "counts"'
    if segmentation["size"] != list(size) or any(type(side) is not int for side in segmentation["size"]):
        return (
            f"its run lengths have the size {_short(segmentation['size'])}, and its image {list(size)} (height, width)"
        )
    counts = run_lengths(segmentation["counts"])
    if counts is None or not len(counts) or counts.min() < 0:
        return f'its run lengths have "counts" that are none: {_short(segmentation["counts"])}'
    pixels = size[0] * size[1]
    if counts.max() > pixels or counts.sum() != pixels:
        return f"its run lengths add up to {sum(counts.tolist())} pixels, and its image has {pixels}"
    return ""


def run_lengths(counts: Any) -> np.ndarray | None:
    """The run lengths int64 (n,), from a list or COCO's compressed text; None where it is neither.

    The text has 5 bits of a number in each character, the lowest first, and one that says whether more follow; from
    the fourth number on it is the difference to the last but one.
    """
    if isinstance(counts, list):
        whole = all(type(count) is int and abs(count) < 2**62 for count in counts)
        return np.array(counts, dtype=np.int64) if whole else None
    if not isinstance(counts, str) or not counts.isascii():
        return None
    bits = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    if not len(bits) or bits.min() < 0 or bits.max() > 63 or bits[-1] & 32:
        return None
    ends = np.flatnonzero(~bits & 32)  # the last character of each number
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(len(bits)) - np.repeat(starts, ends - starts + 1)
    if places.max() > 11:  # more than 60 bits
        return None
    numbers = np.add.reduceat((bits & 31) << 5 * places, starts)
    negative = bits[ends] & 16 > 0
    numbers[negative] -= 1 << 5 * (places[ends][negative] + 1)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def with_area(segmentation: Any) -> Any:
    """Run lengths as they are, or the polygons that have three points."""
    if not isinstance(segmentation, list):
        return segmentation
    return [polygon for polygon in segmentation if len(polygon) >= _LEAST_COORDINATES]


def check_scored(content: dict[str, Any], file: Path) -> None:
    """Raises ValueError for annotations that pycocotools cannot score with."""
    rows = content["annotations"]
    if not any(not row.get("iscrowd") for row in rows):
        raise ValueError(f"{file} has no objects to score with")
    bad = [row for row in rows if not row["segmentation"] or with_area(row["segmentation"]) != row["segmentation"]]
    if bad:
        raise ValueError(
            f"{file}: {len(bad)} of {len(rows)} annotations have no mask, or polygons of fewer than three points; the "
            f"first one has the id {bad[0].get('id')}"
        )


def as_coco(content: dict[str, Any]) -> COCO:
    """The content of an annotation file, as pycocotools has it."""
    for number, row in enumerate(content["annotations"], 1):
        row["id"] = number  # COCOeval takes 0 for "no match"
        row.setdefault("iscrowd", 0)
        row.setdefault("area", row["bbox"][2] * row["bbox"][3])
    coco = COCO()
    coco.dataset = content
    with quiet():
        coco.createIndex()
    return coco


def quiet() -> contextlib.AbstractContextManager:
    """Inside, nothing is printed: pycocotools reports all that it does."""
    return contextlib.redirect_stdout(io.StringIO())
