"""Webdataset shards and Parquet files: the same images, order and names of what is bad as for image folders."""

import io
import json
import os
import pickle
import re
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image, features

from sbp.cli.check_data import CheckDataConfig, check
from sbp.training.config.batches import plan_batches
from sbp.training.config.rules import validate
from sbp.training.data import shards
from sbp.training.data.loading import TrainSampler, ValidationSampler, make_loader, readable
from sbp.training.data.naming import path
from sbp.training.data.shards import expand, read_shard
from sbp.training.data.sources import build_datasets, build_validation_set
from sbp.training.engine import setup
from tests.training.configs import composed, small

CPU = torch.device("cpu")
AUGMENTED = ("recipe.augment=true", "recipe.auto_augment=rand-m9-mstd0.5-inc1")


@pytest.fixture(autouse=True)
def no_cache_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(number):
    pixels = np.random.default_rng(number).integers(256, size=(20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shard(path, numbers, label="cls"):
    """Image number i, of class i % 2, is i.png beside i.cls or i.json."""
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            add(tar, f"some/{i:04}.png", png(i))
            if label in ("cls", "both"):
                add(tar, f"some/{i:04}.cls", str(i % 2).encode())
            if label in ("json", "both"):
                add(tar, f"some/{i:04}.json", json.dumps({"label": i % 2, "name": "x"}).encode())


def write_shards(root, train=40, val=101, per_shard=10, label="cls"):
    root.mkdir(exist_ok=True)
    splits = {}
    for split, count in (("train", train), ("validation", val)):
        groups = [range(first, min(first + per_shard, count)) for first in range(0, count, per_shard)]
        names = [f"small-{split}-{number:02}.tar" for number in range(len(groups))]
        for name, numbers in zip(names, groups, strict=True):
            write_shard(root / name, numbers, label)
        splits[split] = {
            **{"name": split, "num_samples": count, "filenames": names},
            "shard_lengths": [len(numbers) for numbers in groups],
        }
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def config(root, *overrides):
    few = ("data=webdataset", f"data.root={root}", "data.num_classes=2", "data.image_size=16", "data.workers=0")
    return validate(small(*few, "global_batch_size=8", *overrides))


def batches(settings, epoch=0, step=0):
    images = setup.load_images(settings, CPU)
    images.order.start_at(epoch, step)
    return [readable(batch) for batch in images.train]


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for (images, labels), (others, other_labels) in zip(one, other, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)


@pytest.mark.parametrize("label", ["cls", "json", "both"])
def test_shards_give_their_images_and_labels(tmp_path, label):
    settings = config(write_shards(tmp_path / "data", label=label), "data.image_size=20")
    train, val = build_datasets(settings.data, settings.recipe)
    assert (len(train), len(val)) == (40, 101)
    train.transform = np.array
    for i in (0, 9, 10, 39):
        image, number = train[i]
        assert number == i % 2
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(png(i)))))
        assert path(train, i) == f"{tmp_path}/data/small-train-{i // 10:02}.tar:some/{i:04}.png"


