"""Where the claims are checked: the scales, and what is trained at each."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A network and its images. Arms are trained in each setting.

    overrides: of train.py. sbp_layers: how many layers are SBP as published. other_layers: as many at the other end of
    the network.
    epochs, lr, batch_size: of the full schedule. seeds: runs of each arm; those of one seed share initial weights, the
    order of the images and the augmentation. image_size, small_size: of the images, and in the arms of lower
    resolution, in pixels.
    sbp_time: how long a step with SBP takes, relative to one without, for the arms at equal time; measured before they
    are trained.
    images, draws: of the gradient similarity: images in the batch, and masks of each method. needs_root: the images lie
    in a folder. gradients_only: nothing is trained but the network without SBP.
    classes: the first of them, in the order of their names, and the one after the last; None for all. images_of_each:
    of a class, in training. starts_from: the setting of the same scale whose runs without SBP the runs of the same
    seed start from. plain_only: others start from it.
    """

    name: str
    label: str
    overrides: tuple[str, ...]
    sbp_layers: int
    other_layers: tuple[str, ...]
    epochs: int
    lr: float
    batch_size: int
    seeds: int
    image_size: int
    small_size: int
    sbp_time: float = 0.7
    is_vit: bool = True
    needs_root: bool = False
    images: int = 128
    draws: int = 8
    gradients_only: bool = False
    classes: tuple[int, int] | None = None
    images_of_each: int | None = None
    starts_from: str | None = None
    plain_only: bool = False

    @property
    def schedule(self) -> list[str]:
        return [f"recipe.epochs={self.epochs}", f"recipe.lr={self.lr:g}", f"global_batch_size={self.batch_size}"]

    def timed(self, costs: Mapping[str, Any]) -> "Setting":
        """With the time of a step with SBP, relative to one without, that a costs.json has, if it has one."""
        arms = costs.get("arms", {})
        if not {"plain", "sbp"} <= arms.keys():
            return self
        return replace(self, sbp_time=arms["sbp"]["step_ms"] / arms["plain"]["step_ms"])


@dataclass(frozen=True)
class Scale:
    """claims: what is answered unless others are asked for. rounds: of measuring what a step costs.

    device: "cpu", or "auto" for a GPU where there is one. on_one_gpu: runs beside one another on each GPU.
    by_seed: claim by claim, and of each all arms of one seed, in all settings, before any of the next: the study can
    end after any of them.
    """

    settings: tuple[Setting, ...]
    claims: tuple[str, ...]
    rounds: int
    device: str
    on_one_gpu: int = 1
    by_seed: bool = False

    def by_default(self, with_root: bool) -> list[Setting]:
        """Those that need images from a folder, where there is one, else the others."""
        return [one for one in self.settings if one.needs_root == with_root and not one.gradients_only]


# As the published ViTs are, in small: a class token, SBP in the last two thirds of the blocks, no drop path.
SMALL_VIT = (
    "backbone=vit_demo",
    "backbone.drop_path=0",
    "backbone.kwargs.patch_size=4",
    "backbone.kwargs.embed_dim=64",
    "backbone.kwargs.num_heads=4",
    "backbone.kwargs.class_token=true",
    "backbone.kwargs.global_pool=token",
)
PLAIN_RECIPE = ("recipe=demo", "recipe.label_smoothing=0", "threads=1")  # no augmentation either

