"""What the entry points share: one output folder for all processes, a typed config, and errors worth reading."""

import atexit
import gc
import hashlib
import io
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sbp.cli.requeue import Requeue
from sbp.cli.sweep_table import FAILURE, NOT_SWEPT, read_job, read_jobs, table, write_table
from sbp.cli.torchrun import ROOT, RunFailed, quoted, run_children, torchrun
from sbp.training.config.describe import as_text
from sbp.training.config.model import SbpConfig
from sbp.training.config.requests import BenchmarkConfig, CalibrateConfig, EvalConfig, ExportConfig
from sbp.training.config.rules import validate
from sbp.training.config.run import Config
from sbp.training.record.files import open_text
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

C = TypeVar("C", bound=Config | EvalConfig | ExportConfig | BenchmarkConfig | CalibrateConfig)

LONGEST_NAME = 120
_SWEPT = "SBP_SWEPT"  # environment variables, as a cluster's jobs inherit them
_STARTED = "SBP_STARTED"


def register(name: str, kind: type) -> None:
    """The keys of configs/NAME.yaml are the fields of this dataclass."""
    ConfigStore.instance().store(name=f"{name}_schema", node=kind)


register("train", Config)
register("eval", EvalConfig)
register("export", ExportConfig)
register("benchmark", BenchmarkConfig)

# Beside the package in a checkout, within it where it was installed from a wheel.
CONFIGS = next(one for one in (ROOT / "configs", ROOT / "sbp" / "configs") if (one / "train.yaml").is_file())


def command(name: str, kind: type[C], job: Callable[[C, Path], Any]) -> Any:
    """Runs `job` with the config that configs/NAME.yaml and the command line make, as `run_job` does."""
    join_processes()

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)
    def main(composed: DictConfig) -> Any:
        return run_job(composed, kind, job)

    return main()


def job_folder(overrides: ListConfig) -> str:
    """The name of a sweep's job: the overrides that the sweep varies, such as backbone-vit_tiny+sbp.keep_ratio-0.5.

    Of characters that neither a shell nor Hydra's own command line takes for something else, and of bounded length.
    Where that does not leave the whole name, its hash keeps different jobs apart.
    """
    swept = os.environ.get(_SWEPT, "").split()
    named = [override for override in overrides if _key(override) not in NOT_SWEPT]
    chosen = [override for override in named if _key(override) in swept] or named or ["job"]
    name = "+".join(override.lstrip("+~").replace("=", "-", 1) for override in chosen)
    safe = re.sub(r"[^A-Za-z0-9.+_-]", "_", name)
    joined = len(chosen) > 1 and any("+" in override.lstrip("+~") for override in chosen)  # where does one value end?
    if safe == name and len(safe) <= LONGEST_NAME and not joined:
        return safe
    digest = hashlib.sha256("\0".join(chosen).encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{safe[: LONGEST_NAME - 9]}-{digest}"


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~")


OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


def all_keys(*, _root_: DictConfig) -> str:
    """The keys of a training run with their meaning, for --help."""
    plain: Any = OmegaConf.to_container(OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"]))
    return as_text(Config, plain).replace("$", "$$")  # Hydra fills in what stands behind a single one


OmegaConf.register_new_resolver("all_keys", all_keys, replace=True)
OmegaConf.register_new_resolver("or_one", lambda number: number or 1, replace=True)


def for_attention(name: str, mhsa_drop: str) -> str:
    """sbp.mhsa_drop of a timm model of this name: the published one where there is no attention."""
    return SbpConfig.mhsa_drop if name.startswith("convnext") else mhsa_drop


OmegaConf.register_new_resolver("for_attention", for_attention, replace=True)


def join_processes() -> None:
    """Joins the processes of a torchrun. To be called before Hydra's main function, which makes the output folder.

    Under torchrun every process runs Hydra: rank 0 decides the time in the folder's name for all, and the others
    write no config and no log.
    """
    named = any(argument.startswith(("run_dir=", "hydra.run.dir=", "hydra.sweep.dir=")) for argument in sys.argv[1:])
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0 and not named:
        first = os.environ["RANK"] == os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        sys.exit("error: torchrun --max-restarts needs run_dir=NAME: a restart goes on in that folder" if first else 1)
    distributed.start()
    atexit.register(distributed.stop)
    os.environ[_STARTED] = distributed.from_main(datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f"))
    if not distributed.is_main():
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]


class Launch(Callback):
    """What happens before the first job and after the last one, in the process that the user started."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        make_folder(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        self.started = make_folder(folder)
        given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        swept = [_key(str(one.input_line)) for one in given if one.is_sweep_override()]
        os.environ[_SWEPT] = " ".join([*swept, *(config.hydra.sweeper.get("params") or ())])
        if distributed.is_main():
            atexit.register(_say_how_far, folder)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if not distributed.is_main():
            return
        atexit.unregister(_say_how_far)
        folder = Path(config.hydra.sweep.dir)
        jobs = write_table(folder)
        if not jobs:
            return
        if find_spec("matplotlib"):  # which a GPU machine may lack
            from sbp.cli.sweep_figure import draw

            draw(jobs, folder / "figure.png")
        print(f"\n{table(jobs)}\n\n{folder}: table.csv, table.md, figure.png and the runs")
        if failed := [job.name for job in jobs if job.failed_at >= self.started]:
            print("error: failed, as failure.txt in the folder says:", *failed, sep="\n  ", file=sys.stderr)
        if taken := [job.name for job in jobs if job.state == "running"]:
            print("error: left to another process, which still trains there:", *taken, sep="\n  ", file=sys.stderr)
        if failed or taken:
            sys.exit(1)


def _say_how_far(folder: Path) -> None:
    """For a sweep that does not come to its end."""
    if jobs := read_jobs(folder):
        print(f"\n{table(jobs)}\n\n{folder}: the same command goes on from here", flush=True)


def make_folder(folder: Path) -> float:
    """Makes a folder that can be written to, or ends the program with one line; returns its file system's time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError as error:
        at = f" at {error.filename}" if error.filename and Path(error.filename) != folder else ""
        sys.exit(f"error: run_dir={folder} cannot be written to: {error.strerror}{at}")


def typed(given: DictConfig, kind: type[C]) -> C:
    """The composed config as plain dataclasses. Raises OmegaConf's errors for a key or value the schema lacks.

    Hydra lets `+sbp.typo=1` through, even into a typed config; merging into the schema once more does not.
    """
    plain = OmegaConf.to_container(given, resolve=True)
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), plain))  # type: ignore[return-value]


