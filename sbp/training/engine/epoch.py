"""The steps of an epoch, with what may go wrong in each."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from sbp.training.data.loading import Batch, Images
from sbp.training.engine.trainer import Targets, Trainer
from sbp.training.record.incidents import Incidents
from sbp.training.record.progress import Progress
from sbp.training.runtime import distributed, signals


class Step(NamedTuple):
    """done: steps done so far. figures: of those since the last report, or empty. asked_to_stop: by a signal."""

    done: int
    figures: dict[str, float]
    asked_to_stop: bool


def train_epoch(
    trainer: Trainer,
    images: Images,
    progress: Progress,
    incidents: Incidents,
    *,
    first_step: int,
    report_at: Callable[[int], bool],
) -> Iterator[Step]:
    """Runs what is left of the epoch; yields after each optimizer step.

    first_step: steps done before. report_at: for which numbers of steps done the figures are wanted: loss over the
    global batch and its parts, lr, loss scale, images per second, share of time spent waiting for data, steps left out
    and images replaced.
    Raises ValueError, in all processes, when more images are unreadable, or more steps in a row have no finite loss or
    gradient, than `incidents` allows.
    """
    batches = iter(images.train)
    for step in range(first_step, first_step + images.order.steps_left):
        taken = _MicroBatches(trainer.accumulation, images, progress, batches)
        losses = trainer.backward(step, taken).read_all()
        loss = losses["loss"]
        stop, endless, corrupt, lacking = distributed.maxima(
            [signals.received is not None, not math.isfinite(loss), len(taken.unreadable), taken.lacking]
        )  # one exchange a step, while the device computes the gradients
        if lacking:
            incidents.ran_out(step, taken.unreadable)
        if corrupt:
            incidents.replaced(step, taken.unreadable)
        if endless:
            trainer.skip()
            incidents.step_skipped(step, loss, images.names(step))
        else:
            update = trainer.update(step)
            if update.norm is not None and not math.isfinite(update.norm):
                incidents.step_skipped(step, update.norm, images.names(step), what="gradient norm")
            elif update.scale < update.scale_before:
                incidents.step_overflowed(step, update.scale)
            else:
                incidents.step_succeeded()
        progress.advance(images.order.plan.global_batch_size)
        figures: dict[str, float] = {}
        if report_at(step + 1):
            trainer.wait()
            means = [total / distributed.world_size() for total in distributed.sums(list(losses.values()))]
            figures = dict(zip((f"train/{name}" for name in losses), means, strict=True))
            figures |= {"lr": trainer.lr} | trainer.scale() | trainer.kept(step) | progress.read() | incidents.figures()
        yield Step(step + 1, figures, bool(stop))


class _MicroBatches:
    """The micro batches of one step, each taken from the loader when its turn comes.

    unreadable: images that could not be read so far. lacking: whether nothing could be read in the place of one. Then
    images of the probe fill the batch: the other processes need this one until all of them can end together.
    """

    def __init__(self, count: int, images: Images, progress: Progress, batches: Iterator[Batch]) -> None:
        self.count, self.images, self.progress, self.batches = count, images, progress, batches
        self.unreadable: list[str] = []
        self.lacking = False

    def __iter__(self) -> Iterator[tuple[Tensor, Targets]]:
        size = self.images.order.plan.micro_batch_size
        for _ in range(self.count):
            batch = self.progress.wait_for(self.batches)
            self.unreadable += batch.unreadable
            if len(batch.images) == size:
                yield batch.images, batch.labels
                continue
            self.lacking = True
            yield self.images.some(size)
