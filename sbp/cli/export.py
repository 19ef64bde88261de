"""sbp export checkpoint=FILE_OR_RUN_FOLDER run_dir=TARGET [ema=false]: writes a checkpoint as timm reads it.

Writes model.safetensors and config.json, of the averaged weights where there are any (ema=false: of the raw ones).
"""

import logging
from pathlib import Path
from typing import Any

from sbp.cli.launch import command
from sbp.training.config.requests import ExportConfig
from sbp.training.engine.export import export

log = logging.getLogger("export")


def export_checkpoint(request: ExportConfig, folder: Path) -> None:
    """Prints what was written, and how timm reads it. Raises ValueError for what the user got wrong."""
    done = export(Path(request.checkpoint), folder, request.ema)
    kwargs = "".join(f", {key}={value!r}" for key, value in done.kwargs.items())
    log.info(
        "%s: %s weights of %s, step %d",
        done.weights,
        "averaged" if done.averaged else "raw",
        done.checkpoint,
        done.step,
    )
    log.info('timm.create_model("local-dir:%s", pretrained=True)', folder)
    log.info('timm.create_model("%s", checkpoint_path="%s"%s)', done.name, done.weights, kwargs)


def main() -> Any:
    return command("export", ExportConfig, export_checkpoint)
