"""What autograd saves for the backward pass of the published networks: python -m scripts.saved_memory [NAME ...]

Bytes per image of the network's own size (224 pixels for those), as the slope between two batch sizes, under bfloat16
autocast on a CPU with fake tensors
(nothing is computed, a network takes seconds); published SBP layers, grid mask, mhsa_drop qkv. --cuda: with layer norm
in float32, as CUDA's autocast has it.
"""

import argparse
from contextlib import nullcontext
from functools import partial
from typing import Any

import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sbp
from sbp.training.memory.allocations import CudaCasts
from sbp.training.record.table import markdown

NETWORKS = ("vit_tiny_patch16_224", "vit_base_patch16_224", "convnext_tiny", "convnext_base")
ARMS = {  # heading -> arguments of sbp.apply
    "SBP": {},
    "SBP, cheap": {"recompute": "cheap"},
    "SBP, block": {"recompute": "block"},
    "keep_ratio 1": {"keep_ratio": 1},
    "keep_ratio 1, cheap": {"keep_ratio": 1, "recompute": "cheap"},
    "keep_ratio 1, block": {"keep_ratio": 1, "recompute": "block"},
}


def saved_by(name: str, cuda: bool = False) -> dict[str, float]:
    """Saved bytes per image of timm's model ("plain"), and of each of ARMS."""
    with torch.device("meta"):
        model = timm.create_model(name).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model._apply(lambda p: torch.empty(p.shape, dtype=p.dtype))
    count = partial(_per_image, model, mode, cuda)
    found = {"plain": count()}
    for heading, settings in ARMS.items():
        sbp.apply(model, **settings)  # type: ignore[arg-type]
        found[heading] = count()
        sbp.remove(model)
    return found


def _per_image(model: Any, mode: FakeTensorMode, cuda: bool) -> float:
    def saved(batch: int) -> int:
        with mode, torch.autocast("cpu", torch.bfloat16), CudaCasts() if cuda else nullcontext():
            return sbp.saved_bytes(lambda: model(torch.empty(batch, *model.pretrained_cfg["input_size"])).sum())

    return (saved(3) - saved(1)) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=NETWORKS, help="timm models")
    parser.add_argument("--cuda", action="store_true", help="with the casts of CUDA's autocast")
    options = parser.parse_args()
    rows = [["network", "plain MiB", *ARMS]]
    for name in options.names:
        plain, *others = saved_by(name, options.cuda).values()
        rows.append([name, f"{plain / 2**20:.2f}", *(f"{other / plain:.3f}" for other in others)])
    print(markdown(rows))


if __name__ == "__main__":
    main()
