"""Trains a timm model, with or without SBP: `python train.py`, or `torchrun --nproc_per_node=N train.py`.

`python train.py --help` lists the config groups and every key. `-m` sweeps: `python train.py -m sbp.keep_ratio=0.5,1`.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from sbp.training import distributed, setup
from sbp.training.checkpoint import Checkpoints, load_weights, resume_point
from sbp.training.config import Config, check_same_run, validate
from sbp.training.evaluation import evaluate
from sbp.training.loop import train_epoch
from sbp.training.probes import PeakMemory, gradient_cosines
from sbp.training.progress import Progress
from sbp.training.summary import summarise
from sbp.training.tracking import Tracker, new_run_id
from scripts.launch import join_processes, run_job

log = logging.getLogger("train")


def train(config: Config, folder: Path) -> dict[str, Any]:
    """One run, recorded in `folder`; returns its summary. Raises ValueError for what the user got wrong."""
    validate(config)
    device = setup.pick_device(config)
    peak = PeakMemory(device)
    images = setup.load_images(config, device)
    trainer = setup.build_trainer(config, images.order, device)
    epochs, steps_per_epoch = config.recipe.epochs, images.order.steps_per_epoch

    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    step, run_id = 0, new_run_id()
    if (resumed := resume_point(config.resume, checkpoints)) is not None:
        check_same_run(resumed["config"], config)
        load_weights(trainer.model, resumed["state_dict"])  # says what does not fit; then everything else
        trainer.load_state_dict(resumed)
        step, run_id = resumed["step"], resumed["run_id"]

    def save() -> None:
        if distributed.is_main():
            state = {"config": dataclasses.asdict(config), "step": step, "run_id": run_id}
            checkpoints.save(step, trainer.state_dict() | state)

    def report_at(done: int) -> bool:
        return done % config.log_every_steps == 0 or done % steps_per_epoch == 0 or probe_at(done)

    def probe_at(done: int) -> bool:
        return config.sbp.enabled and config.probe.every_steps is not None and done % config.probe.every_steps == 0

    with peak.excluded():
        facts = setup.describe(config, images, trainer)
    setup.announce(config, facts)
    progress = Progress(epochs * steps_per_epoch, step)
    main = distributed.is_main()
    with Tracker(
        folder, config.logger, dataclasses.asdict(config), run_id=run_id, resumed_at=step, enabled=main
    ) as tracker:
        if step == 0:
            tracker.log(0, {key: facts[key] for key in ("saved_bytes_per_image", "effective_keep_ratio")})
        for epoch in range(step // steps_per_epoch, epochs):
            images.order.start_at(epoch, step % steps_per_epoch)
            with progress.epoch(f"epoch {epoch + 1}/{epochs}", len(images.train) // trainer.accumulation):
                for step, figures in train_epoch(
                    trainer,
                    images.train,
                    progress,
                    first_step=step,
                    global_batch_size=config.global_batch_size,
                    report_at=report_at,
                ):
                    with progress.paused():
                        if probe_at(step) and main:
                            with peak.excluded():
                                figures |= gradient_cosines(trainer, *images.probe, draw=step)
                        if figures:
                            tracker.log(step, figures | {"epoch": step / steps_per_epoch})
                        every = config.checkpoint.every_steps
                        if every and step % every == 0 and step % steps_per_epoch:
                            save()

            last = epoch + 1 == epochs
            if last or (epoch + 1) % config.eval_every_epochs == 0:
                figures = peak.read()
                with peak.excluded():
                    for suffix, model in (("", trainer.model), ("_ema", trainer.ema and trainer.ema.module)):
                        if model is not None:
                            accuracy = evaluate(model, images.validation, amp=config.amp)
                            figures |= accuracy.figures(suffix)
                tracker.log(step, figures | {"epoch": epoch + 1})
                log.info("%s", progress.line(epoch + 1, epochs, figures))
            if last or (epoch + 1) % config.checkpoint.every_epochs == 0:
                save()
        summary = summarise(folder, facts) if main else {}
        tracker.summarise(summary)
    return summary


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(composed: DictConfig) -> None:
    run_job(composed, Config, train)


if __name__ == "__main__":
    join_processes()
    main()
