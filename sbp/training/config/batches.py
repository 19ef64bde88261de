"""How the images of a step are spread, and what follows from their number."""

from dataclasses import dataclass

from sbp.training.config.recipe import RecipeConfig
from sbp.training.config.run import Config

AUTO = "auto"  # as micro_batch_size: what the plan says


@dataclass(frozen=True)
class BatchPlan:
    """How the images of one optimizer step are spread over processes and forward passes."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    accumulation: int


def plan_batches(global_batch_size: int, micro_batch_size: int | str | None, world_size: int) -> BatchPlan:
    """Derives the number of accumulated forward passes.

    Raises ValueError unless global = processes x micro x accumulation can hold exactly.
    """
    if isinstance(micro_batch_size, str):
        raise ValueError(
            f"micro_batch_size={micro_batch_size} is for `sbp train` alone; here it must be a number or null"
        )
    if micro_batch_size is None:
        if global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size={global_batch_size} cannot be spread evenly over {world_size} processes; "
                f"take a multiple of {world_size}"
            )
        micro_batch_size = global_batch_size // world_size
    at_once = micro_batch_size * world_size
    if global_batch_size % at_once:
        raise ValueError(
            f"global_batch_size={global_batch_size} cannot be reached: {world_size} processes with "
            f"micro_batch_size={micro_batch_size} take {at_once} images at once, and accumulation must be whole; "
            f"take a multiple of {at_once}, or another micro_batch_size"
        )
    return BatchPlan(global_batch_size, micro_batch_size, world_size, global_batch_size // at_once)


def evaluation_batch(config: Config, micro_batch_size: int | None = None) -> int:
    """Images in one pass of an evaluation. micro_batch_size: of training, where it is not the config's.

    Where neither is known, on how many processes a run was trained is not either: 256 at the most.
    """
    own = None if config.micro_batch_size == AUTO else config.micro_batch_size
    in_training = micro_batch_size or own or min(config.global_batch_size, 256)
    return config.eval_batch_size or (1 if config.task == "detection" else in_training)


def scaled_lr(recipe: RecipeConfig, global_batch_size: int) -> float:
    """The peak learning rate for this global batch: linear in it, or absolute without lr_base_batch_size."""
    if recipe.lr_base_batch_size is None:
        return recipe.lr
    return recipe.lr * global_batch_size / recipe.lr_base_batch_size
