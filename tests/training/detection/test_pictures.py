"""What is drawn, and under which names."""

import torch
from PIL import Image

from sbp.training.detection.pictures import draw, predicted, write
from tests.training.detection.coco_files import coco_folder, coco_settings, plain
from tests.training.detection.finding import Finder, perfect, shapes

CLASSES = ["cat", "dog"]


def found(*scores):
    """A square of 40 px, and within it one of 10 px."""
    masks = torch.zeros(2, 100, 120, dtype=torch.uint8)
    masks[0, 30:70, 20:60], masks[1, 45:55, 35:45] = 1, 1
    target = {
        "boxes": torch.tensor([[20.0, 30, 60, 70], [35, 45, 45, 55]]),
        "labels": torch.tensor([1, 2]),
        "masks": masks,
    }
    return target | ({"scores": torch.tensor(scores)} if scores else {})


def test_objects_that_are_sure_enough_are_drawn_where_they_are():
    image = torch.full((3, 100, 120), 128, dtype=torch.uint8)
    picture = draw(image, found(), CLASSES)
    assert picture.dtype == torch.uint8 and picture.shape == image.shape
    changed = (picture != image).any(0)
    assert changed[31:69, 21:59].all()
    outside = changed.clone()
    outside[30:71, 20:61] = False  # torchvision draws the far edges a pixel out
    assert outside.float().mean() < 0.02, "labels may reach beyond their boxes"
    assert not torch.equal(picture[:, 65, 50], picture[:, 53, 38]), "the smaller one lies on top"

    assert torch.equal(draw(image, found(0.4, 0.3), CLASSES), image)
    assert torch.equal(draw(image, found(0.4, 0.3), CLASSES, threshold=0.5), image)
    small = draw(image, found(0.4, 0.6), CLASSES)
    assert torch.equal(small[:, 65:], image[:, 65:]) and (small != image).any(0)[46:54, 36:44].all()
    assert (draw(image, found(0.4, 0.6), CLASSES, threshold=0.2) != image).any(0)[31:69, 21:59].all()


def test_masks_of_28_px_are_pasted_into_their_boxes():
    image = torch.full((3, 100, 120), 128, dtype=torch.uint8)
    masks = torch.zeros(2, 1, 28, 28)
    masks[:, :, :, 14:] = 1  # the right half
    changed = (draw(image, found(0.9, 0.1) | {"masks": masks}, CLASSES) != image).any(0)
    assert changed[55:65, 42:58].all() and not changed[55:65, 23:38].any()


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
    write(pictures, tmp_path / "pictures")
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == ["10.jpg", "12.jpg", "14.jpg"]
    assert Image.open(tmp_path / "pictures" / "10.jpg").size == (72, 48)
    nothing, seen = dataset[4][0], torch.tensor(list(pictures[2][1].tobytes())).view(48, 64, 3).permute(2, 0, 1)
    assert torch.equal(seen, nothing), "an image without objects stays as it is"
    seen = torch.tensor(list(pictures[0][1].tobytes())).view(48, 72, 3).permute(2, 0, 1)
    assert not torch.equal(seen, dataset[0][0])


def test_generated_images_are_numbered():
    dataset = shapes()
    pictures = predicted(Finder(perfect(dataset.ground_truth())), dataset, 100)
    assert [name for name, _ in pictures] == [f"image {i}" for i in range(7)]
