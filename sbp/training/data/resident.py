"""Small images that lie on the device: decoded once, then cropped and mirrored there."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from sbp.training.config.images import DataConfig
from sbp.training.config.recipe import RecipeConfig
from sbp.training.data.loading import Batch, SeededDataset, TrainSampler, ValidationSampler, make_loader, readable
from sbp.training.data.sources import open_datasets
from sbp.training.runtime import seeding

AT_ONCE = 500  # images that a loader process decodes in one go


@dataclass(frozen=True)
class Crops:
    """Where each image is cropped, and whether it is mirrored: numbers drawn from (seed, pass) for each of the set.

    padding: black pixels on each side of an image, before a crop of its own size. flip: how often it is mirrored.
    """

    padding: int
    flip: float
    seed: int

    @classmethod
    def of(cls, recipe: RecipeConfig, seed: int) -> "Crops | None":
        """Those that `train_transform` makes of square images; None where `recipe.augment` is false."""
        return cls(recipe.crop_padding or 0, recipe.flip, seed) if recipe.augment else None

    def draw(self, turn: int, length: int) -> np.ndarray:
        """For each image of pass `turn` the first row, the first column, and 1 where it is mirrored. (length, 3)."""
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, seeding.SAMPLE, turn)))
        corners = rng.integers(2 * self.padding + 1, size=(length, 2))
        return np.column_stack([corners, rng.random(length) < self.flip])


_drawn = lru_cache(maxsize=2)(Crops.draw)  # a batch may be of two passes


def cropped(images: Tensor, draws: Tensor, padding: int) -> Tensor:
    """Crops of the images' own size out of the padded images, mirrored where that is drawn.

    images: (B, 3, H, W). draws: int64 (B, 3), as `Crops.draw` gives them, on the same device.
    """
    height, width = images.shape[2:]
    top, left, mirrored = draws[:, :, None].unbind(1)  # (B, 1) each
    rows = top + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = left + torch.where(mirrored > 0, columns.flip(0), columns)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    padded = F.pad(images, [padding] * 4)
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class ResidentLoader:
    """Batches in the sampler's order, as `make_loader` gives them, of images that lie on the device.

    dataset: what they were read from, for their names. images: uint8 (N, 3, H, W). labels: int64 (N,). crops: of
    training images; None to take them as they are.
    """

    def __init__(
        self,
        dataset: SeededDataset,
        images: Tensor,
        labels: Tensor,
        sampler: TrainSampler | ValidationSampler,
        crops: Crops | None = None,
    ) -> None:
        self.dataset, self.images, self.labels, self.sampler, self.crops = dataset, images, labels, sampler, crops

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.sampler:
            turns, indices = np.array(batch).T
            there = self._moved(indices)
            images, labels = self.images[there], self.labels[there]
            if self.crops is not None:
                draws = self._draws(self.crops, turns, indices)
                images = cropped(images, self._moved(draws), self.crops.padding)
            yield Batch(images, labels, [])

    def _draws(self, crops: Crops, turns: np.ndarray, indices: np.ndarray) -> np.ndarray:
        draws = np.empty((len(turns), 3), dtype=np.int64)
        for turn in np.unique(turns):
            of_it = turns == turn
            draws[of_it] = _drawn(crops, int(turn), len(self.images))[indices[of_it]]
        return draws

    def _moved(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.images.device, non_blocking=True)


def resident_bytes(data: DataConfig, recipe: RecipeConfig) -> int:
    """What the images of a run take on its device: 0 but with data.on_device. Raises as `build_datasets` does."""
    if not data.on_device:
        return 0
    train, validation = open_datasets(data, recipe)
    return _bytes(len(train), data.size_in_training) + _bytes(len(validation), data.image_size)  # type: ignore[arg-type]


def _bytes(images: int, size: int) -> int:
    return images * 3 * size**2


def resident_loader(
    dataset: Dataset,
    sampler: TrainSampler | ValidationSampler,
    *,
    seed: int,
    workers: int,
    device: torch.device,
    size: int,
    crops: Crops | None = None,
) -> ResidentLoader:
    """Reads all images, with `workers` processes, and keeps them on the device.

    dataset: of images of `size` x `size` pixels, without augmentation.
    Raises ValueError where the device has not the memory for them, before any is read, and for unreadable ones.
    """
    length = len(dataset)  # type: ignore[arg-type]
    needed = _bytes(length, size)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    if free is not None and needed > free:
        raise ValueError(
            f"data.on_device=true needs {needed / 2**30:.1f} GiB for {length} images of {size} px, and the device has "
            f"{free / 2**30:.1f} GiB left; take data.on_device=false"
        )
    images = torch.empty((length, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.empty(length, dtype=torch.int64, device=device)
    loader = make_loader(dataset, ValidationSampler(length, AT_ONCE), seed=seed, workers=workers, device=device)
    done = 0
    for batch in loader:
        some, their = readable(batch)
        images[done : done + len(some)] = some
        labels[done : done + len(some)] = their
        done += len(some)
    return ResidentLoader(SeededDataset(dataset, seed), images, labels, sampler, crops)
