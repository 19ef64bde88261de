"""The sets of images. Each gives uint8 images (3, H, W) and labels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose

from sbp.training.config.images import DataConfig
from sbp.training.config.recipe import RecipeConfig
from sbp.training.data.classes import check_labels, check_same_classes, class_names, hidden
from sbp.training.data.cluttered import DIGITS, ClutteredDigits
from sbp.training.data.preprocessing import decode, train_transform, validation_transform
from sbp.training.data.shards import Shards, find_shards, indexed

_STREAMS = {  # timm's readers without random access, and what to do instead
    "wds": "data=webdataset data.root=FOLDER reads the same shards from a disk, by random access",
    "hfids": "data.name=hfds/... reads the same data set from a disk, where it is downloaded to",
    "tfds": "convert it to image folders, webdataset shards or Parquet files",
}


def build_datasets(data: DataConfig, recipe: RecipeConfig) -> tuple[Dataset, Dataset]:
    """The training and the validation set, with their transforms.

    Raises ValueError for a data set that cannot be trained on, before any image is read.
    """
    train, val = open_datasets(data, recipe)
    check_labels(train, _place(data, "train"), data.num_classes, training=True)
    names, places = (class_names(train), class_names(val)), (_place(data, "train"), _place(data, "val"))
    check_same_classes(*names, places)  # which says more than their number
    check_labels(val, _place(data, "val"), data.num_classes, training=False)
    return train, val


def open_datasets(data: DataConfig, recipe: RecipeConfig) -> tuple[Dataset, Dataset]:
    """As `build_datasets`, with classes and labels that are not looked at."""
    return _dataset(data, "train", train_transform(data, recipe)), _dataset(data, "val", validation_transform(data))


def prepare(data: DataConfig, splits: Sequence[str] = ("train", "val")) -> None:
    """What one process does before all of them open the data sets: finds where images lie in tar shards, downloads."""
    for split in splits:
        if data.source == "timm" and data.download:
            _dataset(data, split, None)
        if data.source == "webdataset":
            shards, _, label = find_shards(Path(data.root or ""), _split_name(data, split))
            indexed(shards, label)


def build_validation_set(data: DataConfig) -> Dataset:
    """The validation set alone. Raises ValueError as `build_datasets`."""
    dataset = _dataset(data, "val", validation_transform(data))
    check_labels(dataset, _place(data, "val"), data.num_classes, training=False)
    return dataset


def _split_name(data: DataConfig, split: str) -> str:
    return data.train_split if split == "train" else data.val_split


def _place(data: DataConfig, split: str) -> str:
    """What an error calls a split."""
    name = _split_name(data, split)
    if data.source in ("folder", "webdataset"):
        return str(Path(data.root or "") / name)
    return f"{data.name if data.source == 'timm' else data.source}, split {name},"


def _dataset(data: DataConfig, split: str, transform: Any) -> Dataset:
    name = _split_name(data, split)
    if data.source == "digits":
        return Digits(split, transform)
    length = data.train_images if split == "train" else data.val_images
    if data.source == "cluttered_digits":
        sources, stream = Digits(split, None), 0 if split == "train" else 1
        return ClutteredDigits(sources.pixels, sources.labels, stream, length, data.image_size, transform)
    if data.source == "synthetic":
        return SyntheticImages(length, data.num_classes, data.image_size, transform)
    if data.source == "folder":
        assert data.root is not None
        images = image_folder(Path(data.root) / name, data.num_classes, transform)
        if data.cache:
            images.loader = Remembered(_load)
        return images
    if data.source == "webdataset":
        assert data.root is not None
        return Shards(Path(data.root), name, data.num_classes, transform, decode)
    assert data.name is not None
    prefix = data.name.partition("/")[0].lower()
    if prefix in _STREAMS:
        raise ValueError(
            f"data.name={data.name} is a stream, which cannot go on exactly where a run was interrupted; "
            f"{_STREAMS[prefix]}"
        )
    if data.root is None and prefix != "hfds":
        raise ValueError(f"data.root is needed: the folder of data.name={data.name}, or one to download it to")
    try:
        dataset = create_dataset(
            data.name, root=data.root, split=name, is_training=split == "train", download=data.download
        )
    except ImportError as error:
        raise ValueError(f"data.name={data.name}: {error}; pip install '.[datasets]'") from None
    except Exception as error:  # of timm, torchvision and datasets, each its own
        said = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"data.name={data.name} in data.root={data.root}, split {name}: {said}") from error
    dataset.transform = Compose([_as_rgb, transform])
    if isinstance(dataset, ImageDataset):
        dataset._max_retries = 1  # timm would silently take the next image in place of an unreadable one
        dataset.load_bytes = True
        dataset.transform = Compose([decode, transform])
        if hasattr(dataset.reader, "image_key"):
            dataset.reader = Table(dataset.reader)  # type: ignore[assignment]
    elif isinstance(dataset, ImageFolder):
        dataset.loader, dataset.transform = _load, transform
    return dataset


class Table:
    """timm's reader of a table, in which a row without an image is one that cannot be read."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        if name == "_reader":  # asked for before it is there, by what copies this
            raise AttributeError(name)
        return getattr(self._reader, name)

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            return self._reader[index]
        except (TypeError, AssertionError):
            raise OSError("no image") from None

    def filename(self, *which: Any, **how: Any) -> str | None:
        try:
            return self._reader.filename(*which, **how)
        except TypeError:
            return None


def _as_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


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
        raise ValueError(
            f"{folder} has {len(classes)} class folders, but data.num_classes is {num_classes}{hidden(classes)}"
        )
    try:
        return ImageFolder(str(folder), transform, loader=_load)
    except FileNotFoundError as error:  # a class without images; torchvision says which
        raise ValueError(f"{folder}: {error}{hidden(classes)}") from None


def _load(path: str) -> Image.Image:
    return decode(Path(path).read_bytes())


class Remembered:
    """Loads each path once and keeps its pixels, uint8 (H, W, 3), for as long as this lives."""

    def __init__(self, load: Callable[[str], Image.Image]) -> None:
        self.load = load
        self.pixels: dict[str, np.ndarray] = {}

    def __call__(self, path: str) -> Image.Image:
        if path not in self.pixels:
            self.pixels[path] = np.asarray(self.load(path))
        return Image.fromarray(self.pixels[path])


class Digits(Dataset):
    """The 1,797 handwritten digits that scikit-learn ships: 8 x 8 grey levels, shown as RGB images.

    One fixed split, a fifth of each class for validation, whatever the run's seed.
    """

    classes: ClassVar = list(DIGITS)

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
