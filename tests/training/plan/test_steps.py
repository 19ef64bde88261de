import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import flop_registry

from sbp.flops import count_flops
from sbp.training.models.build import build_model
from sbp.training.plan.operators import PASSES
from sbp.training.plan.steps import extrapolated, record
from tests.training.configs import small


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
