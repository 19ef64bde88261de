"""The benchmark on tiny networks: what is recorded, and that nothing ends it early. No timings are asserted."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import PatchDropout

import sbp
from sbp.training.benchmark import report
from sbp.training.benchmark.arms import ARMS, KINDS, Arm
from sbp.training.benchmark.authors_release import release_model
from sbp.training.benchmark.benchmark import _choose_arms, _recorded, benchmark, search_largest, unused_in_pools
from sbp.training.benchmark.report import merged, pareto, table
from sbp.training.benchmark.runner import PARTS, Runner
from sbp.training.config.requests import BenchmarkConfig, BenchmarkDataConfig
from sbp.training.config.rules import validate_benchmark
from sbp.training.runtime import distributed, environment
from scripts.gpu.networks import SMALL, benchmark_config
from tests.conftest import cuda_only, others_long
from tests.training.again import Again

EAGER = [name for name, arm in ARMS.items() if not (arm.compile or arm.graph or arm.release)]
RESULTS = Path(__file__).parents[3] / "results" / "gpu"
RELEASE = os.environ.get("SBP_RELEASE")  # the folder of the authors' release


def small(name: str = "vit_base", arms: list[str] | None = None, **changes) -> BenchmarkConfig:
    config = benchmark_config(name, arms or ["plain", "sbp"], "cpu", small=True, release=None)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


@pytest.mark.parametrize("name", others_long(["vit_base", "convnext_base"]))
def test_all_eager_arms_run_and_the_record_holds_what_is_promised(name, tmp_path):
    arms = [arm for arm in EAGER if name.startswith("vit") or not ARMS[arm].vit_only]
    report.write(benchmark(small(name, arms)), tmp_path, "net")
    result = json.loads((tmp_path / "net.json").read_text())
    assert set(result["versions"]) >= {"torch", "timm"} and result["device"].startswith("CPU")
    assert (result["threads"], result["amp"], result["batch_size"], result["rounds"]) == (1, "bfloat16", 4, 2)
    assert list(result["arms"]) == arms
    for record in result["arms"].values():
        assert record["error"] is None and record["kind"] in KINDS
        assert {part: len(times) for part, times in record["times_ms"].items()} == dict.fromkeys((*PARTS, "step"), 4)
        for step, *parts in zip(*(record["times_ms"][key] for key in ("step", *PARTS)), strict=True):
            assert step == pytest.approx(sum(parts))
        assert record["images_per_second"] == pytest.approx(4000 / record["median_ms"]["step"])
        assert record["launches"] > 50 and "kernel_ms" not in record
    plain = result["arms"].pop("plain")
    assert plain["time_ratio"] == plain["memory_ratio"] == 1
    for name in ("checkpoint", "sbp"):
        assert result["arms"][name]["saved_bytes"] < plain["saved_bytes"], name
    assert result["arms"]["casts"]["saved_bytes"] == plain["saved_bytes"]
    assert result["arms"]["casts"]["launches"] < plain["launches"] < result["arms"]["checkpoint"]["launches"]
    assert (tmp_path / "net.png").stat().st_size > 10_000
    assert "| SBP, block recompute " in (tmp_path / "net.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_base", "convnext_base"])
def test_each_budget_compiles_code_of_its_own(name):
    result = benchmark(small(name, ["compile", "compile_0.25", "sbp_compile"]))
    saved = {name: record["saved_bytes"] for name, record in result["arms"].items()}
    assert saved["compile_0.25"] < saved["sbp_compile"] < saved["compile"]
    assert result["arms"]["compile"]["time_ratio"] is None  # there was no plain arm


def test_an_arm_that_fails_leaves_its_error_and_the_others_go_on(monkeypatch):
    turn = Runner.turn

    def fail_after_warmup(self, batch, steps):
        if steps == 2 and isinstance(self.model.patch_drop, PatchDropout):
            raise torch.OutOfMemoryError("no memory\nand a long trace")
        return turn(self, batch, steps)

    monkeypatch.setattr(Runner, "turn", fail_after_warmup)
    monkeypatch.setitem(ARMS, "sbp_head", Arm("SBP, head", sbp={"mhsa_drop": "nonsense"}))
    result = benchmark(small(arms=["sbp_head", "patch_dropout", "plain", "sbp"]))
    errors = {name: record["error"] for name, record in result["arms"].items()}
    assert errors.pop("sbp_head").startswith("ValueError: mhsa_drop must be one of")
    assert errors == {"patch_dropout": "OutOfMemoryError: no memory", "plain": None, "sbp": None}
    assert result["arms"]["sbp"]["memory_ratio"] < 1
    assert "OutOfMemoryError: no memory " in table(result)


def test_the_commit_is_known_without_git_too(monkeypatch):
    monkeypatch.setenv("SBP_COMMIT", "abc")
    monkeypatch.setenv("PATH", "")
    assert environment.versions()["commit"] == "abc"


def test_records_do_not_make_a_checkout_dirty_and_code_does(tmp_path, monkeypatch):
    code = tmp_path / "sbp" / "training" / "runtime" / "environment.py"
    record = tmp_path / "results" / "record.json"
    for path in (code, record):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(environment, "__file__", str(code))
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout[:12]
    record.write_text("2")
    assert environment.versions()["commit"] == head
    code.write_text("2")
    assert environment.versions()["commit"] == f"{head}-dirty"


def test_no_round_begins_once_the_time_is_up():
    assert benchmark(small(seconds=1e-9, rounds=50))["rounds"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["plain", "sbpp"]}, r"arms=\['sbpp'\] must be among plain, "),
        ({"name": "convnext_base", "arms": ["sbp_head"]}, r"arms=\['sbp_head'\] must be among"),
        ({"arms": ["release"]}, r"arms=\['release'\] must be among"),
        ({"release": "nowhere", "arms": ["release"]}, "release=nowhere does not hold"),
        ({"arms": ["plain", "sbp_graph"]}, r"arms=\['sbp_graph'\] cannot run: graph arms need CUDA"),
        ({"amp": "half"}, "amp must be one of"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_mistakes_name_the_key(changes, message):
    with pytest.raises(ValueError, match=message):
        benchmark(small(**changes))


def test_a_detector_may_have_one_class_and_a_classifier_not():
    one = BenchmarkDataConfig(num_classes=1)
    assert validate_benchmark(small(task="detection", data=one)).data.num_classes == 1
    with pytest.raises(ValueError, match=r"data\.num_classes must be at least 2, got 1"):
        validate_benchmark(small(data=one))


def test_pareto_frontier():
    assert pareto([(1, 1), (0.5, 2), (0.7, 1), (0.7, 0.9), (2, 0.9), (0.5, 3)]) == [1, 3]
    assert pareto([(1, 1), (1, 1)]) == [0]


def test_table():
    plain = {
        "label": "plain",
        "kind": "exact gradient",
        "error": None,
        "median_ms": {"forward": 1.04, "backward": 2.0, "optimizer": 0.5, "step": 3.5},
        "quartiles_ms": {"step": [3.0, 4.25]},
        "images_per_second": 1142.9,
        "time_ratio": 1.0,
        "memory_ratio": 1.0,
        "peak_allocated": 3 * 2**29,
        "launches": 958,
        "kernel_ms": 2.96,
        "largest_batch": 100,
        "largest_batch_estimated": True,
    }
    failed = {"label": "SBP", "kind": "SBP", "error": "ValueError: no"}
    # fmt: off
    assert table({"arms": {"plain": plain, "sbp": failed}}).splitlines() == [
        "| arm   | kind           | step ms       | forward ms | backward ms | optimizer ms | kernel ms | launches | images/s | time | memory | peak MiB | largest batch | error          |",  # noqa: E501
        "| ----- | -------------- | ------------- | ---------- | ----------- | ------------ | --------- | -------- | -------- | ---- | ------ | -------- | ------------- | -------------- |",  # noqa: E501
        "| plain | exact gradient | 3.5 (3.0-4.2) | 1.0        | 2.0         | 0.5          | 3.0       | 958      | 1143     | 1.00 | 1.00   | 1536     | ~100          |                |",  # noqa: E501
        "| SBP   | SBP            |               |            |             |              |           |          |          |      |        |          |               | ValueError: no |",  # noqa: E501
    ]
    # fmt: on


def test_merged_results_keep_the_first_plain_arm_and_name_all_versions():
    one = {"rounds": 3, "versions": {"commit": "a"}, "arms": {"sbp": 1, "plain": 2}}
    other = {"rounds": 2, "versions": {"commit": "b"}, "arms": {"plain": 3, "compile": 4}}
    both = merged([one, other, one])
    assert list(both["arms"].items()) == [("plain", 2), ("compile", 4), ("sbp", 1)]
    assert both["rounds"] == 2 and both["versions"] == {"commit": "a / b"}


@pytest.mark.parametrize("guess", [-5, 1, 90, 1000, 4000])
@pytest.mark.parametrize("largest", [0, 1, 7, 1000])
def test_search_for_the_largest_batch(largest, guess):
    tried: list[int] = []
    found = search_largest(lambda size: tried.append(size) or size <= largest, guess)
    assert largest - max(0, largest // 50) <= found <= largest
    assert found in [0, *tried] and len(set(tried)) == len(tried)


def test_no_graph_arm_runs_on_a_cpu_of_itself():
    names = _choose_arms(small(), torch.device("cpu"))
    assert names == ["plain", "sbp"]
    config = small()
    config.arms = None
    assert {"casts", "query_25_cheap", "sbp_blocks"} <= set(names := _choose_arms(config, torch.device("cpu")))
    assert not any(ARMS[name].graph for name in names)
    assert {name for name in ARMS if ARMS[name].graph} == set(_choose_arms(config, torch.device("cuda"))) - set(names)
    with pytest.raises(ValueError, match="graph arms need CUDA"):
        Runner(small(), ARMS["sbp_graph"], torch.device("cpu")).capture(())


@pytest.mark.parametrize(
    "arm", ["casts", "cheap"]
)  # whose passes draw no masks: the stand-in's recording is one pass more
def test_a_step_replayed_by_a_stand_in_is_the_step_run_anew(arm):
    """The stand-in calls again; after three steps the weights are the same, bit for bit."""
    batch = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    runners = [Runner(small(), ARMS[arm], torch.device("cpu")) for _ in range(2)]
    for runner in runners:
        torch.manual_seed(0)
        runner.turn(batch, 1)
    runners[1].capture(batch, Again(list(runners[1].model.parameters())))
    for runner in runners:
        torch.manual_seed(1)
        runner.turn(batch, 2)
    assert all(map(torch.equal, *(runner.model.parameters() for runner in runners)))


# -- what not every machine has


@pytest.mark.skipif(RELEASE is None, reason="SBP_RELEASE names no folder with the authors' release")
@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_the_release_has_the_sizes_of_the_timm_model(family):
    before = timm.__version__
    name = {"vit": "vit_tiny_patch16_224", "convnext": "convnext_tiny"}[family]
    model = sbp.apply(timm.create_model(name, num_classes=5, **SMALL[family]))
    theirs = release_model(Path(RELEASE), model, drop_path=0.1)
    assert timm.__version__ == before
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in model.parameters())
    theirs(torch.randn(2, 3, *(2 * [32 if family == "vit" else 64]))).sum().backward()


def test_an_arm_that_fails_in_one_of_several_processes_ends_them_all(monkeypatch):
    """The others wait for it within a step; what is wrong with the settings fails in all of them."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(torch.OutOfMemoryError), _recorded({"label": "plain"}):
        raise torch.OutOfMemoryError
    record = {"label": "plain"}
    with _recorded(record):
        raise ValueError("no such layers")
    assert record["error"] == "ValueError: no such layers"


