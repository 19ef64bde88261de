"""What a run trains: all that differs between classification and detection.

A task is a module with the functions of `Task`: classification.py, detection/task.py.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sbp.training.config.images import DataConfig
from sbp.training.config.model import BackboneConfig
from sbp.training.config.run import Config
from sbp.training.data.loading import Batch, Sample
from sbp.training.data.preprocessing import Normalize

_MODULES = {"classification": "sbp.training.tasks.classification", "detection": "sbp.training.tasks.detection.task"}


def sum_of(losses: dict[str, Tensor]) -> Tensor:
    """The loss of a model that returns several by name."""
    return torch.stack(list(losses.values())).sum()


class Task(Protocol):
    """The functions of a task's module."""

    def build_datasets(self, config: Config) -> tuple[Dataset, Dataset]:
        """The training and the validation set. Raises ValueError for what cannot be trained on."""

    def build_validation_set(self, config: Config) -> Dataset:
        """The validation set alone."""

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """One batch of what the sets give."""

    def normalize(self, config: Config) -> Normalize:
        """What the images of a batch go through on the device."""

    def preprocessing(self, data: DataConfig) -> Any:
        """What an image goes through in evaluation: a dataclass that reads well as a text."""

    def build_model(self, config: Config) -> nn.Module:
        """The model, with SBP where it is enabled. Raises ValueError for settings that do not fit it."""

    def build_criterion(self, config: Config) -> nn.Module | None:
        """The loss of the model's outputs and the labels; None where the model has losses of its own."""

    def starting_weights(self, backbone: BackboneConfig, data: DataConfig) -> dict[str, Tensor] | None:
        """What `backbone.pretrained` names; as sbp/training/models/pretrained.py."""

    def load_starting_weights(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Into a model that `build_model` made."""

    def evaluate(
        self, model: nn.Module, loader: DataLoader, *, normalize: Normalize | None, amp: str, patched: bool
    ) -> dict[str, float]:
        """The figures of the validation set, exact for any number of processes, which all have to call it.

        Raises ValueError that names the unreadable images, and Preempted when a signal asks to stop.
        """

    def pictures(
        self, model: nn.Module, dataset: Dataset, count: int, *, normalize: Normalize | None, amp: str
    ) -> list[tuple[str, Any]]:
        """What the model finds in `count` images of the validation set, drawn: name and PIL image of each.

        An empty list for a task without anything to draw.
        """


def task_of(config: Config) -> Task:
    """The config's task. Detection needs pycocotools, so that its module is imported only where it is asked for."""
    return cast(Task, import_module(_MODULES[config.task]))
