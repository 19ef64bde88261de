"""sbp check-data data.root=PATH [max_images=2000] ...: checks a data set before a week of training does.

Takes the groups and keys of `sbp train`. Reads every image once; says what is wrong and how fast the loader is. The
complete lists go to data_check.json and corrupt_images.txt in the run's folder, also after Ctrl-C. Exit code 1: errors.
"""

import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from sbp.cli.compose import register
from sbp.cli.launch import command
from sbp.training.checks import findings
from sbp.training.checks.inspection import loading_speed, open_splits, read
from sbp.training.config.keys import key
from sbp.training.config.rules import validate
from sbp.training.config.run import Config
from sbp.training.record.files import lines, shown, write_json, write_text
from sbp.training.record.incidents import CORRUPT_IMAGES
from sbp.training.runtime import environment, signals
from sbp.training.tasks.choice import task_of

log = logging.getLogger("check_data")


@dataclass
class CheckDataConfig(Config):
    """A training run whose data is to be checked."""

    max_images: int | None = key(None, "look at so many images of each split only, at equal distances", at_least=1)


register("check_data", CheckDataConfig)


class DataError(ValueError):
    """What was found is in the report already."""


def check(config: CheckDataConfig, folder: Path, expected: tuple[int, ...] = ()) -> None:
    """Prints the report and writes it to `folder`; ends the program when a signal came.

    expected: as `findings` takes it. Raises ValueError for a config or a data set that cannot be checked, and
    DataError where errors were found.
    """
    validate(config)
    if config.data.source == "shapes":
        raise ValueError("data.source must not be shapes here: there is nothing to check in generated images")
    data, loading, digests = config.data, None, dict[bytes, str]()
    with signals.deferred():
        (train, train_set), (val, val_set) = open_splits(config)
        try:
            if train.length:
                collate = task_of(config).collate
                loading = loading_speed(train_set, config.seed, data.workers, data.prefetch, collate)
                if loading:
                    log.info("loading    %s", findings.meaning(loading, train.length))
            for split, dataset in ((val, val_set), (train, train_set)):  # the smaller one first: its digests are kept
                if split.length and signals.received is None:
                    read(split, dataset, data, config.max_images, digests, compare=split is train)
        finally:
            stopped = signals.received
            found = findings.findings(train, val, data, expected)
            report = {
                "stopped_by": stopped and stopped.name,
                "loading": loading and loading._asdict(),
                "splits": [findings.summary(split) for split in (train, val)],
                "findings": [asdict(one) for one in found],
                "versions": environment.versions(),
                "config": asdict(config),
            }
            write_json(folder / "data_check.json", report)
            corrupt = [image for split in (train, val) for image in findings.unreadable(split)]
            write_text(folder / CORRUPT_IMAGES, lines(corrupt))
    if train_set or val_set:
        log.info("splits\n%s", findings.table([train, val]))
    if found:
        log.info("findings\n%s", shown(findings.listing(found)))
    log.info("%s; complete lists in %s", findings.conclusion(found), folder / "data_check.json")
    if stopped:
        log.warning("stopped by %s: what was not read is not known", stopped.name)
        sys.exit(128 + stopped)  # as a shell has it
    if errors := sum(one.level == findings.ERROR for one in found):
        raise DataError(f"{errors} of the findings {'is an error' if errors == 1 else 'are errors'}")


def check_composed(config: CheckDataConfig, folder: Path) -> None:
    """`check`; data=imagenet, as it is, has ImageNet's numbers of images."""
    imagenet = HydraConfig.get().runtime.choices.get("data") == "imagenet" and config.data.num_classes == 1000
    check(config, folder, findings.IMAGENET_1K if imagenet else ())


def main() -> Any:
    return command("check_data", CheckDataConfig, check_composed)
