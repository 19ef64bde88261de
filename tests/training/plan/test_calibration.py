import json

import pytest
import torch

from sbp.training.plan import calibration, gpus

CPU = torch.device("cpu")


def test_rates_are_measured():
    found = calibration.measure(CPU, 0.5)
    assert set(found) == {"tensor_tflops", "vector_tflops", "bandwidth", "launch_us"}
    assert all(0 < value < 1e6 for value in found.values())


def test_a_call_is_timed_by_its_best_round():
    clock = []
    assert calibration.timed(lambda: clock.append(1), CPU, 0.05) < 1e-3
    assert len(clock) > 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA")
def test_without_cuda_there_is_one_clear_error():
    with pytest.raises(ValueError, match="sbp plan calibrate needs a CUDA device, and device=auto is none here"):
        calibration.calibrated("auto", 1)


@pytest.mark.gpu
def test_a_plan_takes_what_was_measured(tmp_path, device):
    if device.type == "cuda":
        content = calibration.calibrated("auto", 20)
    else:
        content = {"gpu": vars(gpus.find("l40s")) | {"name": "measured"}}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content))
    gpu = gpus.find(str(path))
    assert gpu.bandwidth > 100 and gpu.tensor_tflops > 10
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a file that `sbp plan calibrate` wrote"):
        gpus.find(str(path))
