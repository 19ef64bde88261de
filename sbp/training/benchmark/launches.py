"""Counts the kernels that a step launches on a GPU: with the profiler there, from the operators on a CPU.

A CPU that is slower at launching than the GPU is at computing makes a step as long as its launches take, so that fewer
operators on fewer images save memory, but no time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

NOTHING = {  # views, and memory that nobody fills
    "alias", "as_strided", "chunk", "detach", "diagonal", "expand", "expand_as", "lift", "lift_fresh", "movedim",
    "narrow", "permute", "reshape", "_reshape_alias", "select", "slice", "split", "split_with_sizes", "squeeze",
    "swapaxes", "t", "transpose", "unbind", "unfold", "unsafe_split", "unsafe_chunk", "unsqueeze", "view",
    "view_as", "_unsafe_view", "view_as_complex", "view_as_real",
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided",
    "is_nonzero", "set_", "resize_", "sym_size", "sym_numel", "sym_stride", "record_stream",
}  # fmt: skip
SEVERAL = {  # operator -> its kernels on CUDA, where it is not one
    "native_layer_norm_backward": 2,  # of the input; of weight and bias
    "native_group_norm_backward": 3,
    "native_batch_norm_backward": 2,
    "select_backward": 2,  # zeros, and a copy into them
    "slice_backward": 2,
    "nll_loss_backward": 2,  # the same
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,  # row sums, the gradients, and that of q converted
    "sort": 3,  # radix sort: positions, the sort, and its values gathered
    "argsort": 3,
    "topk": 2,
    "randperm": 4,  # keys, and a sort
    "cumsum": 2,
}
# A foreach operator's kernel takes so many tensors at most, and blocks of so many elements, as torch's
# MultiTensorApply.cuh has it for lists of pairs.
TENSORS, BLOCKS, CHUNK = 64, 320, 65536


def count(step: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Runs `step()`, which has to be warmed up, and returns the kernels in it: how many `launches`, and on CUDA the sum
    of their times, `kernel_ms`. There, those of a replayed graph count, too; copies and fills by the driver do not."""
    if device.type == "cuda":
        return _profiled(step, device)
    with _Operators() as operators:
        step()
    return {"launches": operators.launches}


class _Operators(TorchDispatchMode):
    """What a GPU would launch for the operators that run under it; compiled code does not run under a mode."""

    launches = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.launches += of_operator(operator._schema.name.partition("::")[2], args, result)
        return result


def of_operator(name: str, args: Any, result: Any) -> int:
    """The kernels that a GPU launches for one call of an operator of torch's `aten`."""
    if name in NOTHING:
        return 0
    if name.startswith("_foreach_"):
        return _foreach_launches(args[0])
    if name == "convolution_backward":  # one for each gradient: of the input, of the weight, of the bias
        return sum(isinstance(gradient, Tensor) for gradient in result)
    if name == "convolution":  # cuDNN leaves the bias to another kernel
        return 1 if args[2] is None else 2
    return SEVERAL.get(name, 1)


def _foreach_launches(tensors: list[Tensor]) -> int:
    launches = blocks = full = 0
    for one in tensors:
        full += 1
        for left in reversed(range(-(-one.numel() // CHUNK))):
            blocks += 1
            if blocks == BLOCKS or (full == TENSORS and not left):
                launches, blocks, full = launches + 1, 0, int(left > 0)
    return launches + (blocks > 0)


def _profiled(step: Callable[[], Any], device: torch.device) -> dict[str, float]:
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize(device)
    return sum_up(profiler.events())


def sum_up(events: Any) -> dict[str, float]:
    """The kernels among a profiler's events."""
    kernels = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        if not event.name.startswith(("Memcpy", "Memset"))
    ]
    return {"launches": len(kernels), "kernel_ms": sum(event.time_range.elapsed_us() for event in kernels) / 1000}
