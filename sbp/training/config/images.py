"""Keys of the data."""

from dataclasses import dataclass

from sbp.training.config.keys import key

SHUFFLES = ("full", "shards")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass
class DataConfig:
    """Where the images come from, and how they are brought to the size and range that the network sees."""

    source: str = key(
        "digits",
        "digits (scikit-learn's, no download), cluttered_digits (a digit among pieces of others, generated), "
        "synthetic (generated noise), folder (root/split/class/image), webdataset (tar shards in root; the splits "
        "are patterns such as train-{0000..1023}.tar, or names from root/_info.json), or timm (any name that "
        "`timm.data.create_dataset` takes, streams aside); for detection coco (root/split/image and the annotation "
        "files), or shapes (generated)",
    )
    name: str | None = key(None, "of the data set, with source=timm")
    root: str | None = key(None, "the folder that holds the data", free="always")
    annotations: str = key(
        "annotations/instances_{split}.json",
        "the annotation file of a split, in COCO's format, below root; {split} stands for the last part of "
        "train_split or val_split",
    )
    background: bool = key(
        False,
        "in detection, train also on images of which the annotation file has nothing, so that all that is found in "
        "them is wrong",
    )
    train_split: str = key("train", "the part of the data to train on")
    val_split: str = key("val", "the part of the data to evaluate on")
    download: bool = key(False, "with source=timm", free="always")
    num_classes: int = key(10, "of the labels, at least 2; in detection without the background, so that 1 is enough")
    image_size: int = key(
        224, "in pixels, of evaluation and of the model; in detection of the shorter side", at_least=1
    )
    max_size: int = key(1333, "in detection, of the longer side, at most", at_least=1)
    train_image_size: int | None = key(
        None,
        "of training images, where it is not image_size; a ViT needs ++backbone.kwargs.dynamic_img_size=true for it",
        at_least=1,
    )
    mean: list[float] = key(
        [0.485, 0.456, 0.406],
        "of the three channels, where black is 0 and white 1, that images are normalised by",
        length=3,
        at_least=0,
        at_most=1,
    )
    std: list[float] = key([0.229, 0.224, 0.225], "as mean", length=3, above=0, at_most=1)
    interpolation: str = key("bicubic", "of resizing", one_of=INTERPOLATIONS)
    crop_pct: float = key(
        0.875,
        "in evaluation the shorter side is resized to image_size / crop_pct, then the centre is cropped",
        above=0,
        at_most=1,
    )
    workers: int = key(4, "loader processes for each training process", at_least=0, free="always")
    prefetch: int = key(4, "batches that each of them reads ahead", at_least=1, free="always")
    cache: bool = key(
        False,
        "each loader process keeps what it has decoded, which a small set of image files is read faster with",
        free="always",
    )
    on_device: bool = key(
        False,
        "all images are decoded once and kept on the device as uint8, where training images are cropped and mirrored: "
        "for images as small as CIFAR-10's, of which a GPU takes more than loader processes decode",
    )
    shuffle: str = key(
        "full", "shards reads webdataset shards a few at a time, for disks that seek slowly", one_of=SHUFFLES
    )
    max_corrupt_images: int = key(
        100,
        "so many different unreadable images are replaced by others in training, and listed; one more ends the run; in "
        "evaluation each is an error",
        at_least=0,
        free="always",
    )
    train_images: int = key(1024, "how many a generated data set has", at_least=1)
    val_images: int = key(256, "how many a generated data set has", at_least=1)

    @property
    def size_in_training(self) -> int:
        return self.image_size if self.train_image_size is None else self.train_image_size
