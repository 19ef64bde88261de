"""Counts what autograd keeps for the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(compute_loss: Callable[[], Any]) -> int:
    """Bytes that autograd saves for the backward pass of `compute_loss()`, without parameters.

    Each storage counts once and whole, as a view keeps all of it in memory. A parameter without its gradient is told
    from other tensors where it is saved with its gradient, too. Lower-precision copies that autocast makes of the
    weights count: take the difference between two batch sizes for bytes per image.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    parameters: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # holding it keeps its address from being used again
        if isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            parameters.add(storage._cdata)
        return tensor.detach()  # with its history, which leads here again, all of the graph would live on

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute_loss()
    total = sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)
    del result  # the graph had to live until everything was counted
    return total
