"""A model on several processes: each has a copy of it (DDP), or a share of each of its parameters (FSDP).

A sharded model's parameters are DTensors. What is saved is whole, and whatever is loaded is whole: checkpoints do
not depend on how many processes wrote them, nor how.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sbp.training.runtime import distributed

_BUCKET = 2**23  # numbers that are averaged at once


def wrap(model: nn.Module) -> nn.Module:
    """The model under DDP when there are several processes; itself when there is one, or when it is sharded."""
    if not dist.is_initialized() or is_sharded(model):
        return model
    device = next(model.parameters()).device
    # Said of depthwise weights, whose gradient may come with other strides: a copy of a few kilobytes.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def same_everywhere(model: nn.Module) -> nn.Module:
    """The model, given the main process's weights and buffers, for `average_gradients` in place of DDP."""
    with torch.no_grad():
        distributed.broadcast([*model.parameters(), *model.buffers()])
    return model


def average_gradients(model: nn.Module) -> None:
    """The mean over the processes of each gradient, in place; which parameters have one is the same in all of them."""
    if distributed.world_size() == 1:
        return
    waiting: list[Tensor] = []
    size = 0
    for gradient in [*(p.grad for p in model.parameters() if p.grad is not None), None]:
        if waiting and (gradient is None or size + gradient.numel() > _BUCKET or gradient.dtype != waiting[0].dtype):
            flat = torch.cat([one.flatten() for one in waiting]).div_(distributed.world_size())
            dist.all_reduce(flat)
            parts = flat.split([one.numel() for one in waiting])
            torch._foreach_copy_(waiting, [part.view_as(one) for part, one in zip(parts, waiting, strict=True)])
            waiting, size = [], 0
        if gradient is not None:
            waiting.append(gradient)
            size += gradient.numel()


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch norms over all processes, where there are several on CUDA; else as it is.

    Names and parameters stay, and SBP layers too. Call it before DDP or FSDP.
    """
    if distributed.world_size() == 1 or device.type != "cuda":
        return model
    return convert_sync_batchnorm(model)  # timm's: torch's own leaves out the activation of timm's batch norms


def require_processes() -> None:
    """Raises ValueError where there is nobody to share a model with."""
    if not dist.is_initialized():
        raise ValueError("parallel=fsdp shares a model among processes: start it with torchrun --nproc_per_node=N")


def shard(model: nn.Module, device: Any, ema: ModelEmaV3 | None = None) -> None:
    """Leaves each process its share of the model's parameters, and of their moving average, on `device`. In place.

    Block by block, the children of what timm calls `blocks`: so much of the model is whole at a time. Every process
    must hold the same model, patched if at all and not compiled; from the CPU it never lies on the device as a whole.
    Call it before the optimizer is built. Raises ValueError without torchrun.
    """
    require_processes()
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for module in [model] if ema is None else [model, ema.module]:
        containers = [one for name, one in module.named_modules() if name.split(".")[-1] == "blocks"]
        for block in [block for container in reversed(containers) for block in container.children()]:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh, reshard_after_forward=True)  # outside a pass, parameters are always shares
        module.register_load_state_dict_pre_hook(_take_shares)
    if ema is not None:
        ema.foreach = False  # which takes no buffers, as they are whole, together with shares


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def no_sync(wrapped: nn.Module) -> Iterator[None]:
    """Backward passes inside add to each process's own gradients, kept whole; the first one outside averages all."""
    if isinstance(wrapped, DistributedDataParallel):
        with wrapped.no_sync():
            yield
    elif isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            wrapped.set_requires_gradient_sync(True)
    else:
        yield


def whole(state: Any) -> Any:
    """A state dict whose shares are put together, on the CPU of the main process; None in their place on others.

    All processes have to call it.
    """
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if distributed.is_main() else None
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state


def number(value: Tensor) -> float:
    """A tensor of one number, which each process may hold a part of. All processes have to call it."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads the state dict of an optimizer, as a whole one on the CPU, whatever its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shares = {
        index: {name: _share(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    # How a step is computed is this process's own matter: a checkpoint may be another device's.
    how = ("fused", "foreach", "capturable")
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
    groups = [stored | {key: own[key] for key in how if key in own} for stored, own in pairs]
    optimizer.load_state_dict(state | {"state": shares, "param_groups": groups})


def _share(value: Any, parameter: Tensor) -> Any:
    """This process's share of a whole tensor that has the shape of a sharded parameter; other values as they are."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).clone()


def _take_shares(model: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Before a sharded model loads a whole state dict."""
    for name, parameter in model.named_parameters():
        if name in state:
            state[name] = _share(state[name], parameter)
