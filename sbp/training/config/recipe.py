"""Keys of the recipe."""

from dataclasses import dataclass

from sbp.training.config.keys import key

LATER_SCHEDULERS = ("wsd", "rsqrt", "constant")  # which the earliest timm that is supported has not
SCHEDULERS = ("cosine", "tanh", "poly", "multistep", *LATER_SCHEDULERS)  # that need only the step's number


@dataclass
class RecipeConfig:
    """How to train."""

    epochs: int = key(300, "passes over the training images", at_least=1)
    optimizer: str = key("adamw", "any of timm's that needs gradients alone")
    lr: float = key(
        4e-3,
        "the peak learning rate at a global batch of lr_base_batch_size, scaled linearly to the actual one",
        above=0,
        free="elsewhere",
    )
    lr_base_batch_size: int | None = key(None, "null: lr is absolute", at_least=1)
    weight_decay: float = key(0.05, "of weights; none of biases and norms", at_least=0)
    layer_decay: float | None = key(
        None,
        "the learning rate of each layer is that of the next one times this, counted from the classifier down to the "
        "stem, each block a layer; null for one rate. In detection the layers are the stem, the first two stages, "
        "each three blocks of the third one, the fourth one, and the detector on top",
        above=0,
        at_most=1,
    )
    scheduler: str = key(
        "cosine",
        "constant stays at the peak; multistep multiplies the rate by decay_rate at each of decay_milestones; the "
        "others end at min_lr, poly with the power decay_rate",
        one_of=SCHEDULERS,
    )
    decay_milestones: list[int] | None = key(
        None, "increasing epochs of the run, warm-up and all, with scheduler=multistep"
    )
    decay_rate: float = key(0.1, "see scheduler", above=0)
    warmup_epochs: int = key(20, "the rate first rises for so many epochs, which are part of the run's", at_least=0)
    warmup_steps: int | None = key(None, "in place of warmup_epochs", at_least=0)
    warmup_lr: float = key(1e-6, "the rate at the start of warm-up", at_least=0)
    min_lr: float = key(1e-6, "the rate at the end", at_least=0, free="elsewhere")
    clip_grad: float | None = key(None, "the largest norm of the gradient; null for any", above=0, free="elsewhere")
    label_smoothing: float = key(0.1, "of the targets", at_least=0, below=1)
    mixup: float = key(0.0, "its alpha; 0 for none", at_least=0)
    cutmix: float = key(0.0, "its alpha; 0 for none", at_least=0)
    mixup_switch: float = key(0.5, "how often cutmix takes the place of mixup where both are on", at_least=0, at_most=1)
    ema_decay: float | None = key(None, "of the moving average of the weights; null for none", above=0, below=1)
    augment: bool = key(
        True, "false leaves resizing and normalisation, and mixup and cutmix, which have keys of their own"
    )
    crop_scale: float = key(0.08, "smallest area of the random crop, as a share of the image", above=0, at_most=1)
    crop_padding: int | None = key(
        None,
        "in its place, a crop of the image's own scale, padded by so many black pixels on each side, as is usual for "
        "images of 32 pixels; null for none",
        at_least=0,
    )
    short_sides: list[int] | None = key(
        None, "detection: a training image's shorter side becomes one of these, at random; null for data.image_size"
    )
    crop_share: float = key(
        0.0,
        "detection: so many of the training images are first resized to one of crop_short_sides and cropped to sides "
        "within crop_sides, at random",
        at_least=0,
        at_most=1,
    )
    crop_short_sides: list[int] = key([400, 500, 600], "see crop_share, in pixels")
    crop_sides: list[int] = key([384, 600], "see crop_share: smallest and largest side in pixels", length=2)
    flip: float = key(0.5, "how often an image is mirrored", at_least=0, at_most=1)
    color_jitter: float = key(
        0.0, "its strength; timm leaves it out where there is auto_augment, as the published recipes do", at_least=0
    )
    auto_augment: str | None = key(None, "timm's name of a policy, such as rand-m9-mstd0.5-inc1")
    random_erasing: float = key(0.0, "how often a part of an image is erased", at_least=0, at_most=1)

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed, in pairs."""
        return bool(self.mixup or self.cutmix)
