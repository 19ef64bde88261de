"""Kernel launches of a step as a CPU counts them, beside those that a GPU's profiler saw, and their ratios to plain.

    python -m scripts.count_launches results/gpu/h100-60167d7

Reads the folder's NETWORK-eager.json, runs the same arms on this machine, with narrow layers and small images, on which
the number of launches does not depend, and writes launches.md there.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from sbp.training.benchmark.arms import ARMS
from sbp.training.benchmark.benchmark import benchmark
from sbp.training.record.files import read_json, write_text
from sbp.training.record.table import markdown
from sbp.training.runtime import environment
from scripts.gpu.networks import NETWORKS, benchmark_config

NARROW: dict[str, dict[str, Any]] = {
    "vit": {"img_size": 64, "embed_dim": 48, "num_heads": 12},
    "convnext": {"dims": (8, 16, 32, 64)},
}


def compared(name: str, seen: dict[str, int]) -> list[list[str]]:
    """A row for each arm. seen: launches on the GPU."""
    config = benchmark_config(name, list(seen), "cpu", small=False, release=None)
    config = replace(config, batch_size=2, rounds=1, steps=1, warmup=1, largest_batch=False)
    config.backbone = replace(config.backbone, kwargs=NARROW[name.partition("_")[0]])
    config.data = replace(config.data, image_size=64)
    counted = {arm: record["launches"] for arm, record in benchmark(config)["arms"].items()}
    return [
        [
            NETWORKS[name].backbone.name,
            ARMS[arm].label,
            str(counted[arm]),
            str(there),
            f"{counted[arm] / counted['plain']:.3f}",
            f"{there / seen['plain']:.3f}",
        ]
        for arm, there in seen.items()
    ]


def main(folder: Path) -> None:
    rows, device = [["network", "arm", "counted", "on the GPU", "counted, to plain", "on the GPU, to plain"]], ""
    for name in (one for one, network in NETWORKS.items() if not network.detector):
        path = folder / f"{name}-eager.json"
        record = read_json(path) if path.is_file() else {"arms": {}}
        arms = {arm: one["launches"] for arm, one in record["arms"].items() if one.get("launches") and arm != "release"}
        if arms:
            device = record["device"]
            rows += compared(name, arms)
    versions = ", ".join(f"{key} {value}" for key, value in environment.versions().items())
    text = f"Launches of a step, by `python -m scripts.count_launches {folder}` on a CPU ({versions}), and on {device}."
    write_text(folder / "launches.md", f"{text}\n\n{markdown(rows)}\n")
    print(markdown(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
