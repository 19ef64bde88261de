"""The task of detection; see sbp/training/tasks/task.py."""

from typing import Any

from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sbp.training.config.images import DataConfig
from sbp.training.config.model import BackboneConfig
from sbp.training.config.run import Config
from sbp.training.data.preprocessing import Normalize
from sbp.training.models import pretrained
from sbp.training.tasks.detection import datasets
from sbp.training.tasks.detection.augmentation import PaddedNormalize, Preprocessing, collate
from sbp.training.tasks.detection.detector import build_detector, load_body
from sbp.training.tasks.detection.evaluation import evaluate_detection
from sbp.training.tasks.detection.pictures import predicted

__all__ = ["collate"]

preprocessing = Preprocessing.of
load_starting_weights = load_body


def build_datasets(config: Config) -> tuple[Dataset, Dataset]:
    return datasets.build_datasets(config.data, config.recipe)


def build_validation_set(config: Config) -> Dataset:
    return datasets.build_validation_set(config.data)


def normalize(config: Config) -> Normalize:
    return PaddedNormalize(config.data, config.recipe)


def build_model(config: Config) -> nn.Module:
    return build_detector(config.backbone, config.sbp, config.detector, config.data.num_classes)


def build_criterion(config: Config) -> nn.Module | None:
    return None


def starting_weights(backbone: BackboneConfig, data: DataConfig) -> dict[str, Tensor] | None:
    return pretrained.starting_weights(backbone, data, classifier=False)


def evaluate(
    model: nn.Module, loader: DataLoader, *, normalize: Normalize | None, amp: str, patched: bool
) -> dict[str, float]:
    dataset: Any = loader.dataset.dataset  # type: ignore[attr-defined]
    truth = dataset.ground_truth
    return evaluate_detection(model, loader, ground_truth=truth, normalize=normalize, amp=amp, patched=patched)


def pictures(
    model: nn.Module, dataset: Dataset, count: int, *, normalize: Normalize | None, amp: str
) -> list[tuple[str, Image.Image]]:
    return predicted(model, dataset, count, normalize=normalize, amp=amp)
