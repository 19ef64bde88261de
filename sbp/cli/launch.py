"""What every command starts with and ends with: its processes joined, its folder made, and of a sweep the table."""

import atexit
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

from sbp.cli.compose import CONFIGS, C
from sbp.cli.job import run_job
from sbp.cli.sweep import write_all
from sbp.cli.sweep_table import NOT_SWEPT, read_jobs, table
from sbp.training.config.run import Config
from sbp.training.record.summary import RUN
from sbp.training.runtime import distributed

LONGEST_NAME = 120  # of a job's folder
_SWEPT = "SBP_SWEPT"  # environment variables, as a cluster's jobs inherit them
_STARTED = "SBP_STARTED"


def command(name: str, kind: type[C], job: Callable[[C, Path], Any]) -> Any:
    """Runs `job` with the config that configs/NAME.yaml and the command line make, as `run_job` does."""
    join_processes()
    Launch.trains = kind is Config

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
    """What happens before the first job and after the last one, in the process that the user started.

    trains: whether this process's command writes runs, rather than reads them.
    """

    trains = True

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.run.dir)
        if not self.trains and (folder / RUN).is_file():  # whose .hydra and status would go
            sys.exit(f"error: run_dir={folder} holds a training run: take another folder, such as {folder / 'eval'}")
        make_folder(folder)

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
        jobs = read_jobs(folder)
        if not jobs:
            return
        print(f"\n{table(jobs)}\n")
        try:
            print(f"{folder}: {', '.join(write_all(folder))} and the runs")
        except Exception as error:  # a full disk, or matplotlib: what failed has yet to be said
            print(f"{folder}: no table or figure could be written ({error})")
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
