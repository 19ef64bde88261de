"""Images and their objects in COCO's layout: a folder of images and an annotation file for each split."""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from sbp.training.data.preprocessing import UPRIGHT, decode, decode_with_orientation
from sbp.training.record.files import shown
from sbp.training.tasks.detection.annotations import as_coco, check_scored, read_annotations, with_area
from sbp.training.tasks.detection.augmentation import wide_enough
from sbp.training.tasks.detection.target import Target

log = logging.getLogger(__name__)

_LYING = (5, 6, 7, 8)  # EXIF's orientations that exchange width and height


class CocoImages(Dataset):
    """The images of a split, each as `transform(image, target)` gives it.

    An image that EXIF says to turn is turned, as annotators saw it, unless the width and height in the annotation file
    are those of the image as stored. counts: by label, the objects of the file that are no crowds.
    In training, crowds and objects too small or without a mask are left out, and so are images without others; but with
    `background` those stay of which the file has no annotation at all.
    categories: name by id, in label order: label 1 is the smallest id. classes: the names.
    Raises ValueError for what cannot be trained on, before any image is read.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        annotations: str,
        num_classes: int,
        transform: Any,
        training: bool,
        background: bool = False,
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
            if not objects:
                raise ValueError(f"{self.file} has no images with objects to train on")
            if background:
                annotated = {row["image_id"] for row in content["annotations"]}
                objects |= {image["id"]: [] for image in content["images"] if image["id"] not in annotated}
        else:
            objects = {}
            check_scored(content, self.file)
        label = {category: number for number, category in enumerate(self.categories, 1)}
        self.counts = Counter(label[row["category_id"]] for row in content["annotations"] if not row.get("iscrowd"))
        self.told = False
        self.images = Packed(
            [image["id"], image["file_name"], image["height"], image["width"], objects.get(image["id"], [])]
            for image in content["images"]
            if not training or image["id"] in objects
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Raises OSError for a file that cannot be read, or has another size than its annotations."""
        number, name, height, width, objects = self.images[index]
        image, turn = decode_with_orientation((self.folder / name).read_bytes())
        transpose = self.turning(image.size, turn, (width, height))
        if turn != 1 and not self.told:
            self.told = True  # of one image in each loader process
            done = "left as stored, the size that it is annotated with" if transpose is None else "turned upright"
            log.info("%s has the EXIF orientation %d: %s; others may follow", shown(self.filename(index)), turn, done)
        image = image if transpose is None else image.transpose(transpose)
        target: Target = {"image_id": number}
        if self.training:
            masks = np.empty((len(objects), height, width), np.uint8)
            for mask, (_, _, segmentation) in zip(masks, objects, strict=True):
                mask[:] = _mask(segmentation, height, width)
            target |= {
                "boxes": torch.tensor([box for _, box, _ in objects], dtype=torch.float32).view(-1, 4),
                "labels": torch.tensor([label for label, _, _ in objects], dtype=torch.int64),
                "masks": torch.from_numpy(masks),
            }
        return self.transform(image, target)

    def turning(self, size: tuple[int, int], turn: int, annotated: tuple[int, int]) -> Image.Transpose | None:
        """How to turn a stored image of this size (width, height), with EXIF's orientation `turn`, as it was annotated.

        Where both ways have the annotated size, as of a square, upright. Raises OSError where neither has.
        """
        if (size[::-1] if turn in _LYING else size) == annotated:
            return UPRIGHT[turn]
        if size == annotated:
            return None
        says = f", with the EXIF orientation {turn}" if turn != 1 else ""
        raise OSError(f"{size[0]} x {size[1]} pixels{says}, in {self.file.name} {annotated[0]} x {annotated[1]}")

    def filename(self, index: int, absolute: bool = True) -> str:
        name = self.images[index][1]
        return str(self.folder / name) if absolute else name

    def files(self) -> "Files":
        """For the check of data."""
        return Files(self)

    def ground_truth(self) -> COCO:
        """What pycocotools scores with: the file as it is, crowds and all, read again."""
        return as_coco(read_annotations(self.file))


class Files(Dataset):
    """The files of a split's images, for the check of data: `transform(decode(content))`, and 0 for a label.

    Items of the check's transform get `turned`: whether training turns them as EXIF says; None where that says nothing.
    """

    def __init__(self, images: CocoImages) -> None:
        self.images, self.filename = images, images.filename
        self.decode: Callable[[bytes], Any] = decode
        self.transform: Callable[[Any], Any] = np.asarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Raises OSError as `CocoImages`."""
        _, name, height, width, _ = self.images.images[index]
        content = (self.images.folder / name).read_bytes()
        facts = self.transform(self.decode(content))
        image, turn = decode_with_orientation(content)
        transpose = self.images.turning(image.size, turn, (width, height))
        return facts._replace(turned=None if turn == 1 else transpose is not None), 0


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
        segmentation = with_area(row["segmentation"])
        if wide and segmentation:
            objects[row["image_id"]].append((label[row["category_id"]], box, segmentation))
    return dict(objects)


def _mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """uint8 (height, width) of polygons or run lengths, which pycocotools tells apart."""
    coco = COCO()
    coco.imgs = {0: {"height": height, "width": width}}
    return coco.annToMask({"image_id": 0, "segmentation": segmentation})
