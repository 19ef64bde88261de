"""One evaluation of a checkpoint, with the model and the preprocessing of the run that wrote it."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sbp.training.config.batches import evaluation_batch
from sbp.training.config.keys import check_limits, from_dict
from sbp.training.config.requests import EvalConfig, overridden
from sbp.training.config.rules import validate
from sbp.training.config.run import Config
from sbp.training.data.classes import check_same_classes, class_names
from sbp.training.data.loading import ValidationSampler, make_loader
from sbp.training.data.sources import prepare
from sbp.training.engine import setup
from sbp.training.models.build import fit_position_embedding
from sbp.training.record.checkpoint import choose_weights, find, load, load_weights
from sbp.training.record.files import write_json
from sbp.training.runtime import distributed, signals
from sbp.training.tasks.choice import task_of

log = logging.getLogger("eval")


def evaluate_checkpoint(request: EvalConfig, folder: Path) -> dict[str, Any]:
    """Returns the figures of the run's task and what they were measured with, and writes them to folder/eval.json.

    Raises ValueError for a checkpoint that is damaged or does not fit the model, and for bad data.
    """
    check_limits(request)
    # A run's folder may get a newer one meanwhile, so that one process chooses.
    path = distributed.only_main(lambda: find(Path(request.checkpoint))[0])
    checkpoint = distributed.all_or_none(lambda: load(path))
    config = validate(overridden(from_dict(Config, checkpoint["config"]), request))
    if config.sbp.eval == "published" and not config.sbp.enabled:
        raise ValueError(f"sbp.eval=published, but {path} was trained without SBP")
    ema, weights = choose_weights(path, checkpoint, request.ema)

    task = task_of(config)
    if request.pictures and not task.draws:
        raise ValueError(f"pictures={request.pictures} needs a run with task=detection; {path} is of another one")
    device = setup.prepare_process(config)
    distributed.only_main(lambda: prepare(config.data, ["val"]))
    images = distributed.all_or_none(lambda: task.build_validation_set(config))
    trained = checkpoint.get("data", {"classes": []})["classes"]
    check_same_classes(trained, class_names(images), (f"the run of {path}", "what it is to be evaluated on"))
    model = task.build_model(config).to(device)
    load_weights(model, fit_position_embedding(model, weights))
    order = ValidationSampler(len(images), evaluation_batch(config), distributed.rank(), distributed.world_size())  # type: ignore[arg-type]
    loader = make_loader(
        images, order, seed=config.seed, workers=config.data.workers, device=device, collate=task.collate
    )
    normalize = task.normalize(config).to(device)
    with signals.deferred():
        figures = task.evaluate(model, loader, normalize=normalize, amp=config.amp, patched=config.sbp.enabled)
    if request.pictures and distributed.is_main():
        (folder / "pictures").mkdir(exist_ok=True)
        for name, picture in task.pictures(model, images, request.pictures, normalize=normalize, amp=config.amp):
            picture.save(folder / "pictures" / f"{name}.jpg", quality=90)
    preprocessing = task.preprocessing(config.data)
    log.info("checkpoint     %s, step %d, %s weights", path, checkpoint["step"], "averaged (EMA)" if ema else "raw")
    log.info("preprocessing  %s", preprocessing)
    log.info("evaluation     %s, amp %s", config.sbp.eval if config.sbp.enabled else "exact", config.amp)
    log.info("%s", ", ".join(f"{name} {value:.6g}" for name, value in figures.items()))
    result = figures | {
        "checkpoint": str(path),
        "step": checkpoint["step"],
        "ema": ema,
        "sbp_eval": config.sbp.eval,
        "amp": config.amp,
        "preprocessing": asdict(preprocessing),
    }
    if distributed.is_main():
        write_json(folder / "eval.json", result)
    return result
