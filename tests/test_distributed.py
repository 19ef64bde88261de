"""The method under DDP and FSDP: two gloo processes, started by torchrun on this file's `main`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sbp
from tests.conftest import assert_same_gradients, gradients, images, small_convnext, small_vit

ROOT = Path(__file__).parents[1]


@pytest.mark.multiprocess
def test_two_processes():
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("all is well") == 2


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for make, size in ((small_vit, 32), (small_convnext, 64)):
        each_rank_draws_its_own_masks(make, size, rank)
        ddp_gives_the_gradients_of_one_process(make, size, rank)
        contexts_and_diagnostics_take_the_wrapped_model(make, size)
        wrapped_models_are_refused(make)
    print("all is well")
    dist.destroy_process_group()


def each_rank_draws_its_own_masks(make, size, rank):
    model = sbp.apply(make(), mask="random")
    assert sbp.mask_state(model)["rank"] == rank
    ddp = DistributedDataParallel(model)
    kept = []
    for _ in range(2):
        ddp(images(size)).sum().backward()
        state = next(m for m in model.modules() if hasattr(m, "sbp_state")).sbp_state
        kept.append(state.current.positions[-1].keep)
    gathered = [torch.empty_like(kept[1]) for _ in range(2)]
    dist.all_gather(gathered, kept[1])  # nothing was broadcast between the two passes
    assert not torch.equal(*gathered) and not torch.equal(*kept)


def ddp_gives_the_gradients_of_one_process(make, size, rank):
    x = images(size, batch=4)
    mask = sbp.masks.random_mask(4, 4, 0.5, torch.Generator().manual_seed(0))
    one, two = sbp.apply(make()), DistributedDataParallel(sbp.apply(make()))

    def gradient(model, x):
        model.zero_grad()
        with sbp.fixed_mask(model, mask):
            model(x).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(gradient(two, x[2 * rank : 2 * rank + 2]), gradient(one, x), rtol=1e-11, atol=1e-11)


def contexts_and_diagnostics_take_the_wrapped_model(make, size):
    model = DistributedDataParallel(sbp.apply(make()))
    plain = DistributedDataParallel(make())
    with sbp.disabled(model):
        assert_same_gradients(gradients(model, images(size)), gradients(plain, images(size)), tolerance=0)
    found = sbp.gradient_cosine(model, lambda: model(images(size)).square().sum())
    expected = sbp.gradient_cosine(model.module, lambda: model.module(images(size)).square().sum())
    assert found == expected and 0 < found.total < 1
    gradients(model, images(size))  # the reducer waits for nothing


def wrapped_models_are_refused(make):
    for wrapped, name in ((DistributedDataParallel(make()), "DistributedDataParallel"), (fully_shard(make()), "FSDP")):
        with pytest.raises(ValueError, match=f"before the model is wrapped in {name}"):
            sbp.apply(wrapped)


if __name__ == "__main__":
    main()
