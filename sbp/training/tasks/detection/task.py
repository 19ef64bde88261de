"""The task of detection."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from sbp.training.config.images import DataConfig
from sbp.training.config.model import BackboneConfig
from sbp.training.config.run import Config
from sbp.training.data.loading import Batch, Batches, Sample
from sbp.training.data.preprocessing import Normalize
from sbp.training.models import pretrained
from sbp.training.tasks.detection import augmentation, datasets
from sbp.training.tasks.detection.augmentation import DetectionPreprocessing, PaddedNormalize
from sbp.training.tasks.detection.detector import build_detector, load_body
from sbp.training.tasks.detection.evaluation import evaluate_detection
from sbp.training.tasks.detection.pictures import predicted
from sbp.training.tasks.task import Task


class Detection(Task):
    top = "detector"
    same_shapes = deterministic = exportable = False  # reading regions has no deterministic algorithm
    generated = "shapes"

    def build_datasets(self, config: Config) -> tuple[Dataset, Dataset]:
        return datasets.build_datasets(config.data, config.recipe)

    def build_validation_set(self, config: Config) -> Dataset:
        return datasets.build_validation_set(config.data)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return augmentation.collate(samples)

    def normalize(self, config: Config) -> Normalize:
        return PaddedNormalize(config.data, config.recipe)

    def preprocessing(self, data: DataConfig) -> Any:
        return DetectionPreprocessing.of(data)

    def build_model(self, config: Config) -> nn.Module:
        return build_detector(config.backbone, config.sbp, config.detector, config.data.num_classes)

    def build_criterion(self, config: Config) -> nn.Module | None:
        return None

    def starting_weights(self, backbone: BackboneConfig, data: DataConfig) -> dict[str, Tensor] | None:
        return pretrained.starting_weights(backbone, data, classifier=False)

    def load_starting_weights(self, model: Any, weights: dict[str, Tensor]) -> None:
        load_body(model, weights)

    def evaluate(
        self, model: nn.Module, loader: Batches, *, normalize: Normalize | None, amp: str, patched: bool
    ) -> dict[str, float]:
        dataset: Any = loader.dataset.dataset
        truth = dataset.ground_truth
        return evaluate_detection(model, loader, ground_truth=truth, normalize=normalize, amp=amp, patched=patched)

    def pictures(
        self, model: nn.Module, dataset: Dataset, count: int, *, normalize: Normalize | None, amp: str
    ) -> list[tuple[str, Image.Image]]:
        return predicted(model, dataset, count, normalize=normalize, amp=amp)
