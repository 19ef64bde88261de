"""Exports a checkpoint of train.py for timm: `python scripts/export.py checkpoint=FILE_OR_RUN_FOLDER run_dir=TARGET`.

Writes model.safetensors and config.json, of the averaged weights where there are any (ema=false: of the raw ones).
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # Python itself puts the folder of this file there, not the root

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from sbp.cli.launch import join_processes, run_job
from sbp.training.config.schema import ExportConfig
from sbp.training.engine.export import export

log = logging.getLogger("export")

ConfigStore.instance().store(name="export_schema", node=ExportConfig)


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


@hydra.main(version_base="1.3", config_path="../configs", config_name="export")
def main(composed: DictConfig) -> None:
    run_job(composed, ExportConfig, export_checkpoint)


if __name__ == "__main__":
    join_processes()
    main()
