"""Every kind of fault in a data set is found, once, and nothing is found where nothing is wrong."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch.utils.data import Dataset

from sbp.cli.check_data import CheckDataConfig, DataError, check
from sbp.training.checks import inspection
from sbp.training.checks.findings import IMAGENET_1K, findings, meaning
from sbp.training.checks.inspection import Split, describe, loading_speed, read
from sbp.training.config.images import DataConfig
from sbp.training.data.loading import spread
from tests.conftest import one_of
from tests.training.configs import composed

CLASSES = ("ant", "bee", "cat")
PER_CLASS = {"train": 4, "val": 2}


@pytest.fixture
def root(tmp_path):
    """Three classes of small JPEGs with nothing wrong."""
    number = 0
    for split, count in PER_CLASS.items():
        for name in CLASSES:
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                number += 1
                Image.fromarray(pixels(number)).save(tmp_path / "images" / split / name / f"{i}.jpg")
    return tmp_path / "images"


def pixels(seed, size=(40, 36, 3), dtype=np.uint8):
    return np.random.default_rng(seed).integers(np.iinfo(dtype).max, size=size, dtype=dtype)


def config(root, *overrides):
    small = ("data.num_classes=3", "data.image_size=32", "data.workers=0")
    return composed(f"data.root={root}", *small, *overrides, name="check_data", kind=CheckDataConfig)


def checked(root, *overrides):
    """(exit code, what data_check.json has)."""
    folder = root.parent / "out"
    folder.mkdir(exist_ok=True)
    code = 0
    try:
        check(config(root, *overrides), folder)
    except (SystemExit, DataError) as end:
        code = getattr(end, "code", 1)
    return code, json.loads((folder / "data_check.json").read_text())


def test_nothing_is_found_where_nothing_is_wrong(root):
    code, report = checked(root)
    assert code == 0 and report["findings"] == [] and report["stopped_by"] is None
    train, val = report["splits"]
    assert (train["read"], val["read"]) == (12, 6) and train["complete"] and val["complete"]
    assert train["per_class"] == dict.fromkeys(CLASSES, 4) and train["formats"] == {"JPEG": 12}
    assert report["loading"]["images_per_second"] > 0
    assert (root.parent / "out" / "corrupt_images.txt").read_text() == ""


def converted(mode):
    return lambda file: (
        Image.open(file).convert(mode).save(file, **({} if mode in ("L", "CMYK") else {"format": "PNG"}))
    )


def turned(file):
    image = Image.open(file)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, exif=exif)


def commented(file):
    """A PNG that Pillow refuses with a ValueError."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 2**21, zip=True)
    Image.open(file).save(file, format="PNG", pnginfo=info)


def deep(file):
    Image.fromarray(pixels(0, (40, 36), np.uint16)).save(file, format="PNG")


MISNAMED = ("note", "1 image of another format than the name says")
ON_AN_IMAGE = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:500]), ("error", "1 image that cannot be read;")),
    "empty": (lambda file: file.write_bytes(b""), ("error", "1 image that cannot be read;")),
    "no image": (lambda file: file.write_text("<html>"), ("error", "1 image that cannot be read;")),
    "comment": (commented, ("error", "1 image that cannot be read;")),
    "turned": (turned, ("warning", "1 image with an EXIF orientation")),
    "grey": (converted("L"), ("note", "1 image in grey")),
    "CMYK": (converted("CMYK"), ("note", "1 image in other colours than RGB")),
    "palette": (converted("P"), ("note", "1 image with a palette"), MISNAMED),
    "alpha": (converted("RGBA"), ("warning", "1 image with transparency"), MISNAMED),
    "16 bits": (deep, ("warning", "1 image with more than 8 bits"), MISNAMED),
    "small": (lambda file: Image.open(file).resize((100, 15)).save(file), ("warning", "1 image with a shorter side")),
    "misnamed": (lambda file: Image.open(file).save(file, format="PNG"), MISNAMED),
}


