"""The settings that a plan chooses among, and what is known of their accuracy."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sbp
from sbp.settings import RECOMPUTE
from sbp.training.config.keys import shown
from sbp.training.config.model import SbpConfig
from sbp.training.config.run import Config
from sbp.training.memory.forecast import with_sbp
from sbp.training.memory.phases import phases

EXACT = "exact gradient"
OF_EPOCHS = ("keep_ratio_end", "exact_epochs", "exact_recompute")  # keys of a run whose steps are not all alike
# By task, network, dropped, mhsa_drop and keep-ratio: the talk's, and those of results/cifar10_gpu (of results/cifar10,
# a smaller network, where that has none) and of results/laptop/digits-vit.
_KNOWN = {
    ("classification", "vit", "none", "qkv", 0.5): "ImageNet as published -0.5 to -0.6; CIFAR-10 -0.8; digits -8",
    ("classification", "vit", "none", "qkv", 0.25): "CIFAR-10 -2.5; digits -13",
    ("classification", "vit", "none", "query", 0.5): "CIFAR-10, smaller network -0.8; digits +1",
    ("classification", "vit", "none", "query", 0.25): "CIFAR-10 -1.0",
    ("classification", "vit", "input", "query", 0.25): "CIFAR-10 -1.0",
    ("classification", "convnext", "none", "qkv", 0.5): "ImageNet as published -0.5 to -0.6; CIFAR-10 -1.3",
    ("classification", "convnext", "none", "qkv", 0.25): "CIFAR-10 -2.9",
    ("classification", "convnext", "input", "qkv", 0.5): "CIFAR-10 -0.2",
    ("classification", "convnext", "input", "qkv", 0.25): "CIFAR-10 -2.4",
    ("detection", "convnext", "none", "qkv", 0.5): "COCO as published: box AP -0.2 to -0.7",
}
# Names of timm's models of those networks: no relatives, such as vit_small_patch16_dinov3, ViTamin and ConvNeXt v2.
_STUDIED = {"vit": r"vit_[a-z]+_patch\d+_\d+(\..*)?", "convnext": r"convnext_[a-z]+(\..*)?"}
# Keys whose defaults were studied.
_AS_STUDIED = ("mask", "layers", "mask_per", "rescale", "fixed_mask", "exact_epochs", "keep_ratio_end")
NOT_STUDIED = "not studied"


@dataclass(frozen=True)
class Setting:
    """One way to train. keep_ratio: 1 for exact gradients; mhsa_drop: where there is attention, else "qkv"."""

    keep_ratio: float
    mhsa_drop: str
    recompute: str

    @property
    def exact(self) -> bool:
        return self.keep_ratio == 1

    @property
    def name(self) -> str:
        """As the benchmark calls its arms."""
        if self.exact:
            return "plain" if self.recompute == "none" else self.recompute
        parts = [] if self.keep_ratio == 0.5 else [f"{100 * self.keep_ratio:g}"]
        first = self.mhsa_drop if self.mhsa_drop != "qkv" else "sbp"
        named = [first, *parts, *([] if self.recompute == "none" else [self.recompute])]
        return "sbp_query" if named == ["query"] else "_".join(named)

    def applied(self, config: Config) -> Config:
        """The config with this setting; what it says of epochs stays where the gradient is not exact in all of them."""
        if self.exact:
            config = with_sbp(config, keep_ratio_end=None, exact_epochs=0, exact_recompute=None)
            if self.recompute == "none":
                return with_sbp(config, enabled=False)
        how = {"keep_ratio": self.keep_ratio, "recompute": self.recompute, "mhsa_drop": self.mhsa_drop}
        return with_sbp(config, enabled=True, **how)

    def overrides(self, config: Config) -> list[str]:
        """What to give `sbp train` for it, beside the config's other keys."""
        if self.exact and self.recompute == "none":
            return ["sbp=none"]
        of_epochs = [] if self.exact else [key for key in OF_EPOCHS if getattr(config.sbp, key)]
        return [
            f"sbp.keep_ratio={self.keep_ratio:g}",
            f"sbp.mhsa_drop={self.mhsa_drop}",
            f"sbp.recompute={self.recompute}",
            *(f"sbp.{key}={shown(getattr(config.sbp, key))}".replace(" ", "") for key in of_epochs),
        ]


def settings(support: sbp.Support) -> Iterator[Setting]:
    """Exact gradients, and SBP with one half and one quarter kept, with each way to recompute; what a network has."""
    for recompute in RECOMPUTE if support else ("none",):
        yield Setting(1.0, "qkv", recompute)
    for mhsa_drop in ("qkv", "query") if "query" in support.mhsa_drops else ("qkv",) if support else ():
        for keep_ratio in (0.5, 0.25):
            for recompute in RECOMPUTE if (mhsa_drop, keep_ratio) == ("qkv", 0.5) else RECOMPUTE[:2]:
                yield Setting(keep_ratio, mhsa_drop, recompute)


def accuracy(config: Config, setting: Setting) -> str:
    """What is known of it, in points of top-1 or AP against exact gradients."""
    if setting.exact:
        return EXACT
    network = next((one for one, name in _STUDIED.items() if re.fullmatch(name, config.backbone.name)), None)
    otherwise = any(getattr(config.sbp, key) != getattr(SbpConfig(), key) for key in _AS_STUDIED)
    if network is None or otherwise or config.backbone.pretrained is not None:
        return NOT_STUDIED
    how = config.sbp.dropped, setting.mhsa_drop, setting.keep_ratio
    return _KNOWN.get((config.task, network, *how), NOT_STUDIED)


def of_run(config: Config) -> Setting:
    """That of the first steps of a run. A list of keep-ratios counts as its mean."""
    sbp: Any = next(iter(phases(config).values())).sbp
    if not sbp.enabled:
        return Setting(1.0, "qkv", "none")
    ratio = sum(sbp.keep_ratio) / len(sbp.keep_ratio) if isinstance(sbp.keep_ratio, list) else sbp.keep_ratio
    return Setting(ratio, sbp.mhsa_drop, sbp.recompute)
