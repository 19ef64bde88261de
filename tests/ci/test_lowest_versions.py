"""The environment of `make test-lowest`: the lowest of three packages, all else as CI has it."""

import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FUNCTIONS = runpy.run_path(str(ROOT / ".ci" / "lowest_versions.py"))
constraints, lowest = FUNCTIONS["constraints"], FUNCTIONS["lowest"]

PINNED = """# as CI has them
Jinja2==3.1.6
cuda-toolkit==13.2.2
nvidia-cublas==13.4.1.3
timm==1.0.31
torch==2.15.0
torchvision==0.29.2
triton==3.9.0
"""


def project(*dependencies: str) -> dict:
    extras = {"train": ["torchvision>=0.26", "pillow<13"], "dev": ["pytest>=8"], "datasets": ["timm>=1.0.31"]}
    return {"dependencies": list(dependencies), "optional-dependencies": extras}


def test_three_are_the_lowest_what_torch_pins_is_free_and_all_else_is_as_pinned():
    lines = constraints(project("torch>=2.11", "timm>=1.0.26"), PINNED)
    assert lines == ["torch==2.11", "torchvision==0.26", "timm==1.0.26", "Jinja2==3.1.6"]


def test_this_repository_promises_one_lowest_version_of_each():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert lowest(table).keys() == {"torch", "torchvision", "timm"}


@pytest.mark.parametrize(
    ("dependencies", "found"), [(["torch>=2.11", "timm"], "none"), (["torch>=2.11", "timm>=1", "timm>=2"], "1.*2")]
)
def test_a_bound_that_is_missing_or_not_the_only_one_is_an_error(dependencies, found):
    with pytest.raises(ValueError, match=f"timm needs one lower bound .*{found}"):
        lowest(project(*dependencies))