DIGITS_VIT = Setting(
    name="digits-vit",
    label="a small ViT (6 blocks of 64 channels, 8 x 8 tokens and a class token) on generated digits at 32 px",
    overrides=(*SMALL_VIT, "data=cluttered_digits", "data.train_images=3072", *PLAIN_RECIPE, "recipe.warmup_epochs=1"),
    sbp_layers=4,
    other_layers=tuple(f"blocks.{i}" for i in range(4)),
    epochs=10,
    lr=1e-3,
    batch_size=64,
    seeds=6,
    image_size=32,
    small_size=24,
)
# One pass over the images: too short for the arms that change the number of epochs.
CIFAR_SMALL_VIT = replace(
    DIGITS_VIT,
    name="cifar10-vit",
    label="a small ViT (6 blocks of 64 channels, 8 x 8 tokens and a class token) on CIFAR-10 at 32 px",
    overrides=(*SMALL_VIT, "data=cifar10", "data.workers=0", *PLAIN_RECIPE, "recipe.warmup_epochs=0"),
    epochs=1,
    needs_root=True,
)
PHOTOGRAPHS_RECIPE = (
    "data=cifar10",
    "recipe=short",
    "recipe.crop_padding=4",
    "recipe.label_smoothing=0",
    "recipe.warmup_epochs=0",
    "recipe.lr_base_batch_size=null",
)
# The choice between settings, on photographs with two small networks. A run takes ten minutes of a core.
SMALL_ON_PHOTOGRAPHS = (
    *PHOTOGRAPHS_RECIPE,
    "data.workers=0",
    "data.cache=true",
    "amp=off",
    "threads=1",
    "recipe.warmup_steps=300",
    "eval_batch_size=100",
)
SMALL_VIT_ON_PHOTOGRAPHS = Setting(
    name="small-vit",
    label="a small ViT (6 blocks of 48 channels, 8 x 8 tokens and a class token) on CIFAR-10 at 32 px",
    overrides=(*SMALL_VIT, "backbone.kwargs.embed_dim=48", "backbone.kwargs.num_heads=2", *SMALL_ON_PHOTOGRAPHS),
    sbp_layers=4,
    other_layers=tuple(f"blocks.{i}" for i in range(4)),
    epochs=4,
    lr=2e-3,
    batch_size=64,
    seeds=3,
    image_size=32,
    small_size=24,
    needs_root=True,
)
# A stem of stride 1 without blocks at 32 px, for the mask's grid to be 8 x 8; two thirds of the layers are SBP, as in
# ConvNeXt-Tiny.
SMALL_CONVNEXT = (
    "backbone=convnext_demo",
    "backbone.drop_path=0",
    "backbone.kwargs.patch_size=1",
    "backbone.kwargs.dims=[12,24,48,96]",
    "backbone.kwargs.depths=[0,1,3,1]",
    "+backbone.kwargs.ls_init_value=0.1",
)
SMALL_CONVNEXT_ON_PHOTOGRAPHS = replace(
    SMALL_VIT_ON_PHOTOGRAPHS,
    name="small-convnext",
    label="a small ConvNeXt (1, 3, 1 blocks of 24 to 96 channels, maps of 16 to 4 px, a mask of 8 x 8) on CIFAR-10",
    overrides=(*SMALL_CONVNEXT, *SMALL_ON_PHOTOGRAPHS),
    sbp_layers=5,
    other_layers=(
        "stages.2.blocks.0",
        "stages.2.blocks.1",
        "stages.2.blocks.2",
        "stages.3.downsample",
        "stages.3.blocks.0",
    ),
    lr=4e-3,
    is_vit=False,
)
# Both in sizes that reach 70 %, for a GPU, which several runs share.
ON_A_GPU = (
    *PHOTOGRAPHS_RECIPE,
    "data.on_device=true",
    "data.workers=2",
    "threads=2",
    "recipe.warmup_steps=150",
    "eval_batch_size=1000",
)
VIT_ON_A_GPU = replace(
    SMALL_VIT_ON_PHOTOGRAPHS,
    name="vit",
    label="a ViT (8 blocks of 128 channels, 8 x 8 tokens and a class token) on CIFAR-10 at 32 px",
    overrides=(*SMALL_VIT, "backbone.kwargs.embed_dim=128", "backbone.kwargs.depth=8", *ON_A_GPU),
    sbp_layers=5,
    other_layers=tuple(f"blocks.{i}" for i in range(5)),
    epochs=15,
    batch_size=512,
)
CONVNEXT_ON_A_GPU = replace(
    SMALL_CONVNEXT_ON_PHOTOGRAPHS,
    name="convnext",
    label="a ConvNeXt (2, 6, 2 blocks of 64 to 256 channels, maps of 16 to 4 px, a mask of 8 x 8) on CIFAR-10",
    overrides=(
        *SMALL_CONVNEXT,
        "backbone.kwargs.dims=[32,64,128,256]",
        "backbone.kwargs.depths=[0,2,6,2]",
        *ON_A_GPU,
    ),
    sbp_layers=8,
    other_layers=(
        *(f"stages.2.blocks.{i}" for i in range(1, 6)),
        "stages.3.downsample",
        *(f"stages.3.blocks.{i}" for i in range(2)),
    ),
    epochs=15,
    batch_size=512,
)
# The small ConvNeXt on the digits, and in one pass over the photographs.
DIGITS_CONVNEXT = replace(
    DIGITS_VIT,
    name="digits-convnext",
    label="a small ConvNeXt (1, 3, 1 blocks of 24 to 96 channels, a mask of 8 x 8) on generated cluttered digits",
    overrides=(
        *SMALL_CONVNEXT,
        "data=cluttered_digits",
        "data.train_images=3072",
        *PLAIN_RECIPE,
        "recipe.warmup_epochs=1",
    ),
    sbp_layers=5,
    other_layers=SMALL_CONVNEXT_ON_PHOTOGRAPHS.other_layers,
    seeds=3,
    is_vit=False,
)
CONVNEXT_ONCE = replace(
    SMALL_CONVNEXT_ON_PHOTOGRAPHS,
    name="convnext-once",
    label="a small ConvNeXt (1, 3, 1 blocks of 24 to 96 channels, a mask of 8 x 8), one pass over CIFAR-10",
    overrides=(*SMALL_CONVNEXT_ON_PHOTOGRAPHS.overrides, "recipe.warmup_steps=100"),
    epochs=1,
)


