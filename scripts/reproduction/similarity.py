"""How similar the gradients of SBP are to the exact one, on the weights of a checkpoint, beside two nulls."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import sbp
from sbp.diagnostics import Gradient
from sbp.training.config.keys import from_dict
from sbp.training.config.model import SbpConfig
from sbp.training.config.run import Config
from sbp.training.data.loading import spread_samples
from sbp.training.data.preprocessing import Normalize
from sbp.training.data.sources import build_datasets
from sbp.training.models.build import build_model
from sbp.training.record import checkpoint
from sbp.training.runtime import seeding

SHARES = {"half": 0.5, "three_quarters": 0.75}  # of the batch, for the nulls of claims.py


def similarities(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    methods: dict[str, dict[str, Any]],
    *,
    draws: int,
    nulls: bool = True,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """For each method and each of SHARES, how its gradient compares with the exact one of the batch.

    model: a plain timm model on its device, with the weights in question; it is left plain. images: (B, 3, H, W), as
    the model takes them. methods: arguments of `sbp.apply`. draws: masks, or parts of the batch.

    Each gets {"cosine", "norm_ratio", "per_layer", "norm_ratio_per_layer"}, means over the draws, and
    "cosine_of_mean": of the gradient averaged over all draws; what stays away from 1 there is bias, as far as so few
    draws tell.
    """
    model.train()
    count = len(images)

    def loss(part: slice | Tensor) -> Callable[[], Tensor]:
        def compute() -> Tensor:
            seeding.seed_everything(seed, seeding.PROBE, 0)
            return F.cross_entropy(model(images[part]), labels[part])

        return compute

    def of_method(settings: dict[str, Any]) -> Iterator[Gradient]:
        sbp.apply(model, seed=seed, **settings)
        try:
            for draw in range(draws):
                sbp.set_draw(model, draw)
                yield sbp.gradient(model, loss(slice(None)))
        finally:
            sbp.remove(model)

    def of_null(share: float) -> Iterator[Gradient]:
        for draw in range(draws):
            order = torch.from_numpy(seeding.permutation(count, seed, seeding.PROBE, 1, draw))
            yield sbp.gradient(model, loss(order[: round(share * count)].to(images.device)))

    exact = sbp.gradient(model, loss(slice(None)))
    found = {name: compared(of_method(settings), exact) for name, settings in methods.items()}
    return found | {name: compared(of_null(share), exact) for name, share in SHARES.items() if nulls}


def compared(gradients: Iterable[Gradient], exact: Gradient) -> dict[str, Any]:
    """The mean comparison of these gradients with the exact one, and that of their mean."""
    each, total = [], {}  # type: ignore[var-annotated]
    for one in gradients:
        each.append(sbp.compare_gradients(one, exact))
        for name, value in one.items():
            if value is not None:
                total[name] = total[name] + value if name in total else value
    of_mean = sbp.compare_gradients({name: total.get(name) for name in exact}, exact)
    layers = each[0].per_layer
    return {
        "cosine": fmean(one.total for one in each),
        "norm_ratio": fmean(one.norm_ratio for one in each),
        "cosine_of_mean": of_mean.total,
        "per_layer": {name: fmean(one.per_layer[name] for one in each) for name in layers},
        "norm_ratio_per_layer": {name: fmean(one.norm_ratio_per_layer[name] for one in each) for name in layers},
    }


def of_checkpoint(
    path: Path,
    methods: dict[str, dict[str, Any]],
    *,
    images: int,
    draws: int,
    device: torch.device,
    nulls: bool = True,
    data_root: str | None = None,
) -> dict[str, Any]:
    """`similarities` on the weights of a run's checkpoint: {"seed", "step", "found"}.

    images: so many training images, at equal distances in the data set. data_root: instead of the run's own.
    Raises ValueError for a checkpoint or data that cannot be used.
    """
    content = checkpoint.load(path)
    config = from_dict(Config, content["config"])
    if data_root is not None:
        config.data.root = data_root
    pictures, labels = spread_samples(_train_set(config), images, config.seed)
    backbone = replace(config.backbone, drop_path=0.0)  # a part of the batch would draw others than the whole
    model = build_model(backbone, SbpConfig(enabled=False), config.data.num_classes, config.data.image_size)
    checkpoint.load_weights(model, content["state_dict"])
    normalize = Normalize(config.data, config.recipe).to(device)
    batch = normalize(pictures.to(device)), labels.to(device)
    found = similarities(model.to(device), *batch, methods, draws=draws, nulls=nulls, seed=config.seed)
    return {"seed": config.seed, "step": content["step"], "found": found}


def _train_set(config: Config) -> Dataset:
    """That of a run; the one of the last call where it is the same, as it may take seconds to make."""
    key = json.dumps([asdict(config.data), asdict(config.recipe)])
    if key not in _made:
        _made.clear()
        _made[key] = build_datasets(config.data, config.recipe)[0]
    return _made[key]


_made: dict[str, Dataset] = {}