@pytest.mark.parametrize(("fault", "split"), one_of(2, ON_AN_IMAGE, ["train", "val"]))
def test_an_unusual_image_is_found_once(root, fault, split):
    spoil, *expected = ON_AN_IMAGE[fault]
    file = root / split / "bee" / "1.jpg"
    spoil(file)
    code, report = checked(root)
    found = report["findings"]
    assert code == int(expected[0][0] == "error")
    assert [(one["level"], one["split"]) for one in found] == [(level, split) for level, _ in expected]
    for one, (_, text) in zip(found, expected, strict=True):
        assert one["text"].startswith(text)
        assert len(one["items"]) == 1 and one["items"][0].startswith(str(file))
    listed = (root.parent / "out" / "corrupt_images.txt").read_text().splitlines()
    assert listed == (found[0]["items"] if code else [])


def without_images(folder):
    for file in folder.iterdir():
        file.unlink()


def flat(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "0.jpg").touch()


def uneven(folder):
    for i in range(40):
        shutil.copy(folder / "ant" / "0.jpg", folder / "ant" / f"x{i}.jpg")


def with_files(*names):
    return lambda folder: [(folder / name).touch() for name in names]


def with_a_validation_image(folder):
    shutil.copy(folder.parent / "val" / "cat" / "0.jpg", folder / "cat" / "9.jpg")


ON_A_SPLIT = {
    "no folder": (shutil.rmtree, "error", "no folder"),
    "flat": (flat, "error", "has files but no class folders"),
    "empty class": (lambda folder: without_images(folder / "bee"), "error", "1 class without images"),
    "uneven": (uneven, "warning", "the largest class has 44 images, the smallest 4"),
    "left out": (with_files("bee/notes.txt", "ant/README"), "note", "2 files left out"),
    "images left out": (with_files("5.jpg", "ant/6.gif"), "warning", "2 files left out"),
    "in both": (with_a_validation_image, "warning", "1 image identical to images in val"),
}


@pytest.mark.parametrize("fault", ON_A_SPLIT)
def test_a_fault_of_a_split_is_found_once(root, fault):
    spoil, level, text = ON_A_SPLIT[fault]
    spoil(root / "train")
    code, report = checked(root)
    (found,) = report["findings"]
    assert (found["level"], found["split"]) == (level, "train") and text in found["text"]
    assert code == int(level == "error")
    assert report["splits"][1]["read"] == 6  # the other split is read all the same


def test_classes_must_be_as_many_as_configured_and_the_same_in_both_splits(root):
    code, report = checked(root, "data.num_classes=4")
    assert code == 1
    assert [one["text"] for one in report["findings"]] == ["3 classes, but data.num_classes is 4"] * 2
    (root / "val" / "cat").rename(root / "val" / "dog")
    code, report = checked(root)
    (found,) = report["findings"]
    assert code == 1 and found["text"] == "train and val have different classes"
    assert found["items"] == ["cat (in train only)", "dog (in val only)"]


def test_a_hidden_folder_among_the_classes_is_named(root):
    shutil.copytree(root / "train" / "ant", root / "train" / ".ipynb_checkpoints")
    code, report = checked(root)
    said = "4 classes, but data.num_classes is 3; .ipynb_checkpoints is counted among them, a hidden folder"
    assert code == 1 and report["findings"][0]["text"].startswith(said)


def test_too_many_unreadable_images_would_stop_training(root):
    for name in CLASSES:
        (root / "train" / name / "0.jpg").write_bytes(b"")
    _, report = checked(root, "data.max_corrupt_images=2")
    (found,) = report["findings"]
    assert "training stops, as they are more than data.max_corrupt_images=2" in found["text"]
    _, report = checked(root, "data.max_corrupt_images=3")
    assert "another takes the place of each" in report["findings"][0]["text"]


