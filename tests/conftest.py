"""Small float64 models and the comparisons that most tests of the method need."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

torch.set_num_threads(1)


def small_vit(**kwargs) -> nn.Module:
    """Six blocks of 24 channels on a 4 x 4 grid of tokens."""
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 3, "num_classes": 5} | kwargs
    model = timm.create_model(kwargs.pop("name", "vit_tiny_patch16_224"), **kwargs).double().train()
    return randomise(model)


def small_convnext(randomised: bool = True, **kwargs) -> nn.Module:
    """Depths 2, 1, 3, 1 with 8 to 32 channels."""
    torch.manual_seed(0)
    kwargs = {"depths": (2, 1, 3, 1), "dims": (8, 12, 16, 32), "num_classes": 5} | kwargs
    model = timm.create_model(kwargs.pop("name", "convnext_tiny"), **kwargs).double().train()
    return randomise(model) if randomised else model


def fake_model(make: Callable[[], nn.Module]) -> tuple[nn.Module, FakeTensorMode]:
    """A model of fake tensors, and the mode in which they compute nothing and fail where a value is asked for."""
    with torch.device("meta"):
        model = make()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return model._apply(lambda p: torch.empty(p.shape, dtype=p.dtype)), mode


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter away from zero and one, so that no gradient vanishes by initialisation."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def images(height: int = 32, width: int | None = None, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width or height, generator=generator, dtype=torch.float64)


def gradients(model: nn.Module, x: Tensor, seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a forward pass and the gradient of every parameter and of the input ("input")."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)  # drop path, dropout
    out = model(x)
    outs = out if isinstance(out, (list, tuple)) else [out]
    weights = [torch.linspace(-1, 2, one.numel(), dtype=one.dtype).view_as(one) for one in outs]
    loss = sum((one * weight).sum() for one, weight in zip(outs, weights, strict=True))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found | {"input": x.grad}


def assert_same_gradients(a: tuple, b: tuple, tolerance: float = 1e-10) -> None:
    """Compares two results of `gradients`, relative to each one's largest entry; a missing one counts as zero."""
    floor = 1e-5 * max(float(one.abs().max()) for one in b[1].values())  # some are zero but for rounding
    torch.testing.assert_close(a[0], b[0], rtol=tolerance, atol=tolerance)
    for name in a[1].keys() | b[1].keys():
        one, other = a[1].get(name), b[1].get(name)
        one = torch.zeros_like(other) if one is None else one
        other = torch.zeros_like(one) if other is None else other
        scale = max(float(other.abs().max()), floor)
        torch.testing.assert_close(
            one / scale, other / scale, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
