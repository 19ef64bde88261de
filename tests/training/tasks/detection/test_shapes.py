"""Generated images with objects."""

import numpy as np
import pytest
import torch

from sbp.training.tasks.detection.shapes import CLASSES, SMALLEST, Shapes, generate
from tests.training.tasks.detection.coco_files import plain, settings


def test_an_image_is_a_function_of_stream_and_index():
    for one, again in zip(generate(0, 5, 64), generate(0, 5, 64), strict=True):
        assert np.array_equal(one, again)
    assert len({generate(stream, index, 64)[0].tobytes() for stream in (0, 1) for index in range(20)}) == 40


def test_objects_are_seen_where_their_masks_say():
    sizes, labels, hidden = set(), set(), 0
    for index in range(100):
        pixels, classes, masks = generate(0, index, 64)
        sizes.add(pixels.shape)
        labels |= set(classes.tolist())
        assert pixels.dtype == masks.dtype == np.uint8 and masks.shape[1:] == pixels.shape[:2]
        assert 1 <= len(classes) == len(masks) <= 4
        assert masks.sum(0).max() == 1, "what lies behind is not seen"
        for label, mask in zip(classes, masks, strict=True):
            rows, columns = np.nonzero(mask)
            box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            share = mask.sum() / box
            hidden += share < {1: 0.75, 2: 0.99, 3: 0.45}[int(label)]
            assert pixels[mask == 1].std(axis=0).max() < 20, "one colour, and noise"
    assert labels == {1, 2, 3} and len(sizes) > 80
    assert 10 < hidden < 100, "some hide others"


def test_targets_are_what_evaluation_scores_with():
    train, val = plain(settings("shapes", image_size=64, max_size=200, train_images=8, val_images=8))
    assert (len(train), len(val)) == (8, 8) and train.classes == CLASSES
    assert not torch.equal(train[0][0], val[0][0])
    truth = Shapes(0, 8, 64, 3, lambda image, target: (image, target), True)
    scored = truth.ground_truth()
    assert [scored.cats[number]["name"] for number in sorted(scored.cats)] == CLASSES
    for index in range(8):
        image, target = truth[index]
        rows = scored.loadAnns(scored.getAnnIds(imgIds=[index]))
        assert (scored.imgs[index]["height"], scored.imgs[index]["width"]) == (image.height, image.width)
        assert [row["category_id"] for row in rows] == target["labels"].tolist()
        for row, box, mask in zip(rows, target["boxes"], target["masks"], strict=True):
            x, y, width, height = row["bbox"]
            assert [x, y, x + width, y + height] == box.tolist()
            there = mask.nonzero()
            assert box.tolist() == [*there.min(0).values.flip(0).tolist(), *(there.max(0).values.flip(0) + 1).tolist()]
            assert np.array_equal(scored.annToMask(row), mask.numpy())


def test_what_shapes_cannot_be_is_refused():
    with pytest.raises(ValueError, match=f"must be at least {SMALLEST} for shapes, got 16"):
        plain(settings("shapes", image_size=16))
    data = settings("shapes", image_size=64)
    data.num_classes = 80
    with pytest.raises(ValueError, match="must be 3 for shapes, got 80"):
        plain(data)
