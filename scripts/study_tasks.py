"""What the study does in one setting: trains arms, compares gradients, measures costs; each leaves one file."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from threading import Lock

import torch

from sbp.cli.compose import composed
from sbp.cli.torchrun import quoted
from sbp.training.benchmark.report import write_record
from sbp.training.config.run import Config
from sbp.training.data.sources import build_datasets
from sbp.training.record.status import is_taken, read_json
from sbp.training.record.summary import SUMMARY
from sbp.training.runtime import environment
from scripts.jobs import Jobs
from scripts.reproduction.arms import ARMS, PARTIAL, sbp_arguments
from scripts.reproduction.claims import STAGES, Claim, arms_of, asks_of, gradients_of
from scripts.reproduction.costs import step_costs
from scripts.reproduction.settings import Setting

Task = Callable[[Jobs], str | None]

_writing = Lock()  # a record
_composing = Lock()  # of which Hydra does one at a time

RUN_FIGURES = ("seed", "top1", "top5", "val_loss", "saved_bytes_per_image", "effective_keep_ratio")
RUN_FACTS = ("device", "versions", "amp", "global_batch_size", "epochs", "steps_per_epoch", "train_images", "lr")
COMMON = ("logger=none", "probe.every_steps=null", "eval_every_epochs=1000000")  # the last epoch is evaluated anyway


@dataclass(frozen=True)
class Experiment:
    """A setting, the folder of its runs and that of its results. common: overrides of all of its runs. gives_start:
    others are to be trained that start from its runs without SBP.
    """

    setting: Setting
    device: torch.device
    runs: Path
    results: Path
    common: list[str]
    seeds: list[int]
    gives_start: bool = False

    @classmethod
    def of(
        cls,
        scale: str,
        setting: Setting,
        device: torch.device,
        runs: str,
        results: str,
        root: str | None,
        seeds: int | None,
    ) -> "Experiment":
        """root: of the images. seeds: null for the setting's own number."""
        common = [*setting.overrides, *setting.schedule, *COMMON, f"device={device.type}"]
        where = Path(scale) / setting.name
        if setting.needs_root:
            folder = Path(root or "") if setting.classes is None else Path(runs) / where / "images"
            common.append(f"data.root={quoted(folder.resolve())}")
        if setting.starts_from is not None:
            run = Path(runs).resolve() / scale / setting.starts_from / "plain" / "seed-${seed}"
            common.append(f"backbone.pretrained={quoted(run / 'checkpoints' / 'best.pt')}")
        numbers = list(range(1, 1 + (seeds or setting.seeds)))
        return cls(setting, device, Path(runs).resolve() / where, Path(results) / where, common, numbers)

    def file(self, kind: str, name: str) -> Path:
        return self.results / kind / f"{name}.json"

    def has(self, kind: str, name: str) -> bool:
        """Whether the results are there, for all seeds."""
        record = read_json(self.file(kind, name))
        return {one["seed"] for one in record.get("runs", [])} >= set(self.seeds)

    def finished(self, arm: str) -> dict[int, Path]:
        """The folders of an arm's complete runs, by seed."""
        found = {json.loads(path.read_text())["seed"]: path.parent for path in (self.runs / arm).glob(f"*/{SUMMARY}")}
        return {seed: found[seed] for seed in self.seeds if seed in found}


def link_images(experiment: Experiment, root: Path) -> None:
    """Of a setting that takes some of the classes under `root`, or few images of each, the folder that it reads."""
    setting = experiment.setting
    if setting.classes is None:
        return
    for split, most in (("train", setting.images_of_each), ("test", None)):
        names = sorted(path.name for path in (root / split).iterdir() if path.is_dir())
        for name in names[slice(*setting.classes)]:
            folder = experiment.runs / "images" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            wanted = {folder / path.name: path.resolve() for path in sorted((root / split / name).iterdir())[:most]}
            for link in folder.iterdir():  # of another root, or of more images
                if link.readlink() != wanted.get(link):
                    link.unlink()
            for link, target in wanted.items():
                if not link.is_symlink():
                    link.symlink_to(target)


def tasks(experiment: Experiment, claims: list[Claim]) -> dict[str, dict[str, Task]]:
    """What is left to be done in a setting, by kind and name."""
    setting = experiment.setting
    trained = [arm for arm in arms_of(claims, setting) if ARMS[arm].same_as is None]
    gradients = [name for name in gradients_of(claims, setting) if not experiment.has("gradients", name)]
    asked = [claim for claim in claims if asks_of(claim, setting)]
    partially = any(pair.better in PARTIAL for claim in asked for pair in claim.comparisons)
    published = ["sbp"] if setting.is_vit and partially and not experiment.has("published", "sbp") else []
    # Whose checkpoints others need.
    read = {"plain": bool(gradients) or experiment.gives_start, "sbp": bool(published) or "own" in gradients}
    lacking = [arm for arm, needed in read.items() if needed and len(experiment.finished(arm)) < len(experiment.seeds)]
    return {
        "training": {
            arm: partial(train, experiment, arm)
            for arm in trained
            if arm in lacking or not experiment.has("training", arm)
        },
        "gradients": {name: partial(similarity, experiment, name) for name in gradients},
        "published": {name: partial(evaluate_as_published, experiment) for name in published},
    }