def test_the_label_that_the_info_file_names_comes_before_the_cls_files(tmp_path):
    root = write_shards(tmp_path / "data", val=4, label="both")
    with tarfile.open(root / "small-validation-00.tar", "w") as tar:
        for i in range(4):
            add(tar, f"{i}.png", png(i))
            add(tar, f"{i}.json", json.dumps({"fine": i, "label": 7}).encode())
            add(tar, f"{i}.cls", str(i % 2).encode())
    settings = config(root)
    images = build_validation_set(settings.data)
    assert [images[i][1] for i in range(4)] == [0, 1, 0, 1]
    info = json.loads((root / "_info.json").read_text())
    info["splits"]["validation"]["alt_label"] = "fine"
    (root / "_info.json").write_text(json.dumps(info))
    settings.data.num_classes = 4
    images = build_validation_set(settings.data)
    assert [images[i][1] for i in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda split: split.pop("filenames"), "no 'filenames'"),
        (lambda split: split["shard_lengths"].pop(), r"split validation has \d+ filenames and \d+ shard_lengths"),
        (lambda split: split.update(filenames=3), "not iterable"),
    ],
)
def test_what_is_wrong_in_timms_description_is_said_with_its_file(tmp_path, change, message):
    root = write_shards(tmp_path / "data")
    info = json.loads((root / "_info.json").read_text())
    change(info["splits"]["validation"])
    (root / "_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=rf"{root}/_info.json is not as timm's: .*{message}"):
        build_validation_set(config(root).data)


def test_patterns_name_shards(tmp_path):
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{0..1}-{1..2}") == ["0-1", "0-2", "1-1", "1-2"]
    root = write_shards(tmp_path / "data")
    (root / "_info.json").unlink()
    split = "data.train_split='small-train-{00..02}.tar'"
    train, val = build_datasets(config(root, split, "data.val_split=small-val*.tar").data, small().recipe)
    assert (len(train), len(val)) == (30, 101)
    by_place = f"data.val_split='{root}/small-val*.tar'"
    assert len(build_validation_set(config(tmp_path, by_place).data)) == 101
    for split, message in [
        ("validation", "no split validation: .* no _info.json .* pattern such as validation-{0000..1023}.tar"),
        ("'small-validation-{00..11}.tar'", "no shard .*small-validation-11.tar"),
        ("other-*.tar", r"no shard .*other-\*.tar"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_validation_set(config(root, f"data.val_split={split}").data)


@pytest.mark.parametrize("shuffle", ["full", "shards"])
def test_a_run_on_shards_goes_on_within_an_epoch_whatever_its_workers(tmp_path, shuffle):
    settings = config(write_shards(tmp_path / "data", val=4), *AUGMENTED, f"data.shuffle={shuffle}")
    whole = batches(settings)
    assert_same(batches(settings, step=2), whole[2:])
    settings.data.workers = 1
    one = batches(settings)
    settings.data.workers = 2
    assert_same(batches(settings), one)
    assert_same(one, whole)
    assert not torch.equal(batches(settings, epoch=1)[0][0], whole[0][0])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_images_of_shards_are_evaluated_once_each_on_any_number_of_processes(tmp_path, world_size):
    images = build_validation_set(config(write_shards(tmp_path / "data")).data)
    images.transform = np.array
    seen = []
    for rank in range(world_size):
        order = ValidationSampler(len(images), 8, rank, world_size)
        seen += [
            one.numpy().tobytes()
            for batch in make_loader(images, order, seed=0, workers=0, device=CPU)
            for one in batch.images
        ]
    expected = [np.asarray(Image.open(io.BytesIO(png(i)))).tobytes() for i in range(101)]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_pass_reads_a_few_shards_at_a_time_each_image_once(world_size):
    counts = [10] * 40 + [7] * 3
    samplers = [TrainSampler(421, plan_batches(20, None, world_size), 0, rank, counts) for rank in range(world_size)]
    for epoch in range(2):
        for sampler in samplers:
            sampler.start_at(epoch)
        seen = [image for steps in zip(*samplers, strict=True) for batch in steps for image in batch]
        order = [index for turn, index in seen if turn == epoch]
        assert len(order) == len(set(order))
        shard = np.repeat(np.arange(43), counts)[order]
        first = shard[: 16 * 7]  # less than the first 16 shards have
        assert len(set(first)) == 16 and len(set(first[:32])) > 8
        assert (np.diff(order) != 1).mean() > 0.9
    assert samplers[0].global_batch(0) != TrainSampler(421, plan_batches(20, None, 1), 1, 0, counts).global_batch(0)


def test_a_corrupt_image_in_a_shard_is_named(tmp_path):
    root = write_shards(tmp_path / "data")
    images = build_validation_set(config(root).data)
    shard = root / "small-validation-01.tar"
    content = bytearray(shard.read_bytes())
    offset = read_shard(shard).images[3][0]
    content[offset : offset + 8] = bytes(8)
    stat = shard.stat()
    shard.write_bytes(content)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (batch,) = make_loader(images, ValidationSampler(len(images), 101), seed=0, workers=0, device=CPU)
    assert len(batch.images) == 100
    with pytest.raises(ValueError, match=rf"{shard}:some/0013.png \(not an image\)"):
        readable(batch)
    shard.unlink()
    (batch,) = make_loader(images, ValidationSampler(len(images), 101), seed=0, workers=0, device=CPU)
    with pytest.raises(ValueError, match=rf"cannot read 10 of the images: {shard}:byte \d+ \(.*No such file"):
        readable(batch)


def test_the_index_is_read_again_only_when_a_shard_has_changed(tmp_path, monkeypatch):
    settings = config(write_shards(tmp_path / "data", val=4))
    calls = []
    monkeypatch.setattr(shards, "read_shard", lambda *args: calls.append(args[0].name) or read_shard(*args))
    build_validation_set(settings.data)
    assert calls == ["small-validation-00.tar"]
    build_validation_set(settings.data)
    assert len(calls) == 1
    (stored,) = (tmp_path / "data").glob(".sbp-index-*.npz")
    stored.write_bytes(stored.read_bytes()[:200])
    build_validation_set(settings.data)
    assert len(calls) == 2
    time.sleep(0.01)
    write_shard(tmp_path / "data" / "small-validation-00.tar", [5, 8, 7, 6])
    assert build_validation_set(settings.data)[0][1] == 1
    assert len(calls) == 3


def test_the_index_goes_to_the_users_cache_where_the_folder_is_read_only(tmp_path, monkeypatch):
    settings = config(write_shards(tmp_path / "data", val=4))
    replace = os.replace

    def refusing(source, target):  # permissions do not bind root
        if target.parent == tmp_path / "data":
            raise OSError("read-only")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    build_validation_set(settings.data)
    assert len(list((tmp_path / "cache" / "sbp").iterdir())) == 1
    assert not list((tmp_path / "data").glob(".sbp*"))
    monkeypatch.setattr(shards, "read_shard", None)
    assert len(build_validation_set(settings.data)) == 4


def end_in_the_middle(shard, where):
    shard.write_bytes(shard.read_bytes()[:where])


def without_labels(shard):
    with tarfile.open(shard, "w") as tar:
        add(tar, "0000.png", png(0))


def without_images(shard):
    with tarfile.open(shard, "w") as tar:
        add(tar, "0000.cls", b"0")


def compressed(shard):
    with tarfile.open(shard, "w:gz") as tar:
        add(tar, "0000.png", png(0))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda shard: end_in_the_middle(shard, 900), "cannot read .*00.tar as an uncompressed tar file"),
        (lambda shard: end_in_the_middle(shard, 512 * 4), "cannot read .*00.tar as an uncompressed tar file"),
        (lambda shard: end_in_the_middle(shard, read_shard(shard).images[1][0] - 512), "it ends in the middle"),
        (lambda shard: end_in_the_middle(shard, read_shard(shard).images[1][0] - 100), "it ends in the middle"),
        (lambda shard: shard.write_bytes(b""), "cannot read .*00.tar"),
        (compressed, "cannot read .*00.tar as an uncompressed tar file"),
        (without_labels, "00.tar: 0000 has no label"),
        (without_images, "00.tar has no image"),
        (lambda shard: write_shard(shard, range(3)), "00.tar has 3 images, but 4 according to"),
        (
            lambda shard: write_shard(shard, [0, 2, 4, 6]),
            "1 classes with numbers from 0 to 0, but data.num_classes is 2",
        ),
    ],
    ids=["data", "between", "header", "in header", "empty", "compressed", "no labels", "no images", "few", "classes"],
)
def test_shards_that_cannot_be_trained_on_are_refused(tmp_path, spoil, message):
    settings = config(write_shards(tmp_path / "data", val=4))
    spoil(tmp_path / "data" / "small-validation-00.tar")
    with pytest.raises(ValueError, match=message):
        build_validation_set(settings.data)


