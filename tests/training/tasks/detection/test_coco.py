"""Annotation files: what is learned from, what is scored with, and what is said about bad ones."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sbp.cli.check_data import CheckDataConfig, DataError, check
from sbp.training.config.batches import plan_batches
from sbp.training.config.recipe import RecipeConfig
from sbp.training.data.loading import TrainSampler, ValidationSampler, make_loader, readable, spread_samples
from sbp.training.data.naming import path
from sbp.training.data.preprocessing import UPRIGHT
from sbp.training.tasks.detection.annotations import run_lengths
from sbp.training.tasks.detection.augmentation import collate
from sbp.training.tasks.detection.coco import CocoImages, Packed
from sbp.training.tasks.detection.datasets import build_datasets, build_validation_set
from tests.training.configs import composed
from tests.training.tasks.detection.coco_files import (
    CATEGORIES,
    SIZES,
    annotation,
    coco_folder,
    coco_settings,
    compressed,
    content,
    disc,
    plain,
    rectangle,
    uncompressed,
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


def test_background_is_taken_where_it_is_asked_for(tmp_path):
    """Of the images without objects to learn from, 13 has a crowd; what goes through all transforms is 14."""
    root = coco_folder(tmp_path)
    recipe = RecipeConfig(crop_share=0.5, crop_short_sides=[40], crop_sides=[24, 36], short_sides=[32, 48, 64])
    train, val = build_datasets(coco_settings(root, background=True), recipe)
    assert [train[i][1]["image_id"] for i in range(len(train))] == [10, 11, 12, 14] and len(val) == 5
    sampler = TrainSampler(len(train), plan_batches(4, None, 1), 0)
    for epoch in range(4):
        sampler.start_at(epoch)
        (batch,) = loader(train, sampler)
        (target,) = [one for one in batch.labels if one["image_id"] == 14]
        assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
        assert target["labels"].shape == (0,) and target["labels"].dtype == torch.int64
        assert target["masks"].shape == (0, *target["size"]) and target["masks"].dtype == torch.uint8
    rows = [row for row in content()["annotations"] if row["iscrowd"]]
    with pytest.raises(ValueError, match="has no images with objects to train on"):
        build_datasets(coco_settings(coco_folder(tmp_path / "none", annotations=rows), background=True), recipe)


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
        (changed("images", "id", 1.5), "the ids of the images must be whole numbers, or all be texts"),
        (changed("categories", "id", "3"), "the ids of the categories must be whole numbers, or all be texts"),
        (changed("annotations", "image_id", [10]), r"an annotation has image_id \[10\], which is not among the images"),
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


RLE = compressed(disc(SIZES[0], 40, 20, 10))
LIST = uncompressed(disc(SIZES[0], 40, 20, 10))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("segmentation", RLE | {"size": [60, 40]}, r"run lengths have the size \[60, 40\], and its image \[40, 60\]"),
        ("segmentation", LIST | {"size": [40, 61]}, r"run lengths have the size \[40, 61\], and its image \[40, 60\]"),
        ("segmentation", RLE | {"size": [40.0, 60]}, r"run lengths have the size \[40.0, 60\]"),
        ("segmentation", RLE | {"counts": RLE["counts"][:-3]}, r"add up to \d+ pixels, and its image has 2400"),
        ("segmentation", LIST | {"counts": LIST["counts"][:-1]}, r"add up to \d+ pixels, and its image has 2400"),
        ("segmentation", LIST | {"counts": [10**12]}, "add up to 1000000000000 pixels, and its image has 2400"),
        ("segmentation", LIST | {"counts": [-1, 2401]}, r'"counts" that are none: \[-1, 2401\]'),
        ("segmentation", LIST | {"counts": [2400.5]}, '"counts" that are none'),
        ("segmentation", RLE | {"counts": "\u00e9"}, '"counts" that are none'),
        ("segmentation", RLE | {"counts": "o"}, '"counts" that are none: "o"'),
        ("segmentation", RLE | {"counts": ""}, '"counts" that are none: ""'),
        ("segmentation", {"size": [40, 60]}, 'its run lengths must have "size" and "counts"'),
        ("segmentation", [5, 4, 25, 4, 25, 14], r'its "segmentation" is \[5, 4, .*must be a list of polygons'),
        ("segmentation", [[5, 4, 25, 4, 25, 14, 9]], "must be a list of polygons, each a list x, y"),
        ("segmentation", [[5, 4, 25, 4, 25, "14"]], "must be a list of polygons, each a list x, y"),
        ("segmentation", [[5, 4, 25, 4, 25, float("nan")]], "must be a list of polygons, each a list x, y"),
        ("segmentation", "polygon", "must be a list of polygons, each a list x, y"),
        ("bbox", None, 'its "bbox" is null, and must be x, y, width, height'),
        ("bbox", [1, 2, 3], r'its "bbox" is \[1, 2, 3\], and must be x, y, width, height'),
        ("bbox", [1, 2, 3, float("inf")], 'its "bbox" is .*, and must be x, y, width, height'),
        ("bbox", [30, 2, -3, 5], 'its "bbox" is .*, and width and height must not be negative'),
        ("segmentation", [[5, 4, 25, -1e10, 25, 14]], 'its "segmentation" has the coordinate 1e[+]10, far from any'),
        ("area", "40", 'its "area" is "40", and must be a number'),
        ("iscrowd", "no", 'its "iscrowd" is "no", and must be 0 or 1'),
    ],
)
def test_an_annotation_that_is_not_as_cocos_is_named_at_the_start(tmp_path, key, value, message, training):
    root = coco_folder(tmp_path)
    file = root / "annotations" / f"instances_{'train' if training else 'val'}.json"
    whole = content()
    whole["annotations"][1] |= {"id": 77, key: value}
    file.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=f"{file}: annotation 77: .*{message}"):
        opened(root, training)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("height", "40", '"height" is "40", and must be a whole number of pixels'),
        ("height", None, '"height" is null, and must be a whole number of pixels'),
        ("width", 0, '"width" is 0, and must be a whole number of pixels'),
        ("file_name", None, '"file_name" is null, and no text'),
    ],
)
def test_an_image_that_is_not_as_cocos_is_named(tmp_path, key, value, message):
    with pytest.raises(ValueError, match=f"instances_train.json: image 11: its {message}"):
        opened(coco_folder(tmp_path, **changed("images", key, value)))


@pytest.mark.parametrize("name", [None, 3, ["cat"]])
def test_a_category_without_a_name_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=r'category \S+: its "name" is .*, and no text'):
        opened(coco_folder(tmp_path, **changed("categories", "name", name)))


def test_categories_of_which_only_one_file_numbers_them_differ(tmp_path):
    root = coco_folder(tmp_path)
    whole = content()
    whole["categories"] = [row | {"id": str(row["id"])} for row in whole["categories"]]
    whole["annotations"] = [row | {"category_id": str(row["category_id"])} for row in whole["annotations"]]
    (root / "annotations" / "instances_train.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="have different categories"):
        plain(coco_settings(root))


def test_how_many_are_wrong_is_said(tmp_path):
    rows = [row | {"bbox": None} for row in content()["annotations"]]
    with pytest.raises(ValueError, match=r"annotation 0: .* \(10 annotations have such faults\)"):
        opened(coco_folder(tmp_path, annotations=rows))


def test_null_for_area_and_iscrowd_counts_as_missing(tmp_path):
    whole = content()
    for row in whole["annotations"]:
        if not row["iscrowd"]:
            row |= {"iscrowd": None, "area": None}
    root = coco_folder(tmp_path, both=whole)
    train, val = opened(root), opened(root, training=False)
    assert [train[i][1]["image_id"] for i in range(len(train))] == [10, 11, 12]
    truth = val.ground_truth()
    assert truth.anns[1]["area"] == 200 and truth.anns[1]["iscrowd"] == 0
    assert sum(row["iscrowd"] for row in truth.anns.values()) == 2


def test_run_lengths_are_read_from_both_forms():
    """Those that pycocotools writes, of masks with short runs, long ones and none."""
    generator = np.random.default_rng(0)
    masks = [disc((50, 70), 30, 20, 15), np.zeros((9, 7), np.uint8), np.ones((9, 7), np.uint8)]
    masks += [(generator.random((40, 300)) < share).astype(np.uint8) for share in (0.001, 0.1, 0.5, 0.99)]
    masks += [np.zeros((2000, 3000), np.uint8)]
    for mask in masks:
        expected = uncompressed(mask)["counts"]
        assert run_lengths(expected).tolist() == expected
        assert run_lengths(compressed(mask)["counts"]).tolist() == expected


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


def turned_image(folder, turn, annotated, side=30):
    """A set of one training image, 30 px high and `side` wide when it is upright, stored so that EXIF turns it upright.

    annotated: the (height, width) that the annotation file gives it.
    """
    root = coco_folder(folder)
    upright = Image.fromarray(np.random.default_rng(0).integers(256, size=(30, side, 3), dtype=np.uint8))
    undo = {6: 8, 8: 6}.get(turn, turn)  # quarter turns; the others undo themselves
    stored = upright if turn == 1 else upright.transpose(UPRIGHT[undo])
    exif = Image.Exif()
    exif[0x0112] = turn
    stored.save(root / "images" / "train" / "10.png", exif=exif)
    assert np.array_equal(ImageOps.exif_transpose(Image.open(root / "images" / "train" / "10.png")), upright)
    whole = content()
    whole["images"] = [whole["images"][0] | {"height": annotated[0], "width": annotated[1]}]
    whole["annotations"] = [annotation(10, 7, (5, 4, 9, 5), rectangle(5, 4, 9, 5))]
    (root / "annotations" / "instances_train.json").write_text(json.dumps(whole))
    return opened(root), np.asarray(upright), np.asarray(stored)


@pytest.mark.parametrize("side", [20, 30], ids=["lying or standing", "square"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_an_image_is_turned_as_exif_says_where_it_is_annotated_upright(tmp_path, caplog, turn, side):
    caplog.set_level("INFO")
    images, upright, _ = turned_image(tmp_path, turn, (30, side), side)
    image, target = images[0]
    assert np.array_equal(image, upright) and target["masks"].shape == (1, 30, side)
    images[0]
    assert caplog.text.count(f"10.png has the EXIF orientation {turn}: turned upright") == (turn != 1)


@pytest.mark.parametrize("turn", [5, 6, 7, 8])
def test_an_image_stays_as_stored_where_it_is_annotated_so(tmp_path, caplog, turn):
    caplog.set_level("INFO")
    images, _, stored = turned_image(tmp_path, turn, (20, 30), 20)
    assert np.array_equal(images[0][0], stored)
    assert f"10.png has the EXIF orientation {turn}: left as stored" in caplog.text


def test_a_size_that_neither_way_has_is_said_with_the_orientation(tmp_path):
    images, *_ = turned_image(tmp_path, 6, (21, 30), 20)
    with pytest.raises(OSError, match=r"30 x 20 pixels, with the EXIF orientation 6, in .*json 30 x 21"):
        images[0]


def checked(root, folder):
    """(exit code, what data_check.json has)."""
    splits = ("data.train_split=images/train", "data.val_split=images/val")
    sizes = ("data.num_classes=3", "data.image_size=48", "data.max_size=96", "data.workers=0")
    short = ("recipe.short_sides=[48]", "recipe.crop_share=0")
    given = ("task=detection", "data=coco", "recipe=detection", f"data.root={root}", *splits, *sizes, *short)
    code = 0
    try:
        check(composed(*given, name="check_data", kind=CheckDataConfig), folder)
    except DataError:
        code = 1
    return code, json.loads((folder / "data_check.json").read_text())


def test_the_check_of_data_reads_images_with_objects(tmp_path, caplog):
    caplog.set_level("INFO")
    root = coco_folder(tmp_path / "data")
    for number in range(10, 15):
        file = root / "images" / "train" / f"{number}.png"
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)  # not that of validation
    code, report = checked(root, tmp_path)
    assert code == 0 and report["findings"] == []
    train, val = report["splits"]
    assert (train["read"], val["read"]) == (3, 5) and train["per_class"] == {"cat": 5, "dog": 2, "hat": 1}
    assert "| objects in a class | 1 to 5" in caplog.text

    exif = Image.Exif()
    exif[0x0112] = 3
    train_images = root / "images" / "train"
    Image.open(train_images / "10.png").save(train_images / "10.png", exif=exif)
    Image.open(train_images / "11.png").rotate(90, expand=True).save(train_images / "11.png")
    exif[0x0112] = 8
    lying = root / "images" / "val" / "13.png"
    Image.open(lying).save(lying, exif=exif)
    whole = content()
    whole["annotations"] = [row for row in whole["annotations"] if row["category_id"] != 90]
    (root / "annotations" / "instances_val.json").write_text(json.dumps(whole))
    code, report = checked(root, tmp_path)
    assert code == 1
    assert [(one["level"], one["split"], one["text"][:23]) for one in report["findings"]] == [
        ("error", "images/train", "1 image that cannot be "),
        ("warning", "images/val", "1 class without objects"),
        ("note", "images/train", "1 image with an EXIF or"),
        ("note", "images/val", "1 image with an EXIF or"),
    ]
    error, _, turned, stored = report["findings"]
    assert "11.png (60 x 40 pixels, in instances_train.json 40 x 60)" in error["items"][0]
    assert "turned upright" in turned["text"] and "left as stored" in stored["text"]


def test_the_check_of_data_has_nothing_to_do_for_generated_shapes(tmp_path):
    given = ("task=detection", "data=shapes", "recipe=detection", "recipe.short_sides=null")
    with pytest.raises(ValueError, match=r"data\.source must not be shapes here"):
        check(composed(*given, name="check_data", kind=CheckDataConfig), tmp_path)
