import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from sbp.training.plan.operators import Recorder


def kernels(run):
    with FakeTensorMode(), Recorder() as recorder:
        recorder.part = "forward"
        run()
    return recorder.kernels


def test_a_product_reads_its_inputs_once_and_writes_its_output_once():
    (one,) = kernels(lambda: torch.mm(torch.empty(3, 5, dtype=torch.bfloat16), torch.empty(5, 7, dtype=torch.bfloat16)))
    assert (one.kind, one.flops) == ("product", 2 * 3 * 5 * 7)
    assert (one.read, one.written) == (2 * (15 + 35), 2 * 21)


def test_what_is_expanded_is_read_as_it_lies_in_memory():
    (one,) = kernels(lambda: torch.empty(4, 6) * torch.empty(4, 1).expand(4, 6))
    assert (one.kind, one.read, one.written) == ("broadcast", 4 * (24 + 4), 4 * 24)


@pytest.mark.parametrize("transposed, kind", [(False, "elementwise"), (True, "permuted")])
def test_layouts_tell_kinds_apart(transposed, kind):
    def run():
        x, y = torch.empty(8, 8), torch.empty(8, 8)
        return x + (y.t() if transposed else y)

    (one,) = kernels(run)
    assert one.kind == kind


def test_views_and_empty_memory_cost_nothing():
    assert kernels(lambda: torch.empty(4, 6).t().unsqueeze(0).expand(3, 6, 4)) == []


@pytest.mark.parametrize("groups, kind", [(1, "convolution"), (8, "depthwise")])
def test_a_convolution_with_its_bias_and_its_gradients(groups, kind):
    def run():
        x = torch.empty(2, 8, 6, 6, requires_grad=True)
        weight, bias = torch.empty(8, 8 // groups, 3, 3, requires_grad=True), torch.empty(8, requires_grad=True)
        F.conv2d(x, weight, bias, padding=1, groups=groups).sum().backward()

    found = [one for one in kernels(run) if one.name in ("convolution", "convolution_backward", "add_")]
    assert [one.kind for one in found] == [kind, "broadcast", f"{kind}_backward", f"{kind}_backward"]
    flops = 2 * (2 * 8 * 6 * 6) * 9 * 8 // groups
    if groups == 1:
        assert [one.flops for one in found if one.flops] == [flops] * 3
    assert all(one.flops >= flops for one in found if one.flops)
