"""Counts of launches against what is known of small steps, and of a profiler's events."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.autograd import DeviceType

from sbp.training.benchmark import launches

CPU = torch.device("cpu")


def count(step) -> float:
    return launches.count(step, CPU)["launches"]


def test_views_launch_nothing_and_kernels_are_counted_by_hand():
    x, weight = torch.randn(6, 4), torch.randn(4, 4, requires_grad=True)
    assert count(lambda: x.t().reshape(2, 3, 4)[0].unsqueeze(0).expand(2, 3, 4).detach().unbind()) == 1  # the copy
    assert count(lambda: torch.empty(3, 4).add_(1).mul(2)) == 2
    # the product and the sum; their gradients, of which expanding is a view: ones_like, and the product's
    assert count(lambda: (x @ weight).sum().backward()) == 4


def test_what_launches_several():
    norm, convolution = nn.LayerNorm(4), nn.Conv2d(3, 5, 2)
    x = torch.randn(6, 4, requires_grad=True)
    assert count(lambda: norm(x)) == 1
    y = norm(x)
    assert count(lambda: torch.autograd.grad(y, [x, *norm.parameters()], y.detach())) == 2
    images = torch.randn(1, 3, 4, 4)
    assert count(lambda: convolution(images)) == 2  # the bias apart
    z = convolution(images)
    assert count(lambda: torch.autograd.grad(z, [*convolution.parameters()], z.detach())) == 2  # none for the images


def test_a_foreach_operator_launches_by_tensors_and_by_size():
    many = [torch.zeros(1) for _ in range(130)]
    assert count(lambda: torch._foreach_add_(many, 1)) == 3  # of 64 tensors at most
    large = [torch.zeros(launches.CHUNK * launches.BLOCKS + 1)]
    assert count(lambda: torch._foreach_add_(large, 1)) == 2
    assert count(lambda: torch._foreach_add_([large[0][:-1]], 1)) == 1


def test_the_kernels_among_a_profilers_events():
    def event(name, device, milliseconds, annotation=False):
        elapsed = SimpleNamespace(elapsed_us=lambda: 1000 * milliseconds)
        return SimpleNamespace(name=name, device_type=device, time_range=elapsed, is_user_annotation=annotation)

    events = [
        event("aten::mm", DeviceType.CPU, 9),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, 7, annotation=True),
        event("Memcpy DtoD (Device -> Device)", DeviceType.CUDA, 5),
        event("Memset (Device)", DeviceType.CUDA, 5),
        event("nvjet_sm90", DeviceType.CUDA, 1.5),
        event("void at::native::vectorized_elementwise_kernel", DeviceType.CUDA, 0.25),
    ]
    assert launches.sum_up(events) == {"launches": 2, "kernel_ms": 1.75}
