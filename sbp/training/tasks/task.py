"""What a run trains: all that differs between classification and detection."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sbp.training.config.images import DataConfig
from sbp.training.config.model import BackboneConfig
from sbp.training.config.run import Config
from sbp.training.data.loading import Batch, Batches, Sample
from sbp.training.data.preprocessing import Normalize


def sum_of(losses: dict[str, Tensor]) -> Tensor:
    """The loss of a model that returns several by name."""
    return torch.stack(list(losses.values())).sum()


class Task(ABC):
    """What the rest of the framework asks a task.

    top: what stands on the backbone. same_shapes: whether all training batches have the same shapes. deterministic:
    whether CUDA has deterministic algorithms for all that it does. exportable: whether timm reads its models.
    generated: a data source that reads nothing.
    """

    top: str
    same_shapes: bool
    deterministic: bool
    exportable: bool
    generated: str

    @abstractmethod
    def build_datasets(self, config: Config) -> tuple[Dataset, Dataset]:
        """The training and the validation set. Raises ValueError for what cannot be trained on."""

    @abstractmethod
    def build_validation_set(self, config: Config) -> Dataset:
        """The validation set alone."""

    @abstractmethod
    def collate(self, samples: Sequence[Sample]) -> Batch:
        """One batch of what the sets give."""

    @abstractmethod
    def normalize(self, config: Config) -> Normalize:
        """What the images of a batch go through on the device."""

    @abstractmethod
    def preprocessing(self, data: DataConfig) -> Any:
        """What an image goes through in evaluation: a dataclass that reads well as a text."""

    @abstractmethod
    def build_model(self, config: Config) -> nn.Module:
        """The model, with SBP where it is enabled. Raises ValueError for settings that do not fit it."""

    @abstractmethod
    def build_criterion(self, config: Config) -> nn.Module | None:
        """The loss of the model's outputs and the labels; None where the model has losses of its own."""

    @abstractmethod
    def starting_weights(self, backbone: BackboneConfig, data: DataConfig) -> dict[str, Tensor] | None:
        """What `backbone.pretrained` names; as sbp/training/models/pretrained.py."""

    @abstractmethod
    def load_starting_weights(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Into a model that `build_model` made."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, loader: Batches, *, normalize: Normalize | None, amp: str, patched: bool
    ) -> dict[str, float]:
        """The figures of the validation set, exact for any number of processes, which all have to call it.

        Raises ValueError that names the unreadable images, and Preempted when a signal asks to stop.
        """

    def pictures(
        self, model: nn.Module, dataset: Dataset, count: int, *, normalize: Normalize | None, amp: str
    ) -> list[tuple[str, Any]]:
        """What the model finds in `count` images of the validation set, drawn: name and PIL image of each."""
        return []

    @property
    def draws(self) -> bool:
        """Whether there are pictures."""
        return type(self).pictures is not Task.pictures
