"""The study: checks the talk's claims at the scale of a machine, and writes them down.

    python scripts/study.py scale=laptop                    claims 1, 2 and 5: under 45 minutes on 2 cores
    python scripts/study.py scale=laptop claim=3            any other claim or question of reproduction/claims.py
    python scripts/study.py scale=gpu claim=all data_root=/path/to/cifar10
    nice -n 19 python scripts/study.py scale=cifar10 data_root=/path/to/cifar10     which setting to take: two small
                                                            networks on photographs, 20 hours of 2 cores
    python scripts/study.py scale=cifar10_gpu data_root=/path/to/cifar10    the same with networks of 70 %, on a GPU
    python scripts/study.py scale=fine_tuning data_root=/path/to/cifar10   beside a frozen backbone: 3 hours of a core
    python scripts/study.py scale=convnext                  input gradients at dropped positions: 1.5 hours of a core
    python scripts/study.py scale=imagenet gpus=8           checks and prints the commands of Table 1's eight runs

Trains every arm that the claims need by a sweep of train.py over the seeds (run_dir/SCALE/SETTING/ARM), measures
gradient similarities and the cost of a step, and writes records, figures and a RESULTS.md to outputs/study. The same
command again goes on where it was interrupted, and does nothing twice. `results=results` takes up the records that
are in the repository. Keys: StudyConfig below.
"""

import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Python itself puts the folder of this file there, not the root

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sbp.training.data.sources import build_datasets
from sbp.training.record.status import EXIT_PREEMPTED, read_json
from sbp.training.record.summary import SUMMARY
from sbp.training.runtime import distributed, environment
from scripts import dry_run
from scripts.jobs import Jobs
from scripts.reproduction.claims import ANSWERED, Claim, arms_of
from scripts.reproduction.settings import SCALES, Scale, Setting
from scripts.study_tasks import Experiment, arm_config, by_seed, link_images, measure_costs, tasks

KINDS = ("training", "gradients", "published", "costs")  # of what there is to do, in this order


@dataclass
class StudyConfig:
    """scale: "laptop", "convnext", "cifar10", "cifar10_gpu", "fine_tuning", "gpu", or "imagenet".
    claim: one or a list of the keys of CLAIMS and QUESTIONS in scripts/reproduction/claims.py, "all", or null for what
        the scale answers by default.
    setting: what is trained, by its name in scripts/reproduction/settings.py; null for all that `data_root` allows.
    data_root: the images of the settings that need some: a folder with one for each split, with one for each class.
    seeds: runs of each arm; null for the setting's own number. jobs: runs at once; null for what the scale has on each
        GPU, or for one on each core.
    minutes: stop in good order before they are over. device: null for the scale's own. only: one of "training",
        "gradients", "published" and "costs", of what is trained so far; null for all of it.
    run_dir: where the runs lie. results: the folder of the records, beside which RESULTS.md goes.
    gpus, nodes: of the imagenet scale.
    """

    scale: str = "laptop"
    claim: Any = None
    setting: str | None = None
    data_root: str | None = None
    seeds: int | None = None
    jobs: int | None = None
    minutes: float | None = None
    device: str | None = None
    only: str | None = None
    run_dir: str = "outputs/study"
    results: str = "outputs/study/results"
    gpus: int = 8
    nodes: int = 1


