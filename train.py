"""Trains a timm model, with or without SBP: `python train.py`, or `torchrun --nproc_per_node=N train.py`.

`python train.py --help` lists the config groups and every key. `-m` sweeps: `python train.py -m sbp.keep_ratio=0.5,1`.
"""

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from sbp.training import distributed, setup
from sbp.training.checkpoint import Checkpoints, load_weights, resume_point
from sbp.training.config import Config, check_same_run, validate
from sbp.training.evaluation import evaluate
from sbp.training.forecast import advised
from sbp.training.loop import train_epoch
from sbp.training.probes import PeakMemory, gradient_cosines
from sbp.training.progress import Progress
from sbp.training.summary import summarise
from sbp.training.tracking import Tracker, new_run_id
from scripts.launch import join_processes, run_job

log = logging.getLogger("train")


@advised
def train(config: Config, folder: Path) -> dict[str, Any]:
    """One run, recorded in `folder`; returns its summary. Raises ValueError for what the user got wrong.

    Out of memory is such an error too, and says which settings would have fitted.
    """
    validate(config)
    device, is_main = setup.pick_device(config), distributed.is_main()
    peak = PeakMemory(device)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    resumed = resume_point(config.resume, checkpoints)
    if resumed is not None:
        check_same_run(resumed["config"], config)

    images = setup.load_images(config, device)
    trainer = setup.build_trainer(config, images.order, device)
    step, run_id = 0, new_run_id()
    if resumed is not None:
        load_weights(trainer.model, resumed["state_dict"])  # says what does not fit; then all the rest
        trainer.load_state_dict(resumed)
        step, run_id = resumed["step"], resumed["run_id"]

    with peak.excluded():
        facts = setup.describe(config, images, trainer)
    setup.announce(config, facts)
    epochs, steps_per_epoch = config.recipe.epochs, images.order.steps_per_epoch
    when = setup.Schedule(config, steps_per_epoch)
    progress = Progress(epochs * steps_per_epoch, step)
    accuracy = partial(evaluate, loader=images.validation, amp=config.amp, patched=config.sbp.enabled)

    def save() -> None:
        if is_main:
            state = {"config": asdict(config), "step": step, "run_id": run_id}
            checkpoints.save(step, trainer.state_dict() | state)

    with Tracker(folder, config.logger, asdict(config), run_id=run_id, resumed_at=step, enabled=is_main) as tracker:
        if step == 0:
            tracker.log(0, {key: facts[key] for key in ("saved_bytes_per_image", "effective_keep_ratio")})
        for epoch in range(step // steps_per_epoch, epochs):
            images.order.start_at(epoch, step % steps_per_epoch)
            steps = train_epoch(trainer, images, progress, first_step=step, report_at=when.report)
            with progress.epoch(f"epoch {epoch + 1}/{epochs}", images.order.steps_left):
                for done, figures in steps:
                    step = done
                    with progress.paused():
                        if when.probe(step) and is_main:
                            with peak.excluded():
                                figures |= gradient_cosines(trainer, *images.probe, draw=step)
                        if figures:
                            tracker.log(step, figures | {"epoch": step / steps_per_epoch})
                        if when.save_within_epoch(step):
                            save()
            if when.evaluate(epoch + 1):
                measured = peak.read()
                with peak.excluded():
                    measured |= accuracy(trainer.model).figures()
                    if trainer.ema is not None:
                        measured |= accuracy(trainer.ema.module).figures("_ema")
                tracker.log(step, measured | {"epoch": epoch + 1})
                log.info("%s", progress.line(epoch + 1, epochs, figures | measured))
            if when.save(epoch + 1):
                save()
        summary = summarise(folder, facts) if is_main else {}
        tracker.summarise(summary)
    return summary


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(composed: DictConfig) -> None:
    run_job(composed, Config, train)


if __name__ == "__main__":
    join_processes()
    main()
