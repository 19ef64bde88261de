"""What a patched model was asked for: checked once, and the same for all of its SBP layers."""

from dataclasses import dataclass, fields
from operator import index
from typing import Any

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
        if not isinstance(self.rescale, bool):
            raise ValueError(f"rescale must be True or False, got {self.rescale!r}")


def check_integer(name: str, value: Any, below: int = 2**63) -> int:
    """The value as an int. Raises ValueError where it is none in [0, below)."""
    try:
        number = index(value)
    except TypeError:
        number = -1
    if not 0 <= number < below or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer in [0, 2^{below.bit_length() - 1}), got {value!r}")
    return number
