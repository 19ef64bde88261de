"""The examples of docs/integrations.md, as anybody would start them."""

import runpy
import sys
from pathlib import Path

import pytest
import timm

import sbp

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
pytestmark = pytest.mark.long


def run(name, monkeypatch, folder):
    monkeypatch.chdir(folder)
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["train"]()


def test_they_are_short():
    lines = {path.stem: path.read_text().count("\n") for path in EXAMPLES.glob("*.py")}
    assert set(lines) == {"plain_loop", "lightning_module", "hf_trainer", "timm_train"} and max(lines.values()) < 60


def test_plain_loop(monkeypatch, tmp_path):
    model = run("plain_loop", monkeypatch, tmp_path)
    assert int(sbp.mask_state(model)["draw"]) == 10
    timm.create_model("convnext_atto", num_classes=10, checkpoint_path=str(tmp_path / "convnext_atto.pt"))


def test_lightning(monkeypatch, tmp_path):
    pytest.importorskip("lightning")
    classifier = run("lightning_module", monkeypatch, tmp_path)
    assert int(sbp.mask_state(classifier)["draw"]) == 4  # nothing is drawn in evaluation


def test_hugging_face_trainer(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    model = run("hf_trainer", monkeypatch, tmp_path)
    assert int(sbp.mask_state(model)["draw"]) == 4
    assert all(name.startswith("timm_model.") for name in model.state_dict())


def test_timms_own_script(monkeypatch, tmp_path, capsys):
    """Here one that makes its model as timm's does, and takes a step."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch\nfrom timm.models import create_model\n"
        "model = create_model(sys.argv[1], num_classes=10)\nmodel(torch.randn(2, 3, 64, 64)).sum().backward()\n"
    )
    monkeypatch.setattr(timm.models, "create_model", timm.models.create_model)
    monkeypatch.setattr(sys, "argv", ["timm_train.py", str(script), "convnext_atto"])
    monkeypatch.setenv("SBP_KEEP_RATIO", "0.25")
    runpy.run_path(str(EXAMPLES / "timm_train.py"), run_name="__main__")
    assert "keep_ratio=0.25" in capsys.readouterr().out
