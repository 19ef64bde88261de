"""Accumulated steps in float64, and an evaluation on 101 images, on any number of processes, under DDP, FSDP
and with captured passes.

Started by `test_processes.py` with torchrun; in one process it calls `train` itself. One mask for all of a step
(`sbp.shared_mask`, `sbp.hold_mask`), so that a global batch has one gradient however it is split.
"""

import sys
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sbp.training.config.batches import plan_batches
from sbp.training.data.loading import TrainSampler, ValidationSampler, make_loader, readable, spread_samples
from sbp.training.data.preprocessing import Normalize
from sbp.training.data.sources import build_datasets
from sbp.training.engine import setup
from sbp.training.engine.probes import gradient_cosines
from sbp.training.engine.trainer import Trainer
from sbp.training.models.build import build_model
from sbp.training.models.optim import build_criterion, build_ema, build_optimizer, build_scheduler
from sbp.training.runtime import distributed, wrapping
from sbp.training.tasks.accuracy import evaluate
from tests.training.again import Again
from tests.training.configs import BACKBONES, small

OVERRIDES = (
    "data=synthetic", "data.image_size=32", "data.num_classes=10", "data.val_images=101", "recipe.ema_decay=0.9",
    "sbp.mask=random", "sbp.shared_mask=true", "sbp.hold_mask=true", "backbone.drop_path=0",
    "recipe.layer_decay=0.7",
)  # fmt: skip
GLOBAL_BATCH, STEPS, CHECKPOINT = 24, 4, 2
CPU = torch.device("cpu")


def main(here: Path, elsewhere: Path) -> None:
    """Trains from the start, then on from checkpoints: those written here, and those of another number of processes.

    Saves what each process found to here/<rank>.pt: backbone -> way -> findings.
    """
    distributed.start()
    found: dict = {backbone: {} for backbone in BACKBONES}
    for backbone, ways in found.items():
        checkpoints = {kind: here / f"{backbone}-{kind}.pt" for kind in ("ddp", "fsdp")}
        for kind, path in checkpoints.items():
            ways[kind] = train(backbone, kind, write=path)
        ways["captured"] = train(backbone, "captured")
        for kind, path in (
            ("ddp", checkpoints["fsdp"]),
            ("fsdp", checkpoints["fsdp"]),
            ("fsdp", elsewhere / f"{backbone}-ddp.pt"),
        ):
            ways[f"{kind} after {path.parent.name}/{path.stem}"] = train(backbone, kind, read=path)
    torch.save(found, here / f"{distributed.rank()}.pt")
    every_process_has_a_share_and_skips_a_step_that_overflows_on_one()
    for kind in ("ddp", "fsdp"):
        for clip_grad in ("null", "1"):
            every_process_leaves_out_a_step_whose_gradient_is_not_finite_on_one(kind, clip_grad)
    distributed.stop()


def every_process_has_a_share_and_skips_a_step_that_overflows_on_one() -> None:
    config = small("parallel=fsdp", "amp=float16", "recipe.ema_decay=0.9", "recipe.clip_grad=1")
    trainer = setup.build_trainer(config, setup.load_images(config, CPU).order, CPU)
    averages = trainer.ema.module
    blocks = [type(module).__name__ for module in trainer.model.modules() if isinstance(module, FSDPModule)]
    assert blocks == ["FSDPVisionTransformer", "FSDPBlock", "FSDPSBPBlock"], blocks
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    infinite = torch.full_like(images, torch.inf) if distributed.rank() == 1 else images
    for step, (batch, scale) in enumerate([(images, 2.0**16), (infinite, 2.0**15), (images, 2.0**15)]):
        before = [p.full_tensor() for model in (trainer.model, averages) for p in model.parameters()]
        trainer.step(step, [(batch, labels)])
        assert all(isinstance(p, DTensor) for model in (trainer.model, averages) for p in model.parameters())
        after = [p.full_tensor() for model in (trainer.model, averages) for p in model.parameters()]
        assert trainer.scaler.get_scale() == scale
        assert all(map(torch.equal, before, after)) == (step == 1), step


