import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from sbp.flops import count_flops
from sbp.training.models.build import build_model
from sbp.training.plan.operators import PASSES, Recorder, extrapolated, record
from tests.training.configs import small


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


@pytest.mark.parametrize("override", ["sbp=none", "sbp=default"])
def test_operations_are_those_of_the_method_s_own_count(override):
    config = small(override)
    model = build_model(config.backbone, config.sbp, config.data.num_classes, config.data.image_size).train()
    images, labels = torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64)
    counted = count_flops(lambda: F.cross_entropy(model(images), labels))
    found = record(config, 8).kernels
    if torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:  # of earlier versions of torch
        found = [one for one in found if not one.kind.startswith("attention")]
    forward, backward = (sum(one.flops for one in found if one.part == part) for part in PASSES)
    assert (forward, backward) == pytest.approx(counted, rel=0.01)


def test_the_optimizer_moves_four_tensors_and_writes_three():
    config = small("sbp=none")
    found = [kernel for kernel in record(config, 8).kernels if kernel.name == "_fused_adamw_"]
    assert found and all(one.read == 4 * one.written / 3 and one.part == "optimizer" for one in found)
    model = build_model(config.backbone, config.sbp, config.data.num_classes, config.data.image_size)
    assert sum(one.written for one in found) == 3 * 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("backbone", ["vit", pytest.param("convnext", marks=pytest.mark.long)])
def test_the_step_of_another_batch_lies_on_the_line_through_two(backbone):
    config = small("sbp=default", "amp=bfloat16", "global_batch_size=64", backbone=backbone)
    small_step, large_step, exact = (record(config, size) for size in (8, 16, 32))
    found = extrapolated(small_step, large_step, 32)
    for one, other in zip(found.kernels, exact.kernels, strict=True):
        assert (one.flops, one.bytes) == pytest.approx((other.flops, other.bytes), rel=1e-6)
    assert found.memory.peak == pytest.approx(exact.memory.peak, rel=0.02)
    with pytest.raises(ValueError, match="run different operators"):
        extrapolated(small_step, record(small("sbp=none", backbone=backbone), 16), 32)
