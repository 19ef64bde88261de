"""A small data set in COCO's layout, written to disk: five images, two splits, category ids with gaps."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as run_lengths

from sbp.training.config.images import DataConfig
from sbp.training.config.recipe import RecipeConfig
from sbp.training.tasks.detection.datasets import build_datasets

SIZES = [(40, 60), (60, 40), (50, 50), (33, 70), (48, 64)]  # (height, width)
CATEGORIES = {3: "cat", 7: "dog", 90: "hat"}
PUBLISHED = {"crop_share": 0.5, "short_sides": [480, 640, 800]}


def rectangle(x, y, width, height):
    """A polygon."""
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def disc(size, x, y, radius):
    """A mask uint8 of this size (height, width)."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return ((columns - x) ** 2 + (rows - y) ** 2 <= radius**2).astype(np.uint8)


def compressed(mask):
    code = run_lengths.encode(np.asfortranarray(mask))
    return {"size": code["size"], "counts": code["counts"].decode()}


def uncompressed(mask):
    """Run lengths down the columns, those of zeros first."""
    flat = mask.T.flatten()
    ends = [*(np.flatnonzero(np.diff(flat)) + 1), len(flat)]
    counts = np.diff([0, *ends]).tolist()
    return {"size": list(mask.shape), "counts": counts if flat[0] == 0 else [0, *counts]}


def annotation(image, category, box, segmentation, **other):
    row = {"image_id": image, "category_id": category, "bbox": list(box), "segmentation": segmentation, "iscrowd": 0}
    return {"area": box[2] * box[3], "id": 0} | row | other


def content():
    """Of an annotation file. Image 13 has a crowd alone, image 14 nothing."""
    images = [{"id": 10 + i, "file_name": f"{10 + i}.png", "height": h, "width": w} for i, (h, w) in enumerate(SIZES)]
    annotations = [
        annotation(10, 7, (5, 4, 20, 10), rectangle(5, 4, 20, 10)),
        annotation(10, 90, (30, 10, 21, 21), compressed(disc(SIZES[0], 40, 20, 10))),
        annotation(11, 3, (10, 30, 17, 17), uncompressed(disc(SIZES[1], 18, 38, 8))),
        annotation(11, 3, (-5, 50, 15, 20), rectangle(-5, 50, 15, 20)),  # reaches beyond the image
        annotation(12, 3, (5, 5, 30, 30), compressed(disc(SIZES[2], 20, 20, 15)), iscrowd=1),
        annotation(12, 3, (5, 5, 0.5, 30), rectangle(5, 5, 0.5, 30)),
        annotation(12, 3, (49.5, 5, 30, 30), rectangle(49.5, 5, 30, 30)),  # half a pixel of it lies within
        annotation(12, 3, (5, 5, 30, 30), rectangle(5, 5, 30, 30), area=0),
        annotation(12, 7, (20, 20, 10, 10), rectangle(20, 20, 10, 10)),
        annotation(13, 7, (0, 0, 30, 30), uncompressed(disc(SIZES[3], 15, 15, 15)), iscrowd=1),
    ]
    categories = [{"id": number, "name": CATEGORIES[number]} for number in (90, 3, 7)]
    return {"images": images, "annotations": annotations, "categories": categories}


def one_class():
    """`content` with all its objects in one category."""
    whole = content()
    annotations = [row | {"category_id": 7} for row in whole["annotations"]]
    return whole | {"annotations": annotations, "categories": [{"id": 7, "name": CATEGORIES[7]}]}


def coco_folder(root, both=None, **parts):
    """Writes both splits: `both` or `content`, with these parts of it replaced in the training split's file."""
    (root / "annotations").mkdir(parents=True)
    both = both or content()
    for split, annotations in (("train", both | parts), ("val", both)):
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(annotations))
        for number, size in enumerate(SIZES, 10):
            pixels = np.random.default_rng(number).integers(256, size=(*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{number}.png")
    return root


def settings(source, **keys):
    return DataConfig(source=source, num_classes=3, interpolation="bilinear", workers=0, **keys)


def coco_settings(root, **keys):
    splits = {"train_split": "images/train", "val_split": "images/val"}
    return settings("coco", root=str(root), **{"image_size": 48, "max_size": 96} | splits | keys)


def plain(data):
    """The two sets of these settings, resized only."""
    return build_datasets(data, RecipeConfig(augment=False))
