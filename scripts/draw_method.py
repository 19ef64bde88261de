"""Draws the README's picture of the method: python scripts/draw_method.py docs/sbp.png"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from sbp.masks import grid_mask, random_mask

COMPUTED, KEPT, DROPPED = "#5b8db8", "#f2a900", "#d9dde3"


def draw(path: Path) -> None:
    everything = torch.ones(14, 14, dtype=torch.bool)
    panels = [
        ("forward pass,\nin every step", everything),
        ("backward pass, step 1:\ngrid mask, keep_ratio 0.5", grid_mask(14, 14, 0.5, 0)),
        ("backward pass, step 2:\nanother draw", grid_mask(14, 14, 0.5, 1)),
        ("grid mask,\nkeep_ratio 0.4", grid_mask(14, 14, 0.4, 0)),
        ("random mask,\nkeep_ratio 0.5", random_mask(14, 14, 0.5, torch.Generator().manual_seed(0))),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.2), layout="constrained")
    for axis, (title, mask) in zip(axes, panels, strict=True):
        forward = mask is everything
        axis.pcolormesh(
            mask.flip(0),
            cmap=ListedColormap([DROPPED, COMPUTED if forward else KEPT]),
            vmin=0,
            vmax=1,
            edgecolor="white",
            linewidth=0.8,
        )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(f"{int(mask.sum())} of {mask.numel()} {'computed' if forward else 'kept'}", fontsize=8)
        axis.set(aspect="equal", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.legend(
        handles=[
            Patch(color=COMPUTED, label="computed"),
            Patch(color=KEPT, label="saved for backward, gives gradient"),
            Patch(color=DROPPED, label="nothing saved by SBP layers, no gradient"),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/sbp.png"))
