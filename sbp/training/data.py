"""Images: where they come from, how they are prepared, and in which order each process sees them.

Every training image seeds its own augmentation from (seed, pass, index), so what a run sees depends neither on
the number of loader processes nor on where it was interrupted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate
from torchvision.datasets import ImageFolder

from sbp.training import seeding, signals
from sbp.training.config import BatchPlan, DataConfig, RecipeConfig

_UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # PIL raises SyntaxError for a broken PNG
SUBSTITUTES = 10  # tried in place of an unreadable image; when all fail it is the storage, not the images


class Batch(NamedTuple):
    """images: float32 (B, 3, H, W). labels: int64 (B,). unreadable: images that could not be read, with reasons.

    They are missing, or other images have their places; see SeededDataset.
    """

    images: Tensor
    labels: Tensor
    unreadable: list[str]


NO_IMAGES = Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), [])


@dataclass(frozen=True)
class Preprocessing:
    """What an image goes through in evaluation."""

    image_size: int
    crop_pct: float
    interpolation: str
    mean: list[float]
    std: list[float]

    @classmethod
    def of(cls, data: DataConfig) -> "Preprocessing":
        return cls(data.image_size, data.crop_pct, data.interpolation, list(data.mean), list(data.std))

    def __str__(self) -> str:
        return (
            f"shorter side to {int(self.image_size / self.crop_pct)} px ({self.interpolation}), "
            f"centre crop {self.image_size} px, mean {self.mean}, std {self.std}"
        )


def build_datasets(data: DataConfig, recipe: RecipeConfig) -> tuple[Dataset, Dataset]:
    """The training and the validation set, with their transforms.

    Raises ValueError for a data set that cannot be trained on, before any image is read.
    """
    train, val = _dataset(data, "train", train_transform(data, recipe)), build_validation_set(data)
    if isinstance(train, ImageFolder) and isinstance(val, ImageFolder) and train.classes != val.classes:
        only = min(set(train.classes) ^ set(val.classes))
        raise ValueError(f"{train.root} and {val.root} have different classes: {only} is in one of them only")
    return train, val


def build_validation_set(data: DataConfig) -> Dataset:
    """The validation set alone. Raises ValueError as `build_datasets`."""
    return _dataset(data, "val", validation_transform(data))


def train_transform(data: DataConfig, recipe: RecipeConfig) -> Any:
    """timm's training transform; resizing and normalisation only when `recipe.augment` is false."""
    return create_transform(
        data.image_size,
        is_training=True,
        no_aug=not recipe.augment,
        scale=(recipe.crop_scale, 1.0),
        hflip=recipe.flip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.auto_augment,
        re_prob=recipe.random_erasing,
        re_mode="pixel",
        interpolation=data.interpolation,
        mean=tuple(data.mean),
        std=tuple(data.std),
    )


def validation_transform(data: DataConfig) -> Any:
    """timm's evaluation transform with our figures, never those of a model's own defaults."""
    return create_transform(
        data.image_size,
        crop_pct=data.crop_pct,
        interpolation=data.interpolation,
        mean=tuple(data.mean),
        std=tuple(data.std),
    )


def _dataset(data: DataConfig, split: str, transform: Any) -> Dataset:
    name = data.train_split if split == "train" else data.val_split
    if data.source == "digits":
        return Digits(split, transform)
    if data.source == "synthetic":
        length = data.train_images if split == "train" else data.val_images
        return SyntheticImages(length, data.num_classes, data.image_size, transform)
    if data.source == "folder":
        assert data.root is not None
        return image_folder(Path(data.root) / name, data.num_classes, transform)
    assert data.name is not None
    dataset = create_dataset(
        data.name, root=data.root, split=name, is_training=split == "train", download=data.download
    )
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"data.name={data.name} is a stream; only data sets with a length are supported")
    dataset.transform = transform
    if hasattr(dataset, "_max_retries"):
        dataset._max_retries = 1  # timm would silently take the next image in place of an unreadable one
    return dataset


