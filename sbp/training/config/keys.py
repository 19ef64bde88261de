"""The keys of a config: fields of dataclasses, each with its meaning and its limits beside its default."""

import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from math import isfinite
from typing import Any, Literal, TypeVar, get_type_hints

T = TypeVar("T")

Free = Literal["", "elsewhere", "always"]


@dataclass(frozen=True)
class Key:
    """What a config's key means, and which values it takes; null, where its type has that, is always one of them.

    at_least, above, at_most, below: bounds of a number, or of each in a list with a length. one_of: all values that
    there are. or_one_of: words that it may be in place of a whole number. length: of a list.
    free: whether it may differ between the run that wrote a checkpoint and one that goes on with it: "always", as
    where things lie and how the same global batch is computed; "elsewhere", in another run that starts from the
    checkpoint, what helps one that diverged; "" never, as it decides the result.
    """

    meaning: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    one_of: tuple[Any, ...] = ()
    or_one_of: tuple[Any, ...] = ()
    length: int | None = None
    free: Free = ""

    @property
    def allowed(self) -> str:
        """In words: "one of ...", "in (0, 1]", "at least 1"; empty where the type says all."""
        if self.one_of:
            return f"one of {', '.join(shown(one) for one in self.one_of)}"
        if self.length is not None:
            each = replace(self, length=None).allowed
            return f"{self.length} values{each and f', each {each}'}"
        lower = self.at_least if self.above is None else self.above
        upper = self.at_most if self.below is None else self.below
        if lower is not None and upper is not None:
            left, right = "[("[self.above is not None], "])"[self.below is not None]
            return f"in {left}{lower:g}, {upper:g}{right}"
        if lower is not None:
            others = "".join(f", or {shown(one)}" for one in self.or_one_of)
            return f"{'at least' if self.above is None else 'above'} {lower:g}{others}"
        return "" if upper is None else f"{'at most' if self.below is None else 'below'} {upper:g}"

    def admits(self, value: Any) -> bool:
        if self.one_of:
            return any(value == one and type(value) is type(one) for one in self.one_of)
        if self.length is not None:
            return len(value) == self.length and all(replace(self, length=None).admits(one) for one in value)
        if isinstance(value, float) and not isfinite(value):
            return False
        if self.or_one_of and (isinstance(value, bool) or not isinstance(value, int)):
            return value in self.or_one_of
        bounds: list[tuple[float | None, Callable[[Any, float], bool]]] = [
            (self.at_least, lambda x, bound: x >= bound),
            (self.above, lambda x, bound: x > bound),
            (self.at_most, lambda x, bound: x <= bound),
            (self.below, lambda x, bound: x < bound),
        ]
        return all(bound is None or holds(value, bound) for bound, holds in bounds)


def key(default: Any, meaning: str, **limits: Any) -> Any:
    """A dataclass's field. limits: of `Key`."""
    metadata = {"key": Key(meaning, **limits)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(kind: type[T], meaning: str = "", free: Free = "") -> T:
    """A field that holds keys of its own, all of them as `free` says."""
    return field(default_factory=kind, metadata={"key": Key(meaning, free=free)})  # type: ignore[return-value]


@dataclass(frozen=True)
class Named:
    """A key by its whole name, such as recipe.lr."""

    name: str
    key: Key
    default: Any
    nullable: bool


def keys_of(kind: Any, path: str = "") -> Iterator[Named]:
    """All keys of a config, in their order, those within its groups too."""
    types = get_type_hints(kind)
    for one in fields(kind):
        name, inner = path + one.name, types[one.name]
        if is_dataclass(inner):
            yield from keys_of(inner, f"{name}.")
        else:
            yield Named(name, one.metadata["key"], _default(one), type(None) in getattr(inner, "__args__", ()))


def _default(one: Field) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def check_limits(config: Any) -> None:
    """Raises ValueError for the first value outside of its key's limits, with the key and what it may be."""
    for one in keys_of(type(config)):
        value = select(config, one.name)
        if value is None or one.key.admits(value):
            continue
        allowed = one.key.allowed or "a finite number"
        if one.key.length is not None:
            raise ValueError(f"{one.name} must have {allowed}, got {len(value)}")
        if allowed.startswith("in "):
            allowed = f"{'null or ' if one.nullable else ''}lie {allowed}"
            raise ValueError(f"{one.name} must {'be ' if one.nullable else ''}{allowed}, got {value}")
        raise ValueError(f"{one.name} must be {allowed}, got {quoted(value) if one.key.one_of else value}")


def select(config: Any, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def shown(value: Any) -> str:
    """true, false and null as one writes them."""
    return json.dumps(value) if value is None or isinstance(value, bool | list | dict) else str(value)


def quoted(value: Any) -> str:
    return repr(json.dumps(value) if isinstance(value, bool) else value)


def from_dict(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """The dataclass that `asdict` turned into `values`. Raises ValueError for a key it does not have."""
    types = get_type_hints(kind)
    unknown = [path + key for key in values if key not in types]
    if unknown:
        raise ValueError(f"unknown config key: {', '.join(unknown)}; there are {', '.join(types)}")
    return kind(
        **{
            key: from_dict(types[key], value, f"{path}{key}.") if is_dataclass(types[key]) else value
            for key, value in values.items()
        }
    )
