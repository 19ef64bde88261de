"""Images and their objects in COCO's layout: a folder of images and an annotation file for each split."""

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from sbp.training.data.preprocessing import decode
from sbp.training.detection.augmentation import wide_enough
from sbp.training.detection.target import Target

_KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "bbox", "segmentation"),
    "categories": ("id", "name"),
}
_LEAST_COORDINATES = 6  # a polygon of fewer than three points has no area; pycocotools takes four numbers for a box


class CocoImages(Dataset):
    """The images of a split, each as `transform(image, target)` gives it.

    In training, crowds and objects too small or without a mask are left out, and so are images without others.
    categories: name by id, in label order: label 1 is the smallest id. classes: the names.
    Raises ValueError for what cannot be trained on, before any image is read.
    """

    def __init__(
        self, root: Path, split: str, annotations: str, num_classes: int, transform: Any, training: bool
    ) -> None:
        self.folder, self.file = root / split, root / annotations.replace("{split}", Path(split).name)
        self.transform, self.training = transform, training
        if not root.is_dir():
            raise ValueError(f"no folder {root}; data.root needs a folder of images for each split")
        if not self.folder.is_dir():
            raise ValueError(f"no folder {self.folder}; expected the images of the split in it")
        content = read_annotations(self.file)
        self.categories = {one["id"]: one["name"] for one in sorted(content["categories"], key=lambda one: one["id"])}
        self.classes = list(self.categories.values())
        if len(self.classes) != num_classes:
            raise ValueError(f"{self.file} has {len(self.classes)} categories, but data.num_classes is {num_classes}")
        if training:
            objects = _objects(content, list(self.categories))
        else:
            objects = {}
            _check_scored(content, self.file)
        self.images = Packed(
            [image["id"], image["file_name"], image["height"], image["width"], objects.get(image["id"], [])]
            for image in content["images"]
            if not training or image["id"] in objects
        )
        if not len(self.images):
            what = "images with objects to train on" if training else "images"
            raise ValueError(f"{self.file} has no {what}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Raises OSError for a file that cannot be read, or has another size than its annotations."""
        number, name, height, width, objects = self.images[index]
        image = decode((self.folder / name).read_bytes())
        if (image.width, image.height) != (width, height):
            raise OSError(f"{image.width} x {image.height} pixels, in {self.file.name} {width} x {height}")
        target: Target = {"image_id": number}
        if self.training:
            labels, boxes, segmentations = zip(*objects, strict=True)
            masks = np.stack([_mask(segmentation, height, width) for segmentation in segmentations])
            target |= {
                "boxes": torch.tensor(boxes, dtype=torch.float32),
                "labels": torch.tensor(labels),
                "masks": torch.from_numpy(masks),
            }
        return self.transform(image, target)

    def filename(self, index: int, absolute: bool = True) -> str:
        name = self.images[index][1]
        return str(self.folder / name) if absolute else name

    def ground_truth(self) -> COCO:
        """What pycocotools scores with: the file as it is, crowds and all, read again."""
        return as_coco(read_annotations(self.file))


class Packed:
    """A list of JSON values as two arrays, which loader processes share.

    Of Python objects each process would come to have copies, as counting a reference writes beside it.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        rows = [json.dumps(value).encode() for value in values]
        self.ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(rows), np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Any:
        last = self.ends[index]  # raises IndexError
        first = self.ends[index - 1] if index else 0
        return json.loads(self.bytes[first:last].tobytes())


def read_annotations(file: Path) -> dict[str, Any]:
    """The content of an annotation file. Raises ValueError for a file that has not what is needed of COCO's format."""
    if not file.is_file():
        raise ValueError(f"no annotation file {file}; data.annotations says where it lies below data.root")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    for part, keys in _KEYS.items():
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise ValueError(f'{file} has no list "{part}"; expected an annotation file of COCO\'s instances')
        for key in keys:
            missing = sum(key not in row for row in rows)
            if missing:
                raise ValueError(f'{file}: {missing} of {len(rows)} {part} have no "{key}"')
    wrong = sum(len(row["bbox"]) != 4 for row in content["annotations"])
    if wrong:
        raise ValueError(f'{file}: {wrong} annotations have a "bbox" that is not x, y, width, height')
    for part, key in (("images", "image_id"), ("categories", "category_id")):
        known = {row["id"] for row in content[part]}
        if not known:
            raise ValueError(f"{file} has no {part}")
        if len(known) < len(content[part]):
            raise ValueError(f"{file}: several {part} have the same id")
        for row in content["annotations"]:
            if row[key] not in known:
                raise ValueError(f"{file}: an annotation has {key} {row[key]}, which is not among the {part}")
    return content


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


def _objects(content: dict[str, Any], categories: list[int]) -> dict[int, list]:
    """By image: (label, box, segmentation) of each object that can be learned from."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    label = {category: number for number, category in enumerate(categories, 1)}
    rows = [row for row in content["annotations"] if not row.get("iscrowd") and row.get("area", 1) > 0]
    corners = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).view(-1, 4)
    corners[:, 2:] += corners[:, :2]
    limits = torch.tensor([sizes[row["image_id"]] * 2 for row in rows], dtype=torch.float64).view(-1, 4)
    boxes = corners.clamp(min=0).minimum(limits)
    objects = defaultdict(list)
    for row, box, wide in zip(rows, boxes.tolist(), wide_enough(boxes).tolist(), strict=True):
        segmentation = _with_area(row["segmentation"])
        if wide and segmentation:
            objects[row["image_id"]].append((label[row["category_id"]], box, segmentation))
    return dict(objects)


def _with_area(segmentation: Any) -> Any:
    """Run lengths as they are, or the polygons that have three points."""
    if not isinstance(segmentation, list):
        return segmentation
    return [polygon for polygon in segmentation if len(polygon) >= _LEAST_COORDINATES]


def _check_scored(content: dict[str, Any], file: Path) -> None:
    """Raises ValueError for annotations that pycocotools cannot score with."""
    rows = content["annotations"]
    if not any(not row.get("iscrowd") for row in rows):
        raise ValueError(f"{file} has no objects to score with")
    bad = sum(not row["segmentation"] or _with_area(row["segmentation"]) != row["segmentation"] for row in rows)
    if bad:
        raise ValueError(
            f"{file}: {bad} of {len(rows)} annotations have no mask, or polygons of fewer than three points"
        )


def _mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """uint8 (height, width) of polygons or run lengths, which pycocotools tells apart."""
    coco = COCO()
    coco.imgs = {0: {"height": height, "width": width}}
    return coco.annToMask({"image_id": 0, "segmentation": segmentation})
