"""The sets of images with objects. Each gives uint8 images (3, h, w) and targets."""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from sbp.training.config.images import DataConfig
from sbp.training.config.recipe import RecipeConfig
from sbp.training.tasks.detection.augmentation import DetectionPreprocessing, TrainTransform
from sbp.training.tasks.detection.coco import CocoImages
from sbp.training.tasks.detection.shapes import Shapes

STREAMS = ("train", "val")  # of generated images; to evaluate on "train" shows whether they can be learned at all


def build_datasets(data: DataConfig, recipe: RecipeConfig) -> tuple[Dataset, Dataset]:
    """The training and the validation set, with their transforms.

    Raises ValueError for a data set that cannot be trained on, before any image is read.
    """
    val = build_validation_set(data)  # the smaller one: what is wrong with both is said sooner
    train = _dataset(data, "train", TrainTransform(data, recipe))
    if isinstance(train, CocoImages) and isinstance(val, CocoImages) and train.categories != val.categories:
        number, name = min(set(train.categories.items()) ^ set(val.categories.items()), key=str)
        raise ValueError(
            f"{train.file} and {val.file} have different categories: {name} ({number}) is in one of them only"
        )
    return train, val


def build_validation_set(data: DataConfig) -> Dataset:
    """The validation set alone. Raises ValueError as `build_datasets`."""
    return _dataset(data, "val", DetectionPreprocessing.of(data))


def _dataset(data: DataConfig, split: str, transform: Any) -> Dataset:
    training = split == "train"
    name = data.train_split if training else data.val_split
    if data.source == "shapes":
        if name not in STREAMS:
            raise ValueError(f"data.{split}_split must be one of {', '.join(STREAMS)} for shapes, got {name!r}")
        length = data.train_images if training else data.val_images
        return Shapes(STREAMS.index(name), length, data.image_size, data.num_classes, transform, training)
    assert data.root is not None
    split_of = Path(data.root), name, data.annotations, data.num_classes
    return CocoImages(*split_of, transform, training, data.background)
