"""Writes RESULTS.md and its figures from the records in results/: python -m scripts.results"""

from pathlib import Path

from sbp.training.record.files import write_text
from scripts.reproduction import figures, report
from scripts.reproduction.claims import ANSWERED


def write(folder: Path) -> None:
    """RESULTS.md beside `folder`, figures in it."""
    folder.mkdir(parents=True, exist_ok=True)  # nothing may be done yet
    for one in report.evidence(folder).values():
        for key, claim in ANSWERED.items():
            figures.draw(claim, one, one.folder / f"claim-{key}.png")
    write_text(folder.parent / "RESULTS.md", report.text(folder))


if __name__ == "__main__":
    write(Path("results"))
