import pytest
import torch

from sbp.training.models import build_model
from sbp.training.study.claims import ANSWERED, ARMS, Setting, arms_of, gradients_of, sbp_arguments
from sbp.training.study.settings import SCALES
from scripts.study_tasks import Place, arm_config

SETTINGS = {one.name: (scale, one) for scale, of_it in SCALES.items() for one in of_it.settings}


def place(name, tmp_path):
    scale, setting = SETTINGS[name]
    return Place.of(scale, setting, torch.device("cpu"), str(tmp_path), str(tmp_path), str(tmp_path), None)


def known(setting: Setting) -> list[str]:
    return arms_of(list(ANSWERED.values()), setting)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_arm_is_a_run_that_train_py_takes(name, tmp_path):
    """Each differs from the others, and has as many SBP layers as the setting says."""
    here = place(name, tmp_path)
    configs = {arm: arm_config(here, arm) for arm in known(here.setting)}
    assert len({str(config) for config in configs.values()}) == len(configs)
    if here.setting.gradients_only:
        assert list(configs) == ["plain"]
        return
    with torch.device("meta"):
        for arm in ("sbp", "layers_other"):
            config = configs[arm]
            sizes = config.data.num_classes, config.data.image_size
            model = build_model(config.backbone, config.sbp, *sizes)
            states = {module.sbp_state for module in model.modules() if hasattr(module, "sbp_state")}
            assert [len(state.layers) for state in states] == [here.setting.sbp_layers]
    rising = configs["rising"].sbp.keep_ratio
    assert len(rising) == here.setting.sbp_layers and sum(rising) / len(rising) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("name", SETTINGS)
def test_arms_of_one_seed_differ_in_what_they_say_alone(name, tmp_path):
    """Initial weights, order and augmentation hang on the seed, which nothing in an arm touches."""
    here = place(name, tmp_path)
    for arm in known(here.setting):
        keys = {override.split("=")[0].lstrip("+") for override in ARMS[arm].overrides(here.setting)}
        assert (keys and arm != "sbp") or (arm == "sbp" and not keys)
        assert all(key.split(".")[0] in ("sbp", "recipe", "data", "backbone", "micro_batch_size") for key in keys)


def test_gradients_are_made_by_arguments_of_apply():
    setting = SETTINGS["digits-vit"][1]
    arms = [arm for arm in gradients_of(list(ANSWERED.values()), setting) if arm in ARMS]
    assert sbp_arguments("random", setting) == {"mask": "random"}
    assert sbp_arguments("falling", setting) == {"keep_ratio": [0.75, 0.583, 0.417, 0.25]}
    assert all(isinstance(sbp_arguments(arm, setting), dict) for arm in arms)
