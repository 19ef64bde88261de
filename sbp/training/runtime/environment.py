"""Where a run takes place, for its record."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers, and the commit of this code.

    That of the git checkout; in a copy without one, what SBP_COMMIT says in the environment, if anything.
    """
    found = {"python": platform.python_version()}
    for package in ("sbp", "torch", "torchvision", "timm", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # sbp itself, when it runs from a checkout that is not installed
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        commit = os.environ.get("SBP_COMMIT", "")
    return found | {"commit": commit} if commit else found


def device_name(device: torch.device) -> str:
    """ "NVIDIA H100 80GB HBM3", or the processor and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
