"""The settings that a plan chooses among, and what is known of their accuracy."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import sbp
from sbp.settings import RECOMPUTE
from sbp.training.config.run import Config
from sbp.training.memory.forecast import TODAY, with_sbp

EXACT = "exact gradient"
_KNOWN = {  # by task, network, mhsa_drop and keep-ratio: the talk's, and those of results/laptop/digits-vit
    ("classification", "vit", "qkv", 0.5): "ImageNet as published -0.5 to -0.6; digits -8",
    ("classification", "vit", "qkv", 0.25): "digits -13",
    ("classification", "vit", "query", 0.5): "digits +1",
    ("classification", "convnext", "qkv", 0.5): "ImageNet as published -0.5 to -0.6",
    ("detection", "convnext", "qkv", 0.5): "COCO as published: box AP -0.2",
}
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
        if self.exact and self.recompute == "none":
            return with_sbp(config, enabled=False)
        how = {"keep_ratio": self.keep_ratio, "recompute": self.recompute, "exact_epochs": 0}
        return with_sbp(config, enabled=True, mhsa_drop=self.mhsa_drop, **how)

    def overrides(self) -> list[str]:
        if self.exact and self.recompute == "none":
            return ["sbp=none"]
        return [
            f"sbp.keep_ratio={self.keep_ratio:g}",
            f"sbp.mhsa_drop={self.mhsa_drop}",
            f"sbp.recompute={self.recompute}",
        ]


def attends(config: Config) -> bool:
    """Whether the network has attention, which SBP can drop in other ways than `qkv`.

    Builds it, on no device. Raises ValueError for one that cannot be built.
    """
    with torch.device("meta"):
        model = TODAY.build(replace(config, sbp=replace(config.sbp, enabled=False)))
    return "query" in sbp.supports(model).mhsa_drops


def settings(attends: bool) -> Iterator[Setting]:
    """Exact gradients, and SBP with one half and one quarter kept, with each way to recompute."""
    for recompute in RECOMPUTE:
        yield Setting(1.0, "qkv", recompute)
    for mhsa_drop in ("qkv", "query") if attends else ("qkv",):
        for keep_ratio in (0.5, 0.25):
            for recompute in RECOMPUTE if (mhsa_drop, keep_ratio) == ("qkv", 0.5) else RECOMPUTE[:2]:
                yield Setting(keep_ratio, mhsa_drop, recompute)


def accuracy(config: Config, setting: Setting) -> str:
    """What is known of it, in points of top-1 or AP against exact gradients."""
    if setting.exact:
        return EXACT
    network = next((one for one in ("vit", "convnext") if config.backbone.name.startswith(one)), "")
    return _KNOWN.get((config.task, network, setting.mhsa_drop, setting.keep_ratio), NOT_STUDIED)


def of_run(config: Config) -> Setting:
    """That of a run's config. A list of keep-ratios counts as its mean."""
    sbp: Any = config.sbp
    if not sbp.enabled:
        return Setting(1.0, "qkv", "none")
    ratio = sum(sbp.keep_ratio) / len(sbp.keep_ratio) if isinstance(sbp.keep_ratio, list) else sbp.keep_ratio
    return Setting(1.0 if sbp.exact_epochs else ratio, sbp.mhsa_drop, sbp.recompute)