def by_seed(experiments: list[Experiment], claims: list[Claim]) -> dict[str, Task]:
    """What is left to be trained in several settings: claim by claim, and of each claim all arms of a seed, in their
    order, before any of the next.
    """
    found: list[tuple[tuple[int, int, float], str, Task]] = []
    for experiment in experiments:
        arms = [arm for arm in arms_of(claims, experiment.setting) if ARMS[arm].same_as is None]
        first = {
            arm: next(i for i, one in enumerate(claims) if arm in arms_of([one], experiment.setting)) for arm in arms
        }
        for seed in experiment.seeds:
            one = replace(experiment, seeds=[seed])
            for arm in tasks(one, claims)["training"]:
                rank = first[arm], seed, arms.index(arm) / len(arms)
                found.append((rank, f"{experiment.setting.name}, {arm}, seed {seed}", partial(train, one, arm)))
    return {name: task for _, name, task in sorted(found, key=lambda one: one[0])}


def train(experiment: Experiment, arm: str, jobs: Jobs) -> str | None:
    """A sweep over the seeds, or the run of one."""
    saved = ["checkpoint.keep=1"]
    if arm == "plain":  # the checkpoints that gradients are compared on, and no others that would push them out
        saved = ["checkpoint.keep=1000", "checkpoint.every_epochs=1000000"]
        saved.append(f"checkpoint.every_steps={max(1, total_steps(experiment) // 10)}")
    given = [*experiment.common, *ARMS[arm].overrides(experiment.setting), *saved]
    folder, seeds = experiment.runs / arm, ",".join(map(str, experiment.seeds))
    sweep, own = (
        (["-m"], folder) if len(experiment.seeds) > 1 else ([], folder / f"seed-{seeds}")
    )  # as a sweep names it
    of_seeds = [folder / f"seed-{seed}" for seed in experiment.seeds]
    while any(map(is_taken, of_seeds)) and not jobs.stopping:  # by a run whose study was killed
        time.sleep(5)
    begun = time.time()
    done = jobs.run(["train.py", *sweep, *given, f"seed={seeds}", f"run_dir={quoted(own)}"], folder / "log.txt")
    # Where it has refused to go on, what lies there may be of other settings.
    found = [run / SUMMARY for run in experiment.finished(arm).values()]
    summaries = [json.loads(path.read_text()) for path in found if done or path.stat().st_mtime >= begun]
    if not summaries:
        return None
    with _writing:  # another seed of the arm may end at the same time
        before = read_json(experiment.file("training", arm))  # of other seeds, too, perhaps
        of_seed = {run["seed"]: run for run in before.get("runs", [])}
        of_seed |= {one["seed"]: {key: one.get(key) for key in RUN_FIGURES} for one in summaries}
        runs = [of_seed[seed] for seed in sorted(of_seed)]
        facts = {key: summaries[-1][key] for key in RUN_FACTS}
        for several, values in {
            "devices": [one["device"] for one in summaries],
            "commits": [one["versions"].get("commit", "unknown") for one in summaries],
        }.items():
            facts[several] = sorted({*before.get(several, []), *values})
        command = shell("train.py -m", [*given, f"seed={','.join(map(str, of_seed))}"])
        write_record({"arm": arm, "command": command, **facts, "runs": runs}, experiment.file("training", arm))
    losses = [run["val_loss"] for run in runs]
    return f"validation loss {fmean(losses):.4f} in {len(runs)} runs, {min(losses):.4f} to {max(losses):.4f}"


