"""`backbone.frozen=true`: the classifier alone is trained."""

import pytest
import torch

from sbp.training.config.rules import validate
from sbp.training.engine.train import train
from sbp.training.memory.forecast import forecast
from sbp.training.record.checkpoint import find
from sbp.training.tasks.choice import task_of
from tests.training.configs import composed, small
from tests.training.models.test_pretrained import CLASSIFIER, trained

FROZEN = ("sbp=none", "backbone.frozen=true")


@pytest.mark.parametrize("backbone", ["vit", "convnext"])
def test_the_classifier_changes_and_nothing_else(tmp_path, backbone):
    weights = trained(small(backbone=backbone))
    torch.save(weights, tmp_path / "x.pth")
    config = small(*FROZEN, f"backbone.pretrained={tmp_path / 'x.pth'}", "recipe.layer_decay=0.5", backbone=backbone)
    train(config, tmp_path / "run")
    after = find(tmp_path / "run")[1]["state_dict"]
    changed = {name for name, value in weights.items() if not torch.equal(after[name], value)}
    assert changed == {name for name in weights if name.startswith(CLASSIFIER[backbone])}


@pytest.mark.parametrize("backbone", ["vit", "convnext"])
def test_nothing_of_the_backbone_is_saved_and_its_weights_have_no_gradients(backbone):
    frozen, whole = (forecast(small(*given, backbone=backbone), 64) for given in (FROZEN, ("sbp=none",)))
    assert frozen.activations < 0.1 * whole.activations and frozen.gradients < 0.1 * whole.gradients


def test_a_detector_trains_all_that_stands_on_the_backbone():
    config = composed("task=detection", *FROZEN)
    model = task_of(config).build_model(config)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and frozen == {name for name, _ in model.named_parameters() if name.startswith("backbone.body.")}


def test_sbp_has_nothing_to_drop_there():
    with pytest.raises(ValueError, match=r"backbone\.frozen=true .*: take sbp=none"):
        validate(small("backbone.frozen=true"))
