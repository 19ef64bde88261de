"""What a user can find an image by."""

from pathlib import Path
from typing import Any

from timm.data import ImageDataset


def path(dataset: Any, index: int) -> str:
    """The image's file, or what comes nearest to one: a member of a shard, a row of a table."""
    if hasattr(dataset, "samples"):
        return dataset.samples[index][0]
    name = dataset.filename(index, absolute=True) if hasattr(dataset, "filename") else None
    if isinstance(dataset, ImageDataset) and not (name and Path(name).is_file()):  # a row of Parquet files
        return f"image {index} ({name})" if name else f"image {index}"
    return name or f"image {index}"
