"""Images in tar shards, as webdataset writes them: key.jpg beside key.cls (a class number) or key.json.

Nothing is lost without a word: what looks like an image or a label and is not used is counted.

Such shards are meant to be streamed, which can neither go on exactly within an epoch nor count each image once on any
number of processes. But a tar file is not compressed: where each image lies is found once, from the headers, and then
the shards are a data set like others.
"""

import hashlib
import json
import logging
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from sbp.training.record.files import shown

log = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "avif", "ppm", "pgm", "jp2")
LABELS = ("cls", "json")
_PICTURES = {suffix[1:] for suffix in Image.registered_extensions()} | {*IMAGES, "heic", "heif", "jxl", "svg"}
INFO = ("_info.json", "info.json")  # names that timm looks for
_HEADER = 512  # bytes in front of each file in a tar


class Index(NamedTuple):
    """Where the images lie. shard, label: int32 (N,). offset, size: int64 (N,), bytes. stamps: int64 (shards, 2).

    Images come in the order of the shards, and stamps are their sizes and times of change when they were read.
    unused: int64 (2,), how many members look like an image, or like a label, and are not used. examples: str (2,), one
    of each as shard:member, or "".
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    stamps: np.ndarray
    unused: np.ndarray
    examples: np.ndarray


class Shards(Dataset):
    """The images of a split. Items are (transform(decode(content)), label).

    split: a pattern of file names in root, with {0000..1023} or wildcards, or the name of a split in root/_info.json.
    unused: what looks like an image or a label and is not used, in words; "" where there is none. Raises ValueError
    where that is half of either, for shards that are missing, compressed or not whole, for an image without a label,
    and when the classes are not 0 to num_classes - 1.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        num_classes: int,
        transform: Any,
        decode: Callable[[bytes], Image.Image],
    ) -> None:
        self.transform, self.decode = transform, decode
        self.shards, counts, label = find_shards(root, split)
        self.index = indexed(self.shards, label)
        self.unused = _in_words(self.index)
        if self.index.unused.max() >= len(self.index.label):
            raise ValueError(f"{root}/{split}: {self.unused}; {len(self.index.label)} images are used")
        if self.unused:
            log.warning("%s/%s: %s", root, split, shown(self.unused))
        self.counts = np.bincount(self.index.shard, minlength=len(self.shards))  # images in each shard
        for shard, count, expected in zip(self.shards, self.counts, counts or self.counts, strict=True):
            if count != expected:
                also = f"; {self.unused}" if self.unused else ""
                raise ValueError(f"{shard} has {count} images, but {expected} according to {root}/_info.json{also}")
        classes = np.unique(self.index.label)
        if not np.array_equal(classes, np.arange(num_classes)):
            raise ValueError(
                f"{root}/{split} has {len(classes)} classes with numbers from {classes[0]} to {classes[-1]}, "
                f"but data.num_classes is {num_classes}"
            )

    def __len__(self) -> int:
        return len(self.index.label)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        content = self._read(index, self.index.offset[index], self.index.size[index])
        return self.transform(self.decode(content)), int(self.index.label[index])

    def filename(self, index: int, absolute: bool = False) -> str:
        """shard:member, as `tar --extract --file shard member` takes them; of a long name the first 100 characters."""
        shard, offset = self.shards[self.index.shard[index]], self.index.offset[index]
        try:
            header = self._read(index, offset - _HEADER, _HEADER)
            member = header[:100].rstrip(b"\0").decode(errors="surrogateescape")
        except OSError:  # as the image itself, perhaps, whose name this is to be
            member = f"byte {offset}"
        return f"{shard if absolute else shard.name}:{member}"

    def _read(self, index: int, offset: int, size: int) -> bytes:
        with self.shards[self.index.shard[index]].open("rb") as file:
            file.seek(offset)
            return file.read(size)


