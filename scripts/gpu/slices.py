"""The slices: pieces of work, each in a process of its own, which leaves one record."""

import json
import logging
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

from sbp.training.benchmark import report as benchmark_report
from sbp.training.benchmark.arms import ARMS
from sbp.training.benchmark.benchmark import benchmark
from sbp.training.benchmark.report import write_record
from sbp.training.config.images import DataConfig
from sbp.training.config.model import BackboneConfig, DetectorConfig, SbpConfig
from sbp.training.config.recipe import RecipeConfig
from sbp.training.config.requests import BenchmarkConfig
from sbp.training.config.run import Config
from sbp.training.memory.forecast import forecast
from sbp.training.plan.arms import BenchmarkRules
from sbp.training.record.table import markdown
from sbp.training.runtime import environment
from scripts.gpu.networks import NETWORKS, benchmark_config

ROOT = Path(__file__).parents[2]

EAGER = ["plain", "checkpoint", "cheap", "sbp", "sbp_cheap", "sbp_25_cheap", "sbp_block"]
CASTS = ["casts", "sbp_casts"]
VIT_ONLY = ["patch_dropout", "sbp_query", "sbp_head", "sbp_qkv_exact"]
VIT_ONLY += ["query_cheap", "query_25", "query_25_cheap"]
GRAPH = ["plain", "graph", "cheap_graph", "sbp_graph", "sbp_cheap_graph"]  # of CUDA alone
GRAPH_VIT_ONLY = ["sbp_query_graph"]
COMPILED = {  # plain is in each: it is what the slices have in common
    "compiled": ["plain", "compile", "sbp_compile"],
    "compiled_half": ["plain", "compile_0.5", "sbp_compile_0.5"],
    "compiled_other": ["plain", "compile_0.9", "compile_0.25"],
    "compiled_blocks": ["plain", "blocks", "sbp_blocks"],
}
COMPILED_GRAPH = {
    "compiled_graph": ["plain", "compile_graph", "sbp_compile_graph"],
    "compiled_blocks_graph": ["plain", "blocks_graph", "sbp_blocks_graph"],
}
TESTS = "gpu-tests"
TEST_SECONDS = 190  # after which they are ended; they take three minutes


@dataclass(frozen=True)
class Slice:
    """One piece of work in a process of its own.

    seconds: estimated, with starting up. write: is given the JSON's path, and makes it whole or not at all.
    """

    name: str
    seconds: float
    write: Callable[[Path], None]


def slices(device: str, small: bool, release: str | None) -> list[Slice]:
    """All of them, the most important first. The names start with that of the network."""

    def comparison(name: str, part: str, arms: list[str], seconds: float) -> Slice:
        config = benchmark_config(name, arms, device, small, release)
        return Slice(f"{name}-{part}", 20 if small else seconds, partial(compare, config))

    def eager(name: str) -> Iterator[Slice]:
        arms = EAGER + (VIT_ONLY if name.startswith("vit") else [])
        arms += CASTS if not NETWORKS[name].detector else []
        arms += ["release"] if release and not NETWORKS[name].detector else []
        yield comparison(name, "eager", arms, NETWORKS[name].eager_seconds)

    def graph(name: str) -> Iterator[Slice]:
        if device == "cuda" and not NETWORKS[name].detector:
            arms = GRAPH + (GRAPH_VIT_ONLY if name.startswith("vit") else [])
            yield comparison(name, "graph", arms, NETWORKS[name].eager_seconds)

    def compiled(name: str) -> Iterator[Slice]:
        parts = COMPILED | (COMPILED_GRAPH if device == "cuda" else {})
        for part, arms in parts.items() if not NETWORKS[name].detector else ():
            yield comparison(name, part, arms, 40 + 2 * NETWORKS[name].compile_seconds)

    def forecasts(name: str) -> Iterator[Slice]:
        yield Slice(f"forecast-{name}", 20 if small else 90, partial(check_forecast, f"{name}-eager"))

    tests = [Slice(TESTS, TEST_SECONDS + 10, partial(run_tests, TEST_SECONDS))] if device == "cuda" else []
    return tests + [piece for kind in (eager, graph, forecasts, compiled) for name in NETWORKS for piece in kind(name)]


def run_tests(seconds: float, path: Path) -> None:
    """The tests marked gpu; what they print is beside the JSON, which is written where all passed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    output = path.with_suffix(".txt")
    begin, command = perf_counter(), [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]
    with output.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            file.write(f"\nended after {seconds:.0f} s\n")
            code = None
    last = (output.read_text().strip().splitlines() or [""])[-1]
    print(f"GPU tests: {last}, see {output}", flush=True)
    if code != 0:
        sys.exit(1)
    write_record({"summary": last, "seconds": perf_counter() - begin, "versions": environment.versions()}, path)


def compare(config: BenchmarkConfig, path: Path) -> None:
    result = benchmark(config)
    plain = result["arms"]["plain"]
    if plain["error"]:
        raise RuntimeError(f"the plain arm failed, so there is nothing to compare with: {plain['error']}")
    benchmark_report.write(result, path.parent, path.stem)


def check_forecast(eager: str, path: Path) -> None:
    """Beside the peaks of the eager arms what sbp/training/memory/forecast.py says of them, which needs no GPU."""
    result = json.loads((path.parent / f"{eager}.json").read_text())
    settings, found = result["settings"], {}
    for name, record in result["arms"].items():
        arm = ARMS[name]
        if record["error"] or arm.checkpointing or arm.patch_drop or arm.release:
            continue  # not a training run of ours
        config = Config(
            task=settings["task"],
            backbone=BackboneConfig(**settings["backbone"]),
            detector=DetectorConfig(**settings["detector"]),
            sbp=SbpConfig(enabled=arm.sbp is not None, **settings["sbp"] | (arm.sbp or {})),
            data=DataConfig("synthetic", **settings["data"]),
            recipe=RecipeConfig() if settings["task"] == "classification" else RecipeConfig(label_smoothing=0.0),
            global_batch_size=result["batch_size"],
            amp=result["amp"],
        )
        peak = forecast(config, result["batch_size"], rules=BenchmarkRules()).peak
        found[name] = {"label": arm.label, "forecast": peak, "measured": record.get("peak_allocated")}
    keep = ("network", "device", "versions", "amp", "batch_size")
    write_record({key: result[key] for key in keep} | {"arms": found}, path)
    rows = [["arm", "forecast MiB", "measured MiB", "deviation"]]
    for figures in found.values():
        if figures["measured"]:
            said, was = figures["forecast"] / 2**20, figures["measured"] / 2**20
            rows.append([figures["label"], f"{said:.0f}", f"{was:.0f}", f"{100 * (said / was - 1):+.1f} %"])
    if len(rows) > 1:
        path.with_suffix(".md").write_text(markdown(rows) + "\n")


def do(pieces: list[Slice], folder: Path, deadline: float) -> list[Slice]:
    """Runs them, as long as there is time; returns those that are not done."""
    left = list(pieces)
    for piece in pieces:
        remaining = deadline - perf_counter()
        if piece.seconds > remaining:
            break
        print(f"{piece.name}: about {piece.seconds:.0f} of {remaining:.0f} s left", flush=True)
        process = multiprocessing.get_context("spawn").Process(target=run, args=(piece, folder / f"{piece.name}.json"))
        process.start()
        process.join(remaining)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode == 0:
            left.remove(piece)
        else:
            print(f"{piece.name}: {'failed' if perf_counter() < deadline else 'stopped, the time is up'}", flush=True)
    return left


def run(piece: Slice, path: Path) -> None:
    """In the slice's own process."""
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    piece.write(path)
