"""What an image goes through before the network sees it: in a loader process as uint8, then on the device."""

import io
from dataclasses import dataclass
from typing import Any

import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor, nn
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, Resize

from sbp.training.config.images import DataConfig
from sbp.training.config.recipe import RecipeConfig

UPRIGHT = {  # what turns a stored image upright, by EXIF's number
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_TURN = ("nearest", "bilinear", "bicubic")  # the interpolations that Pillow turns and shears images by


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


def decode(content: bytes) -> Image.Image:
    """The RGB image in an image file's content, as stored. Raises OSError for what Pillow cannot read."""
    return decode_with_orientation(content)[0]


def decode_with_orientation(content: bytes) -> tuple[Image.Image, int]:
    """As `decode`, and the number with which EXIF says how the stored image has to be turned to be upright; 1 for not
    at all.
    """
    try:
        image = Image.open(io.BytesIO(content))
        return image.convert("RGB"), orientation(image)
    except UnidentifiedImageError:
        raise OSError("not an image") from None  # Pillow's message has an address in it, another one each time
    except (OSError, MemoryError):
        raise
    except Exception as error:  # SyntaxError, ValueError and others, by format
        raise OSError(str(error)) from error


def orientation(image: Image.Image) -> int:
    """What EXIF says of an opened image, 1 to 8; 1 where it says nothing that can be read."""
    try:
        number = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises several for broken EXIF
        return 1
    return number if number in UPRIGHT else 1


def train_transform(data: DataConfig, recipe: RecipeConfig) -> Any:
    """timm's training transform, a PIL image to uint8 (3, H, W); resizing only when `recipe.augment` is false.

    A policy turns and shears by bicubic interpolation where Pillow does not by the one that is asked for. `Normalize`
    has the rest. Raises ValueError for a policy that timm does not know.
    """
    size, asked = data.size_in_training, data.interpolation
    of_policy = asked if recipe.auto_augment is None or asked in _TURN else "bicubic"
    try:
        transform = create_transform(
            size,
            is_training=True,
            use_prefetcher=True,  # leaves the images uint8
            no_aug=not recipe.augment,
            scale=(recipe.crop_scale, 1.0),
            hflip=recipe.flip,
            color_jitter=recipe.color_jitter,
            auto_augment=recipe.auto_augment,
            interpolation=of_policy,
            mean=tuple(data.mean),  # what geometric augmentations fill with
            std=tuple(data.std),
        )
    except AssertionError as error:  # which timm raises for a policy that it does not know
        raise ValueError(f"recipe.auto_augment={recipe.auto_augment}: {error}") from None
    if not recipe.augment or (recipe.crop_padding is None and asked == of_policy):
        return transform
    if recipe.crop_padding is not None:  # which timm has not
        crop = [Resize(size, InterpolationMode(asked)), RandomCrop(size, padding=recipe.crop_padding)]
    else:
        crop = [RandomResizedCropAndInterpolation(size, scale=(recipe.crop_scale, 1.0), interpolation=asked)]
    return Compose([*crop, *transform.transforms[1:]])  # in place of the resized crop


def validation_transform(data: DataConfig) -> Any:
    """timm's evaluation transform with our figures, never those of a model's own defaults; as `train_transform`."""
    return create_transform(
        data.image_size, use_prefetcher=True, crop_pct=data.crop_pct, interpolation=data.interpolation
    )


class Normalize(nn.Module):
    """The last part of the preprocessing, which runs on the device: uint8 images (B, 3, H, W) to what the network sees.

    A quarter of the bytes goes through the loader's queues and to the device. Returns float32, or float64 after
    `.double()`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, data: DataConfig, recipe: RecipeConfig) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor([255 * x for x in getattr(data, name)]).view(3, 1, 1))
        self.random_erasing = recipe.random_erasing if recipe.augment else 0.0

    def forward(self, images: Tensor, targets: Any = None, *, erase: bool = False) -> Tensor:
        """erase: also timm's random erasing, with the generators of `random` and torch.

        targets: of the images; only a task whose images are padded looks at them.
        """
        images = (images - self.mean).div_(self.std)
        if erase and self.random_erasing > 0:
            RandomErasing(self.random_erasing, mode="pixel", device=images.device)(images)
        return images
