"""What --help says of each command."""

from importlib import import_module

import pytest
from hydra import compose, initialize_config_dir

from sbp.cli.compose import CONFIGS, KINDS
from sbp.training.config.keys import keys_of

GROUPS = "$APP_CONFIG_GROUPS"  # which Hydra fills in


@pytest.mark.parametrize(
    ("command", "takes_groups"),
    [
        *((name, True) for name in ("train", "forecast", "plan", "check_data")),
        *((name, False) for name in ("eval", "export", "benchmark", "calibrate")),
    ],
)
def test_it_says_what_the_command_does_and_names_each_key(command, takes_groups):
    import_module(f"sbp.cli.{'plan' if command == 'calibrate' else command}")  # registers its keys
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(command, return_hydra_config=True)
    text = config.hydra.help.template
    assert f"sbp {command.replace('_', '-').replace('calibrate', 'plan calibrate')}" in text
    assert all(f"  {one.name}=" in text for one in keys_of(KINDS[command]))
    assert (GROUPS in text) == takes_groups