def fine_tuning(setting: Setting, network: str, what: str) -> tuple[Setting, Setting]:
    """Training on six of the classes, and what follows: a few images of each of the other four, at a lower rate."""
    before = replace(
        setting,
        name=f"{network}-before",
        label=f"{what} on six classes of CIFAR-10",
        overrides=(*setting.overrides, "data.num_classes=6"),
        classes=(0, 6),
        plain_only=True,
        seeds=6,
    )
    after = replace(
        setting,
        name=f"{network}-fine_tuned",
        label=f"{what}, trained on six classes of CIFAR-10, fine-tuned on the other four",
        overrides=(*setting.overrides, "data.num_classes=4", "recipe.warmup_steps=50"),
        classes=(6, 10),
        images_of_each=1000,
        epochs=8,
        lr=setting.lr / 4,
        seeds=6,
        starts_from=before.name,
    )
    return before, after


VIT_BEFORE, VIT_FINE_TUNED = fine_tuning(SMALL_VIT_ON_PHOTOGRAPHS, "vit", "the small ViT")
CONVNEXT_BEFORE, CONVNEXT_FINE_TUNED = fine_tuning(SMALL_CONVNEXT_ON_PHOTOGRAPHS, "convnext", "the small ConvNeXt")
CIFAR_VIT = Setting(
    name="cifar10-vit_tiny-32",
    label="ViT-Tiny with patches of 4 px on CIFAR-10 at 32 px",
    overrides=("backbone=vit_tiny", "+backbone.kwargs.patch_size=4", "data=cifar10", "recipe=short"),
    sbp_layers=8,
    other_layers=tuple(f"blocks.{i}" for i in range(8)),
    epochs=30,
    lr=1e-3,
    batch_size=256,
    seeds=5,
    image_size=32,
    small_size=24,
    needs_root=True,
)
AT_224 = ("data=cifar10", "data.image_size=224", "recipe=short")
CIFAR_VIT_224 = replace(
    CIFAR_VIT,
    name="cifar10-vit_tiny-224",
    label="ViT-Tiny as published on CIFAR-10 at 224 px",
    overrides=("backbone=vit_tiny", *AT_224),
    epochs=10,
    seeds=3,
    image_size=224,
    small_size=160,
)
CONVNEXT_LAYERS = (
    *(f"stages.0.blocks.{i}" for i in range(3)),
    "stages.1.downsample",
    *(f"stages.1.blocks.{i}" for i in range(3)),
    "stages.2.downsample",
    *(f"stages.2.blocks.{i}" for i in range(9)),
    "stages.3.downsample",
    *(f"stages.3.blocks.{i}" for i in range(3)),
)
CIFAR_CONVNEXT_224 = replace(
    CIFAR_VIT_224,
    name="cifar10-convnext_tiny-224",
    label="ConvNeXt-Tiny as published on CIFAR-10 at 224 px",
    overrides=("backbone=convnext_tiny", *AT_224),
    sbp_layers=14,
    other_layers=CONVNEXT_LAYERS[-14:],
    is_vit=False,
)
# Only gradients are looked at, so that the images of ImageNet's validation folder, or a part of it, will do.
PHOTOGRAPHS = (
    "data=imagenet",
    "data.train_split=val",
    "recipe=short",
    "recipe.warmup_epochs=1",
    "amp=off",
    "recipe.lr_base_batch_size=null",
    "recipe.label_smoothing=0",
)
GRADIENTS_ONLY: dict[str, Any] = {"batch_size": 50, "images": 64, "draws": 4, "gradients_only": True}
PHOTOGRAPHS_VIT = replace(
    CIFAR_VIT_224,
    name="photographs-vit_tiny",
    label="the gradients of ViT-Tiny as published on ImageNet photographs at 224 px",
    overrides=("backbone=vit_tiny", *PHOTOGRAPHS),
    **GRADIENTS_ONLY,
)
PHOTOGRAPHS_CONVNEXT = replace(
    CIFAR_CONVNEXT_224,
    name="photographs-convnext_tiny",
    label="the gradients of ConvNeXt-Tiny as published on ImageNet photographs at 224 px",
    overrides=("backbone=convnext_tiny", *PHOTOGRAPHS),
    **GRADIENTS_ONLY,
)

