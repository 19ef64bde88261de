"""What the GPU slices leave behind, and how limits are judged; on a CPU, with tiny networks."""

import json
import os
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import pytest

from sbp.training.config.requests import BenchmarkConfig
from scripts import gpu_results
from scripts.gpu import check, slices
from scripts.gpu.networks import NETWORKS
from scripts.reproduction.settings import SCALES


def note(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def fail(path: Path) -> None:
    raise RuntimeError("on purpose")


@pytest.mark.long
def test_gpu_results_resumes_and_tells_what_is_left(monkeypatch, tmp_path, capsys):
    listed = [
        slices.Slice("gpu-tests", 1, fail),
        slices.Slice("broken", 1, fail),
        slices.Slice("done", 1, note),
        slices.Slice("long", 1000, note),
    ]
    monkeypatch.setattr(gpu_results, "slices", lambda *_: listed)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--minutes", "2"]
    assert gpu_results.main(arguments) == 3
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("cpu-") and os.listdir(folder) == ["done.json"]
    assert capsys.readouterr().out.endswith("\n\nleft: gpu-tests (1 s), broken (1 s), long (1000 s)\n")
    assert gpu_results.main([*arguments, "done"]) == 0
    assert capsys.readouterr().out == f"\nnothing is left to do: {folder}\n"


def test_what_fails_keeps_nothing_else_from_being_tried(monkeypatch, tmp_path):
    listed = [slices.Slice(name, 1, note) for name in ("gpu-tests", "vit_base-eager", "vit_base-compiled")]
    tried = []
    monkeypatch.setattr(gpu_results, "slices", lambda *_: listed)
    monkeypatch.setattr(gpu_results, "do", lambda pieces, *_: tried.extend(pieces) or pieces)  # all fail
    monkeypatch.setattr(gpu_results, "study", lambda *_: tried.append("study") or ["cifar10_gpu"])
    assert gpu_results.main(["--device", "cpu", "--out", str(tmp_path)]) == 3
    assert tried == [listed[0], listed[1], "study", listed[2]]


def test_the_order_of_the_slices():
    listed = [piece.name for piece in slices.slices("cuda", small=False, release=None)]
    assert listed[:4] == ["gpu-tests", "vit_base-eager", "convnext_base-eager", "vit_tiny-eager"]
    assert listed[5:8] == [
        "mask_rcnn_convnext_tiny-eager",
        "cascade_mask_rcnn_convnext_base-eager",
        "vit_base-graph",
    ]
    assert not any("rcnn" in name and ("compiled" in name or "graph" in name) for name in listed)
    on_a_cpu = [piece.name for piece in slices.slices("cpu", small=True, release=None)]
    assert set(on_a_cpu) == {name for name in listed if "graph" not in name} - {"gpu-tests"}


@pytest.mark.parametrize("passes", [True, False])
def test_the_gpu_tests_of_gpu_results(passes, monkeypatch, tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_it.py").write_text(
        f"import pytest\n\n@pytest.mark.gpu\ndef test_one():\n    assert {passes}\n"
        "\ndef test_other():\n    assert False\n"
    )
    monkeypatch.setattr(slices, "ROOT", tmp_path)
    path = tmp_path / "out" / "gpu-tests.json"
    with nullcontext() if passes else pytest.raises(SystemExit):
        slices.run_tests(60, path)
    assert path.is_file() == passes
    assert ("1 passed" if passes else "1 failed") in path.with_suffix(".txt").read_text()


def test_gpu_tests_that_take_too_long_are_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(slices, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        slices.run_tests(0.01, tmp_path / "gpu-tests.json")
    assert "ended after 0 s" in (tmp_path / "gpu-tests.txt").read_text()


def measured(network: str, steps: dict[str, float]) -> dict:
    arms = {name: {"error": None, "median_ms": {"step": step}, "peak_allocated": 1} for name, step in steps.items()}
    return {"settings": {"backbone": {"name": NETWORKS[network].backbone.name}}, "arms": arms}


def test_a_limit_is_judged_within_one_run_and_by_compiled_blocks_where_nothing_else_was_compiled():
    arms = {"plain": 10, "sbp": 11, "sbp_cheap": 12, "sbp_graph": 8.5, "sbp_cheap_graph": 9.01}
    graph = measured("convnext_base", arms)
    for name, peak in {"sbp": 642, "sbp_graph": 642, "sbp_cheap": 422, "sbp_cheap_graph": 423}.items():
        graph["arms"][name]["peak_allocated"] = peak
    blocks = measured("convnext_base", {"plain": 20, "blocks_graph": 12, "sbp_blocks_graph": 11})
    failed = measured("vit_base", {"plain": 10, "sbp_graph": 1})
    failed["arms"]["sbp_graph"]["error"] = "RuntimeError: no"
    lines = {(net, figure, arm, other): rest for net, figure, arm, other, *rest in check.judge([graph, blocks, failed])}
    assert len(lines) == len(check.LIMITS)
    time, memory = ("convnext_base", "step time"), ("convnext_base", "peak memory")
    assert lines.pop((*time, "SBP + graph", "plain")) == ["0.85", "0.850", "pass"]
    assert lines.pop((*time, "SBP, cheap recompute + graph", "plain")) == ["0.9", "0.901", "FAIL"]
    assert lines.pop((*memory, "SBP + graph", "SBP")) == ["1", "1.000", "pass"]
    cheap = lines.pop((*memory, "SBP, cheap recompute + graph", "SBP, cheap recompute"))
    assert cheap == ["1", "1.002", "FAIL"]
    assert lines.pop((*time, "SBP + compiled blocks + graph", "plain")) == ["0.56", "0.550", "pass"]
    compiled = lines.pop((*time, "SBP + compiled blocks + graph", "compiled blocks + graph"))
    assert compiled == ["0.88", "0.917", "FAIL"]
    assert all(rest[1:] == ["", "not measured"] for rest in lines.values())
    whole = measured("convnext_base", {"plain": 20, "compile_graph": 20, "sbp_compile_graph": 2})
    assert ["convnext_base", "step time", "SBP + compile + graph", "plain", "0.56", "0.100", "pass"] in check.judge(
        [blocks, whole]
    )


def test_what_an_h100_has_measured_is_within_the_limits():
    folder = Path(__file__).parents[3] / "results" / "gpu" / "h100-a7a1e7c"
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    lines = check.judge([one for one in records if "settings" in one])
    assert [line for line in lines if line[-1] == "FAIL"] == []
    assert sum(line[-1] == "pass" for line in lines) > 12


def test_the_check_needs_cuda(tmp_path):
    with pytest.raises(SystemExit, match="2"):
        gpu_results.main(["--check", "--device", "cpu", "--out", str(tmp_path)])


@pytest.mark.parametrize(("passed", "code"), [(True, 3), (False, 1)])
def test_the_checks_exit_code(passed, code, monkeypatch, tmp_path, capsys):
    """Nothing was measured; the tests passed or did not."""

    def do(pieces, folder, deadline):
        assert [piece.name for piece in pieces[:2]] == ["check-tests", "check-vit_base-graph"]
        return pieces[1:] if passed else pieces

    monkeypatch.setattr(check, "do", do)
    assert check.check(tmp_path, "cuda", small=False, deadline=0) == code
    assert ("FAIL" in capsys.readouterr().out) == (not passed)


@pytest.mark.parametrize("name", ["convnext_base", "mask_rcnn_convnext_tiny"])
@pytest.mark.long
def test_a_slice_and_the_report_over_the_slices(tmp_path, capsys, name):
    listed = slices.slices("cpu", small=True, release=None)
    pieces = {piece.name: piece for piece in listed}
    pieces[f"{name}-eager"].write(tmp_path / f"{name}-eager.json")
    gpu_results.report(tmp_path, listed)
    assert {f"{name}-eager.json", f"{name}.md", f"{name}.png"} <= set(os.listdir(tmp_path))
    assert "| SBP, cheap recompute " in capsys.readouterr().out
    pieces[f"forecast-{name}"].write(tmp_path / f"forecast-{name}.json")
    found = json.loads((tmp_path / f"forecast-{name}.json").read_text())["arms"]
    assert found["sbp_cheap"]["forecast"] < found["sbp"]["forecast"] < found["plain"]["forecast"]


def test_networks_are_those_of_the_configs():
    pytest.importorskip("hydra")
    from tests.training.configs import composed

    for name, network in NETWORKS.items():
        if network.detector:
            config = composed(f"experiment=table2/{name}_sbp", "data.root=/coco")
            assert config.detector.name == network.detector and config.micro_batch_size == network.batch_size
        else:
            config = composed(f"backbone={name}", name="benchmark", kind=BenchmarkConfig)
        assert config.backbone == network.backbone


def test_the_studies_come_with_the_images_that_they_need(monkeypatch, tmp_path):
    """Each as long as there is time; one that did not end is left."""
    commands = []

    def run(command, cwd, check):
        commands.append(command[2:])
        return SimpleNamespace(returncode=75 if "scale=fine_tuning" in command else 0)

    monkeypatch.setattr(gpu_results.subprocess, "run", run)
    options = Namespace(device="cuda", cifar10=str(tmp_path), photographs=None)
    folder = tmp_path / "gpu" / "nvidia-h100"
    assert gpu_results.study(options, folder, perf_counter() + 300) == ["fine_tuning"]
    assert [command[0] for command in commands] == ["scale=cifar10_gpu", "scale=fine_tuning", *3 * ["scale=gpu"]]
    own = [f"results={folder / 'study'}", "run_dir=outputs/study-nvidia-h100", f"data_root={tmp_path}"]
    assert all(set(own) < set(command) for command in commands)
    assert all("minutes=4.5" in command and "device=cuda" in command for command in commands)
    for command in commands:
        scale, settings = SCALES[command[0].removeprefix("scale=")], [one for one in command if "setting=" in one]
        assert not settings or settings[0].removeprefix("setting=") in {one.name for one in scale.settings}

    assert len(gpu_results.study(options, folder, perf_counter() + 30)) == len(commands) == 5  # no time for any
    options.cifar10, options.photographs = None, str(tmp_path)
    assert gpu_results.study(options, folder, perf_counter() + 300) == []
    assert [command[1] for command in commands[5:]] == [
        f"setting=photographs-{name}" for name in ("vit_tiny", "convnext_tiny")
    ]
    monkeypatch.setattr(gpu_results, "find_spec", lambda name: None)
    assert len(gpu_results.study(options, folder, perf_counter() + 300)) == 2
