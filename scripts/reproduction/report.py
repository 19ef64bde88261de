"""RESULTS.md: every claim with its command, what the talk says, what came out, and the verdict."""

from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from sbp.training.record.status import read_json
from sbp.training.record.table import markdown
from scripts.reproduction import beside, choice, verdicts
from scripts.reproduction.arms import ARMS, NULLS, PARTIAL
from scripts.reproduction.claims import ANSWERED, CLAIMS, QUESTIONS, STAGES, Claim, arms_of, gradients_of
from scripts.reproduction.evidence import Evidence, Finding, label, standard_error
from scripts.reproduction.published import TABLE_1, TABLE_2
from scripts.reproduction.settings import SCALES

MIB = 2**20
NO_CLAIM = "does not apply"
MEASURES = {"val_loss": "validation loss", "cosine": "cosine similarity"}
WHY = "why.yaml"  # in the folder of results: why we think that a claim came out as it did, in words without numbers

INTRODUCTION = """# Results

What the talk on stochastic backpropagation claims, and what came out here. `python -m scripts.results` writes this
file and its figures from the records in [results](results). Those of the study name device, versions, commit and
command (`-dirty`: with changes that were committed later); `python scripts/study.py` makes them. Nothing is chosen on
the images that are measured on, and of every run the last epoch counts. "Published SBP" is a grid mask with a
keep-ratio of one half, `qkv`, the published layers and a fresh mask for each step; what stands beside it differs in
what its name says alone. More or fewer epochs: as many whole ones as come nearest to the time of the other.

## The rule

Fixed before the runs ([verdicts.py](scripts/reproduction/verdicts.py))."""


def evidence(folder: Path) -> dict[str, Evidence]:
    """All that there is, under SCALE/SETTING."""
    found = {f"{scale}/{one.name}": one for scale, of_it in SCALES.items() for one in of_it.settings}
    timed = {name: one.timed(read_json(folder / name / "costs.json")) for name, one in found.items()}
    return {name: Evidence(one, folder / name) for name, one in timed.items() if (folder / name).is_dir()}


def decided(known: dict[str, Evidence]) -> tuple[dict[str, Evidence], list[str]]:
    """Those of which there is something to say, and the names of those with too few runs for that."""
    asked = {name: one for name, one in known.items() if not one.setting.plain_only}
    claims = ANSWERED.values()
    begun = [
        name
        for name, one in asked.items()
        if all(finding.verdict == verdicts.NOT_RUN for claim in claims for finding in one.findings(claim))
        and not any(choice.trained(claim, one) for claim in claims)
    ]
    return {name: one for name, one in asked.items() if name not in begun}, begun


def text(folder: Path) -> str:
    """RESULTS.md from the records in the folder `results`."""
    known, begun = decided(evidence(folder))
    why = yaml.safe_load((folder / WHY).read_text()) if (folder / WHY).is_file() else {}
    of_claims = {name: one for name, one in known.items() if one.setting.starts_from is None}
    parts = [INTRODUCTION, verdicts.RULE, "## In short"]
    parts += ["\n".join(legend(of_claims)), markdown(list(overview(of_claims)))]
    parts += [f"Claim 7, Table 1: memory {memory_of_table_1(folder)}, accuracy not run."]
    parts += ["Our own questions; whether the first of each pair is better:", markdown(list(answers(of_claims)))]
    if begun:
        parts += [f"Begun, with too few runs for a verdict so far: {', '.join(begun)}."]
    for key, claim in ANSWERED.items():
        title = f"## {key}. {claim.title}" if key in CLAIMS else f"## {claim.title}"
        parts += [title, claim.published]
        if key == "7":
            parts += list(table_1(folder))
        for name, one in known.items():
            parts += list(section(key, claim, name, one))
        if key in why:
            parts += [why[key].strip()]
        if key == "7":
            parts += list(table_2(folder))
    parts += list(beside.sections(folder))
    return "\n\n".join(parts) + "\n"


