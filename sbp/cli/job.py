"""One job of a command: its run, here or in processes of its own, and what becomes of it."""

import gc
import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sbp.cli.compose import C, typed
from sbp.cli.failures import Failure, leave, on_this_process, write_failure
from sbp.cli.requeue import Requeue
from sbp.cli.sweep_table import FAILURE, read_job, write_table
from sbp.cli.torchrun import quoted, run_children, torchrun
from sbp.training.config.run import Config
from sbp.training.record.status import (
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    FolderTaken,
    Preempted,
    is_taken,
    read_status,
    write_status,
)
from sbp.training.record.summary import METRIC, finished
from sbp.training.runtime import distributed, signals

log = logging.getLogger(__name__)


def run_job(given: DictConfig, kind: type[C], job: Callable[[C, Path], Any]) -> float | list[float] | None:
    """Runs `job(config, output folder)`; of a training run, returns what config.objective names, for a sampler.

    A training run that is complete in its folder is not run again. What the user got wrong ends with one line and exit
    code 1 (the traceback is in failure.txt). In a sweep any failure is written down, nothing of the job stays in
    memory, and the next one runs. A job that was asked to stop ends all with exit code 75, Ctrl-C in haste with 130.
    """
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    if sweeping:
        signals.listen()  # between its jobs, too
        if signals.stop_requested():
            log.warning("asked to stop; the same command goes on from here")
            sys.exit(EXIT_PREEMPTED)
    _show_any_name()
    requeue = Requeue()
    before = None if distributed.from_main(distributed.is_main() and is_taken(folder)) else read_status(folder)
    if distributed.is_main() and before is not None:
        (folder / FAILURE).unlink(missing_ok=True)
    threads = torch.get_num_threads()
    message = result = None  # an exception must not outlive its job: its frames hold the model
    try:
        config: Any = typed(given, kind)
        if kind is Config:
            result = _objective(_train(config, folder, job), config)
        else:
            job(config, folder)
            if sweeping and distributed.is_main() and before == {}:
                write_status(folder, "completed")
    except Preempted as stop:  # also ends a sweep
        log.warning("%s; the same command goes on from here", stop)
        requeue()
        sys.exit(EXIT_PREEMPTED)
    except KeyboardInterrupt:
        leave(EXIT_INTERRUPTED)
    except FolderTaken as error:  # whatever is written there is the other process's
        message = str(error)
    except Exception as error:
        failure = Failure.of(error)
        write_failure(folder, failure.told, before)
        if failure.alone and distributed.world_size() > 1:
            leave(1, failure.last_words(sweeping))
        if not (failure.foreseen or sweeping):
            raise
        message = failure.message
    finally:
        if sweeping and distributed.is_main():
            _update_table(Path(hydra_config.sweep.dir))
    torch.set_num_threads(threads)  # the next job may leave them to torch
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # else the next job meets this one's code, and its limit of compilations
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sweeping:
        outcome = f"failed: {message}" if message else _done(folder)
        log.log(logging.ERROR if message else logging.INFO, "%s %s", folder.name, outcome)
    elif message is not None:
        sys.exit(f"error: {on_this_process(message)}")
    return result


def _show_any_name() -> None:
    """A file's name need not be UTF-8: else a line of the log that has one would be a traceback in its place."""
    streams = [sys.stdout, *(getattr(handler, "stream", None) for handler in logging.getLogger().handlers)]
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _train(config: Config, folder: Path, job: Callable[..., Any]) -> dict[str, Any]:
    """The summary of this run: as it lies in the folder, of a torchrun of its own, or of this process."""
    hydra_config = HydraConfig.get()
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    if sweeping and config.logger.group is None:
        config.logger.group = Path(hydra_config.sweep.dir).name
    if (done := finished(folder, config)) is not None:
        if not sweeping:
            log.info("%s holds this run, complete; another run_dir takes it once more", folder)
        return done
    if config.processes is None or "RANK" in os.environ:
        summary: dict[str, Any] = job(config, folder)
        if not sweeping:
            log.info("%s %s", folder, _done(folder))
        return summary
    overrides = list(hydra_config.overrides.task)
    if sweeping:
        overrides.append(f"logger.group={quoted(config.logger.group)}")
    overrides += [one for one in hydra_config.overrides.hydra if one.lstrip("+").startswith("hydra.searchpath=")]
    return run_children(torchrun(config.processes, overrides, folder, _where_configs_lie(hydra_config)), folder)


def _where_configs_lie(hydra_config: Any) -> list[str]:
    """The options of Hydra that say so, as this command was given them."""
    options = {"main": "--config-path", "command-line": "--config-dir"}
    sources = [(options.get(one.provider), one.path) for one in hydra_config.runtime.config_sources]
    return [f"--config-name={hydra_config.job.config_name}", *(f"{name}={path}" for name, path in sources if name)]


def _objective(summary: dict[str, Any], config: Config) -> float | list[float] | None:
    if isinstance(config.objective, list):
        return [summary.get(name) for name in config.objective]  # type: ignore[misc]
    return summary.get(config.objective or METRIC[config.task])


def _done(folder: Path) -> str:
    job = read_job(folder)
    shown = {"top1": "top-1 {:.2f} %", "box_ap": "box AP {:.1f}", "mask_ap": "mask AP {:.1f}"}
    figures = [text.format(job.summary[name]) for name, text in shown.items() if job.summary.get(name) is not None]
    return ", ".join([job.status, *figures])


def _update_table(folder: Path) -> None:
    try:
        write_table(folder)
    except OSError as error:  # a full disk costs the table, not the sweep
        log.warning("cannot write the table of %s (%s)", folder, error)
