"""Annotation files: what is learned from, what is scored with, and what is said about bad ones."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from sbp.training.config import RecipeConfig, plan_batches
from sbp.training.data.loading import TrainSampler, ValidationSampler, make_loader, readable, spread_samples
from sbp.training.data.naming import path
from sbp.training.detection.augmentation import collate
from sbp.training.detection.coco import CocoImages, Packed
from sbp.training.detection.sources import build_datasets, build_validation_set
from tests.training.detection.coco_files import (
    CATEGORIES,
    SIZES,
    annotation,
    coco_folder,
    coco_settings,
    content,
    disc,
    plain,
    rectangle,
)

CPU = torch.device("cpu")


def unchanged(image, target):
    return torch.from_numpy(np.array(image)), target


def opened(root, training=True):
    split = "train" if training else "val"
    annotations = "annotations/instances_{split}.json"
    return CocoImages(root, f"images/{split}", annotations, 3, unchanged, training)


def loader(dataset, sampler, **options):
    return make_loader(dataset, sampler, seed=0, device=CPU, collate=collate, **{"workers": 0} | options)


def test_objects_are_those_of_the_file_with_labels_in_the_order_of_category_ids(tmp_path):
    images = opened(coco_folder(tmp_path))
    assert images.classes == ["cat", "dog", "hat"] and images.categories == CATEGORIES
    targets = [images[i][1] for i in range(len(images))]
    assert [target["image_id"] for target in targets] == [10, 11, 12]

    first = targets[0]
    assert first["labels"].tolist() == [2, 3] and first["labels"].dtype == torch.int64
    assert first["boxes"].tolist() == [[5, 4, 25, 14], [30, 10, 51, 31]] and first["boxes"].dtype == torch.float32
    inside = np.zeros(SIZES[0], np.uint8)
    inside[4:14, 5:25] = 1
    assert first["masks"].dtype == torch.uint8
    assert np.array_equal(first["masks"].numpy(), [inside, disc(SIZES[0], 40, 20, 10)])

    second = targets[1]
    assert second["labels"].tolist() == [1, 1]
    assert second["boxes"].tolist() == [[10, 30, 27, 47], [0, 50, 10, 60]], "clipped to the image"
    assert np.array_equal(second["masks"][0].numpy(), disc(SIZES[1], 18, 38, 8))
    assert second["masks"][1].sum() == 100


def test_training_leaves_out_crowds_what_has_no_area_and_images_without_objects(tmp_path):
    images = opened(coco_folder(tmp_path))
    assert len(images) == 3
    assert images[2][1]["boxes"].tolist() == [[20, 20, 30, 30]]
    rows = [
        annotation(10, 3, (5, 5, 9, 9), rectangle(5, 5, 9, 9)),
        annotation(11, 3, (5, 5, 9, 9), []),
        annotation(12, 3, (5, 5, 9, 9), [[5, 5, 9, 9]]),  # two points
    ]
    images = opened(coco_folder(tmp_path / "other", annotations=rows))
    assert [images[i][1]["image_id"] for i in range(len(images))] == [10]


def test_evaluation_has_all_images_and_scores_with_all_that_the_file_has(tmp_path):
    images = opened(coco_folder(tmp_path), training=False)
    assert [images[i][1] for i in range(len(images))] == [{"image_id": number} for number in range(10, 15)]
    truth = images.ground_truth()
    assert sorted(truth.getImgIds()) == list(range(10, 15)) and sorted(truth.getCatIds()) == [3, 7, 90]
    assert len(truth.anns) == 10 and sum(row["iscrowd"] for row in truth.anns.values()) == 2
    assert 0 not in truth.anns, "COCOeval takes the id 0 for no match"


def test_targets_of_the_transforms(tmp_path):
    train, val = plain(coco_settings(coco_folder(tmp_path)))
    image, target = train[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 48, 72)
    assert target["size"] == (48, 72) and target["masks"].shape == (2, 48, 72)
    image, target = val[3]
    assert target == {"image_id": 13, "size": (45, 96), "original_size": (33, 70)} and image.shape == (3, 45, 96)


def test_probe_images_come_with_their_targets(tmp_path):
    train, _ = plain(coco_settings(coco_folder(tmp_path)))
    images, targets = spread_samples(train, 2, 0, collate)
    assert images.shape == (2, 3, 64, 96) and [target["image_id"] for target in targets] == [10, 12]


def test_nothing_is_printed(tmp_path, capsys):
    train, val = plain(coco_settings(coco_folder(tmp_path)))
    assert train[0] and val.ground_truth()
    assert capsys.readouterr() == ("", "")


def test_packed_values_come_back_and_can_be_sent_to_a_process():
    values = [[1, "ä", [0.1, 2]], [], [3]]
    packed = pickle.loads(pickle.dumps(Packed(values)))
    assert [packed[i] for i in range(len(packed))] == values
    with pytest.raises(IndexError):
        packed[3]


def test_batches_depend_on_pass_and_index_not_on_workers_or_the_place_of_a_start(tmp_path):
    recipe = RecipeConfig(crop_share=0.5, crop_short_sides=[40], crop_sides=[24, 36], short_sides=[32, 48, 64])
    images, _ = build_datasets(coco_settings(coco_folder(tmp_path)), recipe)

    def batches(workers, step):
        sampler = TrainSampler(len(images), plan_batches(1, None, 1), 0)
        for epoch in range(4):
            sampler.start_at(epoch, step if epoch == 0 else 0)
            yield from loader(images, sampler, workers=workers)

    whole = list(batches(0, 0))
    for other in (list(batches(2, 0)), list(batches(0, 2))):
        for one, again in zip(whole[-len(other) :], other, strict=True):
            assert torch.equal(one.images, again.images)
            for name, value in one.labels[0].items():
                same = (
                    torch.equal(value, again.labels[0][name])
                    if torch.is_tensor(value)
                    else value == again.labels[0][name]
                )
                assert same, name
    sizes = {batch.labels[0]["size"] for batch in whole}
    assert len(sizes) > 4, "each pass augments anew"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.unlink(), "No such file"),
        (lambda file: file.write_bytes(b"no image"), "not an image"),
        (lambda file: Image.new("RGB", (41, 60)).save(file), "41 x 60 pixels, in instances_{}.json 40 x 60"),
    ],
    ids=["missing", "no image", "another size"],
)
def test_an_unreadable_image_is_replaced_in_training_and_named_in_evaluation(tmp_path, damage, reason):
    root = coco_folder(tmp_path)
    for split in ("train", "val"):
        damage(root / "images" / split / "11.png")
    train, val = plain(coco_settings(root))
    (batch,) = loader(train, [[(0, 0), (0, 1), (0, 2)]], substitutes=5)
    assert len(batch.images) == len(batch.labels) == 3
    assert all("11.png" in name and reason.format("train") in name for name in batch.unreadable) and batch.unreadable
    (batch,) = loader(val, ValidationSampler(5, 5))
    assert [target["image_id"] for target in batch.labels] == [10, 12, 13, 14]
    with pytest.raises(ValueError, match="cannot read 1 of the images") as error:
        readable(batch)
    assert path(val, 1) == str(root / "images" / "val" / "11.png") in str(error.value)
    assert reason.format("val") in str(error.value)


def without(part, key):
    return {part: [{name: value for name, value in row.items() if name != key} for row in content()[part]]}


def changed(part, key, value):
    rows = content()[part]
    rows[1] = rows[1] | {key: value}
    return {part: rows}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"images": None}, 'has no list "images"'),
        ({"annotations": None}, 'has no list "annotations"; expected an annotation file of COCO\'s instances'),
        ({"categories": {}}, 'has no list "categories"'),
        ({"images": [], "annotations": []}, "has no images"),
        ({"annotations": []}, "has no images with objects to train on"),
        (without("annotations", "segmentation"), '10 of 10 annotations have no "segmentation"'),
        (without("annotations", "bbox"), '10 of 10 annotations have no "bbox"'),
        (without("images", "height"), '5 of 5 images have no "height"'),
        (changed("annotations", "image_id", 99), "an annotation has image_id 99, which is not among the images"),
        (changed("annotations", "category_id", 5), "has category_id 5, which is not among the categories"),
        (changed("annotations", "bbox", [1, 2, 3]), '1 annotations have a "bbox" that is not x, y, width, height'),
        (changed("images", "id", 10), "several images have the same id"),
        (
            {"categories": [*content()["categories"], {"id": 8, "name": "bird"}]},
            "4 categories, but data.num_classes is 3",
        ),
        (changed("categories", "name", "bird"), r"different categories: bird \(3\) is in one of them only"),
    ],
)
def test_an_annotation_file_that_cannot_be_trained_on_is_refused(tmp_path, parts, message):
    with pytest.raises(ValueError, match=message) as error:
        plain(coco_settings(coco_folder(tmp_path, **parts)))
    assert "instances_train.json" in str(error.value)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [([], "1 of 10 annotations have no mask"), ([[1, 2, 3, 4]], "polygons of fewer than three points")],
)
def test_what_cannot_be_scored_with_is_refused(tmp_path, segmentation, message):
    root = coco_folder(tmp_path)
    file = root / "annotations" / "instances_val.json"
    file.write_text(json.dumps(content() | changed("annotations", "segmentation", segmentation)))
    with pytest.raises(ValueError, match=f"{file}: .*{message}"):
        build_validation_set(coco_settings(root))
    file.write_text(json.dumps(content() | {"annotations": []}))
    with pytest.raises(ValueError, match=f"{file} has no objects to score with"):
        build_validation_set(coco_settings(root))


@pytest.mark.parametrize(
    ("spoil", "keys", "message"),
    [
        (None, {"root": "nowhere"}, "no folder nowhere; data.root needs"),
        (None, {"val_split": "val2017"}, "no folder .*/val2017; expected the images of the split"),
        (None, {"annotations": "labels/{split}.json"}, "no annotation file .*/labels/val.json; data.annotations says"),
        (b"{", {}, "instances_val.json is not JSON: "),
        (b"\xff\xfe{", {}, "instances_val.json is not JSON: "),
        (b"[]", {}, 'instances_val.json has no list "images"'),
    ],
)
def test_what_is_missing_is_named(tmp_path, spoil, keys, message):
    root = coco_folder(tmp_path)
    if spoil is not None:
        (root / "annotations" / "instances_val.json").write_bytes(spoil)
    with pytest.raises(ValueError, match=message):
        plain(coco_settings(**{"root": root} | keys))