def legend(known: dict[str, Evidence]) -> Iterator[str]:
    """What is trained in each setting, a line for each."""
    for name, one in known.items():
        yield f"- {name}: {one.setting.label}"


def overview(known: dict[str, Evidence]) -> Iterator[list[str]]:
    """The verdict on each claim in each setting."""
    yield ["claim", *known]
    for key, claim in CLAIMS.items():
        if key != "7":
            yield [f"{key}. {claim.title}", *(one.verdict(claim) or NO_CLAIM for one in known.values())]


def answers(known: dict[str, Evidence]) -> Iterator[list[str]]:
    """The outcome of each comparison that answers a question of ours."""
    yield ["comparison", "measure", *known]
    for claim in QUESTIONS.values():
        found = {name: {(f.what, f.measure): f.verdict for f in one.findings(claim)} for name, one in known.items()}
        for pair in dict.fromkeys(pair for of_it in found.values() for pair in of_it):
            outcomes = (answered(of_it[pair]) if pair in of_it else NO_CLAIM for of_it in found.values())
            yield [pair[0], MEASURES[pair[1]], *outcomes]


def answered(verdict: str) -> str:
    """A verdict where nobody has claimed anything."""
    return {verdicts.REPRODUCED: "better", verdicts.OPPOSITE: "worse"}.get(verdict, verdict)


def section(key: str, claim: Claim, name: str, one: Evidence) -> Iterator[str]:
    """Tables and figure of one claim in one setting; nothing where nothing was run."""
    findings = one.findings(claim)
    chooses = claim.shows == "choice" and bool(choice.trained(claim, one))
    undecided = all(finding.verdict == verdicts.NOT_RUN for finding in findings)
    if "plain" not in one.training or (undecided and not chooses):
        return
    scale = name.split("/")[0]
    root = " data_root=FOLDER" if one.setting.needs_root else ""
    command = f"python scripts/study.py scale={scale} setting={one.setting.name} claim={key}{root}"
    record, versions = one.training["plain"], one.training["plain"]["versions"]
    commits, devices = one.provenance(claim)
    yield f"### {name}: {one.verdict(claim)}" if key in CLAIMS else f"### {name}"
    yield (
        f"{one.setting.label[0].upper()}{one.setting.label[1:]}. "
        f"`{command}` on {' and '.join(devices)}, "
        f"torch {versions['torch']}, timm {versions['timm']}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}; "
        f"{record['epochs']} epochs of {record['train_images']} images in batches of {record['global_batch_size']}."
    )
    if chooses:
        yield (
            "Accuracy against others in points, in pairs of the same seed, with intervals; training time and memory of "
            "a step relative to those without SBP."
        )
        yield markdown(list(choice.table(claim, one)))
    elif not one.setting.gradients_only:  # whose images of validation are those of training
        yield markdown(list(arms_table(claim, one)))
    if any(finding.measure == "cosine" for finding in findings):
        yield "Cosine similarity to the exact gradient, and in brackets the ratio of the norms:"
        yield markdown(list(gradients_table(claim, one)))
    if not undecided:
        yield markdown(list(findings_table([finding for finding in findings if finding.found.pairs], key in CLAIMS)))
        lacking = [label(arm) for arm in arms_of([claim], one.setting) if not one.trained(arm, "top1")]
        yield from [f"Not trained: {'; '.join(lacking)}."] if lacking else []
    figure = one.folder / f"claim-{key}.png"
    if figure.is_file():
        yield f"![{claim.title}]({figure.relative_to(figure.parents[3]).as_posix()})"


