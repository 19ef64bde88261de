"""The order of images, their augmentation, and what is said about bad data."""

import io
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.datasets import VisionDataset

from sbp.training.config.batches import plan_batches
from sbp.training.config.images import INTERPOLATIONS, DataConfig
from sbp.training.data import sources
from sbp.training.data.classes import check_labels, check_same_classes
from sbp.training.data.loading import (
    SeededDataset,
    TrainSampler,
    ValidationSampler,
    make_loader,
    readable,
    spread_samples,
)
from sbp.training.data.preprocessing import Normalize, decode, train_transform, validation_transform
from sbp.training.data.sources import Digits, SyntheticImages, build_datasets, build_validation_set, open_datasets
from sbp.training.engine import setup
from sbp.training.runtime import seeding
from tests.conftest import one_of
from tests.training.configs import ROOT, composed, small

CPU = torch.device("cpu")


def image_folders(root, classes=("a", "b"), count=3):
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(256, size=(20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def folder_config(root, *overrides):
    return small("data=imagenet", f"data.root={root}", "data.num_classes=2", "data.workers=0", *overrides)


def order(world_size, micro, *, epoch=0, first_step=0, length=53, batch=12, seed=0):
    """For each step the (pass, index) of its global batch, over all processes."""
    plan = plan_batches(batch, micro, world_size)
    steps = []
    for rank in range(world_size):
        sampler = TrainSampler(length, plan, seed, rank)
        sampler.start_at(epoch, first_step)
        batches = list(sampler)
        assert len(batches) == len(sampler) == sampler.steps_left * plan.accumulation
        for i, one in enumerate(batches):
            step = i // plan.accumulation
            steps += [[] for _ in range(step + 1 - len(steps))]
            steps[step] += one
    return [sorted(step) for step in steps]


def test_a_global_batch_is_the_same_however_it_is_spread():
    alone = order(1, 12)
    assert alone == order(2, 6) == order(2, 3) == order(3, 2)
    assert len(alone) == 4 and len({i for step in alone for _, i in step}) == 48


def test_what_a_pass_leaves_over_comes_first_in_the_next_epoch():
    """53 images in batches of 12: 4 an epoch, so 53 epochs are 48 whole passes."""
    seen = [image for epoch in range(53) for step in order(1, 12, epoch=epoch) for image in step]
    assert sorted(seen) == [(turn, index) for turn in range(48) for index in range(53)]
    first_of_second_epoch = order(1, 12, epoch=1)[0]
    assert [turn for turn, _ in first_of_second_epoch] == [0] * 5 + [1] * 7


def test_an_epoch_goes_on_where_it_was_left_and_the_next_one_differs():
    assert order(2, 3, first_step=3) == order(1, 12)[3:]
    assert order(1, 12, epoch=1) != order(1, 12)
    assert order(1, 12, seed=1) != order(1, 12)


def test_fewer_images_than_a_global_batch_are_refused():
    with pytest.raises(ValueError, match="11 images, fewer than global_batch_size=12"):
        TrainSampler(11, plan_batches(12, None, 1), 0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_counts_every_image_once(world_size):
    samplers = [ValidationSampler(101, 8, rank, world_size) for rank in range(world_size)]
    assert sorted(index for s in samplers for batch in s for _, index in batch) == list(range(101))
    assert all(len(list(s)) == len(s) for s in samplers)


def test_augmentation_depends_on_pass_and_index_not_on_workers():
    config = small("recipe.augment=true", "recipe.auto_augment=rand-m9-mstd0.5-inc1")
    images, _ = build_datasets(config.data, config.recipe)

    def batches(workers, epoch):
        sampler = TrainSampler(len(images), plan_batches(32, None, 1), 0)
        sampler.start_at(epoch, 40)
        return torch.cat([b.images for b in make_loader(images, sampler, seed=0, workers=workers, device=CPU)])

    assert torch.equal(batches(0, 0), batches(2, 0))
    assert not torch.equal(batches(0, 0), batches(0, 1))


def test_the_digits_are_split_by_class_and_share_nothing():
    train, val = Digits("train", None), Digits("val", None)
    assert (len(train), len(val)) == (1437, 360)
    assert min(np.bincount(val.labels)) >= 34
    seen = {pixels.tobytes() for pixels in train.pixels}
    assert not any(pixels.tobytes() in seen for pixels in val.pixels)


def test_digits_reach_the_size_and_range_of_the_config():
    config = small()
    image, label = build_validation_set(config.data)[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 32) and 0 <= label < 10
    network_sees = Normalize(config.data, config.recipe)(image[None])
    assert network_sees.min() == -1 and 0.8 < network_sees.max() <= 1


def test_preprocessing_is_ours_not_the_models():
    published = composed("data=imagenet", "recipe=published")
    text = repr(train_transform(published.data, published.recipe))
    assert "RandAugment" in text and "scale=(0.08, 1.0)" in text and "bicubic" in text
    text = repr(validation_transform(published.data))
    assert "Resize(size=256, interpolation=bicubic" in text and "CenterCrop(size=(224, 224))" in text
    normalize = Normalize(published.data, published.recipe)
    torch.testing.assert_close(normalize.mean.flatten() / 255, torch.tensor([0.485, 0.456, 0.406]))
    assert normalize.random_erasing == 0.25


def test_one_process_downloads_before_the_others_look(monkeypatch):
    asked = []

    def opened(name, **given):
        asked.append((name, given["split"], given["download"]))
        return SyntheticImages(4, 10, 32, None)

    monkeypatch.setattr(sources, "create_dataset", opened)
    name = {"name": "torch/cifar10", "root": "anywhere", "train_split": "train", "val_split": "validation"}
    data = DataConfig("timm", **name, download=True)
    sources.prepare(data)
    assert asked == [("torch/cifar10", "train", True), ("torch/cifar10", "validation", True)]
    sources.prepare(replace(data, download=False))
    assert len(asked) == 2


def test_a_grey_data_set_of_torchvision_becomes_rgb(monkeypatch):
    grey = VisionDataset("anywhere")
    monkeypatch.setattr(sources, "create_dataset", lambda *_, **__: grey)
    config = composed("data=timm", "data.name=torch/mnist", "data.root=anywhere", "recipe=finetune")
    sources.open_datasets(config.data, config.recipe)
    assert grey.transform(Image.new("L", (28, 28))).shape == (3, 224, 224)


def test_what_timm_or_torchvision_cannot_open_is_an_error_with_its_key():
    data = DataConfig("timm", name="torch/cifar10")
    with pytest.raises(ValueError, match=r"data.root is needed: the folder of data.name=torch/cifar10"):
        sources.build_validation_set(data)
    with pytest.raises(ValueError, match=r"data.name=torch/cifar10 in data.root=/nowhere, split val: .*not found"):
        sources.build_validation_set(replace(data, root="/nowhere"))


def test_padded_crops_are_parts_of_the_padded_image_at_its_own_scale():
    """All offsets and both directions occur; low resolution is scaled first."""
    config = composed("data=cifar10", "data.root=anywhere", "recipe=short", "recipe.crop_padding=2")
    pixels = np.random.default_rng(0).integers(1, 256, size=(32, 32, 3), dtype=np.uint8)
    padded = torch.from_numpy(np.pad(pixels, ((2, 2), (2, 2), (0, 0)))).permute(2, 0, 1)
    crops = {
        (top, left, flip): padded[:, top : top + 32, left : left + 32].flip([-1] if flip else [])
        for top in range(5)
        for left in range(5)
        for flip in (False, True)
    }
    transform, seen = train_transform(config.data, config.recipe), set()
    for number in range(200):
        seeding.seed_everything(number)
        out = transform(Image.fromarray(pixels))
        seen |= {where for where, crop in crops.items() if torch.equal(out, crop)} or {number}
    assert seen <= crops.keys() and len(seen) > 40
    config.data.train_image_size = 24
    assert train_transform(config.data, config.recipe)(Image.fromarray(pixels)).shape == (3, 24, 24)
    config.recipe.augment = False
    assert "RandomCrop" not in repr(train_transform(config.data, config.recipe))


def test_remembered_images_are_those_of_the_files(tmp_path, monkeypatch):
    images_of = f"data.root={image_folders(tmp_path)}"
    overrides = ("data=cifar10", images_of, "data.val_split=val", "data.num_classes=2", "recipe=short")
    plain, remembered = (
        open_datasets(config.data, config.recipe)[0]
        for config in (composed(*overrides), composed(*overrides, "data.cache=true"))
    )

    def images(dataset):
        return [SeededDataset(dataset, 0)[turn, i].image for turn in range(2) for i in range(len(dataset))]

    expected = images(plain)
    assert all(map(torch.equal, expected, images(remembered)))
    monkeypatch.setattr(remembered.loader, "load", None)  # which nothing asks for again
    assert all(map(torch.equal, expected, images(remembered)))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_uint8_images_normalised_on_the_device_are_those_of_timms_float_transform(training):
    config = composed("data=imagenet", "recipe=published")
    data, recipe = config.data, config.recipe
    ours = train_transform(data, recipe) if training else validation_transform(data)
    timms = create_transform(
        data.image_size,
        is_training=training,
        color_jitter=recipe.color_jitter if training else 0.4,
        auto_augment=recipe.auto_augment if training else None,
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
        mean=data.mean,
        std=data.std,
    )
    for number, size in enumerate([(300, 400), (500, 260), (224, 224), (30, 20)]):
        pixels = np.random.default_rng(number).integers(256, size=(*size, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((40, 40)).resize(size, Image.Resampling.BICUBIC)
        seeding.seed_everything(number)
        expected = timms(image)
        seeding.seed_everything(number)
        images = torch.stack([ours(image)])
        assert images.dtype == torch.uint8
        for memory_format in (torch.contiguous_format, torch.channels_last):
            seen = Normalize(data, recipe)(images.to(memory_format=memory_format))
            assert seen.dtype == torch.float32 and seen.is_contiguous(memory_format=memory_format)
            torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-6)


def photograph(height=200, width=260):
    pixels = np.random.default_rng(0).integers(256, size=(20, 26, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_what_cannot_be_decoded_is_said_in_the_same_words_each_time():
    jpeg = encoded(photograph())
    for content, message in [
        (jpeg[:2], "not an image"),
        (jpeg[: len(jpeg) // 2], "truncated"),
        (jpeg[:-2], "truncated"),
        (b"", "not an image"),
        (b"no image", "not an image"),
    ]:
        with pytest.raises(OSError, match=message) as first:
            decode(content)
        with pytest.raises(OSError, match=message) as second:
            decode(content)
        assert str(first.value) == str(second.value)


def test_random_erasing_is_of_training_only_and_repeats_with_the_seed():
    config = small("data.image_size=64", "recipe.random_erasing=1", "recipe.augment=true")
    normalize = Normalize(config.data, config.recipe)
    images = torch.randint(256, (20, 3, 64, 64), dtype=torch.uint8)
    seeding.seed_everything(1)
    erased = normalize(images, erase=True)
    area = (erased != normalize(images)).all(dim=1).float().mean(dim=(1, 2))  # erased share of each image
    assert (area > 0.01).all() and (area < 0.35).all() and len(area.unique()) > 10
    seeding.seed_everything(1)
    assert torch.equal(normalize(images, erase=True), erased)
    config.recipe.augment = False
    assert torch.equal(Normalize(config.data, config.recipe)(images, erase=True), normalize(images))


def test_synthetic_images_need_no_disk():
    config = small("data=synthetic", "data.image_size=16", "data.num_classes=3")
    images, _ = build_datasets(config.data, config.recipe)
    a, b = images[5], images[5]
    assert torch.equal(a[0], b[0]) and a[1] == 2 and a[0].shape == (3, 16, 16)


def test_probe_images_come_from_all_over_the_data_set(tmp_path):
    config = folder_config(image_folders(tmp_path))
    images, _ = build_datasets(config.data, config.recipe)
    assert spread_samples(images, 4, seed=0)[1].tolist() == [0, 0, 1, 1]
    assert len(spread_samples(images, 100, seed=0)[1]) == 6


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"no folder {tmp_path}/train"):
        build_datasets(folder_config(tmp_path).data, small().recipe)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda train: None, "train is empty"),
        (lambda train: (train / "0.png").touch(), "has files but no class folders"),
        (lambda train: (train / "a").mkdir(), "one class only"),
        (lambda train: [(train / c).mkdir() for c in "abc"], "3 class folders, but data.num_classes is 2"),
        (lambda train: [(train / c).mkdir() for c in "ab"], "no valid file"),
    ],
    ids=["empty", "flat", "one class", "other classes", "classes without images"],
)
def test_a_folder_that_cannot_be_trained_on_is_refused(tmp_path, spoil, message):
    (tmp_path / "train").mkdir()
    spoil(tmp_path / "train")
    with pytest.raises(ValueError, match=message):
        build_datasets(folder_config(tmp_path).data, small().recipe)


@pytest.mark.parametrize("damage", [b"", b"no image", None], ids=["empty", "no image", "truncated"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(tmp_path, damage, workers):
    bad = image_folders(tmp_path) / "val" / "b" / "1.png"
    bad.write_bytes(bad.read_bytes()[:500] if damage is None else damage)
    images = build_validation_set(folder_config(tmp_path).data)
    loader = make_loader(images, ValidationSampler(len(images), 6), seed=0, workers=workers, device=CPU)
    (batch,) = loader
    assert len(batch.images) == 5
    with pytest.raises(ValueError, match=str(bad)):
        readable(batch)


def test_timm_names_work_and_their_corrupt_images_are_named_too(tmp_path):
    bad = image_folders(tmp_path) / "val" / "a" / "2.png"
    bad.write_bytes(b"no image")
    config = folder_config(tmp_path, "data=timm", "data.name=folder", "data.val_split=val", "data.num_classes=2")
    images = build_validation_set(config.data)
    (batch,) = make_loader(images, ValidationSampler(len(images), 6), seed=0, workers=0, device=CPU)
    with pytest.raises(ValueError, match=str(bad)):
        readable(batch)


def test_splits_of_different_classes_are_refused(tmp_path):
    root = image_folders(tmp_path)
    (root / "val" / "b").rename(root / "val" / "ant")
    with pytest.raises(ValueError, match="have different classes: ant is in one of them only"):
        build_datasets(folder_config(root).data, folder_config(root).recipe)


@pytest.mark.parametrize("timms", [False, True])
def test_a_hidden_folder_among_the_classes_is_named(tmp_path, timms):
    root = image_folders(tmp_path, ("ant", "bee", ".ipynb_checkpoints"))
    config = folder_config(root, *(TIMMS_FOLDER if timms else ()), "data.num_classes=2")
    with pytest.raises(ValueError, match=r"3 class.*, but data.num_classes is 2; .ipynb_checkpoints is counted"):
        build_datasets(config.data, config.recipe)
    shutil.rmtree(root / "val" / ".ipynb_checkpoints")
    config.data.num_classes = 3
    with pytest.raises(ValueError, match=r"2 class|.ipynb_checkpoints is in one of them only; "):
        build_datasets(config.data, config.recipe)
    for file in (root / "train" / ".ipynb_checkpoints").iterdir():
        file.unlink()
    if not timms:  # which takes folders with images only
        with pytest.raises(ValueError, match=r"no valid file.*; .ipynb_checkpoints is counted"):
            build_datasets(config.data, config.recipe)


TIMMS_FOLDER = ("data=timm", "data.name=folder", "data.val_split=val")


@pytest.mark.parametrize("name", ["folder", "torch/image_folder"])
def test_a_class_that_validation_lacks_is_named_before_it_shifts_the_labels(tmp_path, name):
    """Of ant, bee and cat in training, bee would be what training calls ant."""
    root = image_folders(tmp_path, ("ant", "bee", "cat"))
    shutil.rmtree(root / "val" / "ant")
    config = folder_config(root, *TIMMS_FOLDER, f"data.name={name}", "data.num_classes=3")
    with pytest.raises(ValueError, match=r"have different classes: ant is in one of them only"):
        setup.load_images(config, CPU)
    with pytest.raises(ValueError, match=f"{name}, split val, has 2 classes, but data.num_classes is 3"):
        build_validation_set(config.data)
    (root / "val" / "bee").rename(root / "val" / "ant")
    shutil.copytree(root / "val" / "cat", root / "val" / "dog")
    with pytest.raises(ValueError, match=r"split train, and .*, split val, have different classes: bee is in"):
        setup.load_images(config, CPU)


def test_classes_of_inaturalist_and_qmnist_are_known_before_training():
    """Which have them under names of their own."""
    index = [(0, "a.jpg"), (2, "b.jpg"), (5, "c.jpg")]
    inaturalist = SimpleNamespace(all_categories=["ant", "bee", "cat"], index=index, target_type=["full"])
    with pytest.raises(ValueError, match=r"1 of 3 images have labels that are not in 0 to 2 .* with 5"):
        check_labels(inaturalist, "here", 3, training=True)
    inaturalist.index.pop()
    check_labels(inaturalist, "here", 3, training=False)
    with pytest.raises(ValueError, match=r"here has 3 classes, but data.num_classes is 4"):
        check_labels(inaturalist, "here", 4, training=False)
    qmnist = SimpleNamespace(targets=torch.tensor([[7, 1], [2, 1]]), compat=True)
    with pytest.raises(ValueError, match=r"1 of 2 images have labels that are not in 0 to 2"):
        check_labels(qmnist, "here", 3, training=False)


@pytest.mark.parametrize(("policy", "padding"), one_of(3, ["rand-m9-n6-mstd0.5", "augmix", "original"], ["null", "4"]))
def test_every_interpolation_goes_with_every_policy(policy, padding):
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(48, 40, 3), dtype=np.uint8))
    for name in INTERPOLATIONS:
        augment = ("recipe.augment=true", f"recipe.auto_augment={policy}", f"recipe.crop_padding={padding}")
        config = small(*augment, f"data.interpolation={name}")
        transform = train_transform(config.data, config.recipe)
        assert name in repr(transform.transforms[0]).lower()
        for seed in range(12):
            seeding.seed_host(seed)
            assert transform(image).shape == (3, 32, 32)


def test_names_of_classes_in_another_order_are_refused_too():
    check_same_classes(["a", "b"], ["a", "b"], ("one", "other"))
    check_same_classes(["a", "b"], [], ("one", "other"))  # which gives numbers only
    with pytest.raises(ValueError, match="one and other have their classes in different order"):
        check_same_classes(["a", "b"], ["b", "a"], ("one", "other"))


@pytest.mark.parametrize("data", ["digits", "cluttered_digits"])
@pytest.mark.parametrize("count", [7, 11])
def test_generated_digits_are_of_ten_classes(data, count):
    config = small(f"data={data}", f"data.num_classes={count}", "data.train_images=20", "data.val_images=5")
    with pytest.raises(ValueError, match=f"digits, split train, has 10 classes, but data.num_classes is {count}"):
        setup.load_images(config, CPU)
    config.data.num_classes = 10
    assert len(build_validation_set(config.data).classes) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_in_training_another_image_takes_the_place_of_a_corrupt_one(tmp_path, workers):
    """The same one whatever the workers, so batches stay whole; it is drawn anew in each pass."""
    root = image_folders(tmp_path, count=20)
    bad = root / "train" / "b" / "1.png"
    bad.write_bytes(bad.read_bytes()[:300])
    config = folder_config(root, f"data.workers={workers}", "global_batch_size=8", "recipe.epochs=3")
    images = setup.load_images(config, CPU)
    passes = []
    for epoch in range(3):
        images.order.start_at(epoch)
        batches = list(images.train)
        assert all(len(batch.images) == 8 for batch in batches)
        passes.append([name for batch in batches for name in batch.unreadable])
    assert {name for names in passes for name in names} == {passes[0][0]} and str(bad) in passes[0][0]

    sampler = TrainSampler(40, plan_batches(8, None, 1), 0)
    train_set, _ = build_datasets(config.data, config.recipe)
    loaders = [
        make_loader(train_set, sampler, seed=0, workers=count, device=CPU, substitutes=3) for count in (0, workers)
    ]
    for one, other in zip(*loaders, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_the_names_of_a_global_batch_are_those_of_its_images(tmp_path):
    config = folder_config(image_folders(tmp_path), "global_batch_size=4")
    images = setup.load_images(config, CPU)
    names = images.names(1)  # the images that the first epoch leaves over, then the next pass
    assert len(names) == 4 and all(name.startswith(str(tmp_path / "train")) for name in names)
    images.order.start_at(1)
    (batch,) = images.train
    labels = [("a", "b").index(name.split("/")[-2]) for name in names]
    assert batch.labels.tolist() == labels


@pytest.mark.long
def test_a_process_that_fails_does_not_wait_for_its_loaders():
    code = """
import torch
from sbp.training.engine import setup
from tests.training.configs import small
batches = iter(setup.load_images(small("data.workers=1"), torch.device("cpu")).train)
next(batches)
raise RuntimeError("unexpected")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and result.stderr.endswith("RuntimeError: unexpected\n")
