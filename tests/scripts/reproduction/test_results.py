"""RESULTS.md is what the records say, and no number in it is from elsewhere: each is computed here a second time."""

import json
import re

import numpy as np
import pytest
from scipy.stats import ttest_rel

from sbp.training.record.status import read_json
from scripts import results
from scripts.reproduction import report, verdicts
from scripts.reproduction.arms import ARMS, NULLS, PARTIAL
from scripts.reproduction.claims import ANSWERED
from scripts.reproduction.published import TABLE_1, TABLE_2
from tests.training.configs import ROOT

FOLDER = ROOT / "results"
TEXT = (ROOT / "RESULTS.md").read_text()
STUDY, BESIDE = TEXT.split("## Beside the study", 1)
LABELS = {arm.label: name for name, arm in ARMS.items()}
LABELS |= {label: name for name, label in (NULLS | PARTIAL).items()}
STAGES = ("early", "middle", "late")


def records(name, kind):
    return {path.stem: json.loads(path.read_text()) for path in (FOLDER / name / kind).glob("*.json")}


def tables(text):
    """Each as a list of rows of cells, the first one the headings."""
    found, current = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            current.append([cell.strip() for cell in line.strip("|").split("|")])
        elif current:
            found.append([current[0], *current[2:]])
            current = []
    return found


def sections():
    """(claim's title, SCALE/SETTING, text) of every section of a setting."""
    for chapter in re.split(r"^## ", STUDY, flags=re.M)[1:]:
        title = chapter.splitlines()[0]
        for part in re.split(r"^### ", chapter, flags=re.M)[1:]:
            yield title, part.splitlines()[0].split(":")[0], part


