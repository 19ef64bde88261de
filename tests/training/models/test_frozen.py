"""`backbone.frozen=true`: the classifier alone is trained."""

import pytest
import torch

from sbp.training.config.model import BackboneConfig, SbpConfig
from sbp.training.config.rules import validate
from sbp.training.engine import setup
from sbp.training.engine.train import train
from sbp.training.memory.forecast import forecast
from sbp.training.models.build import build_model
from sbp.training.record.checkpoint import find
from sbp.training.tasks.choice import task_of
from tests.conftest import others_long
from tests.training.configs import QUICK, composed, small
from tests.training.models.test_pretrained import CLASSIFIER, trained

FROZEN = ("sbp=none", "backbone.frozen=true")


@pytest.mark.parametrize("backbone", ["vit", "convnext"])
def test_the_classifier_changes_and_nothing_else(tmp_path, backbone):
    weights = trained(small(backbone=backbone))
    torch.save(weights, tmp_path / "x.pth")
    start = f"backbone.pretrained={tmp_path / 'x.pth'}"
    config = small(*QUICK, *FROZEN, start, "recipe.layer_decay=0.5", backbone=backbone)
    train(config, tmp_path / "run")
    after = find(tmp_path / "run")[1]["state_dict"]
    changed = {name for name, value in weights.items() if not torch.equal(after[name], value)}
    assert changed == {name for name in weights if name.startswith(CLASSIFIER[backbone])}


@pytest.mark.parametrize("backbone", others_long(["vit", "convnext"], "vit"))
def test_nothing_of_the_backbone_is_saved_and_its_weights_have_no_gradients(backbone):
    frozen, whole = (forecast(small(*given, backbone=backbone), 64) for given in (FROZEN, ("sbp=none",)))
    assert frozen.activations < 0.1 * whole.activations and frozen.gradients < 0.1 * whole.gradients


def test_both_classifiers_of_a_distilled_model_are_trained():
    config = BackboneConfig("deit_tiny_distilled_patch16_224", kwargs={"depth": 1}, frozen=True)
    model = build_model(config, SbpConfig(enabled=False), 5, 224)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")}


def test_a_model_whose_patches_have_one_number():
    build_model(BackboneConfig("xcit_nano_12_p16_224", kwargs={"depth": 1}), SbpConfig(enabled=False), 5, 224)


def test_a_detector_trains_all_that_stands_on_the_backbone():
    config = composed("task=detection", *FROZEN)
    model = task_of(config).build_model(config)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and frozen == {name for name, _ in model.named_parameters() if name.startswith("backbone.body.")}


def test_sbp_has_nothing_to_drop_there():
    with pytest.raises(ValueError, match=r"backbone\.frozen=true .*: take sbp=none"):
        validate(small("backbone.frozen=true"))


def test_batch_norms_and_drop_paths_of_the_backbone_are_those_of_evaluation(tmp_path):
    """What is frozen gives the classifier the features that it will have to read."""
    name = ("backbone=timm", "backbone.name=resnet10t", "backbone.drop_path=0.5")
    config = composed("data=digits", "recipe=demo", "recipe.epochs=1", "recipe.warmup_epochs=0", *name, *FROZEN)
    device = setup.prepare_process(config)
    trainer = setup.build_trainer(config, setup.load_images(config, device).order, device)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8)
    for step in range(2):
        trainer.step(step, [(images, targets)])
        trainer.model.eval()  # as evaluations do, between steps
    trainer.begin_training()
    assert torch.equal(trainer.model.forward_features(images), trainer.model.eval().forward_features(images))
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {"fc.weight", "fc.bias"}
