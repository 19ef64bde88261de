"""sbp train [group=choice] [key=value] ...: trains a timm model, with or without SBP.

`sbp train --help` lists the config groups and every key. `-m` sweeps: `sbp train -m sbp.keep_ratio=0.5,1`. A command
that names its `run_dir` goes on, when it is given again, where it was interrupted.
"""

from typing import Any

from sbp.cli.launch import command
from sbp.training.config.run import Config
from sbp.training.engine.train import train


def main() -> Any:
    return command("train", Config, train)
