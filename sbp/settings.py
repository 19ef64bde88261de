"""What a patched model was asked for: checked once, and the same for all of its SBP layers."""

from dataclasses import dataclass, fields

MASKS = ("grid", "random")
MHSA_DROPS = ("qkv", "query", "head", "qkv_exact")
EVALUATIONS = ("exact", "published")
RECOMPUTE = ("none", "cheap", "block")
MASK_PER = ("batch", "half", "sample")
DROPPED = ("none", "input", "neighbours")

_CHOICES = {
    "mask": MASKS,
    "mhsa_drop": MHSA_DROPS,
    "evaluation": EVALUATIONS,
    "recompute": RECOMPUTE,
    "exact_recompute": RECOMPUTE,
    "mask_per": MASK_PER,
    "dropped": DROPPED,
}


@dataclass(frozen=True)
class Settings:
    """Arguments of `sbp.apply` that stay as they are. Raises ValueError for one that there is not."""

    mask: str = "grid"
    mhsa_drop: str = "qkv"
    evaluation: str = "exact"
    recompute: str = "none"
    mask_per: str = "batch"
    rescale: bool = False
    dropped: str = "none"
    exact_recompute: str = "none"

    def __post_init__(self) -> None:
        for field in fields(self):
            value, allowed = getattr(self, field.name), _CHOICES.get(field.name)
            if allowed is not None and value not in allowed:
                raise ValueError(f"{field.name} must be one of {', '.join(allowed)}, got {value!r}")