def find_shards(root: Path, split: str) -> tuple[list[Path], list[int], str]:
    """The shards of a split, how many images each has ([] if nobody says), and the `label` of `read_shard`."""
    info = next((root / name for name in INFO if (root / name).is_file()), None)
    try:
        splits = {} if info is None else json.loads(info.read_text()).get("splits", {})
        found = splits.get(split)
        named = [] if found is None else [root / name for name in found["filenames"]]
        counts, label = ([], "") if found is None else (found.get("shard_lengths", []), found.get("alt_label") or "")
        if counts and len(counts) != len(named):
            raise ValueError(f"split {split} has {len(named)} filenames and {len(counts)} shard_lengths")
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{info} is not as timm's: {_said(error)}") from None
    if found is not None:
        paths = named
    elif ".tar" in split:
        paths = [path for name in expand(split) for path in _matching(root, name)]
    else:
        known = f"{root} has {', '.join(splits)}" if splits else f"{root} has no {INFO[0]} that names splits"
        raise ValueError(f"no split {split}: {known}; or give a pattern such as {split}-{{0000..1023}}.tar")
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise ValueError(f"no shard {missing[0] if missing else root / split}")
    return paths, counts, label


def _said(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def expand(pattern: str) -> list[str]:
    """All that a pattern with number ranges stands for: {08..10} is 08, 09 and 10."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return [name for number in numbers for name in expand(pattern[: found.start()] + number + pattern[found.end() :])]


def _matching(root: Path, name: str) -> list[Path]:
    if not re.search(r"[*?\[]", name):
        return [root / name]
    where = Path(name).anchor or root
    return sorted(Path(where).glob(str(Path(name).relative_to(Path(name).anchor))))


def indexed(shards: list[Path], label: str) -> Index:
    """The index of these shards: from a file if there is one and no shard has changed, else read and written there."""
    stamps = np.array([(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, shards)])
    name = hashlib.sha256(
        "\n".join([label, *(str(shard.resolve()) for shard in shards)]).encode(errors="surrogateescape")
    ).hexdigest()[:16]
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sbp"
    places = [folder / f".sbp-index-{name}.npz" for folder in (shards[0].parent, user)]
    for place in places:
        try:
            with np.load(place, allow_pickle=False) as stored:
                index = Index(*(stored[field] for field in Index._fields))
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            continue
        if np.array_equal(index.stamps, stamps):
            return index
    index = _read_headers(shards, label, stamps)
    for place in places:
        temporary = place.with_suffix(f".tmp{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez(file, **index._asdict())
            os.replace(temporary, place)
            break
        except OSError:  # a data set is often read-only
            temporary.unlink(missing_ok=True)
    return index


def _read_headers(shards: list[Path], label: str, stamps: np.ndarray) -> Index:
    log.info("reading the headers of %d shards in %s, once", len(shards), shards[0].parent)
    found: list[tuple[int, int, int, int]] = []
    unused: tuple[list[str], list[str]] = [], []
    with ThreadPoolExecutor(16) as pool:  # which wait for the disk, not for each other
        read = pool.map(lambda shard: read_shard(shard, label), shards)
        bar = tqdm(read, "headers of the shards", len(shards), unit="shard", leave=False, disable=None)
        for number, content in enumerate(bar):  # disable=None: no bar in a log file
            found += [(number, *image) for image in content.images]
            for names, own in zip(unused, content.unused, strict=True):
                names += [f"{shards[number]}:{name}" for name in own]
    shard_number, offset, size, labels = np.array(found, dtype=np.int64).reshape(-1, 4).T
    counts, examples = [len(names) for names in unused], [names[0] if names else "" for names in unused]
    return Index(
        shard_number.astype(np.int32),
        offset,
        size,
        labels.astype(np.int32),
        stamps,
        np.array(counts, dtype=np.int64),
        np.array(examples),
    )


def _in_words(index: Index) -> str:
    parts = zip(index.unused.tolist(), ("images", "labels"), index.examples.tolist(), strict=True)
    return ", and ".join(
        f"{count} files look like {what} and are not used, such as {example}" for count, what, example in parts if count
    )


class Content(NamedTuple):
    """What a shard has. images: (offset, size, label) of each. unused: members that look like an image, or like a
    label, and are not used.
    """

    images: list[tuple[int, int, int]]
    unused: tuple[list[str], list[str]]


def read_shard(shard: Path, label: str = "") -> Content:
    """Reads the headers of a shard, and its labels. Raises ValueError as `Shards`.

    label: the key of the label in the JSON files; "" for the .cls files or, where there is none, the key "label".
    A key is all in front of the last dot. What has more behind the key of an image that is used, such as key.mask.png,
    belongs to that image; so do files of the same key and another kind. Of a key that stands twice the last image and
    the last label count, as when the shard is unpacked.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            members = [member for member in tar.getmembers() if not member.isdir()]
            end = tar.offset
            content = _with_content(members)
            keys: dict[str, dict[str, list[tarfile.TarInfo]]] = {}
            for member, source in zip(members, content, strict=True):
                key, kind = _key_and_kind(member.name)
                if source is not None and kind in (*IMAGES, *LABELS):
                    keys.setdefault(key, {}).setdefault(kind, []).append(source)
            pictured = {key: next((k for k in IMAGES if k in kinds), "") for key, kinds in keys.items()}
            pictured = {key: kind for key, kind in pictured.items() if kind}
            labels = {key: _label_of(tar, keys[key], len(keys[key][kind]), label) for key, kind in pictured.items()}
        with shard.open("rb") as file:
            file.seek(end)
            if file.read(_HEADER) != bytes(_HEADER):  # tarfile takes some broken files for whole ones
                raise tarfile.ReadError("it ends in the middle")
    except (OSError, tarfile.TarError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read {shard} as an uncompressed tar file of images and labels ({error})") from None
    if not pictured:
        raise ValueError(f"{shard} has no image (a file that ends in {', '.join(IMAGES)})")
    used = {key: keys[key][kind][-1] for key, kind in pictured.items() if labels[key] is not None}
    bare = sorted(key for key in pictured if key not in used and not _belongs(key, used))
    if bare:
        wanted = f"{label} in a .json file" if label else "a .cls file, or label in a .json file"
        raise ValueError(f"{shard}: {bare[0].lstrip('/')} has no label ({wanted})")
    unused: tuple[list[str], list[str]] = [], []
    for member, source in zip(members, content, strict=True):
        key, kind = _key_and_kind(member.name)
        if (key in used and (kind != pictured[key] or source is used[key])) or _belongs(key, used):
            continue
        if kind in _PICTURES:
            unused[0].append(member.name)
        elif kind in LABELS:
            unused[1].append(member.name)
    return Content([(m.offset_data, m.size, labels[key]) for key, m in used.items()], unused)  # type: ignore[misc]


def _with_content(members: list[tarfile.TarInfo]) -> list[tarfile.TarInfo | None]:
    """For each member the one that has its content: a link's is another one's, and its own size is 0."""
    files = {os.path.normpath(member.name): member for member in members if member.isreg()}

    def source(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if member.isreg():
            return member
        folder = os.path.dirname(member.name) if member.issym() else ""
        return files.get(os.path.normpath(os.path.join(folder, member.linkname)))

    return [source(member) for member in members]


def _key_and_kind(name: str) -> tuple[str, str]:
    """Hidden files, such as those that macOS puts beside each file, are of no kind."""
    folder, _, file = name.rpartition("/")
    stem, _, kind = file.rpartition(".")
    return f"{folder}/{stem}", "" if file.startswith(".") else kind.lower()


def _belongs(key: str, images: Collection[str]) -> bool:
    """Whether an image's key is in front of a dot in this one."""
    folder, _, stem = key.rpartition("/")
    parts = stem.split(".")
    return any(f"{folder}/{'.'.join(parts[:count])}" in images for count in range(1, len(parts)))


def _label_of(tar: tarfile.TarFile, kinds: dict[str, list[tarfile.TarInfo]], images: int, label: str) -> int | None:
    """The number of a key's class; None where its files do not say. images: how many the key has.

    Raises ValueError for what is no number, and where it is not known which label is the image's.
    """
    kind = "cls" if "cls" in kinds and not label else "json"
    found = [_number(tar.extractfile(member), member.name, kind, label or "label") for member in kinds.get(kind, [])]
    if len(found) != images and len(set(found)) > 1:
        raise ValueError(f"{kinds[kind][0].name} stands there {len(found)} times, with several labels")
    return found[-1] if found else None


def _number(file: Any, name: str, kind: str, label: str) -> int | None:
    value = file.read()
    try:
        value = value if kind == "cls" else json.loads(value).get(label)
        if value is not None and int(value) != float(value):
            raise ValueError(f"{value} is no whole number")
        return None if value is None else int(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: {error}") from None
