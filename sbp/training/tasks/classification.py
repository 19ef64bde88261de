"""The task of classification; see tasks.py."""

from dataclasses import asdict
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from sbp.training.config.run import Config
from sbp.training.data import sources
from sbp.training.data.loading import collate
from sbp.training.data.preprocessing import Normalize, Preprocessing
from sbp.training.models import build, optim
from sbp.training.models.pretrained import load_starting_weights, starting_weights
from sbp.training.tasks import accuracy

__all__ = ["collate", "load_starting_weights", "starting_weights"]

preprocessing = Preprocessing.of


def build_datasets(config: Config) -> tuple[Dataset, Dataset]:
    return sources.build_datasets(config.data, config.recipe)


def build_validation_set(config: Config) -> Dataset:
    return sources.build_validation_set(config.data)


def normalize(config: Config) -> Normalize:
    return Normalize(config.data, config.recipe)


def build_model(config: Config) -> nn.Module:
    data = config.data
    return build.build_model(config.backbone, config.sbp, data.num_classes, data.image_size, data.train_image_size)


def build_criterion(config: Config) -> nn.Module | None:
    return optim.build_criterion(config.recipe)


def evaluate(
    model: nn.Module, loader: DataLoader, *, normalize: Normalize | None, amp: str, patched: bool
) -> dict[str, float]:
    return asdict(accuracy.evaluate(model, loader, normalize=normalize, amp=amp, patched=patched))


def pictures(
    model: nn.Module, dataset: Dataset, count: int, *, normalize: Normalize | None, amp: str
) -> list[tuple[str, Any]]:
    return []