def shard_of(root, members):
    """Validation shards of one tar file with these members: name -> content, or the name that a link points to."""
    write_shards(root, val=4)
    info = json.loads((root / "_info.json").read_text())
    del info["splits"]["validation"]["shard_lengths"]
    (root / "_info.json").write_text(json.dumps(info))
    with tarfile.open(root / "small-validation-00.tar", "w") as tar:
        for name, content in members:
            if isinstance(content, bytes):
                add(tar, name, content)
                continue
            link = tarfile.TarInfo(name)
            link.type, link.linkname = content
            tar.addfile(link)
    return config(root)


def shown(settings):
    """(pixels, label) of each image."""
    images = build_validation_set(settings.data)
    images.transform = np.asarray
    return images, [images[i] for i in range(len(images))]


def encoded(number, kind):
    file = io.BytesIO()
    Image.open(io.BytesIO(png(number))).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def test_a_key_may_have_dots(tmp_path):
    members = labelled(range(6), "in.a/scan_v{}.5")
    images, found = shown(shard_of(tmp_path / "data", members))
    assert [label for _, label in found] == [0, 1] * 3 and images.unused == ""
    assert all(np.array_equal(pixels, Image.open(io.BytesIO(png(i)))) for i, (pixels, _) in enumerate(found))
    assert path(images, 3).endswith(":in.a/scan_v3.5.png")


