"""Reads every image of a data set once, as training would, and keeps what is unusual.

A mark is a kind of unusual image ("unreadable", "rotated", ...); findings.py says what each means.
"""

import hashlib
import io
import logging
import os
import sys
import time
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import Compose
from tqdm import tqdm

from sbp.training.config.images import DataConfig
from sbp.training.config.run import Config
from sbp.training.data.classes import class_names, labels
from sbp.training.data.loading import SUBSTITUTES, Batch, Sample, SeededDataset, collate, make_loader, spread
from sbp.training.data.naming import path
from sbp.training.data.preprocessing import decode, decode_with_orientation, orientation, train_transform
from sbp.training.data.sources import image_folder, open_datasets
from sbp.training.runtime import signals
from sbp.training.tasks.choice import task_of

log = logging.getLogger(__name__)

LOG_EVERY = 60.0  # seconds between lines where there is no terminal for a bar
TURNED = {
    2: "mirrored",
    3: "upside down",
    4: "upside down and mirrored",
    5: "lying and mirrored",
    6: "lying on its left side",
    7: "lying and mirrored",
    8: "lying on its right side",
}
_GREY, _DEEP, _ALPHA = ("L", "1"), ("I", "F", "I;16", "I;16B", "I;16L", "I;16N"), ("RGBA", "LA", "PA", "RGBa", "La")
_PER_BATCH = 8
_WARM_BATCHES, _TIMED_BATCHES = 2, 16  # for each loader process


class Facts(NamedTuple):
    """One image. problem: the image and why it cannot be read, or ""; nothing else is known then.

    size: shorter side in pixels. digest: of the file's bytes, or of the pixels where there is no file. turned: in
    detection, whether training turns the image as `orientation` says.
    """

    problem: str = ""
    label: int = -1
    format: str = ""
    mode: str = ""
    size: int = 0
    orientation: int = 1
    transparent: bool = False
    digest: bytes = b""
    turned: bool | None = None


