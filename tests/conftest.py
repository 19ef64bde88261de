"""Small float64 models and the comparisons that most tests of the method need; and what a GPU machine may lack.

Tests marked gpu run on the CPU in the default suite, and with `-m gpu` on CUDA where there is one; see `device`.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import product

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sbp
from sbp.masks import Positions

torch.set_num_threads(1)

# -- the device, and a machine that has torch, torchvision, timm and pytest alone

OPTIONAL = ("hydra", "omegaconf", "wandb", "pycocotools", "matplotlib", "sklearn", "scipy", "pandas", "datasets")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "of pytest-timeout, which is not installed: tests take as long as they take")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which is not installed")


def pytest_pycollect_makemodule(module_path, parent) -> pytest.Module:
    return _Module.from_parent(parent, path=module_path)


class _Module(pytest.Module):
    """A file of tests, skipped where one of `OPTIONAL` that it imports is not installed."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            missing = (getattr(error.__cause__, "name", None) or "").partition(".")[0]
            if missing in OPTIONAL and find_spec(missing) is None:
                pytest.skip(f"{missing} is not installed", allow_module_level=True)
            raise


@pytest.fixture(autouse=True)
def _do_without_what_a_gpu_machine_may_lack(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu"):
        for name in OPTIONAL:
            monkeypatch.setitem(sys.modules, name, None)  # what imports it fails


@pytest.fixture
def device(pytestconfig: pytest.Config) -> torch.device:
    """CUDA where pytest was asked for the tests marked gpu (`-m gpu`) on a machine that has it, else the CPU."""
    asked = re.search(r"(?<!not )\bgpu\b", pytestconfig.option.markexpr)
    if asked and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def cuda_only(device: torch.device, reason: str) -> bool:
    """Whether to assert what nothing but CUDA can answer. reason: why the CPU cannot, which its output shows."""
    if device.type != "cuda":
        print(f"left to CUDA: {reason}")
    return device.type == "cuda"


@contextmanager
def never_waits(device: torch.device) -> Iterator[None]:
    """What runs inside raises RuntimeError where it waits for CUDA; on the CPU it just runs."""
    if not cuda_only(device, "a CPU computes at once, so nothing waits for it"):
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def others_long(names: Iterable[str], *usual: str) -> list:
    """Parameters of a test that takes its time: the usual ones, and the others marked long."""
    return [name if name in usual else pytest.param(name, marks=pytest.mark.long) for name in names]


def others_slow(names: Iterable[str], usual: Iterable[str], long: Iterable[str]) -> list:
    """Parameters of a test that takes very long: few that always run, few marked long, and the others marked slow."""
    marks = {name: () for name in usual} | {name: pytest.mark.long for name in long}
    return [pytest.param(name, marks=marks.get(name, pytest.mark.slow)) for name in names]


def one_of(number: int, *axes: Iterable) -> list:
    """All combinations of parameters, of which every so many-th always runs and the others are marked long.

    Those whose places in their axes add up to a multiple of `number` run: with each value of an axis there are some of
    every other axis, spread evenly.
    """
    return [
        pytest.param(*values, marks=pytest.mark.long if sum(places) % number else ())
        for places, values in (zip(*case, strict=True) for case in product(*map(enumerate, axes)))
    ]


# -- models and comparisons


def small_vit(**kwargs) -> nn.Module:
    """Six blocks of 24 channels on a 4 x 4 grid of tokens."""
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 3, "num_classes": 5} | kwargs
    model = timm.create_model(kwargs.pop("name", "vit_tiny_patch16_224"), **kwargs).double().train()
    return randomise(model)


EVA = {  # timm architecture -> what makes it small
    "eva_giant_patch14_224": {},
    "eva02_tiny_patch14_224": {"mlp_ratio": 2},
    "eva02_base_patch16_clip_224": {"mlp_ratio": 2},
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_pe_core_tiny_patch16_384": {},
    "vit_base_patch16_rope_reg1_gap_256": {},
}


def small_eva(name: str = "eva02_tiny_patch14_224", **kwargs) -> nn.Module:
    """Six blocks of 24 channels on a 4 x 4 grid of tokens."""
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 3, "num_classes": 5} | kwargs
    model = timm.create_model(name, **EVA[name], **kwargs).double().train()
    if getattr(model.rope, "t_x", None) is not None:  # timm turns its frequencies, but not these, into float32
        model.rope.t_x, model.rope.t_y = model.rope.t_x.float(), model.rope.t_y.float()
    return randomise(model)


def small_beit(name: str = "beit_base_patch16_224", **kwargs) -> nn.Module:
    """Six blocks of 24 channels on a 4 x 4 grid of tokens; of timm's BEiT or relpos ViTs."""
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 3, "num_classes": 5} | kwargs
    return randomise(timm.create_model(name, **kwargs).double().train())


def small_swin(name: str = "swin_tiny_patch4_window7_224", **kwargs) -> nn.Module:
    """Depths 2, 1, 3, 1 with 8 to 64 channels; maps of 16 x 16 to 2 x 2 for images of 64 px, in windows of 4 x 4."""
    torch.manual_seed(0)
    kwargs = {"img_size": 64, "window_size": 4, "embed_dim": 8, "depths": (2, 1, 3, 1)} | kwargs
    model = timm.create_model(name, num_heads=(1, 2, 2, 4), num_classes=5, **kwargs).double().train()
    return randomise(model)


def small_hiera(**kwargs) -> nn.Module:
    """Stages of 1, 2, 3 and 1 blocks with 8 to 64 channels; 3 x 3 mask units of 8 x 8 tokens for images of 96 px."""
    torch.manual_seed(0)
    kwargs = {"img_size": 96, "embed_dim": 8, "num_heads": 1, "stages": (1, 2, 3, 1), "num_classes": 5} | kwargs
    return randomise(timm.create_model("hiera_tiny_224", **kwargs).double().train())


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


def gradients(model: nn.Module, x: Tensor, seed: int = 3, only: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a forward pass and the gradient of every parameter and of the input ("input").

    only: the loss reads this image alone; of all of them it is the sum of those.
    """
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)  # drop path, dropout
    out = model(x)
    outs = out if isinstance(out, (list, tuple)) else [out]
    weights = [torch.linspace(-1, 2, one.numel(), dtype=one.dtype, device=one.device).view_as(one) for one in outs]
    if only is not None:
        rows = torch.arange(len(x), device=x.device) == only
        weights = [weight * rows.view(-1, *[1] * (weight.ndim - 1)) for weight in weights]
    loss = sum((one * weight).sum() for one, weight in zip(outs, weights, strict=True))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found | {"input": x.grad}


def gradients_image_by_image(model: nn.Module, x: Tensor, masks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """`gradients` of a patched model in which each image has the mask of its own (B, H, W), one after the other."""
    results = []
    for image, mask in enumerate(masks):
        with sbp.fixed_mask(model, mask):
            results.append(gradients(model, x, only=image))
    return sum(loss for loss, _ in results), {name: sum(found[name] for _, found in results) for name in results[0][1]}


def masks_of(where: Positions, height: int, width: int, prefix: int = 0) -> Tensor:
    """The masks (B, H, W), or one mask (H, W), of kept positions."""
    kept = where.keep[..., prefix:] - prefix
    empty = torch.zeros(*kept.shape[:-1], height * width, dtype=torch.bool, device=kept.device)
    return empty.scatter(-1, kept, True).unflatten(-1, (height, width))


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
