"""How far the SBP gradient is from the exact one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sbp.patch import disabled
from sbp.state import states

Gradient = dict[str, Tensor | None]  # by timm's own names; None where the loss does not depend on a parameter
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class GradientCosine:
    """How near one gradient is to another, such as that of SBP to the exact one.

    total: cosine similarity of all parameters together, in [-1, 1]. per_layer: of each block, downsampling layer and
    other part by itself. norm_ratio, norm_ratio_per_layer: the length of the one over that of the other.
    """

    total: float
    per_layer: dict[str, float]
    norm_ratio: float
    norm_ratio_per_layer: dict[str, float]


def gradient_cosine(model: nn.Module, compute_loss: Loss | Sequence[Loss]) -> GradientCosine:
    """Compares the gradient of `compute_loss()` with SBP to the one without, on the same random numbers.

    model: patched, in training mode, wrapped (DDP, FSDP2, torch.compile) or not. compute_loss: runs it and returns a
    scalar; or several that do, one after the other, of parts of a batch that does not fit at once: their gradients are
    added up (within `hold_mask` with one mask). Gradients, buffers, random number generators and the masks to come are
    left as they were.
    Under FSDP all processes have to call it, and gradients are averaged over them: with the same images, random
    numbers and masks (`load_mask_state` sets the rank that masks are drawn for) the cosine is that of one process.
    Raises ValueError when the model is not patched, not in training mode, or frozen.
    """
    own = states(model)
    if not model.training:
        raise ValueError("gradient_cosine needs training mode: in evaluation mode nothing is dropped")
    before = [(state.draw.clone(), state.current) for state in own]
    try:
        kept = gradient(model, compute_loss)
        with disabled(model):
            full = gradient(model, compute_loss)
    finally:
        for state, (draw, current) in zip(own, before, strict=True):
            state.set_draw(draw)
            state.current = current
    return compare_gradients(kept, full)


def gradient(model: nn.Module, compute_loss: Loss | Sequence[Loss]) -> Gradient:
    """The gradient of `compute_loss()`, a scalar that the model, patched or not, gives; or the sum of those of several.

    Gradients, buffers and random number generators are left as they were; masks are drawn. Raises ValueError when no
    parameter requires a gradient.
    """
    named = {name: p for name, p in _plain_names(model) if p.requires_grad}
    if not named:
        raise ValueError("there is no gradient to compare: no parameter of the model requires one")
    parameters, parts = list(named.values()), [compute_loss] if callable(compute_loss) else compute_loss
    with _undisturbed(model), torch.enable_grad():
        if any(isinstance(p, DTensor) for p in parameters):
            return dict(zip(named, _sharded_gradient(parts, parameters), strict=True))
        found: list[Tensor | None] = [None] * len(parameters)
        for part in parts:
            new = torch.autograd.grad(part(), parameters, allow_unused=True)
            found = [b if a is None else a if b is None else a + b for a, b in zip(found, new, strict=True)]
    return dict(zip(named, found, strict=True))


def compare_gradients(one: Gradient, other: Gradient) -> GradientCosine:
    """`one` as seen from `other`, two gradients of the same model, over the parameters for which both have one.

    Raises ValueError where these are none, or the names are not the same.
    """
    if one.keys() != other.keys():
        differing = ", ".join(sorted(one.keys() ^ other.keys()))
        raise ValueError(f"the gradients are not of the same model: only one of them has {differing}")
    products: dict[str, Tensor] = {}  # layer -> (one * other, one * one, other * other)
    for name, x in one.items():
        y = other[name]
        if x is None or y is None:
            continue
        a, b = _whole(x).double(), _whole(y).double()
        three = torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
        layer = _layer_of(name)
        products[layer] = products[layer] + three if layer in products else three
    if not products:
        raise ValueError("there is no gradient to compare: no parameter has one in both")
    table = torch.stack([*products.values(), torch.stack(list(products.values())).sum(0)])
    product, first, second = table.unbind(1)
    lengths = (first * second).sqrt()
    equal = (first == second).double()  # where there is no gradient: 1 when neither has one, else 0
    cosines = torch.where(lengths > 0, product / lengths, equal).tolist()
    ratios = torch.where(first == second, 1.0, (first / second).sqrt()).tolist()  # inf where the other has none
    return GradientCosine(
        cosines[-1],
        dict(zip(products, cosines, strict=False)),
        ratios[-1],
        dict(zip(products, ratios, strict=False)),
    )


def _sharded_gradient(parts: Sequence[Loss], parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """FSDP gives the gradients of its shares in `.grad` alone, which is put back."""
    before = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        for part in parts:
            part().backward()
        return [p.grad for p in parameters]
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad


def _whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def _plain_names(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """timm's own names, without what wrappers put in front of them; timm's `clean_state_dict` leaves that of a compiled
    block, which stands within a name.
    """
    for name, parameter in model.named_parameters():
        yield name.replace("_orig_mod.", "").removeprefix("module."), parameter


def _layer_of(name: str) -> str:
    """blocks.3.attn.qkv.weight -> blocks.3, stages.1.downsample.0.bias -> stages.1.downsample, head.bias -> head."""
    parts = name.split(".")
    last_number = max((i for i, part in enumerate(parts[:-1]) if part.isdigit()), default=0)
    if "downsample" in parts:
        last_number = parts.index("downsample")
    return ".".join(parts[: last_number + 1])


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, random numbers are drawn and buffers change; afterwards both are as before. DDP does not reduce."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