def numbers(cell):
    return [float(one) for one in re.findall(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", cell)]


def same(cell, *values):
    """The cell has these values, rounded to as many digits as it shows."""
    shown = re.findall(r"[-+]?\d+(?:\.\d+)?", cell)
    assert len(shown) == len(values), cell
    for text, value in zip(shown, values, strict=True):
        digits = len(text.partition(".")[2])
        assert abs(float(text) - value) <= 0.5000001 * 10**-digits, (cell, value)


def mean_and_error(values):
    values = np.array(list(values))
    return [values.mean(), values.std(ddof=1) / np.sqrt(len(values))]


def of_arm(training, label):
    name = LABELS[label]
    runs = training["partial" if name == "partial" else ARMS[name].same_as or name]
    return name, runs, {run["seed"]: run["val_loss"] for run in runs["runs"]}


def cosines(gradients, label, stages=("middle", "late"), key="cosine"):
    name = LABELS[label]
    runs = gradients["own" if stages == ("own",) else "nulls" if name in NULLS else name]["runs"]
    seeds = sorted({run["seed"] for run in runs})
    return {
        seed: np.mean([run["found"][name][key] for run in runs if run["seed"] == seed and run["stage"] in stages])
        for seed in seeds
    }


def test_it_is_up_to_date():
    """Otherwise: python -m scripts.results"""
    assert report.text(FOLDER) == TEXT


def test_something_was_run():
    of_three_seeds = {f"cifar10{scale}" for scale in ("/small-vit", "/small-convnext", "_gpu/vit", "_gpu/convnext")}
    assert {name for _, name, _ in sections()} >= {"laptop/digits-vit", *of_three_seeds}


@pytest.mark.parametrize("title, name, text", list(sections()), ids=lambda value: value[:24])
def test_tables_are_what_the_records_say(title, name, text):
    training, gradients = records(name, "training"), records(name, "gradients")
    training["partial"] = records(name, "published").get("sbp")
    costs = read_json(FOLDER / name / "costs.json").get("arms", {})  # measured last
    for heading, *rows in tables(text):
        for label, *cells in rows:
            if heading[0] == "arm":
                arm, record, losses = of_arm(training, label)
                assert all(commit[:7] in text for commit in record.get("commits", []))
                same(cells[1], *mean_and_error(losses.values()))
                same(cells[2], *mean_and_error(run["top1"] for run in record["runs"]))
                if arm in costs:
                    same(cells[3], costs[arm]["peak_allocated" if "peak MiB" in heading else "memory"] / 2**20)
                    same(cells[4], costs[arm]["step_ms"])
                    same(cells[5], costs[arm]["step_ms"] / 1000 * record["epochs"] * record["steps_per_epoch"])
            elif heading[0] == "gradient":
                stages = STAGES if len(cells) == 4 else (*STAGES, "own")
                for stage, cell in zip(stages, cells, strict=False):
                    ratio = np.mean(list(cosines(gradients, label, (stage,), "norm_ratio").values()))
                    same(cell, *mean_and_error(cosines(gradients, label, (stage,)).values()), ratio)
                same(cells[-1], np.mean(list(cosines(gradients, label, ("late",), "cosine_of_mean").values())))
            elif heading[0] == "setting":
                check_choice(training, costs, label, *cells)
            else:
                check_comparison(title, training, gradients, costs, label, *cells)


def check_choice(training, costs, label, runs, top1, against_plain, against_published, time, memory):
    arm, record, _ = of_arm(training, label)
    found = {run["seed"]: run["top1"] for run in record["runs"]}
    assert runs == (str(len(found)) if ARMS[arm].same_as is None else f"as {ARMS[ARMS[arm].same_as].label}")
    same(top1, np.mean(list(found.values())))
    for cell, other in ((against_plain, "plain"), (against_published, "sbp")):
        of_other = {run["seed"]: run["top1"] for run in training[other]["runs"]}
        seeds = sorted(found.keys() & of_other.keys())
        first, second = ([one[seed] for seed in seeds] for one in (found, of_other))
        if first == second:
            assert cell == ""
        elif len(seeds) > 1:
            interval = ttest_rel(first, second).confidence_interval(0.95)
            same(cell, np.mean(first) - np.mean(second), interval.low, interval.high)
        else:
            same(cell, first[0] - second[0])
    shares = ARMS[arm].parts or {arm: 1.0}
    if shares.keys() <= costs.keys():
        step = sum(share * costs[part]["step_ms"] for part, share in shares.items())
        same(time, step / costs["plain"]["step_ms"] * record["epochs"] / training["plain"]["epochs"])
        most = max(costs[part].get("peak_allocated", costs[part]["memory"]) for part in shares)
        same(memory, most / costs["plain"].get("peak_allocated", costs["plain"]["memory"]))
    else:
        assert time == memory == ""


def check_comparison(title, training, gradients, costs, what, measure, advantage, pairs, verdict):
    dominates = what.startswith("not dominated by ")
    better, worse = ("published SBP", what.removeprefix("not dominated by ")) if dominates else what.split(" against ")
    try:
        if measure == "cosine similarity":
            first, second = cosines(gradients, better), cosines(gradients, worse)
        else:
            first, second = of_arm(training, worse)[2], of_arm(training, better)[2]
    except (KeyError, TypeError):  # of one there is no record
        first = second = {}
    seeds = sorted(first.keys() & second.keys())
    if verdict == "not run":
        assert len(seeds) < 3 or (dominates and LABELS[worse] not in costs)
        return
    first, second = (np.array([one[seed] for seed in seeds]) for one in (first, second))
    interval = ttest_rel(first, second).confidence_interval(0.95)
    same(advantage.replace("95 %", ""), (first - second).mean(), interval.low, interval.high)
    assert pairs == str(len(seeds))
    words = ("reproduced", "opposite") if title[1] == "." else ("better", "worse")
    decided = words[0] if interval.low > 0 else words[1] if interval.high < 0 else "not separated"
    if dominates:
        own, other = costs["sbp"], costs[LABELS[worse]]
        epochs = of_arm(training, worse)[1]["epochs"] / of_arm(training, better)[1]["epochs"]
        memory = "peak_allocated" if "peak_allocated" in own else "memory"
        more = {"memory": other[memory] > own[memory]}
        more["time"] = other["step_ms"] * epochs > 1.02 * own["step_ms"]
        if any(more.values()):
            decided = f"reproduced: that needs more {' and '.join(name for name in more if more[name])}"
    assert verdict == decided


def test_table_1_is_the_talks_and_the_forecasts():
    (table,) = (one for one in tables(TEXT) if one[0][0] == "network")
    for row, key in zip(table[1:], TABLE_1, strict=True):
        network, batch, memory, forecast, cheap, _, top1 = row
        name, of_a_gpu, plain, sbp, *accuracies = TABLE_1[key]
        assert (network, batch) == (name, str(of_a_gpu))
        same(memory, plain, sbp, sbp / plain)
        assert numbers(top1) == accuracies
        assert_forecast(key, forecast, cheap)


def test_the_documents_repeat_table_1_as_it_is():
    (row,) = re.findall(r"^\| published \| (.*) \|$", (ROOT / "docs" / "memory.md").read_text(), re.M)
    assert row.split(" | ") == [f"{plain} → {sbp}" for _, _, plain, sbp, *_ in TABLE_1.values()]


def assert_forecast(name, forecast, cheap):
    peaks = json.loads((FOLDER / "forecast" / f"{name}.json").read_text())["peak_by_recompute_and_keep_ratio"]
    before = peaks["none"]["1.0"]
    for cell, mode in ((forecast, "none"), (cheap, "cheap")):
        after = peaks[mode]["0.5"]
        same(cell, before / 2**20, after / 2**20, after / before)


def test_table_2_is_the_talks_and_the_forecasts():
    (table,) = (one for one in tables(TEXT) if one[0][0] == "detector")
    for row, name in zip(table[1:], TABLE_2, strict=True):
        detector, memory, forecast, cheap, _, box, mask = row
        words, plain, sbp, *accuracies = TABLE_2[name]
        assert detector == words and re.sub(r"\W+", "", detector).lower() == re.sub("_", "", name)
        same(memory, plain, sbp, sbp / plain)
        assert numbers(box) + numbers(mask) == accuracies
        assert_forecast(name, forecast, cheap)


def test_what_stands_beside_the_study_is_its_record():
    record = json.loads((FOLDER / "gpu" / "h100-60167d7" / "cifar10.json").read_text())
    assert record["device"] in BESIDE and record["settings"] in BESIDE
    for (network, arms), (_, *rows) in zip(record["networks"].items(), tables(BESIDE), strict=True):
        assert f"### {network}" in BESIDE
        plain = arms["no SBP"]["top1"]
        for (label, *top1, lost, loss), (arm, found) in zip(rows, arms.items(), strict=True):
            assert label == arm and LABELS[label]
            assert [float(cell) for cell in top1 if cell] == found["top1"]
            same(loss, np.mean(found["train_loss"]))
            if arm != "no SBP":
                same(lost, np.mean(plain[: len(found["top1"])]) - np.mean(found["top1"]))


def test_outside_of_the_tables_there_are_no_other_numbers():
    """Claims, rule and settings have their own; the records give versions and sizes. Nothing is left."""
    rest = "\n".join(line for line in STUDY.splitlines() if not line.startswith(("|", "![")))
    facts = []
    for name, one in report.evidence(FOLDER).items():
        label = one.setting.label
        facts += [label, label.capitalize(), label[1:], f"setting={one.setting.name}", name]
        for record in one.training.values():
            versions = (f"{key} {record['versions'][key]}" for key in ("torch", "timm"))
            sizes = "{epochs} epochs of {train_images} images in batches of {global_batch_size}".format(**record)
            facts += [*versions, sizes, record["device"], *record.get("devices", [])]
            facts += [commit[:7] for commit in record.get("commits", [record["versions"]["commit"]])]
        facts += [arm["commit"][:7] for arm in one.costs.get("arms", {}).values()]
        facts += [record["versions"]["commit"][:7] for record in one.gradients.values()]
    texts = [text for claim in ANSWERED.values() for text in (claim.title, claim.published)]
    texts += [f"{before} {arm.label}" for arm in ARMS.values() for before in ":;"]  # in lists of arms
    flat = re.sub(r"\s+", " ", re.sub(r"`[^`]*`", "", rest))  # commands aside
    for known in sorted((*facts, *texts, *verdicts.RULE.splitlines()), key=len, reverse=True):
        flat = flat.replace(re.sub(r"`[^`]*`", "", known.strip()), "")
    rest_of_it = (
        r"## \d\.|keep-ratio 0\.5|\(300 epochs of ImageNet each\)|\(\d of \d networks take|Claim 7, Table 1:"
        r"|Table 2:|save 30% |with 0.7% "
    )
    flat = re.sub(rest_of_it, "", flat)
    assert not re.findall(r"[^.\d]{0,30}\d[^.\d]{0,30}", flat)


def test_a_study_that_was_stopped_at_once_has_a_report_as_well(tmp_path):
    results.write(tmp_path / "a" / "results")
    assert (tmp_path / "a" / "RESULTS.md").read_text() == report.text(tmp_path / "a" / "results")
