"""sbp eval checkpoint=FILE_OR_RUN_FOLDER [key=value] ...: evaluates a checkpoint.

The model and the preprocessing are those of the run that wrote it. `sbp.eval=published` evaluates as the authors'
code does, with masks and partial attention.
"""

from typing import Any

from sbp.cli.launch import command
from sbp.training.config.requests import EvalConfig
from sbp.training.engine.evaluate import evaluate_checkpoint


def main() -> Any:
    return command("eval", EvalConfig, evaluate_checkpoint)