@dataclass
class Split:
    """What is known of a split so far.

    fault: why it cannot be opened; then nothing else is known. classes: names in label order, [] where it has none.
    per_class: images by label, of the whole split or (`counted`) of those read so far; or the `objects` in them.
    ignored: files that are not taken for images. unused: what of tar files looks like images or labels and is not used,
    in words. sizes: shorter sides in pixels. marks: by kind, the images as a user finds them.
    """

    name: str
    place: str
    fault: str = ""
    length: int = 0
    to_read: int = 0
    read: int = 0
    seconds: float = 0.0
    classes: list[str] = field(default_factory=list)
    per_class: Counter[int] = field(default_factory=Counter)
    counted: bool = False
    objects: bool = False
    ignored: list[str] = field(default_factory=list)
    unused: str = ""
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    sizes: array = field(default_factory=lambda: array("i"))
    marks: dict[str, list[str]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return not self.fault and self.read == self.length

    def add(self, facts: Facts, name: str, image_size: int) -> None:
        self.read += 1
        if facts.problem:
            self.mark("unreadable", facts.problem)
            return
        if facts.label < 0:
            self.mark("unlabelled", name)
        elif self.counted:
            self.per_class[facts.label] += 1
        self.formats[facts.format or "none"] += 1
        self.modes[facts.mode] += 1
        self.sizes.append(facts.size)
        for kind, detail in unusual(facts, name, image_size).items():
            self.mark(kind, f"{name} ({detail})")

    def mark(self, kind: str, image: str) -> None:
        self.marks.setdefault(kind, []).append(image)


def open_splits(config: Config) -> list[tuple[Split, Any]]:
    """Training and validation: what they say of themselves, and the data set; None where it cannot be opened.

    The training set has its transform. Image folders that training refuses are opened too, where there is something
    to read. Raises ValueError for what else cannot be trained on.
    """
    data, recipe = config.data, config.recipe
    names = (data.train_split, data.val_split)
    if config.task == "detection":
        both = zip(names, task_of(config).build_datasets(config), strict=True)
        return [(describe(name, data.source, dataset), dataset) for name, dataset in both]
    if data.source != "folder":
        place = data.name or data.source
        opened = zip(names, open_datasets(data, recipe), strict=True)
        return [(describe(name, place, dataset), dataset) for name, dataset in opened]
    splits: list[tuple[Split, Any]] = []
    transform = Compose([decode, train_transform(data, recipe)])
    for name in names:
        folder = Path(data.root or "") / name
        try:
            dataset = ImageFolder(str(folder), transform, loader=_read_bytes, allow_empty=True)
            splits.append((describe(name, str(folder), dataset), dataset))
        except OSError as error:
            splits.append((Split(name, str(folder), _why_not(folder, data.num_classes) or str(error)), None))
    return splits


def _read_bytes(name: str) -> bytes:
    return Path(name).read_bytes()


def _why_not(folder: Path, num_classes: int) -> str:
    try:
        image_folder(folder, num_classes)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def describe(name: str, place: str, dataset: Any) -> Split:
    """What a data set says of itself before an image is read."""
    split = Split(name, place, length=len(dataset))
    split.classes = class_names(dataset)
    split.unused = getattr(dataset, "unused", "")
    if hasattr(dataset, "counts") and hasattr(dataset, "files"):
        split.objects = True
        split.per_class = Counter({label - 1: count for label, count in dataset.counts.items()})
    elif hasattr(dataset, "targets") and (numbers := labels(dataset)) is not None:
        split.per_class = Counter(map(int, numbers))
    else:
        split.counted = True
    if isinstance(dataset, ImageFolder):
        walk = os.walk(dataset.root, followlinks=True)
        split.ignored = sorted(
            os.path.join(folder, name)
            for folder, _, names in walk
            for name in names
            if not is_image_file(name) or folder == str(dataset.root)
        )
    return split


def unusual(facts: Facts, name: str, image_size: int) -> dict[str, str]:
    """What is unusual about an image that can be read: kind -> detail."""
    found = {}
    if facts.orientation in TURNED:
        kind = {None: "rotated", True: "turned", False: "not turned"}[facts.turned]
        found[kind] = TURNED[facts.orientation]
    if facts.mode in _DEEP:
        found["deep"] = facts.mode
    elif facts.transparent or facts.mode in _ALPHA:
        found["transparent"] = facts.mode
    elif facts.mode in _GREY:
        found["grey"] = facts.mode
    elif facts.mode == "P":
        found["palette"] = facts.mode
    elif facts.mode != "RGB":
        found["colours"] = facts.mode
    if 2 * facts.size < image_size:
        found["small"] = f"{facts.size} px"
    suffix = Path(name).suffix.lower()
    claimed = Image.registered_extensions().get(suffix)
    actual = "JPEG" if facts.format == "MPO" else facts.format  # a JPEG with further pictures, as phones make them
    if claimed and actual and claimed != actual:
        found["misnamed"] = actual
    return found


class Inspection(Dataset):
    """The name and the Facts of each image; the data set's own decoder and transform give way to `look`."""

    def __init__(self, dataset: Any) -> None:
        if hasattr(dataset, "files"):  # images with objects
            dataset = dataset.files()
        dataset.transform = look
        if isinstance(dataset, ImageFolder):
            dataset.loader = _read_bytes
        elif hasattr(dataset, "decode"):
            dataset.decode = bytes  # leaves the file's content as it is
        self.dataset, self.reading = dataset, SeededDataset(dataset, seed=0)

    def __getitem__(self, number: int) -> tuple[str, Facts]:
        name = path(self.dataset, number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of broken EXIF and large images
            sample = self.reading[0, number]
        facts: Any = sample.image
        if not facts:
            return name, Facts(problem=sample.unreadable[0])
        try:
            return name, facts._replace(label=index(sample.label))
        except TypeError:
            raise ValueError(f"{name} has the label {sample.label!r}, which is no integer") from None


def look(image: bytes | Image.Image) -> Facts:
    """Decodes an image file's content as training does, and raises what that raises; or takes decoded pixels."""
    turn = decode_with_orientation(image)[1] if isinstance(image, bytes) else orientation(image)
    opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
    return Facts(
        format=opened.format or "",
        mode=opened.mode,
        size=min(opened.size),
        orientation=turn,
        transparent="transparency" in opened.info,
        digest=hashlib.blake2b(image if isinstance(image, bytes) else image.tobytes(), digest_size=16).digest(),
    )


def read(
    split: Split,
    dataset: Any,
    data: DataConfig,
    max_images: int | None,
    digests: MutableMapping[bytes, str],
    compare: bool,
) -> None:
    """Looks at the images (at `max_images` of them) and adds to `split`, until done or asked to stop by a signal.

    digests: name by digest. compare: images found in there are marked; otherwise they are put there.
    """
    indices = spread(split.length, max_images)
    split.to_read = len(indices)
    loader = DataLoader(
        Inspection(dataset),
        batch_size=_PER_BATCH,
        sampler=indices,
        num_workers=data.workers,
        collate_fn=list,
        worker_init_fn=_begin_worker,
    )
    started = time.perf_counter()
    for name, facts in _shown(loader, split):
        split.add(facts, name, data.image_size)
        if facts.digest and not compare:
            digests[facts.digest] = name
        elif facts.digest in digests:
            split.mark("in both", f"{name} (is {digests[facts.digest]})")
        split.seconds = time.perf_counter() - started
    rate, took = split.read / max(split.seconds, 1e-9), timedelta(seconds=round(split.seconds))
    log.info("%-10s %s images read in %s, %s images/s", split.name, f"{split.read:,}", took, f"{rate:,.0f}")


def _begin_worker(number: int) -> None:
    signals.ignore()
    logging.disable(logging.WARNING)  # timm's, for each unreadable image


def _shown(loader: DataLoader, split: Split) -> Iterator[tuple[str, Facts]]:
    """The images one by one, with a bar in a terminal and a line now and then elsewhere; ends when asked to stop."""
    in_terminal = sys.stderr.isatty()
    begun = said = time.perf_counter()
    with tqdm(
        total=split.to_read, desc=split.name, unit=" images", disable=not in_terminal, leave=False, dynamic_ncols=True
    ) as bar:
        for batch in loader:
            yield from batch
            bar.update(len(batch))
            now = time.perf_counter()
            if not in_terminal and now - said >= LOG_EVERY:
                said, left = now, (split.to_read - split.read) * (now - begun) / split.read
                rate = split.read / (now - begun)
                progress = f"{split.read:,} of {split.to_read:,} images, {rate:.0f} images/s"
                log.info("%-10s %s, %s left", split.name, progress, timedelta(seconds=round(left)))
            if signals.received is not None:
                return


class Loading(NamedTuple):
    """How fast one process gets its training images. cores: that this process may use."""

    images_per_second: float
    images: int
    workers: int
    cores: int


def loading_speed(
    dataset: Any,
    seed: int,
    workers: int,
    prefetch: int,
    collate: Callable[[Sequence[Sample]], Batch] = collate,
) -> Loading | None:
    """Of random images, through the data set's transform and the loader that training uses; no model runs.

    Timed once each loader process is at work. None when a signal asks to stop.
    """
    at_once = max(workers, 1)
    batches = at_once * (_WARM_BATCHES + _TIMED_BATCHES)
    indices = np.random.default_rng(seed).integers(len(dataset), size=(batches, _PER_BATCH)).tolist()
    order: Any = [[(0, index) for index in batch] for batch in indices]
    options: dict[str, Any] = {"seed": seed, "workers": workers, "prefetch": prefetch, "substitutes": SUBSTITUTES}
    options["collate"] = collate
    started, images = time.perf_counter(), 0
    for number, batch in enumerate(make_loader(dataset, order, device=torch.device("cpu"), **options), 1):
        images += len(batch.labels)
        if number == at_once * _WARM_BATCHES:
            started, images = time.perf_counter(), 0
        if signals.received is not None:
            return None
    seconds = max(time.perf_counter() - started, 1e-9)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Loading(images / seconds, images, workers, cores)
