"""The task of classification."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from sbp.training.config.images import DataConfig
from sbp.training.config.model import BackboneConfig
from sbp.training.config.run import Config
from sbp.training.data import loading, sources
from sbp.training.data.loading import Batch, Batches, Sample
from sbp.training.data.preprocessing import Normalize, Preprocessing
from sbp.training.models import build, optim, pretrained
from sbp.training.tasks import accuracy
from sbp.training.tasks.task import Task


class Classification(Task):
    top = "classifier"
    same_shapes = deterministic = exportable = True
    generated = "synthetic"

    def build_datasets(self, config: Config) -> tuple[Dataset, Dataset]:
        return sources.build_datasets(config.data, config.recipe)

    def build_validation_set(self, config: Config) -> Dataset:
        return sources.build_validation_set(config.data)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return loading.collate(samples)

    def normalize(self, config: Config) -> Normalize:
        return Normalize(config.data, config.recipe)

    def preprocessing(self, data: DataConfig) -> Any:
        return Preprocessing.of(data)

    def build_model(self, config: Config) -> nn.Module:
        data = config.data
        return build.build_model(config.backbone, config.sbp, data.num_classes, data.image_size, data.train_image_size)

    def build_criterion(self, config: Config) -> nn.Module | None:
        return optim.build_criterion(config.recipe)

    def starting_weights(self, backbone: BackboneConfig, data: DataConfig) -> dict[str, Tensor] | None:
        return pretrained.starting_weights(backbone, data)

    def load_starting_weights(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        pretrained.load_starting_weights(model, weights)

    def evaluate(
        self, model: nn.Module, loader: Batches, *, normalize: Normalize | None, amp: str, patched: bool
    ) -> dict[str, float]:
        return asdict(accuracy.evaluate(model, loader, normalize=normalize, amp=amp, patched=patched))