@pytest.mark.parametrize("kind", ["bmp", "tif", "TIFF", "gif", "avif", "webp", "ppm", "jp2"])
def test_images_of_all_kinds_are_used(tmp_path, kind):
    name = {"tif": "TIFF", "jp2": "JPEG2000"}.get(kind, kind.upper())
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    ends = lambda i: ((f".{kind}", encoded(i, name)), (".cls", str(i % 2).encode()))  # noqa: E731
    images, found = shown(shard_of(tmp_path / "data", [(f"{i}{end}", one) for i in range(4) for end, one in ends(i)]))
    assert [label for _, label in found] == [0, 1, 0, 1] and images.unused == ""
    assert all(pixels.shape == (20, 24, 3) for pixels, _ in found)


def labelled(numbers, name="{}"):
    return [
        (name.format(i) + end, one) for i in numbers for end, one in ((".png", png(i)), (".cls", str(i % 2).encode()))
    ]


def lost(count):
    return [(f"lost{i}{end}", one) for i in range(count) for end, one in ((".heic", b"x"), (".cls", b"0"))]


LOST = (
    "{0} files look like images and are not used, such as .*:lost0.heic, and "
    "{0} files look like labels and are not used, such as .*:lost0.cls"
)


def test_what_looks_like_an_image_and_is_not_used_is_counted(tmp_path, caplog):
    """Also where the index was written before; half of all is an error."""
    settings = shard_of(tmp_path / "data", labelled(range(8)) + lost(3))
    for _ in range(2):
        caplog.clear()
        images, found = shown(settings)
        assert len(found) == 8 and re.search(LOST.format(3), images.unused)
        assert images.unused in caplog.text
    with pytest.raises(ValueError, match=LOST.format(8) + "; 8 images are used"):
        shown(shard_of(tmp_path / "other", labelled(range(8)) + lost(8)))


def test_the_check_of_data_says_so_too(tmp_path, caplog):
    caplog.set_level("INFO")
    root = tmp_path / "data"
    shard_of(root, labelled(range(8)) + lost(3))
    few = ("data=webdataset", f"data.root={root}", "data.num_classes=2", "data.image_size=16", "data.workers=0")
    check(composed(*few, name="check_data", kind=CheckDataConfig), tmp_path)
    report = json.loads((tmp_path / "data_check.json").read_text())
    (text,) = [one["text"] for one in report["findings"] if (one["level"], one["split"]) == ("warning", "validation")]
    assert re.search(LOST.format(3), text)
    shard_of(root, labelled(range(8)) + lost(8))
    with pytest.raises(ValueError, match=LOST.format(8)):
        check(composed(*few, name="check_data", kind=CheckDataConfig), tmp_path)


