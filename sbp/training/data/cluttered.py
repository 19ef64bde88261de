"""Digits among fainter pieces of other digits: generated images for studies on a laptop.

After the cluttered MNIST of Mnih et al., "Recurrent Models of Visual Attention", 2014. As where the digit is changes
from image to image and the pieces look like parts of it, a model has to look at every position.
"""

from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

SMALLEST = 16  # px; below it a digit has fewer pixels than its source
DIGITS = "0123456789"
CLASSES = len(DIGITS)
PIECES = 4  # in an image
WINDOW = 4  # a piece is so many pixels wide and high, of a digit's 8
SIZES = 16 / 32, 20 / 32  # of the 8 x 8 px that a digit is drawn in, its empty border too, as a share of the image
TILT = 0.1  # radians, largest rotation either way
DIMMING = 0.4  # brightness of a piece, as a share of a digit's: at its full brightness a small ViT learns little
NOISE = 8.0  # standard deviation, of 255
_CHUNK = 256  # images at a time: bounds the memory that generating takes


class ClutteredDigits(Dataset):
    """Images (image_size, image_size) with one whole digit and `PIECES` fainter pieces of others, shown as RGB images.

    digits, labels: uint8 (N, 8, 8) and int (N,), the sources of digits and pieces. Image number i is of class i % 10.
    It is a function of the sources, i and stream alone, whatever the number of images and the run's seed. All are
    generated here, and kept as uint8. Raises ValueError for an image_size below `SMALLEST`.
    """

    classes: ClassVar = list(DIGITS)

    def __init__(
        self, digits: np.ndarray, labels: list[int], stream: int, length: int, image_size: int, transform: Any
    ) -> None:
        if image_size < SMALLEST:
            raise ValueError(f"data.image_size must be at least {SMALLEST} for cluttered digits, got {image_size}")
        self.labels = [index % CLASSES for index in range(length)]
        self.pixels = _generate(digits, np.asarray(labels), stream, length, image_size)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index]).convert("RGB")), self.labels[index]


def _generate(digits: np.ndarray, labels: np.ndarray, stream: int, length: int, side: int) -> np.ndarray:
    """uint8 (length, side, side)."""
    choices, noise = np.random.default_rng([stream, 0]), np.random.default_rng([stream, 1])
    order, per_class = np.argsort(labels, kind="stable"), np.bincount(labels, minlength=CLASSES)
    first = np.cumsum(per_class) - per_class
    sources = torch.from_numpy(digits).float()
    windows = sources.unfold(1, WINDOW, 1).unfold(2, WINDOW, 1)  # (N, 5, 5, 4, 4)
    images = np.empty((length, side, side), np.uint8)
    for start in range(0, length, _CHUNK):
        chunk = images[start : start + _CHUNK]
        # Both generators fill image after image, so that the images before do not depend on how many follow.
        u = choices.random((len(chunk), 1 + PIECES, 7))  # (images, objects, choices)
        target = np.arange(start, start + len(chunk)) % CLASSES
        whole = order[first[target] + (u[:, 0, 0] * per_class[target]).astype(int)]
        place = torch.from_numpy(u[..., 1:5]).float()
        canvas = _placed(sources[whole], side, *place[:, 0].unbind(-1))
        # Windows at offsets 1 to 3: the border of a digit is mostly empty.
        source, y, x = (u[:, 1:, 0] * len(digits)).astype(int), *(1 + (u[:, 1:, 5:] * 3).astype(int)).transpose(2, 0, 1)
        pieces = windows[source, y, x].flatten(0, 1)
        pieces = _placed(pieces, side, *place[:, 1:].flatten(0, 1).unbind(-1)).view(len(chunk), PIECES, side, side)
        room = 1 - _placed(torch.ones(len(chunk), 8, 8), side, *place[:, 0].unbind(-1))  # pieces cover no digit
        clean = torch.maximum(canvas, DIMMING * room * pieces.amax(1)).numpy()
        noisy = clean + NOISE * noise.standard_normal(chunk.shape, dtype=np.float32)
        chunk[:] = noisy.round().clip(0, 255)
    return images


def _placed(pictures: Tensor, side: int, size: Tensor, angle: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Each picture (N, h, h), enlarged, turned, and somewhere within an empty image: (N, side, side).

    size, angle, x, y: (N,) in [0, 1), of the range of each; the enlargement is that of an 8 x 8 digit.
    """
    low, high = SIZES
    share = (low + size * (high - low)) * pictures.shape[-1] / 8  # of the image's side
    angle = (2 * angle - 1) * TILT
    x, y = (2 * x - 1) * (1 - share), (2 * y - 1) * (1 - share)  # of the centre, the image being [-1, 1]
    cos, sin = angle.cos() / share, angle.sin() / share
    to_source = torch.stack([cos, sin, -cos * x - sin * y, -sin, cos, sin * x - cos * y], 1).view(-1, 2, 3)
    grid = F.affine_grid(to_source, [len(pictures), 1, side, side], align_corners=False)
    return F.grid_sample(pictures[:, None], grid, align_corners=False)[:, 0]
