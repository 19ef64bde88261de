"""Three accumulated steps in float64 and an evaluation on 101 images; saves weights and accuracy to <target>.<rank>.

Started by `test_processes.py` with and without torchrun. keep_ratio 1, as each process draws its own masks.
"""

import copy
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
from sbp.training.optim import build_criterion, build_optimizer, build_scheduler
from tests.training.configs import small

OVERRIDES = ("data=synthetic", "data.image_size=32", "data.num_classes=10", "data.val_images=101", "data.workers=0")


def main(target: str) -> None:
    distributed.start()
    rank, size = distributed.rank(), distributed.world_size()
    config = small(*OVERRIDES, "sbp.keep_ratio=1", "backbone.drop_path=0", "recipe.optimizer=sgd")
    torch.manual_seed(rank)  # DDP must give every process the weights of the first
    model = build_model(config.backbone, config.sbp, config.data.num_classes, config.data.image_size).double()
    optimizer = build_optimizer(model, config.recipe, 0.1)
    plan = plan_batches(24, 4, size)
    trainer = Trainer(
        model,
        optimizer,
        build_scheduler(optimizer, config.recipe, 3),
        build_criterion(config.recipe),
        clip_grad=0.1,
        accumulation=plan.accumulation,
    )
    train_set, val_set = build_datasets(config.data, config.recipe)
    loader = partial(make_loader, seed=0, workers=0, device=torch.device("cpu"))
    micro_batches = map(readable, loader(train_set, TrainSampler(len(train_set), plan, 0, rank)))
    for step in range(3):
        trainer.step(step, ((x.double(), y) for x, y in islice(micro_batches, plan.accumulation)))
    validation = loader(val_set, ValidationSampler(len(val_set), 16, rank, size))
    accuracy = evaluate(copy.deepcopy(model).float(), validation)
    torch.save({"weights": model.state_dict(), "accuracy": asdict(accuracy)}, f"{target}.{rank}")
    distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1])
