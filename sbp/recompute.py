"""What is computed again in the backward pass instead of being saved for it.

    "none"   nothing
    "cheap"  norms and activation functions: a linear layer behind one saves what that one read. No matrix product
    "block"  whole blocks, through torch.utils.checkpoint; of an SBP block the kept part alone

Gradients stay the same: exact methods all of them, which go with SBP or without.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

Function = Callable[[Tensor], Tensor]


class Weights(NamedTuple):
    """Of a linear layer: weight (C', C) and bias in the dtype of matrix products, and what scales its output (C',),
    where that is not in them; folds: weight and bias may be scaled in place of the output."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    folds: bool = False


def weights(
    layer: Any, scale: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
) -> Weights:
    """Those of an nn.Linear or of a convolution that is one, with gradient, for all calls that share them.

    scale: (C',); it goes into the weight, but in float16, which has no room for 1e-6 of one: here, where autocast
    copies the weight anyway, else in each call, so that no copy is saved. weight, bias: (C', C) and (C',), in place of
    the layer's own. Raises ValueError for a layer that is not plain.
    """
    require_plain(layer)
    folds = _folds(scale)
    # What is folded is in full precision, whatever copy the layer itself may read; FSDP1's layers have views alone.
    full = folds and layer._parameters.get("weight") is not None
    own: Any = layer._parameters if full else {name: getattr(layer, name) for name in ("weight", "bias")}
    weight, bias = own["weight"].flatten(1) if weight is None else weight, own["bias"] if bias is None else bias
    if folds and scale is not None and (torch.compiler.is_compiling() or _lowered_dtype(weight) != weight.dtype):
        (weight, bias), scale, folds = _folded(weight, bias, scale), None, False
    return Weights(lowered(weight), None if bias is None else lowered(bias), scale, folds)


def is_plain(layer: Any) -> bool:
    """Whether weight and bias say all that a linear layer does: neither an adapter nor pruning adds to it."""
    own_forward = "forward" in layer.__dict__
    return type(layer) in (nn.Linear, nn.Conv2d) and not own_forward and not layer._forward_pre_hooks


def require_plain(*layers: Any) -> None:
    """Raises ValueError for a layer that is not plain."""
    for layer in layers:
        if not is_plain(layer):
            own = " with a forward or a forward pre-hook of its own" if type(layer) in (nn.Linear, nn.Conv2d) else ""
            raise ValueError(
                "mhsa_drop='head', dropped='input', SBP downsampling and convolutions read the weights of layers, and "
                f"a {type(layer).__name__}{own} may do more than these say: leave such layers as they are in timm, or "
                "take other settings"
            )


def linear(
    layer: Any,
    *before: Function,
    cheap: bool,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    reads: Sequence[Tensor] = (),
) -> Function:
    """The function x -> layer(before(x)) * scale on positions (B, n, C).

    layer: an nn.Linear, or a convolution that is one on positions (1 x 1); or the `weights` of one.
    before: modules or functions that cost no matrix product. reads: tensors they read that are no parameters of
    theirs. weight, bias, scale: as `weights` takes them; where it is folded, a scale costs no pass over the positions
    and saves no position. A layer that is not plain is called, so that an adapter, or what sets its weight, takes part.
    cheap: x is saved for the backward pass and before(x) computed again from it. torch.compile chooses by itself what
    to compute again, so there, and for layers that are called, this makes no difference.
    """
    if not isinstance(layer, (Weights, nn.Conv2d)) and not is_plain(layer):
        assert weight is None and bias is None
        return lambda x: scaled(layer(_chain(before, x)), scale)
    cheap = cheap and not torch.compiler.is_compiling()
    modules = [one for step in before if isinstance(step, nn.Module) for one in step.modules()] if cheap else []
    if any(getattr(one, "inplace", False) for one in modules):  # which would write over what is saved
        before = torch.clone, *before
    if type(layer) is nn.Linear and weight is None and bias is None and not cheap and not _folds(scale):
        return lambda x: scaled(layer(_chain(before, x)), scale)
    ready = layer if isinstance(layer, Weights) else weights(layer, scale, weight, bias)
    inside, outside = (ready.scale, None) if ready.folds else (None, ready.scale)
    if not cheap and inside is None:
        return lambda x: scaled(F.linear(_chain(before, x), ready.weight, ready.bias), outside)
    if not cheap:
        return lambda x: _Linear.apply(partial(_chain, ()), False, _chain(before, x), ready.weight, ready.bias, inside)
    reads = [*reads, *(p for module in modules for p in module.parameters(recurse=False))]
    random = any(one.training for one in modules) and draws_random(*modules)
    first = partial(_chain, before), random
    return lambda x: scaled(_Linear.apply(*first, x, ready.weight, ready.bias, inside, *reads), outside)


