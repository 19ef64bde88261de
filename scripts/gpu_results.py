"""Produces the figures that need a GPU, slice by slice: python -m scripts.gpu_results [--minutes 8.5] [NAME ...]

The tests marked gpu come first; what they print is in gpu-tests.txt. One that fails stops none of the slices, but is
left to do. --check is something else, of 6 minutes at most: the tests, and whether SBP saves as much time as this
project claims; its exit code is 0 only where each of LIMITS was measured and kept.

Needs torch, torchvision and timm alone, with what pip installs for them (numpy, Pillow, PyYAML, tqdm and so on), and
the tests pytest. With --cifar10 or --photographs the study's runs come before the compiled arms; they need Hydra, too:
without a network, `PYTHONPATH=FOLDER` after `pip install --target FOLDER hydra-core` elsewhere. What is in the folder
of this device already is skipped, so that the command can be given again until it has nothing left to do: then its
exit code is 0, else 3. An interrupted slice leaves nothing behind.
"""

import argparse
import json
import logging
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

from sbp.training.benchmark import report as benchmark_report
from sbp.training.benchmark.arms import ARMS
from sbp.training.benchmark.benchmark import benchmark
from sbp.training.benchmark.benchmark import memory as benchmark_memory
from sbp.training.benchmark.report import write_json
from sbp.training.config.images import DataConfig
from sbp.training.config.model import BackboneConfig, DetectorConfig, SbpConfig
from sbp.training.config.recipe import RecipeConfig
from sbp.training.config.requests import BenchmarkConfig, BenchmarkDataConfig
from sbp.training.config.run import Config
from sbp.training.memory.forecast import forecast
from sbp.training.plan.arms import BenchmarkRules
from sbp.training.record.table import markdown
from sbp.training.runtime import distributed, environment
from scripts.reproduction.settings import SCALES

ROOT = Path(__file__).parents[1]
LEFT = 3  # exit code
MEMORY_GIB = 24  # of the largest batch: that of a common card


@dataclass(frozen=True)
class Slice:
    """One piece of work in a process of its own.

    seconds: estimated, with starting up. write: is given the JSON's path, and makes it whole or not at all.
    """

    name: str
    seconds: float
    write: Callable[[Path], None]


@dataclass(frozen=True)
class Network:
    """As published. compile_seconds: estimated, for one compiled arm."""

    backbone: BackboneConfig
    batch_size: int
    eager_seconds: float
    compile_seconds: float
    detector: str | None = None


NETWORKS = {
    "vit_base": Network(BackboneConfig("vit_base_patch16_224", 0.3, {"img_size": 224}), 64, 180, 80),
    "convnext_base": Network(BackboneConfig("convnext_base", 0.3, {"ls_init_value": 1e-6}), 64, 180, 140),
    "vit_tiny": Network(BackboneConfig("vit_tiny_patch16_224", 0.0, {"img_size": 224}), 256, 180, 80),
    "convnext_tiny": Network(BackboneConfig("convnext_tiny", 0.1, {"ls_init_value": 1e-6}), 128, 150, 90),
    "mask_rcnn_convnext_tiny": Network(
        BackboneConfig("convnext_tiny", 0.4, {"ls_init_value": 1.0}), 2, 180, 0, "mask_rcnn"
    ),
    "cascade_mask_rcnn_convnext_base": Network(
        BackboneConfig("convnext_base", 0.7, {"ls_init_value": 1.0}), 2, 240, 0, "cascade_mask_rcnn"
    ),
}
SMALL: dict[str, dict[str, Any]] = {
    "vit": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
    "convnext": {"depths": (1, 1, 3, 1), "dims": (8, 8, 16, 16), "patch_size": 4},
}
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
class Limit:
    """What an arm's figure, over that of another arm of the same process, may be at most."""

    network: str
    arm: str
    at_most: float
    other: str = "plain"
    figure: str = "step time"


def _limits() -> Iterator[Limit]:
    for network, of_plain, of_compiled in (("vit_base", 0.52, 0.72), ("convnext_base", 0.56, 0.82)):
        yield Limit(network, "sbp_compile_graph", of_plain)
        yield Limit(network, "sbp_compile_graph", of_compiled, "compile_graph")
    for network, sbp, cheap in (
        ("vit_base", 0.72, 0.78), ("convnext_base", 0.85, 0.90), ("vit_tiny", 0.70, 0.77), ("convnext_tiny", 0.88, 0.93)
    ):  # fmt: skip
        yield Limit(network, "sbp_graph", sbp)
        yield Limit(network, "sbp_cheap_graph", cheap)
        for arm in ("sbp", "sbp_cheap"):
            yield Limit(network, f"{arm}_graph", 1.0, arm, "peak memory")


