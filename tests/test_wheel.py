"""The wheel has all that the command needs: started in an empty folder, away from the checkout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ("logger=none", "recipe.epochs=1", "recipe.warmup_epochs=0", "backbone.kwargs.depth=2", "threads=1")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "installed"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):  # building leaves files in the folder that it builds from
        if name.startswith(("sbp/", "configs/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={folder}", source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", f"--target={target}", wheel], check=True)
    return target


@pytest.mark.long
@pytest.mark.timeout(900)  # it starts the command eight times
def test_it_trains_evaluates_sweeps_and_exports(installed, tmp_path):
    def sbp(*arguments):
        environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, installed / "bin" / "sbp", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = sbp()
    assert all(f"sbp {name}" in listed for name in ("train", "eval", "export", "forecast", "check-data"))
    code = "import sbp, sbp.cli.compose as compose; print(sbp.__file__, compose.CONFIGS)"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    where = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert where.stdout.count(str(installed)) == 2

    sbp("train", *TINY, "run_dir=run")
    sbp("eval", "checkpoint=run", "run_dir=evaluation")
    top1 = json.loads((tmp_path / "run" / "summary.json").read_text())["top1"]
    assert json.loads((tmp_path / "evaluation" / "eval.json").read_text())["top1"] == top1
    sbp("export", "checkpoint=run", "run_dir=exported")
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    table = sbp("train", "-m", *TINY, "run_dir=sweep", "sbp.keep_ratio=0.5,1.0")
    assert table.count("done") >= 2 and (tmp_path / "sweep" / "table.csv").is_file()
    assert sbp("sweep", "sweep") in table
