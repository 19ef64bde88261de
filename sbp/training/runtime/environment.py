"""Where a run takes place, for its record, and what it asks of the place."""

import ctypes
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_CALLED = {"stochastic-backprop": "sbp"}  # where distribution and import differ


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers, and the commit of this code.

    That of the git checkout, with "-dirty" where the package differs from it; in a copy without one, what SBP_COMMIT
    says in the environment, if anything.
    """
    found = {"python": platform.python_version()}
    for name in ("stochastic-backprop", "torch", "torchvision", "timm", "numpy", "pillow"):
        try:
            found[_CALLED.get(name, name)] = version(name)
        except PackageNotFoundError:
            continue  # sbp itself, when it runs from a checkout that is not installed
    package = Path(__file__).parents[2]  # it alone, as a study writes its records into the same checkout
    git = ["git", "-C", str(package)]
    try:
        head = [*git, "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
        if subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True, check=False).returncode:
            commit += "-dirty"
    except (FileNotFoundError, subprocess.CalledProcessError):
        commit = os.environ.get("SBP_COMMIT", "")
    return found | {"commit": commit} if commit else found


def device_name(device: torch.device) -> str:
    """ "NVIDIA H100 80GB HBM3", or the processor and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def keep_freed_memory() -> None:
    """On Linux: what a step frees in the CPU's memory serves the next one.

    The C library would give a hundred megabytes back to the system after each step and get them again page by page,
    which took as long as half of a small network's step, and far longer for a network that saves more than for one that
    saves less. `malloc_trim` still gives back what is free.
    """
    trim_threshold, most_mapped = -1, -4  # of malloc.h
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(most_mapped, 0)