def arms_table(claim: Claim, one: Evidence) -> Iterator[list[str]]:
    memory = "peak MiB" if one.on_cuda else "saved MiB a step"
    yield ["arm", "runs", "validation loss", "top-1 %", memory, "step ms", "training s"]
    evaluated = [arm for arm in PARTIAL if any(pair.better == arm for pair in claim.comparisons)]
    for arm in [*arms_of([claim], one.setting), *evaluated]:
        losses, top1 = one.trained(arm, "val_loss"), one.trained(arm, "top1")
        cost = one.cost(arm)
        if not losses:
            continue
        step = one.step_ms(arm)
        figures = [f"{cost.memory / MIB:.1f}", f"{step:.1f}", f"{cost.time:.0f}"] if cost and step else ["", "", ""]
        model = "sbp" if arm in PARTIAL else ARMS[arm].same_as
        runs = str(len(losses)) if model is None else f"as {label(model)}"
        shown = [spread(losses, 4), spread(top1, 2)]
        yield [label(arm), runs, *shown, *figures]


def gradients_table(claim: Claim, one: Evidence) -> Iterator[list[str]]:
    stages = [*STAGES, *(["own"] if claim.shows == "similarities" and "own" in one.gradients else [])]
    names = {"own": "late, trained with SBP"}
    yield ["gradient", *(names.get(stage, stage) for stage in stages), "late, mean of all draws"]
    for method in [*(arm for arm in gradients_of([claim], one.setting) if arm in ARMS), *NULLS]:
        if not one.cosines(method):
            continue

        def mean(stage: str, figure: str, method: str = method) -> float:
            return fmean(one.cosines(method, (stage,), figure).values())

        cells = [f"{spread(one.cosines(method, (s,)), 3)} ({mean(s, 'norm_ratio'):.2f})" for s in stages]
        yield [label(method), *cells, f"{mean('late', 'cosine_of_mean'):.3f}"]


def findings_table(findings: list[Finding], claimed: bool) -> Iterator[list[str]]:
    yield ["comparison", "measure", "advantage [95 % interval]", "pairs", "verdict"]
    for one in findings:
        gap = one.found
        interval = f" [{gap.low:+.4f}, {gap.high:+.4f}]" if isfinite(gap.low) else ""
        advantage = f"{gap.mean:+.4f}{interval}" if gap.pairs else ""
        verdict = one.verdict if claimed else answered(one.verdict)
        why = f": that needs more {one.why}" if one.why else ""
        yield [one.what, MEASURES[one.measure], advantage, str(gap.pairs), f"{verdict}{why}"]


def spread(values: Any, digits: int) -> str:
    """Mean ± standard error."""
    error = standard_error(values)
    return f"{fmean(values.values()):.{digits}f}" + (f" ± {error:.{digits}f}" if isfinite(error) else "")


def table_1(folder: Path) -> Iterator[str]:
    """The paper's Table 1 beside forecasts, and beside what scripts/gpu_results.py has measured."""
    if not (folder / "forecast").is_dir():  # of a study alone
        return
    rows = [["network", "batch", "talk, MiB", "forecast, MiB", "with `cheap`, MiB", "measured, MiB", "talk, top-1 %"]]
    for key, (network, batch, plain, sbp, top1, top1_sbp) in TABLE_1.items():
        rows.append([network, str(batch), ratio(plain, sbp), *memory_cells(folder, key), f"{top1} → {top1_sbp}"])
    yield f"Memory: **{memory_of_table_1(folder)}**; accuracy: **not run** (300 epochs of ImageNet each)."
    yield markdown(rows)
    yield (
        "MiB without → with SBP at keep-ratio 0.5, and their ratio, by `sbp forecast "
        "backbone=vit_tiny global_batch_size=256 amp=bfloat16` and so on; `make gpu-results` measures. "
        "`python scripts/study.py scale=imagenet gpus=8` checks the eight runs and prints their commands."
    )


