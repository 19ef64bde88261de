"""Accumulated steps in float64, and an evaluation on 101 images; saves what it saw to <target>.<rank>.

Run by `test_processes.py` in one process and, with torchrun, in several. One mask for all of a step
(`sbp.shared_mask`, `sbp.hold_mask`), so that a global batch has one gradient however it is split.
"""

import sys
from dataclasses import asdict
from functools import partial
from itertools import islice

import torch

from sbp.training import distributed
from sbp.training.config import plan_batches
from sbp.training.data import TrainSampler, ValidationSampler, build_datasets, make_loader, readable
from sbp.training.evaluation import evaluate
from sbp.training.loop import Trainer
from sbp.training.models import build_model
from sbp.training.optim import build_criterion, build_ema, build_optimizer, build_scheduler
from tests.training.configs import BACKBONES, small

OVERRIDES = (
    *("data=synthetic", "data.image_size=32", "data.num_classes=10", "data.val_images=101", "recipe.ema_decay=0.9"),
    *("sbp.mask=random", "sbp.shared_mask=true", "sbp.hold_mask=true", "backbone.drop_path=0"),
)
GLOBAL_BATCH, STEPS = 24, 4


def main(target: str) -> None:
    distributed.start()
    found = {backbone: train(small(*OVERRIDES, backbone=backbone)) for backbone in BACKBONES}
    torch.save(found, f"{target}.{distributed.rank()}")
    distributed.stop()


def train(config) -> dict:
    """Weights, averaged weights, the gradients of each step after clipping, and accuracy."""
    trainer, plan = build(config)
    gradients = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
    )
    train_set, val_set = build_datasets(config.data, config.recipe)
    for images in (train_set, val_set):
        images.transform.transforms.append(torch.Tensor.double)
    loader = partial(make_loader, seed=0, workers=0, device=torch.device("cpu"))
    micro_batches = map(readable, loader(train_set, TrainSampler(len(train_set), plan, 0, distributed.rank())))
    for step in range(STEPS):
        trainer.step(step, islice(micro_batches, plan.accumulation))
    sampler = ValidationSampler(len(val_set), 16, distributed.rank(), distributed.world_size())
    accuracy = evaluate(trainer.model, loader(val_set, sampler))
    state = trainer.state_dict()
    kept = {name: dict(state[name]) for name in ("state_dict", "state_dict_ema")}
    return kept | {"gradients": dict(enumerate(gradients)), "accuracy": asdict(accuracy)}


def build(config) -> tuple:
    """One process takes the global batch at once; several take theirs in three micro batches each."""
    size = distributed.world_size()
    plan = plan_batches(GLOBAL_BATCH, GLOBAL_BATCH // (3 * size) if size > 1 else None, size)
    torch.manual_seed(0)
    model = build_model(config.backbone, config.sbp, config.data.num_classes, config.data.image_size).double()
    ema = build_ema(model, config.recipe)
    optimizer = build_optimizer(model, config.recipe, 1e-2)
    trainer = Trainer(
        model,
        optimizer,
        build_scheduler(optimizer, config.recipe, STEPS),
        build_criterion(config.recipe),
        ema=ema,
        clip_grad=0.1,
        accumulation=plan.accumulation,
        hold_mask=True,
    )
    return trainer, plan


if __name__ == "__main__":
    main(sys.argv[1])
