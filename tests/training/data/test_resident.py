"""Images that lie on the device."""

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import crop, hflip, pad

from sbp.training.config.batches import plan_batches
from sbp.training.config.rules import validate
from sbp.training.data import resident
from sbp.training.data.loading import TrainSampler, ValidationSampler
from sbp.training.data.preprocessing import validation_transform
from sbp.training.data.resident import Crops, cropped, resident_loader
from sbp.training.data.sources import SyntheticImages, build_datasets
from sbp.training.engine import setup
from tests.training.configs import small
from tests.training.data.test_loading import folder_config, image_folders

CPU = torch.device("cpu")
AT_16 = ("data.image_size=16", "global_batch_size=4")
ON_DEVICE = (*AT_16, "data.on_device=true", "recipe.crop_padding=2")


def pixels(count, size=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def training_loader(length=10, batch=4, seed=0, rank=0, world_size=1):
    data = SyntheticImages(length, 2, 8, validation_transform(small("data.image_size=8").data))
    sampler = TrainSampler(length, plan_batches(batch, None, world_size), seed, rank)
    crops = Crops(padding=2, flip=0.5, seed=seed)
    return resident_loader(data, sampler, seed=seed, workers=0, device=CPU, size=8, crops=crops)


def epochs(loader, count, first_step=0):
    """All batches of the first epochs."""
    found = []
    for epoch in range(count):
        loader.sampler.start_at(epoch, first_step if epoch == 0 else 0)
        found += list(loader)
    return found


@pytest.mark.parametrize("padding", [0, 3])
def test_crops_are_those_of_torchvision(padding):
    images = pixels(6)
    draws = torch.from_numpy(Crops(padding, 0.5, seed=1).draw(0, 6))
    assert 0 < draws[:, 2].sum() < 6, "some of them are mirrored, some are not"
    found = cropped(images, draws, padding)
    for image, one, (top, left, mirrored) in zip(images, found, draws.tolist(), strict=True):
        expected = crop(pad(image, padding), top, left, 8, 8)
        assert torch.equal(one, hflip(expected) if mirrored else expected)
    assert found.dtype == torch.uint8 and found.is_contiguous()


def test_draws_cover_all_places_and_differ_between_passes_and_seeds():
    draws = Crops(padding=2, flip=0.25, seed=1).draw(0, 4000)
    for column in (0, 1):
        counts = np.bincount(draws[:, column], minlength=5)
        assert len(counts) == 5 and counts.min() > 600
    assert draws[:, 2].mean() == pytest.approx(0.25, abs=0.03)
    others = [Crops(2, 0.25, 1).draw(1, 4000), Crops(2, 0.25, 2).draw(0, 4000)]
    assert all((draws[:, 0] != other[:, 0]).mean() > 0.5 for other in others)


def test_every_image_comes_once_a_pass_with_its_label():
    loader = training_loader(length=12)
    loader.crops = None
    batches = epochs(loader, 1)
    assert len(batches) == len(loader) == 3
    seen = torch.cat([batch.images for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    order = [int((loader.images == one).flatten(1).all(1).nonzero()) for one in seen]
    assert sorted(order) == list(range(12))
    assert labels.tolist() == [index % 2 for index in order]


def test_what_a_run_sees_depends_neither_on_an_interruption_nor_on_the_number_of_processes():
    whole = epochs(training_loader(), 3)  # 2 steps an epoch; a pass ends within a batch
    again = epochs(training_loader(), 3, first_step=1)
    assert all(torch.equal(one.images, other.images) for one, other in zip(whole[1:], again, strict=True))
    halves = [epochs(training_loader(rank=rank, world_size=2), 3) for rank in range(2)]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        assert torch.equal(batch.labels, torch.cat([first.labels, second.labels]))


def test_an_image_is_augmented_otherwise_in_each_pass():
    loader = training_loader(length=8, batch=8)
    first, second = epochs(loader, 2)
    assert not torch.equal(
        first.images.float().mean((1, 2, 3)).sort()[0], second.images.float().mean((1, 2, 3)).sort()[0]
    )


def test_evaluation_sees_the_images_that_a_loader_gives(tmp_path):
    config = folder_config(image_folders(tmp_path), *ON_DEVICE)
    images = setup.load_images(config, CPU)
    loaded = setup.load_images(folder_config(tmp_path, *AT_16), CPU)
    for one, other in zip(images.validation, loaded.validation, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_training_images_are_those_of_the_folder(tmp_path):
    config = folder_config(image_folders(tmp_path), *AT_16, "recipe.augment=false", "data.on_device=true")
    images = setup.load_images(config, CPU)
    assert images.train.crops is None
    dataset, _ = build_datasets(config.data, config.recipe)
    assert torch.equal(images.train.images, torch.stack([image for image, _ in dataset]))
    assert images.train.labels.tolist() == [label for _, label in dataset]
    batch = next(iter(images.train))
    indices = [index for _, index in images.order.global_batch(0)]
    assert torch.equal(batch.images, images.train.images[indices]), "without augmentation nothing is cropped"
    assert [name.rpartition("/")[2] for name in images.names(0)] == [
        dataset.samples[index][0].rpartition("/")[2] for index in indices
    ]


def test_an_unreadable_image_is_named(tmp_path):
    image_folders(tmp_path)
    (tmp_path / "train/a/1.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"cannot read 1 of the images: .*train/a/1\.png"):
        setup.load_images(folder_config(tmp_path, *ON_DEVICE, "probe.images=4"), CPU)


def test_too_little_memory_is_said_before_anything_is_read(monkeypatch):
    class Unread(SyntheticImages):
        def __getitem__(self, index):
            raise AssertionError("read")

    monkeypatch.setattr(resident.torch.cuda, "mem_get_info", lambda device: (2**30, 2**33))
    data = Unread(10**6, 2, 32, None)
    with pytest.raises(ValueError, match=r"data.on_device=true needs 2.9 GiB for 1000000 images of 32 px.* 1.0 GiB"):
        resident_loader(data, ValidationSampler(10**6, 100), seed=0, workers=0, device=torch.device("cuda"), size=32)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["recipe.crop_padding=null"], "recipe.crop_padding"),
        (["recipe.crop_padding=2", "recipe.color_jitter=0.4"], "recipe.color_jitter"),
        (["recipe.crop_padding=2", "recipe.auto_augment=rand-m9-mstd0.5-inc1"], "recipe.auto_augment"),
    ],
)
def test_augmentation_that_needs_the_host_is_named(overrides, key):
    with pytest.raises(ValueError, match=key):
        validate(small("data=digits", "data.on_device=true", "recipe.augment=true", *overrides))
    validate(small("data=digits", "data.on_device=true", *overrides, "recipe.augment=false"))
