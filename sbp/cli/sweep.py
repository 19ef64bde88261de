"""sbp sweep FOLDER [--save]: the table of a sweep, while it runs or after it."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from sbp.cli.sweep_table import read_jobs, table, write_table


def main() -> None:
    parser = argparse.ArgumentParser(prog="sbp sweep", description="The table of a sweep, running or ended.")
    parser.add_argument("folder", type=Path, help="the sweep's folder: what run_dir named")
    parser.add_argument("--save", action="store_true", help="also write table.csv, table.md and figure.png to it")
    arguments = parser.parse_args()
    folder = arguments.folder
    jobs = read_jobs(folder) if folder.is_dir() else []
    if not jobs:
        sys.exit(f"error: {folder} {'holds no run' if folder.is_dir() else 'is no folder'}")
    print(table(jobs))
    if arguments.save:
        print(f"\n{folder}: {', '.join(write_all(folder))}")


def write_all(folder: Path) -> list[str]:
    """Writes what a sweep leaves beside its runs; returns the names of the files."""
    jobs = write_table(folder)
    if not find_spec("matplotlib"):  # which a GPU machine may lack
        return ["table.csv", "table.md"]
    from sbp.cli.sweep_figure import draw

    draw(jobs, folder / "figure.png")
    return ["table.csv", "table.md", "figure.png"]
