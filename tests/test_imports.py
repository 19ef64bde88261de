"""Imports go one way: entry points -> training framework -> method -> torch and timm."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.installed import modules_besides

ROOT = Path(__file__).parents[1]
METHOD = sorted((ROOT / "sbp").glob("*.py"))
FRAMEWORK = sorted((ROOT / "sbp" / "training").rglob("*.py"))
COMMANDS = sorted((ROOT / "sbp" / "cli").rglob("*.py"))
ENTRY_POINTS = [ROOT / "train.py", ROOT / "eval.py", *COMMANDS, *sorted((ROOT / "scripts").rglob("*.py"))]

# The rooms of sbp/training: each imports those before it, and none after it.
ROOMS = ["config", "runtime", "record", "models", "data", "tasks", "memory", "benchmark", "plan", "checks", "engine"]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", METHOD, ids=lambda path: path.name)
def test_the_method_needs_torch_and_timm_only(path):
    roots = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert roots <= {"torch", "timm", "sbp"}
    assert not any(name.startswith(("sbp.training", "sbp.cli")) for name in imported(path))


@pytest.mark.parametrize("path", FRAMEWORK, ids=lambda path: path.name)
def test_the_framework_knows_no_hydra_and_one_module_knows_wandb(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {"hydra", "omegaconf", "train", "eval", "scripts"}
    assert not any(name.startswith("sbp.cli") for name in imported(path))
    assert "wandb" not in roots or path.name == "tracking.py"


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def graph(paths: list[Path]) -> dict[str, set[str]]:
    """Which of these modules each of them imports."""
    modules = {module(path): path for path in paths}
    return {name: imported(path) & modules.keys() for name, path in modules.items()}


def test_rooms_import_those_before_them():
    assert {path.name for path in (ROOT / "sbp" / "training").iterdir() if path.is_dir()} - {"__pycache__"} == {*ROOMS}
    wrong = []
    for name, others in graph(FRAMEWORK).items():
        room = name.split(".")[2]
        wrong += [(name, one) for one in others if room in ROOMS and ROOMS.index(one.split(".")[2]) > ROOMS.index(room)]
    assert wrong == []


def test_no_circle_of_files():
    arrows = graph(METHOD + FRAMEWORK + COMMANDS)
    while leaves := {name for name, others in arrows.items() if not others & arrows.keys()}:
        arrows = {name: others for name, others in arrows.items() if name not in leaves}
    assert not arrows


def test_nothing_imports_scripts():
    assert not any(name.split(".")[0] == "scripts" for path in METHOD + FRAMEWORK + COMMANDS for name in imported(path))


def test_only_entry_points_know_hydra():
    knowing = [path for path in ENTRY_POINTS if any(name.split(".")[0] == "hydra" for name in imported(path))]
    assert knowing and not any(path.parent == ROOT for path in knowing)
    assert not any("wandb" in {name.split(".")[0] for name in imported(path)} for path in ENTRY_POINTS)


@pytest.mark.long
def test_the_method_imports_without_the_framework():
    code = "import sys, sbp; sys.exit(str({'hydra', 'omegaconf', 'sbp.training'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.stderr.strip() == "set()"


@pytest.mark.long
def test_benchmark_and_gpu_results_need_torch_torchvision_and_timm_alone():
    """With what these need, as pip installs them: a GPU machine often has nothing else, and no network. timm does not
    come without torchvision, nor torchvision without numpy and Pillow."""
    absent = modules_besides("torch", "torchvision", "timm")
    assert {"hydra", "omegaconf", "wandb", "matplotlib", "sklearn", "pycocotools"} <= set(absent)
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import scripts.gpu_results"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
