"""The method under DDP and FSDP: two gloo processes, started by torchrun on this file's `main`."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import sbp
from sbp.state import State, states
from sbp.training.runtime.compiling import blocks_of
from tests.conftest import (
    assert_same_gradients,
    gradients,
    images,
    small_beit,
    small_convnext,
    small_eva,
    small_hiera,
    small_swin,
    small_vit,
)

ROOT = Path(__file__).parents[1]


@pytest.mark.multiprocess
@pytest.mark.long
def test_two_processes():
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("all is well") == 2


def main() -> None:
    before = sbp.apply(small_vit())
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for make, size in ((small_vit, 32), (small_convnext, 64)):
        each_rank_draws_its_own_masks(make, size, rank, before)
        for recompute in ("none", "cheap", "block"):
            wrapped_models_give_the_gradients_of_one_process(make, size, rank, recompute)
        contexts_and_diagnostics_take_the_wrapped_model(make, size)
        cosines_of_a_sharded_model_are_those_of_one_process(make, size)
        wrapped_models_are_refused(make)
        sharded_models_are_not_taken_back(make)
    for make, size, grid in (
        (small_eva, 32, 4),
        (small_beit, 32, 4),
        (partial(small_swin, drop_path_rate=0), 64, 4),
        (partial(small_swin, drop_path_rate=0, strict_img_size=False), 72, 4),  # with padding
        (partial(small_hiera, drop_path_rate=0), 96, 3),
    ):
        for recompute in ("none", "cheap"):
            wrapped_models_give_the_gradients_of_one_process(make, size, rank, recompute, grid)
    print("all is well")
    dist.destroy_process_group()


def each_rank_draws_its_own_masks(make, size, rank, before):
    """before: a model that was patched when the process did not know its rank yet, as a LightningModule's is."""
    model = sbp.apply(make(), mask="random")
    assert [state.rank for one in (model, before) for state in states(one)] == [rank, rank]
    sbp.load_mask_state(model, sbp.mask_state(before))  # which is alike in all processes
    ddp = DistributedDataParallel(model)
    kept = []
    for _ in range(2):
        ddp(images(size)).sum().backward()
        state = next(m for m in model.modules() if hasattr(m, "sbp_state")).sbp_state
        kept.append(state.current.positions[-1].keep)
    gathered = [torch.empty_like(kept[1]) for _ in range(2)]
    dist.all_gather(gathered, kept[1])  # nothing was broadcast between the two passes
    assert not torch.equal(*gathered) and not torch.equal(*kept)


def wrapped_models_give_the_gradients_of_one_process(make, size, rank, recompute, grid=4):
    x = images(size, batch=4)
    mask = sbp.masks.random_mask(grid, grid, 0.5, torch.Generator().manual_seed(0))
    one = sbp.apply(make())

    def gradient(model, x):
        with sbp.fixed_mask(model, mask):
            model(x).square().mean().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).flatten() for g in grads])

    expected = gradient(one, x)
    for wrap in (DistributedDataParallel, sharded):
        model = wrap(sbp.apply(make(), recompute=recompute))
        torch.testing.assert_close(gradient(model, x[2 * rank : 2 * rank + 2]), expected, rtol=1e-10, atol=1e-10)


def sharded(model):
    """FSDP, block by block."""
    for layer in blocks_of(model):
        fully_shard(layer)
    return fully_shard(model)


def sharded_models_are_not_taken_back(make):
    model = sharded(sbp.apply(make()))
    with pytest.raises(ValueError, match="before the model is sharded"):
        sbp.remove(model)
    hooks = [getattr(hook, "__self__", None) for one in model.modules() for hook in one._forward_pre_hooks.values()]
    assert any(isinstance(one, State) for one in hooks)


def contexts_and_diagnostics_take_the_wrapped_model(make, size):
    model = DistributedDataParallel(sbp.apply(make()))
    plain = DistributedDataParallel(make())
    with sbp.disabled(model):
        assert_same_gradients(gradients(model, images(size)), gradients(plain, images(size)), tolerance=0)
    found = sbp.gradient_cosine(model, lambda: model(images(size)).square().sum())
    expected = sbp.gradient_cosine(model.module, lambda: model.module(images(size)).square().sum())
    assert found == expected and 0 < found.total < 1
    gradients(model, images(size))  # the reducer waits for nothing


def cosines_of_a_sharded_model_are_those_of_one_process(make, size):
    x = images(size)
    one, model = sbp.apply(make(), rank=0), sharded(sbp.apply(make(), rank=0))
    expected = sbp.gradient_cosine(one, lambda: one(x).square().sum())
    model(x).sum().backward()
    sbp.set_draw(model, 0)
    before = {name: (p.grad, p.grad.full_tensor().clone()) for name, p in model.named_parameters()}
    found = sbp.gradient_cosine(model, lambda: model(x).square().sum())
    assert found.per_layer == pytest.approx(expected.per_layer, abs=1e-10) and 0 < found.total < 1
    assert found.total == pytest.approx(expected.total, abs=1e-10)
    for name, p in model.named_parameters():
        grad, value = before[name]
        assert p.grad is grad and torch.equal(grad.full_tensor(), value), name


def wrapped_models_are_refused(make):
    for wrapped, name in ((DistributedDataParallel(make()), "DistributedDataParallel"), (fully_shard(make()), "FSDP")):
        with pytest.raises(ValueError, match=f"before the model is wrapped in {name}"):
            sbp.apply(wrapped)


if __name__ == "__main__":
    main()
