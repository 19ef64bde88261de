"""What is installed here besides some packages and what these need, to see what works without it."""

from importlib.metadata import PackageNotFoundError, packages_distributions, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def modules_besides(*packages: str) -> list[str]:
    """The importable names that neither these packages nor their requirements, nor this repository, bring."""
    needed = requirements(packages) | {"stochastic-backprop"}
    return sorted(
        module
        for module, brought_by in packages_distributions().items()
        if not needed & {canonicalize_name(name) for name in brought_by}
    )


def requirements(packages: tuple[str, ...]) -> set[str]:
    """The names of the packages, and of all that they require on this machine, directly or not."""
    found, left = set(), [(name, "") for name in packages]  # with the extra that is asked for
    while left:
        one = left.pop()
        if one in found:
            continue
        found.add(one)
        try:
            listed = requires(one[0]) or []
        except PackageNotFoundError:  # asked for, but brought by another one or not at all
            continue
        for requirement in map(Requirement, listed):
            if requirement.marker is None or requirement.marker.evaluate({"extra": one[1]}):
                left += [(canonicalize_name(requirement.name), extra) for extra in ("", *requirement.extras)]
    return {name for name, _ in found}
