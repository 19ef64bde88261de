"""How similar the gradients of SBP are to the exact one, on checkpoints of training runs.

    python -m scripts.gradient_similarity outputs/NAME/checkpoints/step-00000500.pt --methods '{"grid": {}, "random":
        {"mask": "random"}}' --out similarity.json

Beside the methods (arguments of `sbp.apply`) stand the gradients of half and of three quarters of the batch. Needs
torch, torchvision and timm alone.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from sbp.training.benchmark.report import write_record
from sbp.training.record.table import markdown
from sbp.training.runtime import distributed, environment
from scripts.reproduction.similarity import of_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.gradient_similarity", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="+", help="files that train.py wrote")
    parser.add_argument("--methods", type=json.loads, default={"SBP": {}}, help="JSON: name -> arguments of sbp.apply")
    parser.add_argument(
        "--images", type=int, default=128, help="of the training set, at equal distances (default: 128)"
    )
    parser.add_argument("--draws", type=int, default=8, help="masks of each method, or parts of the batch (default: 8)")
    parser.add_argument("--no-nulls", dest="nulls", action="store_false", help="without the parts of the batch")
    parser.add_argument("--data-root", help="where the images lie, if not where the run had them")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--out", type=Path, help="JSON with all figures, those of each layer too")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    settings: Any = {"images": options.images, "draws": options.draws}
    settings |= {"nulls": options.nulls, "data_root": options.data_root}
    try:
        device = distributed.pick_device(options.device)
        records = [of_checkpoint(path, options.methods, device=device, **settings) for path in options.checkpoint]
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(markdown(table(options.checkpoint, records)))
    if options.out:
        facts = {"device": environment.device_name(device), "versions": environment.versions()}
        facts |= {"images": options.images, "draws": options.draws, "methods": options.methods}
        write_record(facts | {"checkpoints": records}, options.out)


def table(paths: list[Path], records: list[dict]) -> list[list[str]]:
    rows = [["checkpoint", "gradient", "cosine", "norm ratio", "cosine of the mean over draws"]]
    for path, record in zip(paths, records, strict=True):
        for name, found in record["found"].items():
            figures = [f"{found[key]:.4f}" for key in ("cosine", "norm_ratio", "cosine_of_mean")]
            rows.append([path.name, name.replace("_", " "), *figures])
    return rows


if __name__ == "__main__":
    main()
