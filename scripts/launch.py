"""What the entry points share: one output folder for all processes, a typed config, and errors worth reading."""

import atexit
import gc
import hashlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sbp.training import distributed
from sbp.training.config import BenchmarkConfig, Config, EvalConfig, ExportConfig
from sbp.training.status import EXIT_PREEMPTED, Preempted

log = logging.getLogger(__name__)

C = TypeVar("C", bound=Config | EvalConfig | ExportConfig | BenchmarkConfig)

FAILURE = "failure.txt"
LONGEST_NAME = 120
_SWEEP = re.compile(r"=.*,|\b(range|choice|glob|interval)\(")

ConfigStore.instance().store(name="train_schema", node=Config)
ConfigStore.instance().store(name="eval_schema", node=EvalConfig)
ConfigStore.instance().store(name="benchmark_schema", node=BenchmarkConfig)


def job_folder(overrides: ListConfig) -> str:
    """The name of a sweep's job: the overrides that the sweep varies, such as backbone-vit_tiny+sbp.keep_ratio-0.5.

    Of characters that neither a shell nor Hydra's own command line takes for something else, and of bounded length.
    """
    swept = {_key(argument) for argument in sys.argv[1:] if "=" in argument and _SWEEP.search(argument)}
    chosen = [override for override in overrides if _key(override) in swept] or list(overrides) or ["job"]
    name = "+".join(override.lstrip("+~").replace("=", "-", 1) for override in chosen)
    safe = re.sub(r"[^A-Za-z0-9.+_-]", "_", name)
    if len(safe) > LONGEST_NAME:
        safe = f"{safe[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return safe


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~")


OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


def join_processes() -> None:
    """Joins the processes of a torchrun. To be called before Hydra's main function, which makes the output folder.

    Under torchrun every process runs Hydra: rank 0 decides the time in the folder's name for all, and the others
    write no config and no log.
    """
    distributed.start()
    atexit.register(distributed.stop)
    os.environ["SBP_STARTED"] = distributed.from_main(datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f"))
    if not distributed.is_main():
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]


def typed(composed: DictConfig, kind: type[C]) -> C:
    """The composed config as plain dataclasses. Raises OmegaConf's errors for a key or value the schema lacks.

    Hydra lets `+sbp.typo=1` through, even into a typed config; merging into the schema once more does not.
    """
    plain = OmegaConf.to_container(composed, resolve=True)
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), plain))  # type: ignore[return-value]


def run_job(composed: DictConfig, kind: type[C], job: Callable[[C, Path], Any]) -> None:
    """Runs `job(config, output folder)`.

    What the user got wrong ends with one line and exit code 1 (the traceback is in failure.txt). In a sweep any
    failure is written down and the next job runs; the sweep's table names it, and the exit code is 1. A job that was
    asked to stop ends all with exit code 75.
    """
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    message = None  # the exception must not outlive its job: its frames hold the model
    (folder / FAILURE).unlink(missing_ok=True)
    try:
        config = typed(composed, kind)
        if sweeping and isinstance(config, Config) and config.logger.group is None:
            config.logger.group = Path(hydra_config.sweep.dir).name
        job(config, folder)
    except Preempted as stop:  # also ends a sweep
        log.warning("%s; the same command goes on from here", stop)
        sys.exit(EXIT_PREEMPTED)
    except (ValueError, OmegaConfBaseException) as error:
        message = _one_line(error)
        _write_failure(folder, message)
    except Exception as error:
        if not sweeping:
            raise
        message = f"{type(error).__name__}: {_one_line(error)}"
        _write_failure(folder, message)
    gc.collect()
    if message is None:
        return
    if sweeping:
        log.error("job failed: %s", message)
        return
    sys.exit(f"error: {message}" if distributed.is_main() else f"error on process {distributed.rank()}: {message}")


def _one_line(error: BaseException) -> str:
    if isinstance(error, OmegaConfBaseException):
        return f"{str(error).splitlines()[0]} (key: {error.full_key})"
    return str(error)


def _write_failure(folder: Path, message: str) -> None:
    if distributed.is_main():
        (folder / FAILURE).write_text(f"{message}\n\n{traceback.format_exc()}")
