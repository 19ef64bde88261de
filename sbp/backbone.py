"""What a backbone family tells about a model, and all that `patch.py` needs to know of it.

A family is one file with three things: `find(model)`, which returns a `Backbone` or None; `SBP_CLASSES`, which
maps each timm class to the subclass that takes its place; and `SUPPORTED`, a phrase for error messages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import unwrap
from typing import Any, TypeVar

from torch import nn

from sbp.settings import MHSA_DROPS
from sbp.state import State

M = TypeVar("M", bound=nn.Module)

# The attribute of an SBP layer that names the method to compile, where that is not `forward`: one in which nothing
# depends on which layer it is, so that all of a kind share their code.
COMPILED = "sbp_compiled_method"


@dataclass(frozen=True)
class Backbone:
    """layers: every layer that can be SBP, by qualified name, in the order of the network.
    published: the names of those that the paper chose.
    hooks: (module, name of the state's method) of the forward pre-hooks that draw the masks.
    state: makes the family's `State` from layer names and settings.
    containers: further modules whose class is swapped, whichever layers are chosen.
    mhsa_drops: the choices of `mhsa_drop` that there are; none where there is no attention.
    """

    layers: dict[str, nn.Module]
    published: list[str]
    hooks: list[tuple[nn.Module, str]]
    state: Callable[..., State]
    containers: list[nn.Module] = field(default_factory=list)
    mhsa_drops: tuple[str, ...] = MHSA_DROPS


def only(model: nn.Module, kind: type[M] | tuple[type[M], ...]) -> tuple[str, M] | None:
    """The one module of this type, or these, in the model, with its name. Raises ValueError when there are several."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    if len(found) > 1:
        raise ValueError(
            f"the model has {len(found)} backbones ({', '.join(name for name, _ in found)}): "
            "call sbp.apply on each of them"
        )
    return found[0] if found else None


def blocks_of(name: str, network: Any) -> dict[str, nn.Module]:
    """The blocks of a network that stands under this name in the model, by their qualified names."""
    prefix = f"{name}." if name else ""
    return {f"{prefix}blocks.{i}": block for i, block in enumerate(network.blocks)}


def of_one_network(stages: Sequence[str]) -> None:
    """Raises ValueError where the names of stages are of several networks, which timm's features_only took apart."""
    parents = list(dict.fromkeys(stage.rpartition(".")[0] for stage in stages))
    if len(parents) > 1:
        raise ValueError(f"there are several backbones ({', '.join(parents)}): call sbp.apply on each of them")


def is_own(
    model: Any, kind: Any, methods: Sequence[str] = ("forward", "forward_features", "forward_head", "pool")
) -> bool:
    """Whether these methods of a network are those of timm's class, neither overridden nor replaced on the instance.

    What wraps one of them there, as accelerate does for autocast, does not replace it.
    """
    return all(
        (unwrap(vars(model)[name]) if name in vars(model) else getattr(type(model), name, None))
        is getattr(kind, name, None)
        for name in methods
    )


def require(name: str, module: Any, *kinds: type[nn.Module]) -> None:
    """Raises ValueError where a module is none of these timm classes, or a subclass, of which SBP knows no forward."""
    if type(module) in kinds:
        if not is_own(module, type(module), ["forward"]):
            raise ValueError(f"{name} has a `forward` of its own, set on the instance, which SBP would not run")
        return
    known = " or ".join(kind.__name__ for kind in kinds)
    parent = next((kind for kind in kinds if isinstance(module, kind)), None)
    if parent is not None:
        raise ValueError(
            f"{name} is a {type(module).__name__}, a subclass of timm's {parent.__name__} whose own forward SBP would "
            f"not run; it knows {known} alone"
        )
    raise ValueError(f"{name} is a {type(module).__name__}, for which there is no SBP; it knows timm's {known} here")
