"""Whether SBP saves as much time as this project claims: limits, each between two arms of one process."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sbp.training.benchmark.arms import ARMS
from sbp.training.benchmark.benchmark import memory as benchmark_memory
from sbp.training.record.table import markdown
from scripts.gpu.networks import NETWORKS, benchmark_config
from scripts.gpu.slices import Slice, compare, do, run_tests

LEFT = 3  # exit code


@dataclass(frozen=True)
class Limit:
    """What an arm's figure, over that of another arm of the same process, may be at most."""

    network: str
    arm: str
    at_most: float
    other: str = "plain"
    figure: str = "step time"


def _limits() -> Iterator[Limit]:
    for network, of_plain, of_compiled in (("vit_base", 0.52, 0.72), ("convnext_base", 0.56, 0.88)):
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
CHECK_MINUTES, CHECK_TEST_SECONDS = 6.0, 180


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