LIMITS = list(_limits())  # on an H100, in bfloat16
CHECKED = ["plain", "sbp", "sbp_cheap", "sbp_graph", "sbp_cheap_graph"]
# Where compiling a whole network takes too long for the check, its blocks are compiled.
BLOCKS_INSTEAD = {"sbp_compile_graph": "sbp_blocks_graph", "compile_graph": "blocks_graph"}
CHECK_MINUTES, CHECK_TEST_SECONDS = 6.0, 150


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
    write_json({"summary": last, "seconds": perf_counter() - begin, "versions": environment.versions()}, path)


def benchmark_config(name: str, arms: list[str], device: str, small: bool, release: str | None) -> BenchmarkConfig:
    network = NETWORKS[name]
    config = BenchmarkConfig(
        backbone=network.backbone, arms=arms, batch_size=network.batch_size, device=device, release=release,
        rounds=20, memory_gib=MEMORY_GIB, seconds=480,
    )  # fmt: skip
    if network.detector:
        config.task, config.detector = "detection", DetectorConfig(network.detector)
        config.data = BenchmarkDataConfig(image_size=800, num_classes=80)
    if small:
        family = "vit" if name.startswith("vit") else "convnext"
        config.backbone = BackboneConfig(network.backbone.name, network.backbone.drop_path, SMALL[family])
        config.data = BenchmarkDataConfig(image_size=32 if family == "vit" else 64, max_size=96, num_classes=10)
        config.detector = replace(config.detector, fpn_channels=8, hidden_size=16, rois_per_image=16)
        config.batch_size, config.rounds, config.warmup, config.memory_gib = 4, 2, 1, 1
        config.compile_backend, config.threads = "aot_eager_decomp_partition", 1
    return config


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
    write_json({key: result[key] for key in keep} | {"arms": found}, path)
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


def study(options: argparse.Namespace, deadline: float) -> list[str]:
    """Goes on with the study's runs, as long as there is time; returns the settings that are not done."""
    roots = {"photographs": options.photographs, "cifar10": options.cifar10}
    wanted = [one.name for one in SCALES["gpu"].settings if roots[one.name.partition("-")[0]] is not None]
    left = sorted(wanted, key=lambda name: not name.startswith("photographs"))  # in a moment, and no other shows it
    if left and find_spec("hydra") is None:
        print("the study's runs are left: Hydra is not installed")
        return left
    for name in list(left):
        if (minutes := (deadline - perf_counter()) / 60) < 1:
            break
        root = Path(roots[name.partition("-")[0]]).resolve()
        given = ["scale=gpu", f"setting={name}", f"data_root={root}", f"minutes={minutes - 0.5:.1f}"]
        given += [f"device={options.device}", f"jobs={3 if options.device == 'cuda' else 2}"]  # small networks share it
        given += [f"results={options.out.parent}"]
        if subprocess.run([sys.executable, "scripts/study.py", *given], cwd=ROOT, check=False).returncode == 0:
            left.remove(name)
    return left


def run(piece: Slice, path: Path) -> None:
    """In the slice's own process."""
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    piece.write(path)


