"""Trains a small ViT and a small ConvNeXt on handwritten digits, with and without SBP, and compares them.

    python -m scripts.demo outputs/demo

Runs train.py (a Hydra multirun for each backbone, both at once, one thread each) and eval.py as a user would, then
writes table.md, table.csv and figure.png to the folder. What was in the folder's runs before is replaced.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sbp.cli.sweep_table import columns_of
from sbp.training.record.table import markdown

ROOT = Path(__file__).parents[1]
BACKBONES = {
    "vit": ["backbone=vit_demo", "recipe.epochs=20"],
    "convnext": ["backbone=convnext_demo", "recipe.epochs=15"],
}
COMMON = ["data=digits", "recipe=demo", "logger=wandb", "logger.offline=true", "probe.every_steps=100", "threads=1"]


def main(folder: Path) -> None:
    start = perf_counter()
    for name in BACKBONES:
        shutil.rmtree(folder / name, ignore_errors=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: train(name, folder / name), BACKBONES))
        runs = sorted(path.parent for name in BACKBONES for path in (folder / name).glob("*/summary.json"))
        rows = list(pool.map(evaluate, runs))
    rows.sort(key=lambda row: (row["backbone"], -row["keep_ratio"]))

    columns = columns_of(rows)
    cells = [
        ["backbone", *columns],
        *([row["backbone"], *(str(show(row)) for show in columns.values())] for row in rows),
    ]
    table = markdown(cells)
    (folder / "table.md").write_text(table + "\n")
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(cells)
    draw(rows, folder / "figure.png")
    print(f"\n{table}\n\n{rows[0]['device']}; top-1 on {rows[0]['images']} digits by eval.py")
    print("peak MiB is the resident memory of the process: at this size that of the libraries, not of the activations")
    print(f"{folder}: table.md, table.csv, figure.png and the runs; {perf_counter() - start:.0f} s")


def train(name: str, folder: Path) -> None:
    overrides = [*BACKBONES[name], *COMMON, f'run_dir="{folder}"', "sbp.keep_ratio=1.0,0.5"]
    run(["train.py", "-m", *overrides], shown=name)


def evaluate(run_folder: Path) -> dict[str, Any]:
    """The summary of a run, with the accuracy that eval.py finds for its checkpoint."""
    target = run_folder / "eval"
    run(["eval.py", f'checkpoint="{run_folder}"', f'run_dir="{target}"', "threads=1"])
    summary = json.loads((run_folder / "summary.json").read_text())
    return summary | json.loads((target / "eval.json").read_text()) | {"backbone": run_folder.parent.name}


def run(command: list[str], shown: str | None = None) -> None:
    """Runs a command of this project; shows its lines behind a name, or, when it fails, all of them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if shown:
            print(f"{shown:>8} | {line}", end="", flush=True)
    if process.wait():
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}:\n{''.join(lines)}")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of each figure, for each backbone with keep-ratio 1 and 0.5."""
    panels = {
        "saved activations, MiB / image": lambda row: row["saved_bytes_per_image"] / 2**20,
        "top-1, %": lambda row: row["top1"],
        "training speed, images / s": lambda row: row["images_per_second"],
    }
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    ratios = sorted({row["keep_ratio"] for row in rows}, reverse=True)
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 3.2), layout="constrained")
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for i, ratio in enumerate(ratios):
            heights = [
                value(next(r for r in rows if r["backbone"] == b and r["keep_ratio"] == ratio)) for b in backbones
            ]
            places = [j + 0.38 * (i - (len(ratios) - 1) / 2) for j in range(len(backbones))]
            bars = axis.bar(
                places, heights, 0.36, label=f"keep-ratio {ratio:g}", color=["#5b8db8", "#f2a900"][i % 2],
                edgecolor="black", hatch=["", "//"][i % 2],
            )  # fmt: skip
            axis.bar_label(bars, fmt="%.3g", fontsize=8)
        axis.set_xticks(range(len(backbones)), backbones)
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ratios), frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/demo").resolve())
