"""The kernels that CUDA runs for each operator: their operations and their bytes.

What runs within a `Recorder` is written down as kernels, with floating-point operations (a multiplication with addition
is 2), the bytes they read once and write once, and a kind, whose efficiency `roofline.py` knows.
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sbp.training.benchmark import launches

_CPU = torch.device("cpu")

PASSES = ("forward", "backward")
ONCE = ("clipping", "optimizer", "average")  # a step, however many micro batches it has

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
NORMS = {"native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"}
SUMS = {
    "sum", "mean", "amax", "amin", "max", "min", "norm", "linalg_vector_norm", "prod", "var_mean", "any", "all",
    "_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "cumsum", "argmax",
}  # fmt: skip
MOVES = {  # positions to other places
    "cat", "stack", "gather", "index_select", "index", "index_copy", "index_copy_", "index_add", "index_add_",
    "scatter", "scatter_", "scatter_add", "scatter_add_", "index_put", "index_put_", "_index_put_impl_",
    "embedding", "flip", "roll", "constant_pad_nd", "repeat", "upsample_nearest2d", "upsample_bicubic2d",
}  # fmt: skip
_WRITES_SOURCE = {"index_copy_", "index_add_", "scatter_", "scatter_add_", "index_put_", "_index_put_impl_"}
_SILENT = {"device", "_record_function_enter_new", "_record_function_exit", "_local_scalar_dense", "item"}


@dataclass(frozen=True)
class Kernel:
    """One call's kernel or kernels; or those of `count` calls alike, whose other figures are one's.

    flops, read, written: of the call, the last two in bytes; launches: its kernels. rows: how many numbers a sum adds
    up for each of its results, the columns; or of a norm, how many vectors of how many numbers. cast: of a weight to
    autocast's precision, or of its gradient back. shapes: of the inputs. inputs, outputs: numbers of storages, and the
    bytes of them that are read or written.
    """

    name: str
    kind: str
    part: str
    flops: float
    read: float
    written: float
    launches: int = 1
    rows: float = 0
    columns: float = 0
    cast: bool = False
    count: int = 1
    shapes: tuple[tuple[int, ...], ...] = ()
    inputs: tuple[tuple[int, float], ...] = ()
    outputs: tuple[tuple[int, float], ...] = ()

    @property
    def bytes(self) -> float:
        return self.read + self.written


class Recorder(TorchDispatchMode):
    """Writes down the kernels of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "setup"
        self.kernels: list[Kernel] = []
        self.weights: set[tuple[int, ...]] = set()
        self._numbers: dict[int, tuple[int, weakref.ref]] = {}
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked for ten times as often as all else
            return _CPU
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if self.part not in (*PASSES, *ONCE) or name in launches.NOTHING or name in _SILENT:
            return out
        if self.part == "optimizer" and name in ("zeros", "zeros_like"):  # makes the optimizer's state, once a run
            return out
        self.kernels += self._kernels(name, args, out)
        return out

    def _kernels(self, name: str, args: tuple, out: Any) -> Iterator[Kernel]:
        inputs, outputs = _tensors(args), _tensors(out)
        make = partial(self._kernel, name, inputs, outputs)
        count = launches.of_operator(name, args, out)
        if name == "convolution":
            x, weight, bias = args[:3]
            yield make(kind=_conv_kind(weight, args[8]), flops=_conv_flops(out, weight), inputs=[x, weight])
            if bias is not None:
                yield make(name="add_", kind="broadcast", inputs=[out, bias])
        elif name == "convolution_backward":
            gradient, x, weight = args[:3]
            kind = f"{_conv_kind(weight, args[9])}_backward"
            flops = _conv_flops(gradient, weight)
            if out[0] is not None:
                yield make(kind=kind, flops=flops, inputs=[gradient, weight], outputs=[out[0]])
            if out[1] is not None:
                yield make(kind=kind, flops=flops, inputs=[gradient, x], outputs=[out[1]])
            if out[2] is not None:
                rows, columns = gradient.numel() / gradient.shape[1], gradient.shape[1]
                yield make(name="sum", kind="sum", inputs=[gradient], outputs=[out[2]], rows=rows, columns=columns)
        elif name.startswith("_scaled_dot_product"):
            yield make(launches=count, **_attention(name, args, out))
        elif name in PRODUCTS:
            left, right = (args[1], args[2]) if "add" in name else (args[0], args[1])
            yield make(kind="product", flops=2 * left.numel() * right.shape[-1])
        elif name == "native_layer_norm_backward":
            gradient, x = args[0], args[1]
            yield from self._contiguous(gradient, x)
            if out[0] is not None:
                yield make(kind="norm_backward", inputs=[gradient, x], outputs=[out[0]])
            if out[1] is not None:
                rows, columns = x.numel() / out[1].numel(), out[1].numel()
                yield make(
                    kind="norm_weights", inputs=[gradient, x], outputs=[out[1], out[2]], rows=rows, columns=columns
                )
        elif name == "native_layer_norm":
            yield from self._contiguous(args[0])
            rows = out[1].numel()
            yield make(kind="norm", rows=rows, columns=out[0].numel() / max(rows, 1))
        elif name in NORMS or name.endswith(("_norm_backward", "_norm_legit_functional")):
            yield make(kind="norm" if name in NORMS else "norm_backward", launches=count)
        elif name in SUMS:
            columns = outputs[0].numel()
            yield make(kind="sum", rows=inputs[0].numel() / max(columns, 1), columns=columns)
        elif name in MOVES:
            kind = "cat" if name in ("cat", "stack") else "move"
            written = inputs[-1:] if name in _WRITES_SOURCE else outputs
            read = [*outputs, *inputs[1:]] if name in ("gather", "index_select", "index") else inputs
            read = inputs[1:] if name in _WRITES_SOURCE else read
            yield make(kind=kind, inputs=read, outputs=written, launches=count)
        elif self.part == "optimizer" and name.startswith(("_foreach", "_fused")):
            fused = name.startswith("_fused")  # reads weights, gradients and two averages; writes all but gradients
            inputs = _tensors(args[:4]) if fused else inputs
            written = _tensors((args[0], *args[2:4])) if fused else outputs or inputs
            count = launches.of_operator("_foreach_", args, out)
            yield make(kind="optimizer", inputs=inputs, outputs=written, launches=count)
        else:
            yield from self._elementwise(name, args, inputs, outputs, count)

    def _contiguous(self, *tensors: Tensor) -> Iterator[Kernel]:
        """CUDA's layer norm works on copies of what is not contiguous."""
        for one in tensors:
            if not one.is_contiguous():
                yield self._kernel("copy_", [one], [one], kind="permuted")

    def _elementwise(
        self, name: str, args: tuple, inputs: Sequence[Tensor], outputs: Sequence[Tensor], count: int
    ) -> Iterator[Kernel]:
        if name in ("copy_", "fill_", "zero_", "bernoulli_", "uniform_", "normal_", "random_"):
            inputs = inputs[1:]  # the first one is only written
        if name.startswith(("zeros", "ones", "full", "new_zeros", "new_ones", "rand", "arange")):
            inputs = []
        if name.endswith("_like"):
            inputs = []
        kind = "optimizer" if self.part in ONCE else _layout([*inputs, *outputs])
        cast = name == "_to_copy" and tuple(inputs[0].shape) in self.weights and inputs[0].dtype != outputs[0].dtype
        yield self._kernel(name, inputs, outputs, kind=kind, launches=count, cast=cast)

    def _kernel(
        self,
        called: str,
        all_inputs: Sequence[Tensor],
        all_outputs: Sequence[Tensor],
        *,
        kind: str,
        name: str | None = None,
        flops: float = 0,
        inputs: Sequence[Tensor] | None = None,
        outputs: Sequence[Tensor] | None = None,
        launches: int = 1,
        rows: float = 0,
        columns: float = 0,
        cast: bool = False,
    ) -> Kernel:
        read = [(self._number(one), _bytes(one)) for one in (all_inputs if inputs is None else inputs)]
        written = [(self._number(one), _bytes(one)) for one in (all_outputs if outputs is None else outputs)]
        return Kernel(
            name or called,
            kind,
            self.part,
            float(flops),
            sum(size for _, size in read),
            sum(size for _, size in written),
            launches,
            rows,
            columns,
            cast,
            shapes=tuple(tuple(one.shape) for one in (all_inputs if name is None else inputs or ())[:3]),
            inputs=tuple(read),
            outputs=tuple(written),
        )

    def _number(self, tensor: Tensor) -> int:
        """The same for all tensors that share their memory."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._numbers:
            self._count += 1
            self._numbers[address] = self._count, weakref.ref(storage, lambda _: self._numbers.pop(address, None))
        return self._numbers[address][0]


def _attention(name: str, args: tuple, out: Any) -> dict[str, Any]:
    """Two products of queries with keys, and with values, in the forward pass; five in the backward pass."""
    if "backward" in name:
        gradient, q, k, v, result = args[:5]
        products = 2 * q.numel() * k.shape[-2]
        gradients = _tensors(out)[:3]
        tensors = {"inputs": [gradient, q, k, v, result], "outputs": gradients}
        return {"kind": "attention_backward", "flops": 5 * products, **tensors}
    q, k, v = args[:3]
    return {
        "kind": "attention",
        "flops": 4 * q.numel() * k.shape[-2],
        "inputs": [q, k, v],
        "outputs": _tensors(out)[:1],
    }


def _conv_flops(out: Tensor, weight: Tensor) -> float:
    """Of the forward pass, and of each of the two gradients. out: of the forward pass's result, or its gradient.

    A depthwise kernel works on tiles with their borders, which on small maps count for more.
    """
    flops = 2 * out.numel() * math.prod(weight.shape[1:])
    return flops * (1 + (weight.shape[-1] + 1) / 2 / out.shape[-1]) if weight.shape[1] == 1 else flops


def _conv_kind(weight: Tensor, groups: int) -> str:
    """stem: of images, whose few channels leave tensor cores idle."""
    return "depthwise" if groups > 1 else "stem" if weight.shape[1] < 8 else "convolution"


def _layout(tensors: Sequence[Tensor]) -> str:
    """elementwise: all in one order; permuted: in several ones; broadcast: some are smaller."""
    whole = [one for one in tensors if one.numel() > 1]
    if not whole:
        return "elementwise"
    shape = max(whole, key=lambda one: one.numel()).shape
    if any(one.shape != shape or 0 in one.stride() for one in whole):
        return "broadcast"
    strides = {_strides(one) for one in whole}
    return "elementwise" if len(strides) == 1 else "permuted"


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Of the dimensions that are larger than 1."""
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def _tensors(values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


def _bytes(tensor: Tensor) -> float:
    """Bytes of memory that the tensor's elements lie in: an expanded one is smaller than its shape."""
    apart = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return float(math.prod(apart) * tensor.itemsize)