def test_what_other_arms_graphs_hold_is_not_this_arms():
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 100, "allocated_size": 10},  # whoever asks gets the rest
        {"segment_pool_id": (0, 1), "total_size": 50, "allocated_size": 20},
        {"segment_pool_id": (0, 2), "total_size": 7, "allocated_size": 0},
    ]
    assert unused_in_pools(segments) == 30 + 7


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "arms"),
    [
        ("vit_base", ["plain", "sbp", "compile"]),
        ("convnext_base", ["plain", "sbp"]),
    ],
)
def test_memory_and_largest_batch(device, name, arms):
    config = small(name, arms, device=device.type, memory_gib=0.25, batch_size=16)
    records = benchmark(config)["arms"]
    assert not any(record["error"] or "largest_batch_error" in record for record in records.values())
    if cuda_only(device, "of a CPU's memory only what autograd saves is known, and no batch is too large"):
        for record in records.values():
            assert 0 < record["resident"] < record["peak_allocated"] <= record["peak_reserved"]
            assert record["largest_batch_estimated"] == (record["label"] == "compile")
        assert 16 < records["plain"]["largest_batch"] < records["sbp"]["largest_batch"]
    else:
        assert (
            records["sbp"]["saved_bytes"] < records["plain"]["saved_bytes"] and "largest_batch" not in records["plain"]
        )


# -- results/gpu


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*-eager.json")), ids=lambda path: path.stem)
def test_the_tables_of_the_results_are_those_of_their_records(path):
    result = json.loads(path.read_text())
    text = f"{report.caption(result)}\n\n{table(result)}\n"
    assert path.with_suffix(".md").read_text() == text and path.with_suffix(".png").is_file()
    assert set(result["arms"]) <= set(ARMS) and not str(result["settings"]["release"]).startswith(("/", "."))