def test_of_a_key_that_stands_twice_the_last_image_has_its_own_label(tmp_path):
    other = [("1.png", png(7)), ("1.cls", b"0")]
    images, found = shown(shard_of(tmp_path / "data", labelled(range(4)) + other))
    assert [label for _, label in found] == [0, 0, 0, 1]
    assert np.array_equal(found[1][0], Image.open(io.BytesIO(png(7))))
    assert "1 files look like images and are not used, such as " in images.unused and ":1.png" in images.unused
    with pytest.raises(ValueError, match=r"1\.cls stands there 2 times, with several labels"):
        shown(shard_of(tmp_path / "other", labelled(range(4)) + other[1:]))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE], ids=["hard link", "symbolic link"])
def test_a_link_is_the_image_that_it_points_to(tmp_path, kind):
    to = (lambda name: name) if kind == tarfile.SYMTYPE else "some/{}".format
    links = [("some/8.png", (kind, to("3.png"))), ("some/8.cls", (kind, to("2.cls")))]
    images, found = shown(shard_of(tmp_path / "data", labelled(range(4), "some/{}") + links))
    assert [label for _, label in found] == [0, 1, 0, 1, 0] and images.unused == ""
    assert np.array_equal(found[4][0], found[3][0])
    broken = [("9.png", (kind, "nowhere.png")), ("9.cls", b"0")]
    images, found = shown(shard_of(tmp_path / "other", labelled(range(4)) + broken))
    assert len(found) == 4 and "such as " in images.unused and ":9.png" in images.unused


def test_what_belongs_to_an_image_is_not_taken_for_a_lost_one(tmp_path):
    """Masks, further facts, pictures of another kind under the same key, and what macOS puts beside each file."""
    beside = [("{}.mask.png", png(9)), ("{}.meta.json", b"{}"), ("{}.json", b"[1]"), ("{}.gif", b"")]
    beside += [("._{}.png", b"x"), ("._{}.cls", b"x")]
    members = [(name.format(i), content) for i in range(4) for name, content in beside]
    images, found = shown(shard_of(tmp_path / "data", members + labelled(range(4))))
    assert [label for _, label in found] == [0, 1, 0, 1] and images.unused == ""
    assert all(np.array_equal(pixels, Image.open(io.BytesIO(png(i)))) for i, (pixels, _) in enumerate(found))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("1.cls", b"bee", "1.cls: .*'bee'"), ("1.json", b'{"label": 0.5}', "1.json: 0.5 is no whole number")],
)
def test_a_label_that_is_no_number_is_named(tmp_path, name, content, message):
    members = [("1.png", png(1)), (name, content)]
    with pytest.raises(ValueError, match=message):
        shown(shard_of(tmp_path / "data", members))


def test_shuffling_by_shards_needs_shards():
    with pytest.raises(ValueError, match=r"data\.shuffle=shards needs data\.source=webdataset, got digits"):
        validate(small("data.shuffle=shards"))


@pytest.mark.parametrize(
    ("name", "instead"),
    [("wds/imagenet", "data=webdataset"), ("hfids/some/name", "data.name=hfds/"), ("TFDS/imagenet2012", "convert it")],
)
def test_streams_are_refused_with_what_to_do_instead(name, instead):
    settings = small("data=timm", f"data.name={name}", "data.root=x")
    with pytest.raises(ValueError, match=f"{name} is a stream, .*{instead}"):
        build_validation_set(settings.data)


def parquet_folder(root, bad=None, labels=None, instead=None):
    """101 images in two files for each split, as a column of bytes, with integer labels.

    instead: image -> the cell in its place. labels: those of a split that are not as in the others: split -> image ->
    label.
    """
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    pytest.importorskip("timm", "1.0.31")  # whose reader takes labels without names
    root.mkdir()
    for split in ("train", "validation"):
        for part, numbers in enumerate((range(50), range(50, 101))):
            images = [{"bytes": b"no image" if i == bad else png(i), "path": f"{i:04}.png"} for i in numbers]
            images = [(instead or {}).get(i, image) for i, image in zip(numbers, images, strict=True)]
            own = (labels or {}).get(split, {})
            table = pyarrow.table({"image": images, "label": [own.get(i, i % 2) for i in numbers]})
            parquet.write_table(table, root / f"{split}-{part:05}-of-00002.parquet")
    return root


