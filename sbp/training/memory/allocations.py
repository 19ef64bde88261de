"""What a step on fake tensors allocates and frees, as CUDA would.

Fake tensors have shapes and dtypes, but no memory. They are the CPU's, as autograd runs a backward pass on CUDA tensors
only where there is a CUDA device; where CUDA casts or allocates otherwise, this file says so (`CudaCasts`,
`_workspace`).
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

PARTS = ("weights", "gradients", "optimizer", "activations", "temporaries")
HOST = "host"  # what lies in the CPU's memory during a step on CUDA
_ROUNDING = 512  # bytes: CUDA's caching allocator rounds every allocation up to a multiple of this


class CudaCasts(TorchFunctionMode):
    """Within autocast, what CUDA computes in float32 and the CPU would not; and answers that no fake tensor has."""

    # These see their inputs as float32, so that autograd may save a copy ...
    float32_inputs: frozenset[Callable] = frozenset({
        F.layer_norm, F.group_norm, F.cosine_similarity, F.softplus, F.cross_entropy, F.nll_loss, F.kl_div,
        F.binary_cross_entropy_with_logits, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.interpolate,
        torch.layer_norm, torch.group_norm, torch.pow, Tensor.pow, Tensor.__pow__, torch.exp, Tensor.exp,
        torch.log, Tensor.log, torch.rsqrt, Tensor.rsqrt, torch.reciprocal, Tensor.reciprocal,
    })  # fmt: skip
    # ... and these read what they get and return float32.
    float32_result: frozenset[Callable] = frozenset({
        torch.sum, Tensor.sum, torch.norm, Tensor.norm, torch.linalg.vector_norm, torch.prod, Tensor.prod,
        torch.cumsum, Tensor.cumsum, F.log_softmax, torch.log_softmax, Tensor.log_softmax,
    })  # fmt: skip
    softmax: frozenset[Callable] = frozenset({F.softmax, torch.softmax, Tensor.softmax})

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.item:  # of the optimizer's step counter: any number will do
            return 1.0
        if func is F.scaled_dot_product_attention:  # CUDA's fused kernels save no mask, the CPU's takes no dropout
            kwargs = kwargs | {"dropout_p": 0.0}
        if torch.is_autocast_enabled("cpu"):
            if func in self.float32_inputs:
                args, kwargs = tree_map(_as_float32, (args, kwargs))
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **kwargs)
            if func in self.float32_result:
                kwargs = {"dtype": torch.float32} | kwargs
            if func in self.softmax:
                return _softmax(*args, **kwargs)
        return func(*args, **kwargs)


def _as_float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


def _softmax(x: Tensor, dim: int, *args: Any, **kwargs: Any) -> Tensor:
    """In float32; CUDA's kernel reads float16 itself and turns other dtypes into a copy."""
    return torch._softmax(x, dim, x.dtype == torch.float16) if x.dtype == torch.float16 else x.float().softmax(dim)


def _workspace(func: Any, args: tuple) -> int:
    """Bytes that CUDA's kernel for `func` allocates for itself, beside its results."""
    operator = func.overloadpacket
    if operator in (torch.ops.aten.native_layer_norm, torch.ops.aten.native_layer_norm_backward):
        tensors = (arg for arg in args[:2] if isinstance(arg, Tensor))  # it works on contiguous copies
        return sum(x.numel() * x.itemsize for x in tensors if not x.is_contiguous())
    if operator is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        batch, heads, tokens, channels = args[1].shape
        if args[1].dtype != torch.float32:  # flash attention sums the queries' gradient in float32
            return 4 * batch * heads * _round_up(tokens, 128) * _round_up(channels, 32)
    return 0


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class Allocations(TorchDispatchMode):
    """Writes down every storage that is allocated and freed inside, and what each one is for."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []  # of each storage
        self.events: list[tuple[int, int]] = []  # number of a storage; its bytes, negative when it is freed
        self._alive: dict[int, tuple[int, int, weakref.ref]] = {}  # by address

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.note(out)
        workspace = _workspace(func, args)
        if workspace:
            self._add(workspace)
            self._remove(len(self.kinds) - 1, workspace)
        return out

    def note(self, tensors: Any, kind: str | None = None) -> None:
        """Takes the storages of these tensors, in any container, as allocated; `kind` says what they are for."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address not in self._alive:
                number, size = self._add(storage.nbytes())
                freed = weakref.ref(storage, partial(self._freed, address))
                self._alive[address] = number, size, freed
            if kind is not None:
                self.kinds[self._alive[address][0]] = kind

    def rename_temporaries(self, kind: str) -> int:
        """What is alive and of no kind yet gets this one; returns its bytes."""
        found = [(number, size) for number, size, _ in self._alive.values() if self.kinds[number] == "temporaries"]
        for number, _ in found:
            self.kinds[number] = kind
        return sum(size for _, size in found)

    def peak(self, since: int = 0, until: int | None = None) -> dict[str, int]:
        """Bytes of each part when their sum was largest, from event number `since` on and before number `until`."""
        parts = dict.fromkeys((*PARTS, HOST), 0)
        largest, total, at_peak = 0, 0, dict(parts)
        for place, (number, size) in enumerate(self.events[:until]):
            kind = self.kinds[number]
            parts[kind] += size
            total += size if kind != HOST else 0
            if total > largest and place >= since:
                largest, at_peak = total, dict(parts)
        return {part: at_peak[part] for part in PARTS}

    def _freed(self, address: int, _: weakref.ref) -> None:
        number, size, _ = self._alive.pop(address)
        self._remove(number, size)

    def _add(self, size: int) -> tuple[int, int]:
        number, size = len(self.kinds), _round_up(size, _ROUNDING)
        self.kinds.append("temporaries")
        self.events.append((number, size))
        return number, size

    def _remove(self, number: int, size: int) -> None:
        self.events.append((number, -_round_up(size, _ROUNDING)))


@contextmanager
def fake_cuda(casts: CudaCasts) -> Iterator[Allocations]:
    """What is made inside is fake and written down."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # deepcopy, for the EMA
        with _FakeMode(), casts, Allocations() as allocations:
            try:
                yield allocations
            except DataDependentOutputException as error:
                raise ValueError(
                    "no forecast for this size of training images: it cuts mask blocks at the border, and how many "
                    "pixels are kept then differs from step to step; take a multiple of 32"
                ) from error


class _FakeMode(FakeTensorMode):
    """A deep copy of a fake tensor, such as the moving average's, belongs to the same mode."""

    def __deepcopy__(self, memo: dict) -> "_FakeMode":
        return self
