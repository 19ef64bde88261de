"""Images, boxes and masks change together."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from sbp.training.config.images import DataConfig
from sbp.training.config.recipe import RecipeConfig
from sbp.training.data.loading import Sample
from sbp.training.data.preprocessing import Normalize
from sbp.training.tasks.detection.augmentation import (
    DetectionPreprocessing,
    PaddedNormalize,
    TrainTransform,
    collate,
    crop,
    flip,
    random_crop,
    resize,
)
from tests.training.tasks.detection.coco_files import disc

DATA = DataConfig(source="coco", image_size=800, max_size=1333, interpolation="bilinear")
PUBLISHED = RecipeConfig(short_sides=list(range(480, 801, 32)), crop_share=0.5)


def scene(size=(240, 360), discs=((90, 70, 40), (250, 150, 60), (320, 40, 9))):
    """White discs on black, and their target: what is white in the image is what the masks must be."""
    masks = np.stack([disc(size, *one) for one in discs])
    boxes = [[x - r, y - r, x + r + 1, y + r + 1] for x, y, r in discs]
    target = {
        "image_id": 1,
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.arange(1, len(discs) + 1),
        "masks": torch.from_numpy(masks),
    }
    return Image.fromarray(255 * masks.max(0)).convert("RGB"), target


def empty(height, width):
    target = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}
    return Image.new("RGB", (width, height)), target | {"masks": torch.empty(0, height, width, dtype=torch.uint8)}


def assert_together(image, target, least=0.97):
    """The image (3, h, w) is white where the masks are, and each box surrounds its mask but for a few pixels."""
    white, masks = image[0] >= 128, target["masks"].bool()
    together = masks.any(0)
    assert (white & together).sum() >= least * (white | together).sum()
    for mask, box in zip(masks, target["boxes"], strict=True):
        there = mask.nonzero().flip(1)  # x, y
        if len(there):
            around = torch.cat([there.min(0).values, there.max(0).values + 1])
            slack = 2.5 * max(image.shape[1:]) / 360  # the outermost pixels of a disc are few
            assert (box[:2] <= around[:2] + slack).all() and (box[2:] >= around[2:] - slack).all()
            whole = (box[:2] > 1).all() and box[2] < image.shape[2] - 1 and box[3] < image.shape[1] - 1
            assert not whole or (box - around).abs().max() <= slack


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((427, 640), (800, 1199)),
        ((400, 1000), (533, 1333)),
        ((1000, 1000), (800, 800)),
        ((2, 4000), (1, 1333)),
    ],
)
def test_sizes_of_evaluation(size, expected):
    image, target = DetectionPreprocessing.of(DATA)(Image.new("RGB", size[::-1]), {"image_id": 3})
    assert image.shape == (3, *expected) and image.dtype == torch.uint8
    assert target == {"image_id": 3, "size": expected, "original_size": size}


def test_evaluation_says_what_it_does():
    text = str(DetectionPreprocessing.of(DATA))
    assert "shorter side to 800 px, longer one at most 1333 px (bilinear), mean [0.485, 0.456, 0.406]" in text


@pytest.mark.parametrize("short_side", [120, 240, 300, 480])
def test_resizing_shifts_nothing(short_side):
    image, target = resize(*scene(), short_side, 10_000, "bilinear")
    assert image.height == short_side and target["masks"].shape == (3, image.height, image.width)
    assert target["boxes"][0].tolist() == pytest.approx([x * short_side / 240 for x in (50, 30, 131, 111)])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert_together(pixels, target)
    centres = [mask.nonzero().float().mean(0) + 0.5 for mask in target["masks"].unbind()]
    for centre, (x, y) in zip(centres, ((90.5, 70.5), (250.5, 150.5), (320.5, 40.5)), strict=True):
        assert centre.tolist() == pytest.approx([y * short_side / 240, x * short_side / 240], abs=0.3)


def test_bilinear_averages_where_an_image_shrinks():
    stripes = np.zeros((100, 100, 3), np.uint8)
    stripes[::2] = 200
    image, _ = resize(Image.fromarray(stripes), {}, 20, 100, "bilinear")
    assert np.abs(np.array(image)[1:-1].astype(int) - 100).max() <= 10
    image, _ = resize(Image.fromarray(stripes), {}, 20, 100, "nearest")
    assert set(np.unique(np.array(image))) == {0, 200}


def test_flipping_twice_changes_nothing():
    image, target = scene()
    once = flip(image, target)
    assert_together(torch.from_numpy(np.array(once[0])).permute(2, 0, 1), once[1])
    assert once[1]["boxes"][0].tolist() == [360 - 131, 30, 360 - 50, 111]
    again, same = flip(*once)
    assert again.tobytes() == image.tobytes()
    assert torch.equal(same["masks"], target["masks"]) and torch.equal(same["boxes"], target["boxes"])


def test_a_crop_clips_boxes_and_drops_what_is_too_small():
    image, target = crop(*scene(), 60, 90, 100, 160)  # x from 90 to 250, y from 60 to 160
    assert image.size == (160, 100)
    assert target["boxes"].tolist() == [[0, 0, 41, 51], [100, 30, 160, 100]] and target["labels"].tolist() == [1, 2]
    assert target["masks"].shape == (2, 100, 160)
    _, target = crop(*scene(), 0, 130, 240, 100)  # of the first disc a column, of the second 40
    assert target["boxes"].tolist() == [[0, 30, 1, 111], [60, 90, 100, 211]]
    _, target = crop(*scene(), 0, 131, 240, 50)
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 240, 50) and target["labels"].shape == (0,)


def test_sides_of_a_random_crop():
    """Each within [min(side, low), min(side, high)], at any place."""
    random.seed(0)
    crops = [random_crop(*empty(500, 300), 384, 600)[0].size for _ in range(400)]
    assert {width for width, _ in crops} == {300}
    heights = Counter(height for _, height in crops)
    assert min(heights) == 384 and max(heights) == 500 and max(heights.values()) < 20
    places = {random_crop(*scene(), 200, 200)[1]["boxes"][0].tolist()[0] for _ in range(60)}
    assert len(places) > 20


def test_training_images_are_as_published():
    random.seed(0)
    transform, shapes = TrainTransform(DATA, PUBLISHED), Counter()
    flips = 0
    for _ in range(120):
        image, target = transform(*scene())
        height, width = image.shape[1:]
        assert target["size"] == (height, width) == tuple(target["masks"].shape[1:])
        assert image.dtype == target["masks"].dtype == torch.uint8 and target["boxes"].dtype == torch.float32
        assert max(height, width) <= 1333 and (
            min(height, width) in PUBLISHED.short_sides or max(height, width) == 1333
        )
        assert (target["boxes"][:, :2] >= 0).all()
        assert (target["boxes"][:, 2:] <= torch.tensor([width + 1e-3, height + 1e-3])).all()
        assert_together(image, target, least=0.96)
        shapes[round(width / height, 2)] += 1
        flips += bool(len(target["boxes"]) == 3 and target["boxes"][0, 0] > target["boxes"][1, 0])
    assert 45 <= shapes[1.5] <= 75, "half of the images are whole"
    assert 20 <= flips <= 70 and len(shapes) > 30


def test_without_augmentation_images_are_resized_only():
    transform = TrainTransform(DATA, RecipeConfig(augment=False, short_sides=[480], crop_share=1, flip=1))
    image, target = transform(*scene())
    assert image.shape == (3, 800, 1200)
    assert target["boxes"][0].tolist() == pytest.approx([50 / 0.3, 100, 131 / 0.3, 370])


def test_an_image_without_objects_goes_through():
    random.seed(0)
    for _ in range(10):
        image, target = TrainTransform(DATA, PUBLISHED)(*empty(50, 90))
        assert target["masks"].shape == (0, *image.shape[1:]) and target["boxes"].shape == (0, 4)


def sample(height, width, number, unreadable=()):
    return Sample(torch.full((3, height, width), number, dtype=torch.uint8), {"size": (height, width)}, [*unreadable])


def test_a_batch_is_padded_to_multiples_of_32():
    batch = collate([sample(33, 90, 1), Sample(None, -1, ["a.jpg"]), sample(50, 20, 2, ["b.jpg"])])
    assert batch.images.shape == (2, 3, 64, 96) and batch.images.dtype == torch.uint8
    assert [target["size"] for target in batch.labels] == [(33, 90), (50, 20)]
    assert batch.unreadable == ["a.jpg", "b.jpg"]
    for image, number, (height, width) in zip(batch.images, (1, 2), ((33, 90), (50, 20)), strict=True):
        assert (image[:, :height, :width] == number).all()
        assert image.sum(dtype=torch.int64) == number * 3 * height * width
    assert collate([sample(64, 96, 1)]).images.shape == (1, 3, 64, 96)
    nothing = collate([Sample(None, -1, ["a.jpg"])])
    assert len(nothing.images) == len(nothing.labels) == 0 and nothing.unreadable == ["a.jpg"]


def test_padding_is_zero_after_normalisation():
    images = torch.full((2, 3, 64, 96), 255, dtype=torch.uint8)
    normalize = PaddedNormalize(DATA, PUBLISHED)
    seen = normalize(images, [{"size": (33, 90)}, {"size": (64, 20)}])
    white = Normalize(DATA, PUBLISHED)(images)
    assert (white > 2).all() and torch.equal(seen[0, :, :33, :90], white[0, :, :33, :90])
    assert (seen > 2).sum((1, 2, 3)).tolist() == [3 * 33 * 90, 3 * 64 * 20]
    assert (seen == 0).sum((1, 2, 3)).tolist() == [3 * (64 * 96 - 33 * 90), 3 * 64 * (96 - 20)]