def table_2(folder: Path) -> Iterator[str]:
    """The talk's Table 2 beside forecasts and measurements, as `table_1`."""
    if not (folder / "forecast").is_dir():
        return
    rows = [["detector", "talk, GB", "forecast, MiB", "with `cheap`, MiB", "measured, MiB", "box AP", "mask AP"]]
    for key, (detector, plain, sbp, *aps) in TABLE_2.items():
        box, box_sbp, mask, mask_sbp = aps
        accuracy = [f"{box} → {box_sbp}", f"{mask} → {mask_sbp}"]
        rows.append([detector, f"{plain} → {sbp} ({sbp / plain:.2f})", *memory_cells(folder, key), *accuracy])
    yield "## Table 2: detection and segmentation on COCO"
    yield "“SBP can save 30% of GPU memory with 0.7% of accuracy drop”."
    yield "Memory: **forecast** where the table has no measurement; accuracy: **not run**, AP is the talk's."
    yield markdown(rows)
    yield (
        "Without → with SBP at keep-ratio 0.5, and their ratio; two images of `800 x 1333` pixels, by `sbp "
        "forecast experiment=table2/mask_rcnn_convnext_tiny_sbp data.root=/path/to/coco "
        "global_batch_size=2 amp=bfloat16` and so on; `make gpu-results` measures. By forecast, which knows no "
        "workspaces, today's plain detectors need about half of what the talk's did, and SBP saves a smaller share of "
        "it: weights, optimizer, pyramid and heads, which it does not touch, are there in full. It saves somewhat less "
        "in the experiments' own `amp=float16`, and where gradients are held besides, as on several GPUs: "
        "`amp=float16 world_size=8 global_batch_size=16`. "
        "`python train.py task=detection experiment=table2/...` runs the four."
    )


def memory_cells(folder: Path, key: str) -> list[str]:
    """By forecast, by forecast with `cheap`, and as measured."""
    forecast = read_json(folder / "forecast" / f"{key}.json")["peak_by_recompute_and_keep_ratio"]
    before = forecast["none"]["1.0"]
    measured = [peaks_in_words(device, arms) for device, arms in peaks(folder, key)]
    by_forecast = [ratio(before / MIB, forecast[mode]["0.5"] / MIB) for mode in ("none", "cheap")]
    return [*by_forecast, "; ".join(measured) or "not run"]


def ratio(before: float, after: float) -> str:
    return f"{before:.0f} → {after:.0f} ({after / before:.2f})"


def peaks(folder: Path, key: str) -> list[tuple[str, dict[str, float]]]:
    """Device, and peak bytes of each arm in one run of scripts/gpu_results.py, for each GPU that was measured on."""
    found = []
    for path in sorted((folder / "gpu").glob(f"*/{key}-eager.json")):
        record = read_json(path)
        arms = {name: one["peak_allocated"] for name, one in record["arms"].items() if one.get("peak_allocated")}
        if {"plain", "sbp"} <= arms.keys() and not path.parent.name.endswith("-small"):
            found.append((record["device"], arms))
    return found


def peaks_in_words(device: str, arms: dict[str, float]) -> str:
    names = {"sbp_cheap": "SBP with `cheap`", "checkpoint": "checkpointing", "release": "authors' release"}
    others = [f"{words} {arms[name] / MIB:.0f}" for name, words in names.items() if name in arms]
    return ", ".join([ratio(arms["plain"] / MIB, arms["sbp"] / MIB), *others]) + f" on {device}"


def memory_of_table_1(folder: Path) -> str:
    """The verdict on the memory column, and how many networks reach it."""
    reached: list[bool] = []
    for key, (_, _, plain, sbp, _, _) in TABLE_1.items():
        if measured := peaks(folder, key):
            reached.append(all(arms["sbp"] / arms["plain"] <= sbp / plain for _, arms in measured))
    verdict = verdicts.of_table_1(reached, len(TABLE_1))
    if verdict == verdicts.NOT_RUN:
        return verdict
    return f"{verdict} ({sum(reached)} of {len(reached)} networks take at most the talk's share)"
