"""In which order each process sees the images, and how they are loaded.

Every training image seeds its own augmentation from (seed, pass, index), so what a run sees depends neither on
the number of loader processes nor on where it was interrupted.
"""

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from sbp.training.config.batches import BatchPlan
from sbp.training.data.naming import path
from sbp.training.runtime import seeding, signals

_UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # PIL raises SyntaxError for a broken PNG
SUBSTITUTES = 10  # tried in place of an unreadable image; when all fail it is the storage, not the images
SHARDS_AT_ONCE = 16  # of ImageNet's 1,024: 20,000 images


class Batch(NamedTuple):
    """images: uint8 (B, 3, H, W). labels: int64 (B,), or in detection a list of B targets, which are dictionaries.
    unreadable: images that could not be read, with reasons.

    They are missing, or other images have their places; see SeededDataset.
    """

    images: Tensor
    labels: Any
    unreadable: list[str]


NO_IMAGES = Batch(torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), [])


class Sample(NamedTuple):
    """image: uint8 (3, H, W), None where it cannot be read. unreadable: the images tried in vain, with reasons.

    label: a number, or in detection a target.
    """

    image: Tensor | None
    label: Any
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
            seeding.seed_host(*key)
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
    shards: how many images each shard has, to read SHARDS_AT_ONCE of them at a time.
    """

    def __init__(
        self, length: int, plan: BatchPlan, seed: int, rank: int = 0, shards: Sequence[int] | None = None
    ) -> None:
        self.length, self.plan, self.seed, self.rank = length, plan, seed, rank
        self.images = _Stream(length, seed, shards)
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
        first = step * self.plan.global_batch_size
        return [self.images[position] for position in range(first, first + self.plan.global_batch_size)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan = self.plan
        share = plan.global_batch_size // plan.world_size
        before = self.epoch * self.steps_per_epoch
        for step in range(before + self.first_step, before + self.steps_per_epoch):
            start = step * plan.global_batch_size + self.rank * share
            for first in range(start, start + share, plan.micro_batch_size):
                yield [self.images[position] for position in range(first, first + plan.micro_batch_size)]


class _Stream:
    """(pass, index) of the image at any position of a run, counted from its start."""

    def __init__(self, length: int, seed: int, shards: Sequence[int] | None) -> None:
        self.length, self.seed, self.shards = length, seed, shards
        self.turn, self.order = -1, np.empty(0)

    def __getitem__(self, position: int) -> tuple[int, int]:
        turn, place = divmod(position, self.length)
        if turn != self.turn:
            self.turn, self.order = turn, self._permutation(self.seed, seeding.ORDER, turn)
        return turn, int(self.order[place])

    def _permutation(self, *key: int) -> np.ndarray:
        if self.shards is None:
            return seeding.permutation(self.length, *key)
        return seeding.permutation_in_windows(self.shards, SHARDS_AT_ONCE, *key)


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


class Batches(Protocol):
    """A loader: of a `DataLoader`, what the loop needs."""

    dataset: Any

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Images:
    """All images of a run. probe: (images, labels), those that gradient cosines are measured on.

    classes: their names in the order of the labels; [] where the data set has none.
    """

    train: Batches
    order: TrainSampler
    validation: Batches
    probe: tuple[Tensor, Any]
    classes: list[str]

    @property
    def facts(self) -> dict[str, Any]:
        """What they have to have in common with those of a run that goes on."""
        return {"images": self.order.length, "classes": self.classes}

    def some(self, count: int) -> tuple[Tensor, Any]:
        """So many images of the probe and their labels: the first ones, again and again where it has fewer."""
        images, labels = self.probe
        indices = [place % len(images) for place in range(count)]
        return images[indices], labels[indices] if isinstance(labels, Tensor) else [labels[i] for i in indices]

    def names(self, step: int) -> list[str]:
        """The images of a step's global batch, counted from the run's start; none is read."""
        dataset = self.train.dataset.dataset
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
    collate: Callable[[Sequence[Sample]], Batch] = collate,
) -> DataLoader:
    """Batches in the sampler's order, read by `workers` processes (0: by this one), each `prefetch` batches ahead.

    collate: makes a batch of samples. substitutes: how many other images may be tried in place of an unreadable one;
        see SeededDataset.
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


@atexit.register
def _end_workers() -> None:
    """After an error nobody has ended them, and multiprocessing would wait for ever for them to heed SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch reports that they were killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def moved(targets: Any, device: torch.device) -> Any:
    """Labels (B,), or a list of dictionaries with tensors, on the device; what is no tensor stays as it is."""
    if isinstance(targets, Tensor):
        return targets.to(device, non_blocking=True)
    return [
        {key: moved(value, device) if isinstance(value, Tensor) else value for key, value in one.items()}
        for one in targets
    ]


def readable(batch: Batch) -> tuple[Tensor, Any]:
    """The images and labels of a batch; raises ValueError that names what could not be read."""
    if batch.unreadable:
        raise ValueError(f"cannot read {len(batch.unreadable)} of the images: {'; '.join(batch.unreadable)}")
    return batch.images, batch.labels


def spread(length: int, count: int | None) -> Sequence[int]:
    """`count` indices at equal distances; all of them when there are fewer, or for None."""
    if count is None or count >= length:
        return range(length)
    return [int(index) for index in np.linspace(0, length - 1, count).round()]


def spread_samples(
    dataset: Dataset, count: int, seed: int, collate: Callable[[Sequence[Sample]], Batch] = collate
) -> tuple[Tensor, Any]:
    """`count` images and labels at equal distances in the data set (all of it when it has fewer).

    Others take the places of unreadable ones. Raises ValueError where those cannot be read either.
    """
    seeded = SeededDataset(dataset, seed, SUBSTITUTES)
    indices = spread(len(dataset), count)  # type: ignore[arg-type]
    batch = collate([seeded[0, index] for index in indices])
    if len(batch.images) < len(indices):
        raise ValueError(f"cannot read images, nor others in their places: {'; '.join(batch.unreadable)}")
    return batch.images, batch.labels
