"""sbp plan [group=choice] [key=value] ...: which settings train a network fastest on a GPU, on a machine without one.

    sbp plan backbone=vit_base gpu=a100-40gb
    sbp plan backbone=vit_base gpu=h100 arms=[plain,sbp] batch_size=64 json=arms.json
    sbp plan calibrate file=gpu.json

Takes the groups and keys of `sbp train`, and those of PlanConfig. Prints a table of settings that fit, without those
that another one beats in time and memory, and what to give `sbp train` for the fastest.
"""

import logging
import sys
from dataclasses import fields, replace
from pathlib import Path
from shlex import join
from typing import Any

from hydra.core.hydra_config import HydraConfig

from sbp.cli.compose import register
from sbp.cli.launch import command
from sbp.training.benchmark.arms import ARMS, EXACT
from sbp.training.config.keys import check_limits
from sbp.training.config.requests import CalibrateConfig, PlanConfig, world_size
from sbp.training.config.run import Config
from sbp.training.plan import gpus
from sbp.training.plan.arms import arm_config, arm_times, recorded
from sbp.training.plan.gpus import Gpu
from sbp.training.plan.report import arms_table, as_json, draw, entry, table
from sbp.training.plan.search import Point, plan, undominated
from sbp.training.plan.settings import OF_EPOCHS
from sbp.training.record.files import write_json

log = logging.getLogger("plan")

register("plan", PlanConfig)
register("calibrate", CalibrateConfig)


def report(config: PlanConfig, folder: Path) -> None:
    """Prints the plan and writes what is asked for. Raises ValueError for what the user got wrong."""
    check_limits(config)
    gpu = gpus.find(config.gpu)
    gpu = gpu if config.launch_us is None else replace(gpu, launch_us=config.launch_us)
    run = run_config(config, gpu)
    if run.parallel == "fsdp":
        raise ValueError("a plan is of parallel=ddp, where each process holds the whole model; got parallel=fsdp")
    if config.arms is not None:
        result, points = _arms(config, run, gpu)
        available = None
    else:
        available = 2**30 * (gpus.USABLE * gpu.memory_gib if config.memory_gib is None else config.memory_gib)
        shown = _plan(config, run, gpu, available)
        result = as_json(gpu, shown, run.global_batch_size)
        points = [(one.name, one.setting.exact, one.peak, one.images_per_second) for one in shown]
    if config.json is not None:
        path = Path(config.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    if config.figure is not None:
        draw(points, f"{run.backbone.name}, {gpu.name}, amp {run.amp}", available, Path(config.figure))


def run_config(config: PlanConfig, gpu: Gpu) -> Config:
    """The training run's part, with the image size in data and model, and a precision that the GPU has."""
    run = Config(**{field.name: getattr(config, field.name) for field in fields(Config)})
    if config.image_size is not None:
        kwargs = run.backbone.kwargs
        kwargs = kwargs | {"img_size": config.image_size} if "img_size" in kwargs else kwargs
        data = replace(run.data, image_size=config.image_size, max_size=max(run.data.max_size, config.image_size))
        run = replace(run, data=data, backbone=replace(run.backbone, kwargs=kwargs))
    if run.amp == "bfloat16" and not gpu.bfloat16:
        log.info("amp        float16, as %s has no bfloat16", gpu.name)
        run = replace(run, amp="float16")
    return run


def _arms(config: PlanConfig, run: Config, gpu: Gpu) -> tuple[dict[str, Any], list[tuple[str, bool, int, float]]]:
    if run.task != "classification":
        raise ValueError(f"arms needs task=classification, got {run.task}")
    arms = {}
    for name in config.arms or []:
        one = arm_config(run.backbone, name, config.batch_size, like=run)
        step = recorded(one, config.batch_size)
        arms[name] = entry(arm_times(name, step, gpu, run.amp), step.memory.peak, config.batch_size)
    log.info("%s on %s, batch %d\n\n%s\n", run.backbone.name, gpu.name, config.batch_size, arms_table(gpu, arms))
    points = [(name, ARMS[name].kind == EXACT, one["peak"], one["images_per_second"]) for name, one in arms.items()]
    return {"gpu": gpu.name, "arms": arms}, points


def _plan(config: PlanConfig, run: Config, gpu: Gpu, available: float) -> list[Point]:
    processes = world_size(config)
    points = plan(run, gpu, available, world_size=processes)
    if not points:
        raise ValueError(
            f"nothing fits into {available / 2**30:.1f} GiB (memory_gib), not even the smallest micro batch of "
            f"global_batch_size={run.global_batch_size}"
        )
    shown = undominated(points)
    best = shown[0]
    log.info("plan       %s, %d px, amp %s", run.backbone.name, run.data.image_size, run.amp)
    log.info("gpu        %s, %.1f GiB to fit into; %g us a launch", gpu.name, available / 2**30, gpu.launch_us)
    log.info("batch      %d images a step, %d process(es)", run.global_batch_size, processes)
    log.info(
        "forecasts  without workspaces, input and communication; docs/plan.md says how far off\n\n%s\n",
        table(shown, best),
    )
    given = ["sbp", "train", *_given(config)]
    log.info("fastest    %s", join([*given, *best.overrides(run)]))
    exact = next((one for one in shown if one.setting.exact), None)
    if exact is not None and exact is not best:
        log.info("exact      %s", join([*given, *exact.overrides(run)]))
    return shown


def _given(config: PlanConfig) -> list[str]:
    """What the command line says of the run, besides what the plan decides."""
    given = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    groups = _groups({one.split("=")[0] for one in given})
    own = {field.name for field in fields(PlanConfig)} - {field.name for field in fields(Config)}
    decided = {*own, "run_dir", "processes", "amp", "compile", "global_batch_size", "micro_batch_size", "sbp"}
    kept = [one for one in given if one.split("=")[0].lstrip("+~") not in decided]
    of_setting = {f"sbp.{key}" for key in ("enabled", "keep_ratio", "mhsa_drop", "recompute", *OF_EPOCHS)}
    kept = [one for one in kept if one.split("=")[0].lstrip("+~") not in of_setting]
    processes = world_size(config)
    kept += [f"processes={processes}"] if processes > 1 else []
    return [*groups, *kept, *([] if config.image_size is None else [f"data.image_size={config.image_size}"])]


def _groups(given: set[str]) -> list[str]:
    """What this command has chosen by itself, where `sbp train` would choose something else."""
    if "experiment" in given or not HydraConfig.initialized():
        return []
    chosen = HydraConfig.get().runtime.choices
    return [f"{group}={chosen[group]}" for group in ("backbone", "data", "recipe") if group not in given]


def calibrate(config: CalibrateConfig, folder: Path) -> None:
    """Measures this machine's GPU. Raises ValueError where there is none."""
    from sbp.training.plan.calibration import calibrated

    check_limits(config)
    path = Path(config.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, calibrated(config.device, config.seconds))
    log.info("%s: sbp plan gpu=%s ...", config.file, config.file)


def main() -> Any:
    if sys.argv[1:2] == ["calibrate"]:
        sys.argv = [f"{sys.argv[0]} calibrate", *sys.argv[2:]]
        return command("calibrate", CalibrateConfig, calibrate)
    return command("plan", PlanConfig, report)
