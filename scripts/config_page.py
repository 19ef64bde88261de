"""Writes docs/config.md from the config's fields, which a test holds it to: python -m scripts.config_page"""

from pathlib import Path

from sbp.cli.check_data import CheckDataConfig
from sbp.cli.forecast import ForecastConfig
from sbp.training.config.describe import as_markdown
from sbp.training.config.requests import BenchmarkConfig, CalibrateConfig, EvalConfig, ExportConfig, PlanConfig
from sbp.training.config.run import Config
from sbp.training.record.files import write_text

PAGE = Path(__file__).parents[1] / "docs" / "config.md"


def page() -> str:
    parts = [
        "# Every key",
        "`python -m scripts.config_page` writes this page from the fields in `sbp/training/config`. The defaults are "
        "those of the fields; what a group's choice in `configs/` says counts more (`sbp train` begins with "
        "`backbone=vit_demo data=digits recipe=demo logger=wandb`), and what the command line says "
        "most. `sbp train --help` shows the values that a command line ends up with.",
        as_markdown(Config),
        "# Keys of `sbp eval`",
        as_markdown(EvalConfig),
        "# Keys of `sbp export`",
        as_markdown(ExportConfig),
        "# Keys of `sbp benchmark`",
        as_markdown(BenchmarkConfig),
        "# Keys of `sbp forecast`",
        "Besides all of those of `sbp train`, above:",
        as_markdown(ForecastConfig, besides=Config),
        "# Keys of `sbp check-data`",
        "Besides all of those of `sbp train`, above:",
        as_markdown(CheckDataConfig, besides=Config),
        "# Keys of `sbp plan`",
        "Besides all of those of `sbp train`, above:",
        as_markdown(PlanConfig, besides=Config),
        "# Keys of `sbp plan calibrate`",
        as_markdown(CalibrateConfig),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    write_text(PAGE, page())