# The claims and questions in the order in which their runs matter for the choice.
WHICH_SETTING = tuple(
    ["better", "neighbours", "choice", "2", "5", "1", "learning_rate", "gradients", "masks", "alternatives", "3", "4"]
)
SHORT_RUNS: dict[str, Any] = {"rounds": 12, "device": "auto", "on_one_gpu": 10, "by_seed": True}

SCALES = {
    "laptop": Scale((DIGITS_VIT, CIFAR_SMALL_VIT), claims=("1", "2", "5", "exact_attention"), rounds=15, device="cpu"),
    "cifar10": Scale(
        (SMALL_VIT_ON_PHOTOGRAPHS, SMALL_CONVNEXT_ON_PHOTOGRAPHS),
        claims=WHICH_SETTING,
        **SHORT_RUNS,
    ),
    "cifar10_gpu": Scale(
        (VIT_ON_A_GPU, CONVNEXT_ON_A_GPU),
        claims=WHICH_SETTING,
        **SHORT_RUNS,
    ),
    "convnext": Scale(
        (DIGITS_CONVNEXT, CONVNEXT_ONCE),
        claims=("input_gradients",),
        **SHORT_RUNS,
    ),
    "fine_tuning": Scale(
        (VIT_BEFORE, CONVNEXT_BEFORE, VIT_FINE_TUNED, CONVNEXT_FINE_TUNED),
        claims=("fine_tuning",),
        **SHORT_RUNS,
    ),
    "gpu": Scale(
        (CIFAR_VIT, CIFAR_VIT_224, CIFAR_CONVNEXT_224, PHOTOGRAPHS_VIT, PHOTOGRAPHS_CONVNEXT),
        claims=("1", "2", "3", "4", "5", "exact_attention"),
        rounds=20,
        device="auto",
    ),
}