def main() -> None:
    config = read_config(sys.argv[1:])
    if config.scale == "imagenet":
        return dry_run.main([f"--gpus={config.gpus}", f"--nodes={config.nodes}"])
    scale = SCALES[config.scale]
    claims, settings = asked(config, scale), chosen(config, scale)
    device = distributed.pick_device(config.device or scale.device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    folders = config.run_dir, config.results, config.data_root
    experiments = [Experiment.of(config.scale, setting, device, *folders, config.seeds) for setting in settings]
    for experiment in experiments:
        check_images(experiment, config.data_root)
        check_device(experiment)
    starts = {one.setting.starts_from for one in experiments if tasks(one, claims)["training"]}
    experiments = [replace(one, gives_start=one.setting.name in starts) for one in experiments]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = (config.only,) if config.only else KINDS
    with Jobs(config.jobs or gpus * scale.on_one_gpu or cores, gpus, config.minutes) as jobs:
        if scale.by_seed and "training" in wanted:
            experiments = [at_measured_time(experiment, claims, scale, jobs) for experiment in experiments]
            for starting in (False, True):  # what others start from comes first
                several = [one for one in experiments if (one.setting.starts_from is not None) == starting]
                jobs.do("training", {} if jobs.stopping else by_seed(several, claims))
        for experiment in experiments:
            if not scale.by_seed and "training" in wanted:
                experiment = at_measured_time(experiment, claims, scale, jobs)
            for kind, todo in {} if jobs.stopping else tasks(experiment, claims).items():
                jobs.do(f"{experiment.setting.name}, {kind}", todo if kind in wanted else {})
            if "costs" in wanted and not (experiment.setting.gradients_only or experiment.setting.plain_only):
                arms = arms_of(claims, experiment.setting)
                jobs.do(
                    f"{experiment.setting.name}, costs", {"all": partial(measure_costs, experiment, arms, scale.rounds)}
                )
    write_results(Path(config.results))
    if jobs.failed:
        sys.exit("error: failed:\n  " + "\n  ".join(jobs.failed))
    if jobs.stopping:
        print("stopped; the same command goes on from here")
        sys.exit(EXIT_PREEMPTED)


def at_measured_time(experiment: Experiment, claims: list[Claim], scale: Scale, jobs: Jobs) -> Experiment:
    """With the time that a step with SBP takes, where arms are to be trained for as long as others."""
    if jobs.stopping or not {"longer", "shorter"} & set(arms_of(claims, experiment.setting)):
        return experiment
    jobs.do(f"{experiment.setting.name}, time", {"of a step": partial(measure_costs, experiment, [], scale.rounds)})
    costs = read_json(experiment.results / "costs.json")
    if not {"plain", "sbp"} <= costs.get("arms", {}).keys() and not jobs.stopping:
        sys.exit("error: failed, and arms of equal time need it:\n  " + "\n  ".join(jobs.failed))
    return replace(experiment, setting=experiment.setting.timed(costs))


def read_config(arguments: list[str]) -> StudyConfig:
    """Ends the program with one line for what the user got wrong."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__, StudyConfig.__doc__, sep="\n")
        sys.exit()
    try:
        merged = OmegaConf.merge(OmegaConf.structured(StudyConfig), OmegaConf.from_cli(arguments))
        config: StudyConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        sys.exit(f"error: {str(error).splitlines()[0]} (key: {error.full_key}; --help lists all)")
    allowed = [*SCALES, "imagenet"]
    if config.scale not in allowed:
        sys.exit(f"error: scale must be one of {', '.join(allowed)}, got {config.scale}")
    if config.only not in (None, *KINDS):
        sys.exit(f"error: only must be one of {', '.join(KINDS)}, got {config.only}")
    for key, least in {"seeds": 2, "jobs": 1, "gpus": 1, "nodes": 1}.items():
        if (value := getattr(config, key)) is not None and value < least:
            sys.exit(f"error: {key} must be at least {least}, got {value}")
    if config.data_root is not None and not Path(config.data_root).is_dir():
        sys.exit(f"error: data_root={config.data_root} is no folder")
    return config


def asked(config: StudyConfig, scale: Scale) -> list[Claim]:
    """The claims and questions to answer."""
    given = config.claim if isinstance(config.claim, list) else [config.claim]
    keys = list(scale.claims) if config.claim is None else [str(key) for key in given]
    unknown = [key for key in keys if key not in ANSWERED and key != "all"]
    if unknown:
        sys.exit(f"error: no claim {', '.join(unknown)}; there are {', '.join(ANSWERED)}, and all")
    if keys == ["7"]:
        sys.exit("Table 1: `make gpu-results` measures its memory, scale=imagenet has the commands of its runs")
    return list(ANSWERED.values()) if "all" in keys else [ANSWERED[key] for key in keys]


def chosen(config: StudyConfig, scale: Scale) -> list[Setting]:
    """The settings to train."""
    names = {one.name: one for one in scale.settings}
    if config.setting is not None and config.setting not in names:
        sys.exit(f"error: scale={config.scale} has no setting {config.setting}; there are {', '.join(names)}")
    settings = [names[config.setting]] if config.setting else scale.by_default(config.data_root is not None)
    before = [names[one.starts_from] for one in settings if one.starts_from is not None]
    settings = list(dict.fromkeys([*before, *settings]))
    if not settings or (config.data_root is None and any(one.needs_root for one in settings)):
        wanted = f"setting={config.setting}" if config.setting else f"scale={config.scale}"
        sys.exit(f"error: {wanted} needs data_root: the folder of its images")
    return settings


def check_images(experiment: Experiment, root: str | None) -> None:
    """Before anything runs. Ends the program with one line for a folder that is not as the setting needs it."""
    if experiment.setting.needs_root:
        config = arm_config(experiment, "plain")
        try:
            link_images(experiment, Path(root or ""))
            build_datasets(config.data, config.recipe)
        except (ValueError, OSError) as error:
            sys.exit(f"error: data_root={root} does not fit setting={experiment.setting.name}: {error}")


def check_device(experiment: Experiment) -> None:
    """Ends the program with one line where there are results or runs of another device, of which no figure may be set
    beside this one's.
    """
    here = kind_of(environment.device_name(experiment.device))
    for path in sorted([*experiment.results.rglob("*.json"), *experiment.runs.glob(f"*/*/{SUMMARY}")]):
        there = kind_of(read_json(path).get("device", here))
        if there != here:
            sys.exit(f"error: {path} is of {there}, and this is {here}: results= and run_dir= need other folders")


def kind_of(device: str) -> str:
    """Without the number of threads."""
    return device.partition(",")[0]


def write_results(folder: Path) -> None:
    if find_spec("matplotlib") and find_spec("scipy"):
        from scripts import results

        results.write(folder)
    else:  # on a GPU machine without a network
        print(f"{folder}: `python -m scripts.results` makes RESULTS.md of it where matplotlib and scipy are installed")


if __name__ == "__main__":
    main()
