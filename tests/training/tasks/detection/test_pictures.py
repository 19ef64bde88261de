"""What is drawn, and under which names."""

import pytest
import torch

from sbp.training.tasks.detection import pictures as module
from sbp.training.tasks.detection.pictures import draw, predicted
from tests.training.tasks.detection.coco_files import coco_folder, coco_settings, plain
from tests.training.tasks.detection.finding import Finder, perfect, shapes

CLASSES = ["cat", "dog"]


def found(*scores):
    """A square of 160 px, and within it one of 80 px."""
    masks = torch.zeros(2, 200, 240, dtype=torch.uint8)
    masks[0, 20:180, 40:200], masks[1, 60:140, 80:160] = 1, 1
    boxes = torch.tensor([[40.0, 20, 200, 180], [80, 60, 160, 140]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}
    return target | ({"scores": torch.tensor(scores)} if scores else {})


GREY = torch.full((3, 200, 240), 128, dtype=torch.uint8)
LARGE, SMALL, OUTSIDE = (160, 180), (120, 150), (190, 220)  # points in the one, in both, in none; away from labels


def colours(picture):
    assert picture.dtype == torch.uint8 and picture.shape == GREY.shape
    return [tuple(picture[:, y, x].tolist()) for y, x in (LARGE, SMALL, OUTSIDE)]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_smaller_object_lies_upon_the_larger_one(order):
    large, small, outside = colours(draw(GREY, {name: value[order] for name, value in found().items()}, CLASSES))
    assert len({large, small, outside}) == 3 and outside == (128, 128, 128)
    assert small != (64, 64, 64), "torchvision paints black what masks share"


def test_objects_that_are_sure_enough_are_drawn_where_they_are():
    assert torch.equal(draw(GREY, found(0.4, 0.3), CLASSES), GREY)
    large, small, outside = colours(draw(GREY, found(0.4, 0.6), CLASSES))
    assert large == outside == (128, 128, 128) != small
    large, small, _ = colours(draw(GREY, found(0.6, 0.4), CLASSES))
    assert large == small != (128, 128, 128)
    assert len(set(colours(draw(GREY, found(0.4, 0.6), CLASSES, threshold=0.2)))) == 3


def test_masks_of_28_px_are_pasted_into_their_boxes():
    masks = torch.zeros(2, 1, 28, 28)
    masks[:, :, :, 14:] = 1  # the right half
    changed = (draw(GREY, found(0.9, 0.1) | {"masks": masks}, CLASSES) != GREY).any(0)
    assert changed[60:170, 125:195].all() and not changed[60:170, 45:115].any()


def test_pictures_have_the_size_the_model_sees_and_the_names_of_the_files(tmp_path):
    dataset = plain(coco_settings(coco_folder(tmp_path)))[1]
    model = Finder(perfect(dataset.ground_truth())).train()
    pictures = predicted(model, dataset, 3)
    assert model.training
    assert [(name, picture.size) for name, picture in pictures] == [
        ("10", (72, 48)),
        ("12", (48, 48)),
        ("14", (64, 48)),
    ]
    nothing, seen = dataset[4][0], torch.tensor(list(pictures[2][1].tobytes())).view(48, 64, 3).permute(2, 0, 1)
    assert torch.equal(seen, nothing), "an image without objects stays as it is"
    seen = torch.tensor(list(pictures[0][1].tobytes())).view(48, 72, 3).permute(2, 0, 1)
    assert not torch.equal(seen, dataset[0][0])


def test_generated_images_are_numbered():
    dataset = shapes()
    pictures = predicted(Finder(perfect(dataset.ground_truth())), dataset, 100)
    assert [name for name, _ in pictures] == [f"image {i}" for i in range(7)]


def test_files_of_the_same_name_in_other_folders_have_pictures_of_their_own(tmp_path, monkeypatch):
    dataset = plain(coco_settings(coco_folder(tmp_path)))[1]
    monkeypatch.setattr(module, "path", lambda dataset, index: f"camera{index}/000001.jpg")
    names = [name for name, _ in predicted(Finder(perfect(dataset.ground_truth())), dataset, 3)]
    assert names[0] == "000001" and len(set(names)) == 3
