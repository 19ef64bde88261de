"""The constraints of an environment with the lowest torch, torchvision and timm that pyproject.toml promises.

    python .ci/lowest_versions.py > lowest.txt

The three are pinned to the lower bounds that `.[train,dev]` gives; whatever torch pins itself is left to it; all else
is as in constraints.txt. Needs Python alone, as it runs before anything is installed.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOWEST = ("torch", "torchvision", "timm")
OF_TORCH = ("triton", "nvidia-", "cuda-")  # torch asks for exactly one version of each
BOUND = re.compile(r"([\w-]+)>=([\d.]+)")


def lowest(project: dict) -> dict[str, str]:
    """The lower bound of each of `LOWEST` (from pyproject.toml's table "project").

    Raises ValueError where the dependencies and the extras train and dev give none, or two different ones.
    """
    extras = project["optional-dependencies"]
    bounds: dict[str, set[str]] = {name: set() for name in LOWEST}
    for requirement in (*project["dependencies"], *extras["train"], *extras["dev"]):
        if (bound := BOUND.match(requirement)) and bound[1] in bounds:
            bounds[bound[1]].add(bound[2])
    for name, versions in bounds.items():
        if len(versions) != 1:
            raise ValueError(f"pyproject.toml: {name} needs one lower bound (>=), got {sorted(versions) or 'none'}")
    return {name: versions.pop() for name, versions in bounds.items()}


def constraints(project: dict, pinned: str) -> list[str]:
    """The lines of a constraints file. pinned: the text of constraints.txt."""
    rest = [line for line in pinned.splitlines() if re.match(r"\w", line)]
    rest = [line for line in rest if line.split("==")[0] not in LOWEST and not line.startswith(OF_TORCH)]
    return [f"{name}=={version}" for name, version in lowest(project).items()] + rest


if __name__ == "__main__":
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    print("\n".join(constraints(table, (ROOT / "constraints.txt").read_text())))
