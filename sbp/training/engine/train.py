"""One training run, from its config to its summary."""

import logging
from pathlib import Path
from typing import Any

from sbp.training.config.rules import validate
from sbp.training.config.run import Config
from sbp.training.engine.planned import planned
from sbp.training.engine.run import Run
from sbp.training.memory.advice import advised
from sbp.training.plan.auto import Expected, FirstSteps
from sbp.training.record.status import RunStatus, recorded

log = logging.getLogger(__name__)


@recorded
@planned
@advised
def train(config: Config, folder: Path, status: RunStatus, expected: Expected | None = None) -> dict[str, Any]:
    """One run, recorded in `folder`, where an interrupted one goes on; returns its summary.

    Raises ValueError for what the user got wrong and for what cannot go on; out of memory is such an error, and says
    which settings would have fitted. Raises Preempted when a signal asks to stop. expected: what was forecast of its
    steps.
    """
    validate(config)
    run = Run(config, folder, status)
    first = FirstSteps(expected, run.device, run.peak.allocated)
    with run.tracker:
        if run.step == 0:
            run.log({key: run.facts[key] for key in ("saved_bytes_per_image", "effective_keep_ratio")})
        run.catch_up()
        while run.epoch < config.recipe.epochs:
            for step, figures, asked_to_stop in run.train_epoch():
                for line in first.done():
                    log.warning("%s", line)
                if run.when.probe(step):
                    figures |= run.gradient_cosines()
                if figures:
                    run.log(figures)
                if asked_to_stop or run.when.save_within_epoch(step):
                    run.save()
                if asked_to_stop:
                    raise run.preempted()
            if run.when.save(run.epoch):
                run.save()
            if run.when.evaluate(run.epoch):
                run.evaluate()
        return run.summarise()
