"""The study end to end, on a setting that takes seconds."""

import json
from dataclasses import replace

import pytest
import torch

from scripts import results, study_tasks
from scripts.jobs import Jobs
from scripts.reproduction import report
from scripts.reproduction.arms import ARMS
from scripts.reproduction.claims import CLAIMS, Claim
from scripts.reproduction.evidence import Evidence
from scripts.reproduction.settings import DIGITS_VIT
from scripts.study_tasks import Experiment, by_seed, measure_costs, tasks

pytestmark = [pytest.mark.survival, pytest.mark.multiprocess]

TINY = replace(
    DIGITS_VIT,
    overrides=(*DIGITS_VIT.overrides, "data.train_images=128", "data.val_images=64", "backbone.kwargs.embed_dim=16"),
    epochs=2,
    images=16,
    draws=2,
)
CLAIM = [replace(CLAIMS["1"], context=("fixed",))]


@pytest.mark.timeout(900)  # eleven runs
def test_runs_records_and_report(tmp_path, monkeypatch):
    experiment = Experiment.of(
        "laptop", TINY, torch.device("cpu"), str(tmp_path / "runs"), str(tmp_path / "results"), None, 3
    )
    todo = tasks(experiment, CLAIM)
    assert {kind: list(names) for kind, names in todo.items()} == {
        "training": ["plain", "sbp", "fixed"],
        "gradients": ["nulls", "own", "sbp"],
        "published": [],
    }
    with Jobs(2) as jobs:
        for kind, some in todo.items():
            jobs.do(kind, some)
    assert not jobs.failed
    measure_costs(experiment, ["fixed"], 1, jobs)

    one = Evidence(TINY, experiment.results)
    assert set(one.trained("fixed", "val_loss")) == {1, 2, 3} != set(one.trained("fixed", "val_loss").values())
    stages = [(run["seed"], run["stage"], run["step"]) for run in one.gradients["nulls"]["runs"]]
    assert stages == [(seed, *at) for seed in (1, 2, 3) for at in (("early", 1), ("middle", 2), ("late", 4))]
    assert one.verdict(CLAIMS["1"]) != "not run"
    own = [(run["seed"], run["step"], set(run["found"])) for run in one.gradients["own"]["runs"]]
    assert own == [(seed, 4, {"sbp", "half", "three_quarters"}) for seed in (1, 2, 3)]
    assert str(tmp_path) not in json.dumps([one.training, one.gradients, one.costs])  # of no use to anyone else

    results.write(tmp_path / "results")
    assert (tmp_path / "RESULTS.md").read_text() == report.text(tmp_path / "results")
    assert (experiment.results / "claim-1.png").read_bytes().startswith(b"\x89PNG")

    assert not any(tasks(experiment, CLAIM).values())  # nothing is done twice
    monkeypatch.setattr(study_tasks, "step_costs", None)
    measure_costs(experiment, ["fixed"], 1, jobs)
    assert list(tasks(replace(experiment, seeds=[1, 2, 3, 4]), CLAIM)["training"]) == ["plain", "sbp", "fixed"]

    with Jobs(2) as jobs:  # a run by itself, and a second seed beside it
        jobs.do("more", by_seed([replace(experiment, seeds=[4, 5])], [Claim("", "", against_plain=("fixed",))]))
    assert not jobs.failed
    record = Evidence(TINY, experiment.results).training["fixed"]
    assert [run["seed"] for run in record["runs"]] == [1, 2, 3, 4, 5] and record["command"].endswith("seed=1,2,3,4,5")
    again = ["train.py", *experiment.common, *ARMS["fixed"].overrides(TINY), "seed=4", f"run_dir={tmp_path / 'again'}"]
    assert Jobs(1).run([*again, "checkpoint.keep=1"], tmp_path / "log.txt")
    of_sweep = json.loads((experiment.runs / "fixed" / "seed-4" / "summary.json").read_text())
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["val_loss"] == of_sweep["val_loss"]