def parquet_config(folder, cache, *overrides):
    name = ("data=timm", f"data.name=hfds/{folder}", f"data.root={cache}", "data.num_classes=2", "data.image_size=16")
    return small(*name, "data.workers=0", "global_batch_size=8", *overrides)


def test_parquet_files_are_read_by_timms_name_and_go_on_within_an_epoch(tmp_path):
    settings = parquet_config(parquet_folder(tmp_path / "data"), tmp_path / "cache", *AUGMENTED)
    whole = batches(settings)
    assert len(whole) == 12
    assert_same(batches(settings, step=5), whole[5:])
    settings.data.workers = 2
    assert_same(batches(settings), whole)
    images = build_validation_set(settings.data)
    assert [len(range(rank, len(images), 2)) for rank in range(2)] == [51, 50]
    images.transform = images.transform.transforms[0]  # decoding alone
    assert all(np.array_equal(np.asarray(images[i][0]), Image.open(io.BytesIO(png(i)))) for i in (0, 50, 100))
    assert [images[i][1] for i in (0, 51, 100)] == [0, 1, 0]


def test_a_corrupt_image_in_a_parquet_file_is_named(tmp_path):
    settings = parquet_config(parquet_folder(tmp_path / "data", bad=60), tmp_path / "cache")
    images = build_validation_set(settings.data)
    (batch,) = make_loader(images, ValidationSampler(len(images), 101), seed=0, workers=0, device=CPU)
    assert len(batch.images) == 100
    with pytest.raises(ValueError, match=r"image 60 \(0060.png\) \(not an image\)"):
        readable(batch)


def test_a_row_without_an_image_is_named_too(tmp_path):
    nulls = {60: None, 61: {"bytes": None, "path": None}, 62: {"bytes": b"", "path": ""}}
    settings = parquet_config(parquet_folder(tmp_path / "data", instead=nulls), tmp_path / "cache")
    images = build_validation_set(settings.data)
    (batch,) = make_loader(images, ValidationSampler(len(images), 101), seed=0, workers=0, device=CPU)
    assert len(batch.images) == 98
    with pytest.raises(ValueError, match="cannot read 3 of the images: image 60; image 61; image 62"):
        readable(batch)
    assert pickle.loads(pickle.dumps(images))[0][1] == images[0][1]  # as it goes to loader processes


WORDS = {i: ("ant", "bee")[i % 2] for i in range(101)}
OUTSIDE = (
    r"split {}: 1 of 101 images have labels that are not in 0 to 1 .*; the first one is image 60 \(0060.png\) with"
)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"train": {60: 7}}, OUTSIDE.format("train,") + " 7"),
        ({"validation": {60: 2}}, OUTSIDE.format("validation,") + " 2"),
        ({"validation": {60: -1}}, OUTSIDE.format("validation,") + " -1"),
        ({"train": dict.fromkeys(range(101), 0)}, "split train, has 1 classes with numbers from 0 to 0, but"),
        ({"train": {60: None}}, r"split train,: image 60 \(0060.png\) has the label nan, which is no integer"),
        (dict.fromkeys(("train", "validation"), WORDS), r"split train,: image 0 .* has the label ant, which is no"),
    ],
    ids=["training", "validation", "no label", "one class", "null", "text"],
)
def test_labels_in_parquet_files_are_checked_before_anything_is_trained(tmp_path, labels, message):
    settings = parquet_config(parquet_folder(tmp_path / "data", labels=labels), tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        setup.load_images(settings, CPU)


def test_a_validation_split_of_parquet_files_may_lack_a_class_as_its_labels_are_numbers(tmp_path):
    root = parquet_folder(tmp_path / "data", labels={"validation": dict.fromkeys(range(101), 1)})
    settings = parquet_config(root, tmp_path / "cache")
    images = setup.load_images(settings, CPU)
    assert {int(label) for batch in images.validation for label in batch.labels} == {1}
