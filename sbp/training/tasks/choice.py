"""The task that a config asks for."""

from sbp.training.config.run import Config
from sbp.training.tasks.classification import Classification
from sbp.training.tasks.task import Task


def task_of(config: Config) -> Task:
    """Detection needs pycocotools, so that its module is imported only where it is asked for."""
    if config.task == "detection":
        from sbp.training.tasks.detection.task import Detection

        return Detection()
    return Classification()