def check(folder: Path, device: str, small: bool, deadline: float) -> int:
    """The tests, then what LIMITS are about; prints each limit beside what was measured. Returns the exit code."""
    pieces = [Slice("check-tests", CHECK_TEST_SECONDS + 5, partial(run_tests, CHECK_TEST_SECONDS))]
    compiled = {"vit_base": ["compile_graph", "sbp_compile_graph"], "convnext_base": list(BLOCKS_INSTEAD.values())}
    for part, arms_of in (("graph", dict.fromkeys(("vit_base", "convnext_base", "vit_tiny", "convnext_tiny"), CHECKED)),
                          ("compiled", {name: ["plain", *arms] for name, arms in compiled.items()})):  # fmt: skip
        for name, arms in arms_of.items():
            config = benchmark_config(name, arms, device, small, release=None)
            config.largest_batch, config.rounds = False, 2 if small else 5
            pieces.append(Slice(f"check-{name}-{part}", 10 if part == "graph" else 30, partial(compare, config)))
    for piece in pieces:
        (folder / f"{piece.name}.json").unlink(missing_ok=True)
    failed = [piece.name for piece in do(pieces, folder, deadline)]
    verdicts = judge([read for piece in pieces[1:] if (read := _read(folder / f"{piece.name}.json"))])
    print(markdown([["network", "figure", "arm", "relative to", "limit", "measured", ""], *verdicts]))
    print("the GPU tests: " + ("FAIL" if "check-tests" in failed else "pass"))
    if "check-tests" in failed or any(line[-1] == "FAIL" for line in verdicts):
        return 1
    return LEFT if failed or any(line[-1] == "not measured" for line in verdicts) else 0


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def judge(results: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each of LIMITS: network, figure, arm, the other arm, limit, measured, and a verdict.

    results: of benchmarks. The first one of the network that has both arms counts, else the first one with
    BLOCKS_INSTEAD of them.
    """
    lines = []
    for limit in LIMITS:
        arms, ratio = [limit.arm, limit.other], None
        for pair in (arms, [BLOCKS_INSTEAD.get(name, name) for name in arms]):
            found = [_ratio(result, limit, *pair) for result in results if _is_of(result, limit.network)]
            ratio = next((one for one in found if one is not None), None)
            if ratio is not None:
                arms = pair
                break
        verdict = "not measured" if ratio is None else "pass" if ratio <= limit.at_most else "FAIL"
        labels = [ARMS[name].label for name in arms]
        measured = "" if ratio is None else f"{ratio:.3f}"
        lines.append([limit.network, limit.figure, *labels, f"{limit.at_most:.3g}", measured, verdict])
    return lines


def _is_of(result: dict[str, Any], network: str) -> bool:
    return result["settings"]["backbone"]["name"] == NETWORKS[network].backbone.name


def _ratio(result: dict[str, Any], limit: Limit, arm: str, other: str) -> float | None:
    """None where one of the two was not measured."""
    records = [result["arms"].get(name) for name in (arm, other)]
    if any(record is None or record["error"] or "median_ms" not in record for record in records):
        return None
    if limit.figure == "step time":
        one, base = (record["median_ms"]["step"] for record in records)
    else:
        one, base = (benchmark_memory(record) for record in records)
    return one / base


def report(folder: Path, listed: list[Slice]) -> None:
    """One table and figure for each network, over all of its slices that are done; prints the tables."""
    done = [path for piece in listed if (path := folder / f"{piece.name}.json").is_file()]
    for name in NETWORKS:
        results = [json.loads(path.read_text()) for path in done if path.name.startswith(f"{name}-")]
        if results:
            merged = benchmark_report.merged(results)
            benchmark_report.write_report(merged, folder, name)
            print(f"\n{folder / name}.md\n{benchmark_report.table(merged)}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="slices to run; all of them by default")
    parser.add_argument("--minutes", type=float, help=f"stop before they are over (8.5; --check: {CHECK_MINUTES:g})")
    parser.add_argument("--check", action="store_true", help="run the tests and measure what is claimed, nothing else")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="default: results/gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks, to try the command itself")
    parser.add_argument("--cifar10", help="a folder with train/CLASS and test/CLASS, for the study's runs")
    parser.add_argument("--photographs", help="a folder with val/CLASS of ImageNet's 1,000 classes, for the study's")
    parser.add_argument("--release", help="the folder of the authors' release, for an arm with their model")
    options = parser.parse_args(arguments)
    minutes = options.minutes or (CHECK_MINUTES if options.check else 8.5)
    deadline = perf_counter() + 60 * minutes

    try:
        device = environment.device_name(distributed.pick_device(options.device))
    except ValueError as error:
        sys.exit(f"error: {error}")
    folder = options.out / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ("-small" if options.small else ""))
    if options.check:
        if options.names or options.device != "cuda":
            parser.error("--check takes no slices, and CUDA alone")
        return check(folder, options.device, options.small, deadline)
    listed = slices(options.device, options.small, options.release)
    unknown = set(options.names) - {piece.name for piece in listed}
    if unknown:
        parser.error(f"no slice {', '.join(sorted(unknown))}; there are {', '.join(piece.name for piece in listed)}")

    left = [piece for piece in listed if not options.names or piece.name in options.names]
    left = [piece for piece in left if not (folder / f"{piece.name}.json").is_file()]
    tests = [piece for piece in left if piece.name == TESTS]
    compiled = [piece for piece in left if piece.name.partition("-")[2] in COMPILED | COMPILED_GRAPH]
    eager = [piece for piece in left if piece not in tests + compiled]
    tests = do(tests, folder, deadline)  # what is wrong there keeps nothing else from running
    eager = do(eager, folder, deadline)
    settings = [] if eager or options.names or options.small else study(options, deadline)
    compiled = compiled if eager or settings else do(compiled, folder, deadline)
    report(folder, listed)
    still = [f"{piece.name} ({piece.seconds:.0f} s)" for piece in tests + eager + compiled]
    still += [f"the study's {name}" for name in settings]
    print(f"\nleft: {', '.join(still)}" if still else f"\nnothing is left to do: {folder}")
    return LEFT if still else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
