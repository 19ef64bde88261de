"""Models that find what they are told to, and an evaluation of one on any number of processes.

Started by `test_detection_evaluation.py` with torchrun; see `main`.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torchvision.ops import roi_align

from sbp.training.data.loading import ValidationSampler, make_loader
from sbp.training.runtime import distributed, wrapping
from sbp.training.tasks.detection.augmentation import collate
from sbp.training.tasks.detection.evaluation import evaluate_detection
from tests.training.tasks.detection.coco_files import plain, settings

CPU = torch.device("cpu")
IMAGES, BATCH = 7, 3  # of two processes one has two batches, the other one


class Finder(nn.Module):
    """Gives `found[image_id]`: boxes in pixels of the file, labels, scores, and masks (n, 1, 28, 28).

    It resizes the boxes as a detector would see them, and has a buffer and a block with weights, as one has.
    """

    def __init__(self, found):
        super().__init__()
        self.found, self.calls = found, []
        self.blocks = nn.ModuleList([nn.Linear(1, 1)])
        self.register_buffer("number", torch.zeros(1))

    def forward(self, images, targets):
        self.calls.append((images, targets))
        self.blocks[0](images.float().mean().view(1, 1))
        return [self.seen(target) for target in targets]

    def seen(self, target):
        if "image_id" not in target:  # an image that stands in for none
            return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} | {
                "scores": torch.zeros(0),
                "masks": torch.zeros(0, 1, 28, 28),
            }
        found = self.found[target["image_id"]]
        (height, width), (original_height, original_width) = target["size"], target["original_size"]
        return found | {"boxes": found["boxes"] * torch.tensor([width / original_width, height / original_height] * 2)}


def perfect(truth):
    """Of each image of the ground truth all objects but crowds, as a detector would say it."""
    labels = {category: label for label, category in enumerate(sorted(truth.getCatIds()), 1)}
    found = {}
    for number in truth.getImgIds():
        rows = [row for row in truth.loadAnns(truth.getAnnIds(imgIds=[number])) if not row["iscrowd"]]
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [
            roi_align(torch.from_numpy(truth.annToMask(row))[None, None].float(), [box[None]], 28, aligned=True)[0]
            for row, box in zip(rows, boxes, strict=True)
        ]
        found[number] = {
            "boxes": boxes,
            "labels": torch.tensor([labels[row["category_id"]] for row in rows], dtype=torch.int64),
            "scores": torch.full((len(rows),), 0.9),
            "masks": torch.stack(masks) if masks else torch.empty(0, 1, 28, 28),
        }
    return found


def disturbed(found):
    """Boxes that are off by a few pixels, some wrong labels, and scores of all kinds."""
    generator = torch.Generator().manual_seed(0)
    other = {}
    for number, one in found.items():
        count = len(one["boxes"])
        boxes = one["boxes"] + torch.randn(count, 4, generator=generator) * 2
        boxes = boxes.clamp(min=0)
        boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2] + 1)
        labels = torch.where(torch.rand(count, generator=generator) < 0.2, 1, one["labels"])
        other[number] = one | {"boxes": boxes, "labels": labels, "scores": torch.rand(count, generator=generator)}
    return other


def shapes():
    return plain(settings("shapes", image_size=64, max_size=100, val_images=IMAGES))[1]


def figures(dataset, found, *, batch=BATCH, sharded=False, **options):
    model = Finder(found)
    if sharded:
        wrapping.shard(model, CPU)
    sampler = ValidationSampler(len(dataset), batch, distributed.rank(), distributed.world_size())
    loader = make_loader(dataset, sampler, seed=0, workers=0, device=CPU, collate=collate)
    return evaluate_detection(model, loader, ground_truth=dataset.ground_truth, **options)


def main(folder: Path) -> None:
    """What this process is told, of a model that each has whole and of one that they share: folder/<rank>.pt."""
    distributed.start()
    dataset = shapes()
    found = disturbed(perfect(dataset.ground_truth()))
    told = [figures(dataset, found, sharded=sharded) for sharded in (False, True)]
    torch.save(told, folder / f"{distributed.rank()}.pt")
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
