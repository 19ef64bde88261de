import json
from dataclasses import replace

import pytest

from sbp.training.plan import fusing
from sbp.training.plan.gpus import find, matching, names
from sbp.training.plan.operators import Kernel
from sbp.training.plan.roofline import Efficiency, efficiencies, kernel_seconds, seconds
from sbp.training.plan.steps import record
from sbp.training.plan.times import How, forecast_times
from scripts import plan_accuracy
from tests.training.configs import small

H100 = find("h100")
GB, TFLOP = 1e9, 1e12


def kernel(kind="elementwise", part="forward", inputs=((1, 8.0),), outputs=((2, 8.0),), **values):
    read, written = sum(size for _, size in inputs), sum(size for _, size in outputs)
    return Kernel("any", kind, part, **{"flops": 0.0, "read": read, "written": written} | values,
                  inputs=inputs, outputs=outputs)  # fmt: skip


def test_a_kernel_takes_what_its_operations_or_its_bytes_take():
    one = Efficiency(compute=0.5, bandwidth=0.5, start_us=0.0, rows_ns=0.0, overlap=1.0)
    product = kernel("product", flops=H100.tensor_tflops * TFLOP, read=H100.bandwidth * GB, written=0.0)
    assert seconds(product, H100, one) == pytest.approx(4)
    at_once = seconds(product, H100, replace(one, overlap=2.0))
    assert at_once == pytest.approx(8**0.5)
    without_tensor_cores = seconds(product, H100, one, amp="off")
    assert without_tensor_cores == pytest.approx(2 + 2 * H100.tensor_tflops / H100.vector_tflops)


def test_a_tiny_kernel_takes_the_time_of_its_start():
    assert kernel_seconds([kernel(launches=3)], H100) == pytest.approx(
        3e-6 * efficiencies()["elementwise"].start_us, rel=0.01
    )


@pytest.mark.parametrize("name", names())
def test_every_gpu_has_a_data_sheet(name):
    gpu = find(name)
    assert gpu.source and 1 < gpu.bandwidth < 10_000 and gpu.vector_tflops < gpu.tensor_tflops


def test_a_gpu_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"gpu must be one of h100, a100-40gb.*, got 'v100'"):
        find("v100")


@pytest.mark.parametrize(
    "device, memory, name",
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 79.3, "a100-80gb"),
        ("NVIDIA L40S", 44.5, "l40s"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("Tesla T4", 14.7, "t4"),
        ("NVIDIA H200", 139.8, None),
    ],
)
def test_the_data_sheet_of_a_device(device, memory, name):
    gpu = matching(device, memory)
    assert (gpu and gpu.name) == name


def test_a_chain_of_elementwise_kernels_becomes_one():
    chain = [kernel(inputs=((i, 8.0),), outputs=((i + 1, 8.0),)) for i in range(1, 4)]
    (one,) = fusing.fused(chain)
    assert (one.kind, one.read, one.written, one.launches) == (fusing.FUSED, 8.0, 8.0, 1)


def test_what_a_product_reads_is_written_and_what_follows_it_is_another_group():
    first = kernel(outputs=((2, 8.0),))
    product = kernel("product", inputs=((2, 8.0),), outputs=((3, 8.0),))
    both = kernel(inputs=((2, 8.0), (3, 8.0)), outputs=((4, 8.0),))
    found = fusing.fused([first, product, both])
    assert [one.kind for one in found] == ["product", fusing.FUSED, fusing.FUSED]
    assert [one.read for one in found[1:]] == [8.0, 16.0]


def test_groups_end_with_the_forward_pass():
    saved = kernel(outputs=((2, 8.0),))
    assert len(fusing.fused([saved, kernel(part="backward", inputs=((2, 8.0),), outputs=((3, 8.0),))])) == 2


def test_casts_together_move_the_same_bytes_in_fewer_launches():
    casts = [kernel(cast=True, part=part, read=4e6, written=2e6) for part in ("forward", "backward") for _ in range(50)]
    found = fusing.cast_together([*casts, kernel()])
    assert sum(one.bytes for one in found) == sum(one.bytes for one in [*casts, kernel()])
    assert len(found) == 3 and fusing.launches(found) < 10


def test_the_host_bounds_eager_steps_and_not_those_of_a_graph():
    step = record(small("sbp=default", "amp=bfloat16"), 8)
    slow = replace(H100, launch_us=100.0)
    eager, graph = (forecast_times(step, slow, How(graph=graph, cast_together=graph)) for graph in (False, True))
    assert eager.step == pytest.approx(1e-4 * eager.launches)
    assert eager.step > eager.kernels
    assert graph.step < 0.2 * eager.step and graph.launches < eager.launches
    twice = forecast_times(step, slow, How(), accumulation=2)
    assert eager.kernels < twice.kernels < 2 * eager.kernels
    assert forecast_times(step, slow, How(), recompute=True).step > eager.step


def test_arms_without_a_forecast_are_set_beside_none(tmp_path):
    """Checkpointing and PatchDropout have no SBP settings either, and are not plain training."""
    arm = {"kernel_ms": 1.0, "median_ms": {"step": 2.0}, "launches": 3, "peak_allocated": 4}
    backbone = {"name": "vit_tiny_patch16_224", "drop_path": 0.0, "kwargs": {"depth": 1, "embed_dim": 48}}
    record = {"settings": {"backbone": backbone}, "batch_size": 2}
    record["arms"] = dict.fromkeys(("plain", "checkpoint", "patch_dropout", "release"), arm)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    assert [row.arm for row in plan_accuracy.rows(path)] == ["plain"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_kernels_take_as_long_as_they_were_measured_to_and_the_page_says_so():
    for path in plan_accuracy.files():
        rows = list(plan_accuracy.rows(path))
        for row in rows:
            assert abs(row.off) < (0.1 if row.network in plan_accuracy.FITTED else 0.15), row
        measured, forecast = ([row.kernel_ms[i] for row in rows] for i in (0, 1))
        for i, one in enumerate(measured):
            for k, other in enumerate(measured):
                if one < 0.98 * other:
                    assert forecast[i] < forecast[k], (rows[i].arm, rows[k].arm)
    text = plan_accuracy.PAGE.read_text()
    assert text == plan_accuracy.page(text, plan_accuracy.table())