def test_the_findings_do_not_depend_on_loader_processes(root):
    for i, (spoil, *_) in enumerate(ON_AN_IMAGE.values()):
        spoil(root / "train" / CLASSES[i % 3] / f"{i // 3}.jpg")
    code, report = checked(root)
    assert (code, checked(root, "data.workers=2")[1]["findings"]) == (1, report["findings"])
    assert Counter(one["level"] for one in report["findings"]) == {"error": 1, "warning": 4, "note": 4}


def test_a_sample_says_that_it_is_one(root):
    code, report = checked(root, "max_images=5")
    assert code == 0 and [split["read"] for split in report["splits"]] == [5, 5]
    assert [one["text"] for one in report["findings"]] == [
        f"only 5 of {count} images were read; nothing is known of the others" for count in (12, 6)
    ]
    assert list(spread(12, 5)) == [0, 3, 6, 8, 11] and list(spread(3, 5)) == list(spread(3, None)) == [0, 1, 2]
    with pytest.raises(ValueError, match="max_images must be at least 1, got 0"):
        check(config(root, "max_images=0"), root)


def test_a_signal_leaves_what_was_found(root, monkeypatch):
    (root / "val" / "ant" / "0.jpg").write_bytes(b"")
    monkeypatch.setattr(inspection, "_PER_BATCH", 2)
    add = Split.add

    def interrupted(self, *arguments):
        add(self, *arguments)
        if self.name == "train" and self.read == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Split, "add", interrupted)
    code, report = checked(root)
    assert code == 130 and report["stopped_by"] == "SIGINT"
    assert [split["read"] for split in report["splits"]] == [4, 6]
    assert [one["level"] for one in report["findings"]] == ["error", "note"]
    assert str(root / "val" / "ant" / "0.jpg") in (root.parent / "out" / "corrupt_images.txt").read_text()


def test_a_log_gets_lines_in_place_of_a_bar(root, monkeypatch, caplog, capfd):
    caplog.set_level("INFO")
    monkeypatch.setattr(inspection, "LOG_EVERY", 0.0)
    checked(root)
    assert sum("of 12 images, " in line and line.endswith(" left") for line in caplog.messages) == 2
    assert sum("12 images read in " in line for line in caplog.messages) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.long
def test_the_command_reports_and_its_exit_code_tells(root):
    """As a user starts it, with a log file for a terminal."""
    shutil.rmtree(root / "train" / "cat")
    (root / "train" / "bee" / "3.jpg").write_bytes(b"")
    small = ("data.num_classes=3", "data.image_size=32", "data.workers=1", f"run_dir={root.parent / 'out'}")
    command = [sys.executable, "-m", "sbp.cli", "check-data", f"data.root={root}", *small]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root.parent, check=False)
    assert (done.returncode, done.stderr) == (1, "error: 3 of the findings are errors\n") and "\r" not in done.stdout
    for line in (
        "| images            | 8 ",
        "error    train: 2 classes, but data.num_classes is 3",
        "error    train and val have different classes\n             cat (in val only)\n",
        f"error    train: 1 image that cannot be read; in training another takes the place of each (up to "
        f"data.max_corrupt_images=100)\n             {root}/train/bee/3.jpg (not an image)\n",
        f"3 errors, 0 warnings, 0 notes; complete lists in {root.parent}/out/data_check.json",
    ):
        assert done.stdout.count(line) == 1, line
    assert (root.parent / "out" / "check_data.log").read_text() in done.stdout


def test_imagenets_counts_are_said_to_be_met_or_not():
    data = DataConfig(num_classes=1)
    splits = [
        Split(name, "", length=n, read=n, per_class=Counter({0: n})) for name, n in (("train", 1281167), ("val", 49))
    ]
    found = findings(*splits, data, IMAGENET_1K)
    assert [(one.level, one.text) for one in found] == [
        ("warning", "49 images, but 50,000 in ImageNet-1k"),
        ("note", "1,281,167 images, as in ImageNet-1k"),
    ]
    assert findings(*splits, data) == []