def stacked(*layers: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of linear layers that read the same, one above the other."""
    weight = torch.cat([layer.weight for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weight, None
    biases = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
    return weight, torch.cat(biases)


def block(run: Callable[..., Any], *inputs: Tensor | None, random: bool, once: Sequence[Tensor | None] = ()) -> Any:
    """run(*inputs, *once, again=False), of which only the inputs are saved; for the backward pass it runs again.

    Then with again=True, and None for each of `once`. What it returns does not matter then, so whatever needs no
    gradient can be left out. random: it draws random numbers, which are to be the same ones again.
    """
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": random}
    if torch.compiler.is_compiling():  # what nothing reads is left out by the compiler
        return checkpoint(partial(run, again=False), *inputs, *once, **how)
    recomputing, left = _Recomputing(), [*once]
    none = [None] * len(left)

    def run_now(*inputs: Tensor | None) -> Any:
        rest = none if recomputing.now else [left.pop(0) for _ in none]  # kept by nothing here from then on
        return run(*inputs, *rest, again=recomputing.now)

    how["context_fn"] = lambda: (nullcontext(), recomputing)  # of the forward pass, and of running again
    return checkpoint(run_now, *inputs, **how)


class _Recomputing:
    """A context within which `now` is true."""

    now = False

    def __enter__(self) -> None:
        self.now = True

    def __exit__(self, *_: object) -> None:
        self.now = False


def draws_random(*modules: nn.Module) -> bool:
    """Whether any of the modules, or of those within, draws random numbers in training, drop paths aside: dropout of
    any kind, and perhaps whatever is of another library.
    """
    return any(map(_may_draw, (one for module in modules for one in module.modules())))


def _may_draw(one: nn.Module) -> bool:
    if isinstance(one, _DropoutNd):
        return one.p > 0
    return isinstance(one, nn.RReLU) or not type(one).__module__.startswith(("torch.", "timm.", "sbp."))


def lowered(x: Tensor) -> Tensor:
    """x in the dtype that autocast gives to matrix products, if it is on: what a layer behind would save of it."""
    return x.to(_lowered_dtype(x))


def _lowered_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    lowers = device != "meta" and torch.is_autocast_enabled(device)  # which raises there
    return torch.get_autocast_dtype(device) if lowers else x.dtype


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def _folds(scale: Tensor | None) -> bool:
    return scale is not None and lowered(scale).dtype != torch.float16


def _chain(steps: Sequence[Function], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _folded(weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer whose output is scaled."""
    if scale is None:
        return weight, bias
    return (weight * scale[:, None]).to(weight.dtype), None if bias is None else (bias * scale).to(weight.dtype)


class _Linear(torch.autograd.Function):
    """F.linear(before(x), weight, bias) * scale, which saves x and parameters alone."""

    @staticmethod
    def forward(
        ctx: Any,
        before: Function,
        random: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        *reads: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, None if scale is None else bias, scale, *reads)
        ctx.before = before
        ctx.replay = _replay(x) if random else nullcontext
        ctx.autocast = _autocast_of(x.device.type)
        return F.linear(before(x.detach()).to(weight.dtype), *_folded(weight, bias, scale))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, _, needs_x, needs_weight, needs_bias, needs_scale, *needs_reads = ctx.needs_input_grad
        x, weight, bias, scale, *reads = ctx.saved_tensors
        with torch.enable_grad(), ctx.autocast(), ctx.replay():
            x = x.detach().requires_grad_(needs_x)
            result = ctx.before(x.view_as(x))  # FlopCounterMode puts hooks on modules, which cannot take a leaf here
        flat, products, sums, grad_scale = grad.flatten(0, -2), None, None, None
        if needs_weight or needs_scale:
            products = flat.t() @ result.detach().to(weight.dtype).flatten(0, -2)
        if needs_bias or (needs_scale and bias is not None):
            sums = flat.sum(0)
        if needs_scale:
            assert products is not None
            grad_scale = (products * weight).sum(1) + (0 if bias is None else sums * bias)
        if scale is not None:
            products = None if products is None else products * scale[:, None]
            sums = None if sums is None else sums * scale
        sources = [x, *reads]
        wanted = [tensor for tensor, needed in zip(sources, [needs_x, *needs_reads], strict=True) if needed]
        back = (grad @ _folded(weight, None, scale)[0]).to(result.dtype) if wanted else None
        found = iter(torch.autograd.grad(result, wanted, back) if wanted else ())
        grads = [next(found) if needed else None for needed in (needs_x, *needs_reads)]
        of_weights = products if needs_weight else None, sums if needs_bias else None, grad_scale
        return None, None, grads[0], *of_weights, *grads[1:]


def _autocast_of(device: str) -> Callable[[], Any]:
    """A context with the autocast of now."""
    if device == "meta":
        return nullcontext
    settings = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
    return partial(torch.autocast, device, **settings, cache_enabled=False)  # type: ignore[arg-type]


def _replay(x: Tensor) -> Callable[[], Any]:
    """A context in which the random numbers of now are drawn again."""
    cpu, (devices, states) = torch.get_rng_state(), get_device_states(x)

    @contextmanager
    def replayed() -> Iterator[None]:
        with torch.random.fork_rng(devices):
            torch.set_rng_state(cpu)
            set_device_states(devices, states)
            yield

    return replayed