def every_process_leaves_out_a_step_whose_gradient_is_not_finite_on_one(kind: str, clip_grad: str) -> None:
    config = small(f"parallel={kind}", "recipe.ema_decay=0.9", f"recipe.clip_grad={clip_grad}")
    trainer = setup.build_trainer(config, setup.load_images(config, CPU).order, CPU)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    infinite = torch.full_like(images, torch.inf) if distributed.rank() == 1 else images
    for step, batch in enumerate([images, infinite, images]):
        before = [whole(p) for model in (trainer.model, trainer.ema.module) for p in model.parameters()]
        trainer.backward(step, [(batch, labels)])
        norm = trainer.update(step).norm
        after = [whole(p) for model in (trainer.model, trainer.ema.module) for p in model.parameters()]
        assert all(map(torch.equal, before, after)) == (step == 1), (kind, step)
        assert (norm == norm and norm < torch.inf) == (step != 1), (kind, norm)
        norms = distributed.gathered(str(norm))
        assert len(set(norms)) == 1, f"{kind}: the norm is that of the whole gradient: {norms}"


def train(backbone: str, kind: str, *, write: Path | None = None, read: Path | None = None) -> dict:
    """All steps, with a checkpoint on the way; or those behind the checkpoint.

    Returns weights, averaged weights, the gradients of each step after clipping, gradient cosines at the end,
    and accuracies.
    """
    config = small(*OVERRIDES, backbone=backbone)
    trainer, plan = build(config, kind)
    first = 0
    if read is not None:
        trainer.load_state_dict(torch.load(read, weights_only=True))
        first = CHECKPOINT
    gradients = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append({name: whole(p.grad) for name, p in trainer.model.named_parameters()})
    )
    train_set, val_set = build_datasets(config.data, config.recipe)
    loader = partial(make_loader, seed=0, workers=0, device=CPU)
    order = TrainSampler(len(train_set), plan, 0, distributed.rank())
    order.start_at(0, first)
    micro_batches = map(readable, loader(train_set, order))
    for step in range(first, STEPS):
        if step == CHECKPOINT and write is not None:
            state = trainer.state_dict()
            if distributed.is_main():
                torch.save(state, write)
        trainer.step(step, islice(micro_batches, plan.accumulation))
    sampler = ValidationSampler(len(val_set), 10, distributed.rank(), distributed.world_size())
    cosines = gradient_cosines(trainer, *spread_samples(train_set, 6, 0), draw=STEPS, at_once=4)
    models = {"state_dict": trainer.model, "state_dict_ema": trainer.ema.module}
    return {
        **{
            f"accuracy of {name}": asdict(evaluate(model, loader(val_set, sampler), normalize=trainer.normalize))
            for name, model in models.items()
        },
        **{name: {key: whole(value) for key, value in model.state_dict().items()} for name, model in models.items()},
        "gradients": dict(enumerate(gradients, first)),
        "cosines": {name: torch.tensor(value, dtype=torch.float64) for name, value in cosines.items()},
    }


def build(config, kind: str) -> tuple:
    """One process takes the global batch at once; several take theirs in three micro batches each."""
    size = distributed.world_size()
    plan = plan_batches(GLOBAL_BATCH, GLOBAL_BATCH // (3 * size) if size > 1 else None, size)
    torch.manual_seed(0)
    model = build_model(config.backbone, config.sbp, config.data.num_classes, config.data.image_size).double()
    ema = build_ema(model, config.recipe)
    if kind == "fsdp":
        wrapping.shard(model, CPU, ema)
    optimizer = build_optimizer(model, config.recipe, 1e-2)
    recorder = partial(Again, list(model.parameters())) if kind == "captured" else None
    trainer = Trainer(
        model,
        optimizer,
        build_scheduler(optimizer, config.recipe, STEPS),
        build_criterion(config.recipe),
        normalize=Normalize(config.data, config.recipe).double(),
        ema=ema,
        clip_grad=0.1,
        accumulation=plan.accumulation,
        hold_mask=True,
        recorder=recorder,
    )
    return trainer, plan


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
