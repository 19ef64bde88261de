"""What a training step of each arm costs, all of them in turns on one machine."""

import gc
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from time import perf_counter, process_time

import torch
from torch import Tensor

from sbp.training.config.batches import plan_batches
from sbp.training.config.rules import SLOPE_IMAGES
from sbp.training.config.run import Config
from sbp.training.data.loading import TrainSampler
from sbp.training.engine import setup
from sbp.training.engine.probes import saved_bytes_per_image
from sbp.training.engine.trainer import Trainer
from sbp.training.runtime import distributed


def step_costs(
    configs: dict[str, Config], *, rounds: int, device: torch.device, stopping: Callable[[], bool] = lambda: False
) -> dict[str, dict[str, float]]:
    """For each arm {"step_ms", "memory", "peak_allocated"}.

    step_ms: median over the rounds, in each of which every arm takes one step on random images; on a CPU the time of
    this process alone, whose one thread may share the core with others. memory: bytes that are
    saved for the backward pass of one micro batch. peak_allocated: bytes on CUDA, of the arm by itself. {} when it was
    asked to stop before the end.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in configs}
    batches = {name: _batch(config) for name, config in configs.items()}
    for name, config in configs.items():
        trainer = _trainer(config, device)
        few = tuple(part[: SLOPE_IMAGES["classification"]] for part in batches[name][0])
        found[name]["memory"] = saved_bytes_per_image(trainer, *few) * len(batches[name][0][0])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            for step in range(3):
                trainer.step(step, batches[name])
            found[name]["peak_allocated"] = torch.cuda.max_memory_allocated(device)
        del trainer
        gc.collect()
    clock = perf_counter if device.type == "cuda" else process_time
    trainers = {name: _trainer(config, device) for name, config in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in configs}
    for step in range(rounds + 1):  # the first is for warming up
        if stopping():
            return {}
        for name, trainer in trainers.items():
            trainer.wait()
            begin = clock()
            trainer.step(step, batches[name])
            trainer.wait()
            times[name].append(1000 * (clock() - begin))
    for name, values in times.items():
        found[name]["step_ms"] = median(values[1:])
    return found


def _trainer(config: Config, device: torch.device) -> Trainer:
    config = replace(config, recipe=replace(config.recipe, warmup_steps=None))  # there may be fewer images here
    plan = plan_batches(config.global_batch_size, config.micro_batch_size, distributed.world_size())
    return setup.build_trainer(config, TrainSampler(config.data.train_images, plan, config.seed, 0), device)


def _batch(config: Config) -> list[tuple[Tensor, Tensor]]:
    """The micro batches of one step: uint8 images and labels, made from noise."""
    plan = plan_batches(config.global_batch_size, config.micro_batch_size, distributed.world_size())
    size = config.data.size_in_training
    generator = torch.Generator().manual_seed(0)

    def micro_batch() -> tuple[Tensor, Tensor]:
        shape = (plan.micro_batch_size, 3, size, size)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return images, torch.arange(plan.micro_batch_size) % config.data.num_classes

    return [micro_batch() for _ in range(plan.accumulation)]
