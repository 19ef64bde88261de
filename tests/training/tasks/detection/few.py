"""A few photographs of a folder in COCO's layout, as a data set of their own."""

import json
from collections import defaultdict
from pathlib import Path

COUNT, FEWEST, MOST = 8, 1, 6  # images, and objects in each


def few_images(root: Path, folder: Path, split: str) -> None:
    """Makes folder/{split,annotations} of the first images of root, by id, that have few objects and no crowd."""
    content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    objects = defaultdict(list)
    for one in content["annotations"]:
        objects[one["image_id"]].append(one)
    images = [
        image
        for image in sorted(content["images"], key=lambda image: image["id"])
        if FEWEST <= len(objects[image["id"]]) <= MOST and not any(one["iscrowd"] for one in objects[image["id"]])
    ][:COUNT]
    for name in (split, "annotations"):
        (folder / name).mkdir(parents=True)
    for image in images:
        (folder / split / image["file_name"]).symlink_to((root / "images" / split / image["file_name"]).resolve())
    content |= {"images": images, "annotations": [one for image in images for one in objects[image["id"]]]}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