class Labelled(Dataset):
    """A data set that has nothing but a length, images and labels; no file."""

    def __init__(self, *labels, same=False):
        self.labels, self.same, self.transform = labels, same, None

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(pixels(0 if self.same else index))), self.labels[index]


def found_in(train, val, num_classes):
    data, digests, splits = DataConfig(num_classes=num_classes, image_size=32, workers=0), {}, []
    for name, dataset in (("val", val), ("train", train)):
        splits.append(describe(name, "", dataset))
        read(splits[-1], dataset, data, None, digests, compare=name == "train")
    return [(one.level, one.split, one.text, one.items) for one in findings(splits[1], splits[0], data)]


def test_labels_and_pixels_are_enough():
    assert found_in(Labelled(0, 1, 2), Labelled(), 3) == [
        ("error", "val", "3 classes without images", ["label 0", "label 1", "label 2"])
    ]
    assert found_in(Labelled(0, 1, 4), Labelled(-1, 0, 1, same=True), 2) == [
        ("error", "train", "labels that are not below 2", ["label 4"]),
        ("error", "val", "1 image without a label", ["image 0"]),
        ("warning", "train", "1 image identical to images in val, which then measures what was learned by heart",
         ["image 0 (is image 2)"]),
    ]  # fmt: skip


class Encoded(Labelled):
    """A data set that decodes by itself, as that of webdataset shards does: transform(decode(content))."""

    decode = None

    def __getitem__(self, index):
        content = io.BytesIO()
        Image.fromarray(pixels(index)).convert("L" if index else "RGB").save(content, format="JPEG")
        return self.transform(self.decode(content.getvalue())), self.labels[index]

    def filename(self, index, absolute=False):
        return f"shard.tar:{index}.png"


def test_images_are_looked_at_before_they_are_decoded():
    found = found_in(Encoded(0, 1), Labelled(0, 1), 2)
    assert [(split, items) for _, split, _, items in found] == [
        ("train", ["shard.tar:1.png (L)"]),
        ("train", ["shard.tar:0.png (JPEG)", "shard.tar:1.png (JPEG)"]),
    ]


def test_timms_data_sets_are_read_from_their_files(root):
    turned(root / "train" / "bee" / "1.jpg")
    (root / "val" / "cat" / "0.jpg").write_bytes(b"")
    (root / "val" / "cat" / "1.jpg").write_bytes(b"")
    code, report = checked(root, "data=timm", "data.name=folder", "data.val_split=val")
    levels = [(one["level"], one["split"], len(one["items"])) for one in report["findings"]]
    assert code == 1 and levels == [("error", "val", 1), ("error", "val", 2), ("warning", "train", 1)]
    assert report["splits"][0]["formats"] == {"JPEG": 12}


def test_classes_of_timms_folders_are_compared(root):
    shutil.rmtree(root / "val" / "ant")
    code, report = checked(root, "data=timm", "data.name=folder", "data.val_split=val")
    assert code == 1 and [(one["split"], one["text"], one["items"]) for one in report["findings"]] == [
        ("val", "2 classes, but data.num_classes is 3", []),
        ("", "train and val have different classes", ["ant (in train only)"]),
    ]


def broken_at_first(image):
    """For image 0, whose pixels are those of seed 0."""
    if np.array_equal(np.asarray(image), pixels(0)):
        raise OSError("no such thing")
    return torch.zeros(3, 4, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loaders_speed_is_measured_and_put_into_words(workers):
    """Also where an image cannot be read."""
    dataset = Labelled(0, 1, 2, 3)
    dataset.transform = broken_at_first
    loading = loading_speed(dataset, seed=0, workers=workers, prefetch=2)
    assert loading.images == 128 and loading.workers == workers and loading.images_per_second > 0
    text = meaning(loading._replace(images_per_second=100, workers=8, cores=4), 360_000)
    assert "data.workers=8 gets 100 augmented images/s" in text and "takes 1:00:00" in text and "only 4 cores" in text
    assert not multiprocessing.active_children()