def total_steps(experiment: Experiment) -> int:
    """Of a run without SBP."""
    config = arm_config(experiment, "plain")
    generated = config.data.source in ("cluttered_digits", "synthetic")
    images = config.data.train_images if generated else len(build_datasets(config.data, config.recipe)[0])  # type: ignore[arg-type]
    return config.recipe.epochs * (images // config.global_batch_size)


def similarity(experiment: Experiment, name: str, jobs: Jobs) -> str | None:
    """The gradients of an arm, or of parts of the batch ("nulls"), on checkpoints of the runs without SBP.

    "own": those of published SBP, and of parts of the batch, on the last checkpoints of its own runs.
    """
    arm = "sbp" if name == "own" else "plain"
    runs_of_it = experiment.finished(arm)
    if len(runs_of_it) < len(experiment.seeds):
        raise ValueError(f"the runs of {arm} are not complete, on whose checkpoints gradients are compared")
    staged = {"own": last_checkpoint}.get(name, staged_checkpoints)
    checkpoints = [pair for run in runs_of_it.values() for pair in staged(run).items()]
    nulls = name not in ARMS
    method = "sbp" if name == "own" else name
    methods = {} if name == "nulls" else {method: sbp_arguments(method, experiment.setting)}
    options = [
        f"--methods={json.dumps(methods)}",
        f"--images={experiment.setting.images}",
        f"--draws={experiment.setting.draws}",
    ]
    options += [f"--device={experiment.device.type}", "--threads=1", *([] if nulls else ["--no-nulls"])]
    out = experiment.runs / "gradients" / f"{name}.json"
    command = ["-m", "scripts.gradient_similarity", *(str(path) for _, path in checkpoints), *options, f"--out={out}"]
    if not jobs.run(command, out.with_suffix(".txt")):
        return None
    record = json.loads(out.read_text())
    runs = [one | {"stage": stage} for one, (stage, _) in zip(record.pop("checkpoints"), checkpoints, strict=True)]
    told = {"command": shell("-m scripts.gradient_similarity CHECKPOINTS", options)}
    write_record(told | record | {"runs": runs}, experiment.file("gradients", name))
    late = [one["found"] for one in runs if one["stage"] in ("late", "own")]
    return ", ".join(f"cosine {fmean(one[key]['cosine'] for one in late):.3f} ({key})" for key in late[0]) + ", late"


def last_checkpoint(run: Path) -> dict[str, Path]:
    return {"own": max((run / "checkpoints").glob("step-*.pt"))}


def staged_checkpoints(run: Path) -> dict[str, Path]:
    """The checkpoint of each stage of a run. Raises ValueError where there is none near it."""
    paths = {int(path.stem.removeprefix("step-")): path for path in (run / "checkpoints").glob("step-*.pt")}
    found = {}
    for stage, share in STAGES.items():
        wanted = share * max(paths)
        step = min(paths, key=lambda step: abs(step - wanted))
        if abs(step - wanted) > max(1, 0.05 * max(paths)):
            raise ValueError(f"{run} has no checkpoint near step {wanted:.0f}: remove it, and train it again")
        found[stage] = paths[step]
    return found


def evaluate_as_published(experiment: Experiment, jobs: Jobs) -> str | None:
    """The accuracy of the arm "sbp" with partial attention in evaluation too, as the authors' code has it."""
    folder = experiment.runs / "published"
    checkpoints = {
        seed: next((run / "checkpoints").glob("step-*.pt")) for seed, run in experiment.finished("sbp").items()
    }
    given = ["sbp.eval=published", f"device={experiment.device.type}"]
    for seed, path in checkpoints.items():
        command = ["eval.py", f"checkpoint={quoted(path)}", *given, f"run_dir={quoted(folder / str(seed))}"]
        if not jobs.run(command, folder / "log.txt"):
            return None
    found = {seed: json.loads((folder / str(seed) / "eval.json").read_text()) for seed in checkpoints}
    runs = [{"seed": seed, "top1": one["top1"], "val_loss": one["loss"]} for seed, one in found.items()]
    facts = {"command": shell("eval.py checkpoint=FILE", given), "device": environment.device_name(experiment.device)}
    write_record(facts | {"versions": environment.versions(), "runs": runs}, experiment.file("published", "sbp"))
    return f"validation loss {fmean(run['val_loss'] for run in runs):.4f} with partial attention in evaluation too"


def measure_costs(experiment: Experiment, arms: list[str], rounds: int, jobs: Jobs) -> None:
    """What a step of each arm costs, in groups that take turns with plain training; on a GPU nothing else may run then.

    What is known stays: later arms are set in relation to the plain arm's time of before.
    """
    path = experiment.results / "costs.json"
    known = read_json(path).get("arms", {})
    configs = {arm: arm_config(experiment, arm) for arm in dict.fromkeys(["plain", "sbp", *arms])}
    new = [arm for arm in configs if arm not in known and (arm not in ARMS or ARMS[arm].parts is None)]
    if experiment.device.type == "cpu":
        torch.set_num_threads(1)
        environment.keep_freed_memory()
    for group in (new[first : first + 3] for first in range(0, len(new), 3)):  # all at once might not fit into memory
        taking_turns = {arm: configs[arm] for arm in dict.fromkeys(["plain", *group])}
        found = step_costs(taking_turns, rounds=rounds, device=experiment.device, stopping=lambda: jobs.stopping)
        if not found:
            return
        scale = known["plain"]["step_ms"] / found["plain"]["step_ms"] if "plain" in known else 1.0
        versions = environment.versions()
        of_all = {"commit": versions.pop("commit", "unknown")}
        known |= {arm: found[arm] | {"step_ms": scale * found[arm]["step_ms"]} | of_all for arm in group}
        facts = {"device": environment.device_name(experiment.device), "versions": versions, "rounds": rounds}
        write_record({"command": "python scripts/study.py"} | facts | {"arms": known}, path)


def arm_config(experiment: Experiment, arm: str) -> Config:
    """Of one run, as train.py gets it."""
    with _composing:
        return composed([*experiment.common, *ARMS[arm].overrides(experiment.setting)])


def shell(command: str, arguments: list[str]) -> str:
    """A command as a shell takes it, without this machine's paths."""
    paths = {"data.root": "FOLDER", "backbone.pretrained": "FILE"}
    keys = [one.partition("=")[0] for one in arguments]
    named = [f"{key}={paths[key]}" if key in paths else one for key, one in zip(keys, arguments, strict=True)]
    return " ".join(["python", command, *(f"'{one}'" if set(one) & set("[]{}$ ") else one for one in named)])
