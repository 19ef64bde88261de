"""What was measured beside the study, with too few runs for a verdict: its table in RESULTS.md."""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from sbp.training.record.status import read_json
from sbp.training.record.table import markdown


def sections(folder: Path) -> Iterator[str]:
    """Of each cifar10.json in results/gpu: accuracies, and what each arm loses to plain training in the same seeds."""
    for path in sorted((folder / "gpu").glob("*/cifar10.json")):
        record = read_json(path)
        versions = record["versions"]
        yield f"## Beside the study: CIFAR-10 on {record['device']}"
        yield (
            f"{record['settings']}. torch {versions['torch']}, timm {versions['timm']}, commit {versions['commit']}, "
            f"by a script around `sbp.apply` that was not kept ([the record]({path.relative_to(folder.parent)})); "
            "`python scripts/study.py scale=cifar10_gpu` asks the same. One run or two of each: no verdict."
        )
        for network, arms in record["networks"].items():
            yield f"### {network}"
            yield markdown(list(_rows(record["seeds"], arms)))


def _rows(seeds: list[int], arms: dict[str, dict[str, list[float]]]) -> Iterator[list[str]]:
    yield ["arm", *(f"top-1 %, seed {seed}" for seed in seeds), "lost, points", "training loss"]
    plain = next(iter(arms.values()))["top1"]
    for arm, found in arms.items():
        top1 = found["top1"]
        shown = [f"{one:.2f}" for one in top1] + [""] * (len(seeds) - len(top1))
        lost = fmean(before - after for before, after in zip(plain, top1, strict=False))
        yield [arm, *shown, f"{lost:.2f}" if top1 is not plain else "", f"{fmean(found['train_loss']):.3f}"]
