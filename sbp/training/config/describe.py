"""The keys of a config in words: for --help, and for docs/config.md."""

import textwrap
from collections.abc import Mapping
from typing import Any

from sbp.training.config.keys import Named, keys_of, shown

_HEAD = ["| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]
_WIDTH = 116


def as_text(kind: type, values: Mapping[str, Any]) -> str:
    """Of each key its value in `values`, what is allowed, and its meaning."""
    lines = []
    for keys in _groups(kind).values():
        for one in keys:
            allowed = f"  ({one.key.allowed})" if one.key.allowed else ""
            lines.append(f"  {one.name}={shown(_value(values, one.name))}{allowed}")
            lines += textwrap.wrap(one.key.meaning, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    return "\n".join(lines)


def as_markdown(kind: type, besides: type | None = None) -> str:
    """A table for each group: key, default, what is allowed, meaning. besides: whose keys are left out."""
    known = set() if besides is None else {one.name for one in keys_of(besides)}
    parts = []
    for name, found in _groups(kind).items():
        keys = [one for one in found if one.name not in known]
        if not keys:
            continue
        rows = [f"| `{one.name}` | `{shown(one.default)}` | {one.key.allowed} | {one.key.meaning} |" for one in keys]
        parts += [f"## {f'`{name}`' if name else 'Of no group'}", "\n".join([*_HEAD, *rows])]
    return "\n\n".join(parts)


def _groups(kind: type) -> dict[str, list[Named]]:
    """The keys of each group; those of none come first."""
    groups: dict[str, list[Named]] = {"": []}
    for one in keys_of(kind):
        groups.setdefault(one.name.rpartition(".")[0], []).append(one)
    return groups


def _value(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values