def composed(overrides: Sequence[str]) -> Config:
    """The config that `python train.py *overrides` runs with, validated."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return validate(typed(compose("train", list(overrides)), Config))


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
    before = None if distributed.from_main(is_taken(folder)) else read_status(folder)
    if distributed.is_main() and before is not None:
        (folder / FAILURE).unlink(missing_ok=True)
    message = result = None  # an exception must not outlive its job: its frames hold the model
    try:
        config: Any = typed(given, kind)
        if kind is Config:
            result = _objective(_train(config, folder, job), config)
        else:
            job(config, folder)
    except Preempted as stop:  # also ends a sweep
        log.warning("%s; the same command goes on from here", stop)
        requeue()
        sys.exit(EXIT_PREEMPTED)
    except KeyboardInterrupt:
        _leave(EXIT_INTERRUPTED)
    except FolderTaken as error:  # whatever is written there is the other process's
        message = str(error)
    except Exception as error:
        foreseen = isinstance(error, _FORESEEN)
        alone = not foreseen or _ran_out_of_memory(error)  # else all processes end with the same error
        message = _one_line(error) if foreseen else f"{type(error).__name__}: {_one_line(error)}"
        told = _on_this_process(message) if alone else message
        _write_failure(folder, told, before)
        if alone and distributed.world_size() > 1:
            told = f"error: {told}{_ALONE if sweeping else ''}"
            _leave(1, told if foreseen or sweeping else traceback.format_exc())
        if not (foreseen or sweeping):
            raise
    finally:
        if sweeping and distributed.is_main():
            _update_table(Path(hydra_config.sweep.dir))
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sweeping:
        outcome = f"failed: {message}" if message else _done(folder)
        log.log(logging.ERROR if message else logging.INFO, "%s %s", folder.name, outcome)
    elif message is not None:
        sys.exit(f"error: {_on_this_process(message)}")
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
    return run_children(torchrun(config.processes, overrides, folder, hydra_config.job.config_name), folder)


def _objective(summary: dict[str, Any], config: Config) -> float | list[float] | None:
    if isinstance(config.objective, list):
        return [summary.get(name) for name in config.objective]  # type: ignore[misc]
    return summary.get(config.objective or METRIC[config.task])


def _done(folder: Path) -> str:
    job = read_job(folder)
    shown = {"top1": "top-1 {:.2f} %", "box_ap": "box AP {:.1f}", "mask_ap": "mask AP {:.1f}"}
    figures = [text.format(job.summary[name]) for name, text in shown.items() if job.summary.get(name) is not None]
    return ", ".join([job.status, *figures])


_FORESEEN = (RunFailed, ValueError, OmegaConfBaseException, torch.OutOfMemoryError)
_ALONE = (
    "\nunder one torchrun the other processes cannot go on without this one: the sweep ends here. With processes=N in "
    "place of torchrun each job has its own, and fails alone"
)


def _update_table(folder: Path) -> None:
    try:
        write_table(folder)
    except OSError as error:  # a full disk costs the table, not the sweep
        log.warning("cannot write the table of %s (%s)", folder, error)


def _leave(code: int, message: str = "") -> NoReturn:
    """Ends this process. As one of several it does so at once: to leave them in good order waits for the others, who
    wait for this one.
    """
    if distributed.world_size() == 1:
        sys.exit(message or code)
    print(message, file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _ran_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or isinstance(error.__cause__, torch.OutOfMemoryError)


def _on_this_process(message: str) -> str:
    return message if distributed.is_main() else f"on process {distributed.rank()}: {message}"


def _one_line(error: BaseException) -> str:
    if isinstance(error, OmegaConfBaseException):
        return f"{str(error).splitlines()[0]} (key: {error.full_key})"
    return str(error)


def _write_failure(folder: Path, message: str, before: dict[str, Any] | None) -> None:
    """Why this attempt failed; the first process that fails writes it, as the others fail in its wake.

    before: the status before this attempt, None where a run goes on in another process, which stays as it is. So does
    a status that says so already, and that of a complete run.
    """
    if before is None:
        return
    try:
        with open_text(folder / FAILURE, "x") as file:
            file.write(f"{message}\n\n{traceback.format_exc()}")
    except FileExistsError:
        return
    except OSError as error:
        log.warning("cannot write %s (%s)", folder / FAILURE, error)
    status = read_status(folder)
    if status.get("state") == "running" or (status == before and status.get("state") != "completed"):
        steps = {key: status[key] for key in ("step", "total_steps") if key in status}
        write_status(folder, "failed", message=message, **steps)