def image_folder(folder: Path, num_classes: int, transform: Any = None) -> ImageFolder:
    """The images in folder/class/.

    Raises ValueError for a folder that is missing, empty, without class folders, of one class, or of another
    number of classes, and for an empty class folder.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; data.root needs one folder for each split, with one for each class")
    classes = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    if not classes:
        flat = any(entry.is_file() for entry in folder.iterdir())
        state = "has files but no class folders" if flat else "is empty"
        raise ValueError(f"{folder} {state}; expected {folder}/<class>/<image>")
    if len(classes) == 1:
        raise ValueError(f"{folder} has one class only ({classes[0]}); is it the folder of a single class?")
    if len(classes) != num_classes:
        raise ValueError(f"{folder} has {len(classes)} class folders, but data.num_classes is {num_classes}")
    try:
        return ImageFolder(str(folder), transform)
    except FileNotFoundError as error:  # a class without images; torchvision says which
        raise ValueError(f"{folder}: {error}") from None


class Digits(Dataset):
    """The 1,797 handwritten digits that scikit-learn ships: 8 x 8 grey levels, shown as RGB images.

    One fixed split, a fifth of each class for validation, whatever the run's seed.
    """

    def __init__(self, split: str, transform: Any) -> None:
        from sklearn.datasets import load_digits  # slow to import, and no other data needs it
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        parts = train_test_split(pixels, labels, test_size=0.2, random_state=0, stratify=labels)
        pixels, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
        self.pixels = (pixels.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index]).convert("RGB")), self.labels[index]


class SyntheticImages(Dataset):
    """Random images, each a function of its index; for timing, as nothing can be learned from them."""

    def __init__(self, length: int, num_classes: int, image_size: int, transform: Any) -> None:
        self.length, self.num_classes, self.image_size = length, num_classes, image_size
        self.transform = transform

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = np.random.default_rng(index)
        pixels = generator.integers(256, size=(self.image_size, self.image_size, 3), dtype=np.uint8)
        return self.transform(Image.fromarray(pixels)), index % self.num_classes


class Sample(NamedTuple):
    """image: float32 (3, H, W), None where it cannot be read. unreadable: the images tried in vain, with reasons."""

    image: Tensor | None
    label: int
    unreadable: list[str]


class SeededDataset(Dataset):
    """Takes (pass, index) and seeds random, numpy and torch from it before the image is read and augmented.

    substitutes: so many other images, drawn from the same key, are tried in place of an unreadable one.
    """

    def __init__(self, dataset: Dataset, seed: int, substitutes: int = 0) -> None:
        self.dataset, self.seed, self.substitutes = dataset, seed, substitutes

    def __getitem__(self, where: tuple[int, int]) -> Sample:
        turn, index = where
        unreadable: list[str] = []
        for attempt in range(self.substitutes + 1):
            key = (self.seed, seeding.SAMPLE, turn, index) + ((attempt,) if attempt else ())
            seeding.seed_everything(*key)
            at = index if attempt == 0 else seeding.whole_number(len(self.dataset), *key)  # type: ignore[arg-type]
            try:
                image, label = self.dataset[at]
                return Sample(image, label, unreadable)
            except _UNREADABLE as error:
                unreadable.append(f"{path(self.dataset, at)} ({error})")
            except RuntimeError as error:  # timm's after its retries
                if "consecutive samples" not in str(error):
                    raise
                unreadable.append(path(self.dataset, at))
        return Sample(None, -1, unreadable)


def path(dataset: Any, index: int) -> str:
    """What a user can find an image by."""
    if hasattr(dataset, "samples"):
        return dataset.samples[index][0]
    return dataset.filename(index, absolute=True) if hasattr(dataset, "filename") else f"image {index}"


def collate(samples: Sequence[Sample]) -> Batch:
    """Stacks the images that there are and lists those that could not be read."""
    there = [(sample.image, sample.label) for sample in samples if sample.image is not None]
    images, labels = default_collate(there) if there else NO_IMAGES[:2]
    return Batch(images, labels, [name for sample in samples for name in sample.unreadable])


class TrainSampler(Sampler[list[tuple[int, int]]]):
    """The micro batches of one process, one epoch at a time, as lists of (pass, index).

    A run reads the images as one stream, pass after pass in an order drawn from (seed, pass), and cuts it into
    global batches, whatever the number of processes. An epoch has as many of them as a pass fills; the images
    that a pass leaves over come first in the next epoch, so none is lost and none counts twice.
    """

    def __init__(self, length: int, plan: BatchPlan, seed: int, rank: int = 0) -> None:
        self.length, self.plan, self.seed, self.rank = length, plan, seed, rank
        self.steps_per_epoch = length // plan.global_batch_size
        self.epoch = self.first_step = 0
        if not self.steps_per_epoch:
            raise ValueError(
                f"the training set has {length} images, fewer than global_batch_size={plan.global_batch_size}"
            )

    def start_at(self, epoch: int, step: int = 0) -> None:
        """The next pass over the loader is this epoch, from its optimizer step number `step` on."""
        self.epoch, self.first_step = epoch, step

    @property
    def steps_left(self) -> int:
        """Optimizer steps from `start_at` to the end of the epoch."""
        return self.steps_per_epoch - self.first_step

    def __len__(self) -> int:
        return self.steps_left * self.plan.accumulation

    def global_batch(self, step: int) -> list[tuple[int, int]]:
        """(pass, index) of all images of optimizer step `step`, counted from the run's start."""
        images = _Stream(self.length, self.seed)
        first = step * self.plan.global_batch_size
        return [images[position] for position in range(first, first + self.plan.global_batch_size)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan = self.plan
        share = plan.global_batch_size // plan.world_size
        before = self.epoch * self.steps_per_epoch
        images = _Stream(self.length, self.seed)
        for step in range(before + self.first_step, before + self.steps_per_epoch):
            start = step * plan.global_batch_size + self.rank * share
            for first in range(start, start + share, plan.micro_batch_size):
                yield [images[position] for position in range(first, first + plan.micro_batch_size)]


class _Stream:
    """(pass, index) of the image at any position of a run, counted from its start."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self.turn, self.order = -1, np.empty(0)

    def __getitem__(self, position: int) -> tuple[int, int]:
        turn, place = divmod(position, self.length)
        if turn != self.turn:
            self.turn, self.order = turn, seeding.permutation(self.length, self.seed, seeding.ORDER, turn)
        return turn, int(self.order[place])


class ValidationSampler(Sampler[list[tuple[int, int]]]):
    """Each image once over all processes: every `world_size`-th, from `rank` on. Nothing is padded."""

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, length, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[first : first + self.batch_size]]


@dataclass(frozen=True)
class Images:
    """All images of a run. probe: (images, labels), those that gradient cosines are measured on."""

    train: DataLoader
    order: TrainSampler
    validation: DataLoader
    probe: tuple[Tensor, Tensor]

    def names(self, step: int) -> list[str]:
        """The images of a step's global batch, counted from the run's start; none is read."""
        dataset = self.train.dataset.dataset  # type: ignore[attr-defined]
        return [path(dataset, index) for _, index in self.order.global_batch(step)]


def make_loader(
    dataset: Dataset,
    sampler: Sampler,
    *,
    seed: int,
    workers: int,
    device: torch.device,
    prefetch: int = 2,
    substitutes: int = 0,
) -> DataLoader:
    """Batches in the sampler's order, read by `workers` processes (0: by this one), each `prefetch` batches ahead.

    substitutes: how many other images may be tried in place of an unreadable one; see SeededDataset.
    """
    return DataLoader(
        SeededDataset(dataset, seed, substitutes),
        batch_sampler=sampler,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        collate_fn=collate,
        worker_init_fn=_begin_worker,
    )


def _begin_worker(number: int) -> None:
    signals.ignore()  # the run ends them itself, when its checkpoint is written


def readable(batch: Batch) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch; raises ValueError that names what could not be read."""
    if batch.unreadable:
        raise ValueError(f"cannot read {len(batch.unreadable)} of the images: {'; '.join(batch.unreadable)}")
    return batch.images, batch.labels


def spread_samples(dataset: Dataset, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` images and labels at equal distances in the data set (all of it when it has fewer).

    Others take the places of unreadable ones. Raises ValueError where those cannot be read either.
    """
    length = len(dataset)  # type: ignore[arg-type]
    seeded = SeededDataset(dataset, seed, SUBSTITUTES)
    indices = np.linspace(0, length - 1, min(count, length)).round().astype(int)
    batch = collate([seeded[0, int(index)] for index in indices])
    if len(batch.images) < len(indices):
        raise ValueError(f"cannot read images, nor others in their places: {'; '.join(batch.unreadable)}")
    return batch.images, batch.labels
