"""One training run: its parts, where it stands, and what happens between its steps."""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from sbp.training.config.rules import check_device, check_new_run
from sbp.training.config.run import Config
from sbp.training.config.same_run import check_same_images, check_same_run
from sbp.training.engine import setup
from sbp.training.engine.epoch import Step, train_epoch
from sbp.training.engine.probes import PeakMemory, gradient_cosines
from sbp.training.record import summary
from sbp.training.record.checkpoint import Checkpoints, Origin, load_weights, resume_point
from sbp.training.record.incidents import Incidents
from sbp.training.record.progress import Progress
from sbp.training.record.status import Preempted, RunStatus
from sbp.training.record.tracking import Tracker, new_run_id
from sbp.training.runtime import distributed, signals
from sbp.training.tasks.choice import task_of

log = logging.getLogger(__name__)

PICTURES = 4  # that wandb shows of each evaluation
PROBE_PARTS = 4  # of a micro batch: exact backpropagation through one fits where SBP through all of them does


class Run:
    """Built from a config and, when there is one to go on from, a checkpoint. Every process has one and calls the same.

    step: optimizer steps done so far. when: what is due at which step. tracker: to be entered before anything runs.
    Raises ValueError for data, settings or a checkpoint that cannot be trained with.
    """

    def __init__(self, config: Config, folder: Path, status: RunStatus) -> None:
        self.config, self.folder, self.status = config, folder, status
        self.task = task_of(config)
        self._figures: dict[str, float] = {}  # of the last report
        origin = self._open()
        self._build(origin)
        if origin is not None:
            self._go_on(origin)
        self._announce()

    def _open(self) -> Origin | None:
        """The device, and the checkpoint to go on from."""
        self.device = setup.prepare_process(self.config)
        check_device(self.config, self.device.type)
        self.peak = PeakMemory(self.device)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.config.checkpoint.keep)
        origin = resume_point(self.config.resume, self.checkpoints)
        if origin is None:
            check_new_run(self.config)
        else:
            check_same_run(origin.content["config"], self.config, own=origin.own)
        return origin

    def _build(self, origin: Origin | None) -> None:
        """The parts, as they are before the first step."""
        config = self.config
        setup.check_network(config)
        weights = self.task.starting_weights(config.backbone, config.data) if origin is None else None
        self.images = setup.load_images(config, self.device)
        self.trainer = setup.build_trainer(config, self.images.order, self.device, weights)
        limits = config.data.max_corrupt_images, config.max_skipped_steps
        self.incidents = Incidents(self.folder, self.checkpoints, *limits, config.amp, config.recipe.clip_grad)
        self.step, self.run_id = 0, new_run_id()
        self.steps_per_epoch = self.images.order.steps_per_epoch
        self.total_steps = config.recipe.epochs * self.steps_per_epoch
        self.when = setup.Schedule(config, self.steps_per_epoch)

    def _go_on(self, origin: Origin) -> None:
        """Where the checkpoint stands."""
        content = origin.content
        check_same_images(content.get("data"), self.images.facts, origin.own)
        load_weights(self.trainer.model, content["state_dict"])  # says what does not fit; then all the rest
        self.trainer.load_state_dict(content)
        self.step = content["step"]
        if not origin.own and self.step >= self.total_steps:
            raise ValueError(
                f"resume={self.config.resume} stands at step {self.step}, and this run ends at {self.total_steps}: "
                "nothing is left to train"
            )
        if origin.own:
            self.run_id = content["run_id"]
            self.incidents.load_state_dict(content["incidents"])
            if origin.path != self.checkpoints.path(self.step):  # which is damaged, if it is there
                self.save()

    def _announce(self) -> None:
        """Says and records what the run is about to do."""
        self.progress = Progress(self.total_steps, self.step)
        with self.peak.excluded():
            self.facts = setup.describe(self.config, self.images, self.trainer)
        setup.announce(self.config, self.facts)
        if distributed.is_main():
            summary.record_facts(self.folder, self.facts)
        self.incidents.forget_after(self.step)
        self.status.update(step=self.step, total_steps=self.total_steps)
        self.tracker = Tracker(
            self.folder,
            self.config.logger,
            asdict(self.config),
            run_id=self.run_id,
            resumed_at=self.step,
            enabled=distributed.is_main(),
        )

    @property
    def epoch(self) -> int:
        """Epochs done so far."""
        return self.step // self.steps_per_epoch

    def train_epoch(self) -> Iterator[Step]:
        """Runs what is left of an epoch; yields after each step. What its caller does is not training time."""
        epoch, epochs = self.epoch, self.config.recipe.epochs
        self.images.order.start_at(epoch, self.step % self.steps_per_epoch)
        steps = train_epoch(
            self.trainer,
            self.images,
            self.progress,
            self.incidents,
            first_step=self.step,
            report_at=self.when.report,
        )
        with self.progress.epoch(f"epoch {epoch + 1}/{epochs}", self.images.order.steps_left):
            for step in steps:
                self.step = step.done
                with self.progress.paused():
                    yield step

    def log(self, figures: dict[str, float]) -> None:
        """Records figures, after a step."""
        self._figures = figures
        self.tracker.log(self.step, figures | {"epoch": self.step / self.steps_per_epoch})

    def gradient_cosines(self) -> dict[str, float]:
        """Those of the weights of now, on the probe's images; measured by the main process where one is enough."""
        if not (distributed.is_main() or self.trainer.collective):
            return {}
        self.trainer.make_room()
        with self.peak.excluded():
            draw = 0 if self.trainer.fixed_mask else self.step
            micro = self.images.order.plan.micro_batch_size
            at_once = max(min(2, micro), micro // PROBE_PARTS // 2 * 2)  # pairs, as masks may be of halves
            return gradient_cosines(self.trainer, *self.images.probe, draw=draw, at_once=at_once)

    def save(self) -> None:
        """A checkpoint of now."""
        content = self.trainer.state_dict() | {"incidents": self.incidents.state_dict()}
        content |= {"config": asdict(self.config), "data": self.images.facts, "step": self.step, "run_id": self.run_id}
        distributed.only_main(lambda: self.checkpoints.save(self.step, content))
        newest = self.checkpoints.newest()
        self.status.update(step=self.step, checkpoint=None if newest is None else str(newest))

    def catch_up(self) -> None:
        """What an interruption after the checkpoint has left undone: an evaluation, and best.pt."""
        due = self.step > 0 and self.step % self.steps_per_epoch == 0 and self.when.evaluate(self.epoch)
        if due and not distributed.only_main(lambda: summary.is_evaluated(self.folder, self.step)):
            self.evaluate()
        self._keep_if_best()

    def evaluate(self) -> None:
        """Records the task's figures and peak memory at an epoch's end, and keeps the checkpoint if it is the best.

        Raises Preempted, with a checkpoint written, when a signal asks to stop.
        """
        measured = self.peak.read()
        self.trainer.make_room()
        try:
            with self.peak.excluded():
                measured |= self._evaluated(self.trainer.model)
                if self.trainer.ema is not None:
                    measured |= self._evaluated(self.trainer.ema.module, "_ema")
                pictures = self._pictures()
        except Preempted:
            self._ensure_saved()
            raise
        self.tracker.log(self.step, measured | {"epoch": self.epoch}, pictures)
        self.progress.say(self.epoch, self.config.recipe.epochs, self._figures | measured)
        self._keep_if_best()

    def _evaluated(self, model: nn.Module, suffix: str = "") -> dict[str, float]:
        """val/NAME for each figure of the task."""
        figures = self.task.evaluate(
            model,
            self.images.validation,
            normalize=self.trainer.normalize,
            amp=self.config.amp,
            patched=self.config.sbp.enabled,
        )
        return {f"val/{name}{suffix}": value for name, value in figures.items() if name != "images"}

    def _pictures(self) -> list[tuple[str, Any]]:
        if self.trainer.sharded or not self.tracker.shows:  # which on other processes it never does
            return []
        dataset = self.images.validation.dataset.dataset
        model, normalize = self.trainer.model, self.trainer.normalize
        try:
            return self.task.pictures(model, dataset, PICTURES, normalize=normalize, amp=self.config.amp)
        except (ValueError, OSError) as error:  # of an image that could be read a moment ago
            log.warning("wandb gets no pictures of this evaluation: %s", error)
            return []

    def _keep_if_best(self) -> None:
        """Makes the checkpoint of now best.pt when no evaluation on record was better."""
        self.tracker.flush()
        if self.step and distributed.only_main(lambda: summary.best_step(self.folder, self.config.task)) == self.step:
            self._ensure_saved()
            if distributed.is_main():
                self.checkpoints.keep_best(self.step)

    def preempted(self) -> Preempted:
        """To be raised when a signal has asked to stop and the checkpoint is written."""
        message = f"stopped by {signals.name()} after step {self.step} of {self.total_steps}"
        if not self.checkpoints.path(self.step).is_file():
            message += f"; no checkpoint could be written since {self.checkpoints.newest() or 'the start'}"
        return Preempted(message)

    def _ensure_saved(self) -> None:
        if not distributed.only_main(lambda: self.checkpoints.path(self.step).is_file()):
            self.save()

    def summarise(self) -> dict[str, Any]:
        """The figures of a run that is done.

        Raises ValueError when its last checkpoint, or its last figures, could not be written.
        """
        return distributed.only_main(self._summarise)

    def _summarise(self) -> dict[str, Any]:
        if not self.checkpoints.path(self.step).is_file():
            raise ValueError(
                f"all {self.step} steps are done, but their checkpoint could not be written to "
                f"{self.checkpoints.folder}; make room there, and the same command goes on from "
                f"{self.checkpoints.newest() or 'the start'}"
            )
        if not self.tracker.flush():
            raise ValueError(
                f"all {self.step} steps are done, but {self.tracker.path} could not be written; make room there, and "
                "the same command evaluates once more"
            )
        if self.trainer.graphs is not None and self.trainer.graphs.failure is not None:
            self.facts["cuda_graph"] = self.trainer.graphs.failure
        figures = summary.summarise(self.folder, self.facts)
        self.tracker.summarise(figures)
        return figures
