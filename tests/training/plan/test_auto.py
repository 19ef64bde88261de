import shutil
from dataclasses import replace
from itertools import count

import pytest
import torch

from sbp.training.config.batches import plan_batches
from sbp.training.config.rules import validate
from sbp.training.engine import planned
from sbp.training.engine.train import train
from sbp.training.memory.forecast import forecast, forecast_phases
from sbp.training.plan import auto
from sbp.training.plan.auto import Expected, FirstSteps, choose, differences
from sbp.training.plan.gpus import find
from sbp.training.plan.search import line
from sbp.training.record.files import read_json
from tests.training.configs import composed, small

CPU = torch.device("cpu")
H100 = find("h100")


def test_the_largest_micro_batch_that_fits_is_chosen():
    config = small("micro_batch_size=auto", "global_batch_size=64", "amp=bfloat16")
    whole, found = forecast(config, 64).peak, line(replace(config, micro_batch_size=None))
    given = {"gpu": H100, "forecast": lambda _: found}  # which takes its time
    assert choose(config, CPU, 1, **given, available=2 * whole).micro_batch_size == 64
    less = choose(config, CPU, 1, **given, available=0.7 * whole)
    assert less.micro_batch_size < 64 and 64 % less.micro_batch_size == 0 and less.peak <= 0.7 * whole
    assert choose(config, CPU, 2, **given, available=2 * whole).step is None  # what processes exchange is not known
    with pytest.raises(ValueError, match="micro_batch_size=auto: by forecast not even the smallest one fits"):
        choose(config, CPU, 1, **given, available=1e3)


def test_a_share_of_a_model_is_not_forecast():
    config = small("micro_batch_size=auto", "parallel=fsdp")
    with pytest.raises(ValueError, match="with fsdp give it a number"):
        choose(config, CPU, 2, gpu=H100, available=1e9)


def test_images_that_stay_on_the_device_take_their_room():
    keys = ("micro_batch_size=auto", "global_batch_size=64", "data=synthetic", "data.on_device=true")
    config = small(*keys, "data.train_images=200", "data.val_images=100", "data.image_size=32")
    images = 300 * 3 * 32**2
    whole = forecast(config, 64).peak
    assert choose(config, CPU, 1, gpu=H100, available=1.01 * whole).micro_batch_size < 64
    found = choose(config, CPU, 1, gpu=H100, available=1.01 * whole + images)
    assert found.micro_batch_size == 64 and found.peak == pytest.approx(whole + images, rel=0.01)


@pytest.mark.long
def test_the_micro_batch_fits_every_phase_of_the_run():
    keys = ("sbp.keep_ratio=0.25", "sbp.keep_ratio_end=0.5", "sbp.exact_epochs=1", "recipe.epochs=4")
    config = small("micro_batch_size=auto", "global_batch_size=64", *keys)
    needed = {name: one.peak for name, one in forecast_phases(config, 64).items()}
    assert list(needed) == ["keep_ratio 0.25", "keep_ratio 0.5", "exact epochs"]
    assert sorted(needed.values()) == list(needed.values())
    found = choose(config, CPU, 1, gpu=H100, available=1.03 * needed["exact epochs"])
    assert found.micro_batch_size == 64
    assert found.peak == pytest.approx(needed["keep_ratio 0.25"], rel=0.03)  # what the first steps are compared with
    assert found.run_peak == pytest.approx(needed["exact epochs"], rel=0.03)
    assert choose(config, CPU, 1, gpu=H100, available=needed["keep_ratio 0.5"]).micro_batch_size < 64


def test_without_a_gpu_it_is_the_whole_share():
    assert choose(small("global_batch_size=64"), CPU, 2) == Expected(32)


@pytest.mark.long
def test_a_run_plans_once_and_keeps_the_answer(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(planned, "choose", lambda *_: asked.append(1) or Expected(8, 1.0, 1))
    config = small("micro_batch_size=auto", "global_batch_size=16", "probe.every_steps=null")
    summary = train(config, tmp_path)
    assert (summary["micro_batch_size"], summary["accumulation"], summary["config"]["micro_batch_size"]) == (8, 2, 8)
    assert read_json(tmp_path / "run.json")["config"]["micro_batch_size"] == 8
    monkeypatch.setattr(planned, "choose", lambda *_: asked.append(1) or Expected(4))
    assert planned.resolve(config, tmp_path).micro_batch_size == 8 and len(asked) == 1
    assert planned.resolve(replace(config, resume="never"), tmp_path).micro_batch_size == 4
    assert planned.kept(config, tmp_path, 2) == Expected(8)
    assert planned.kept(config, tmp_path, 4) is None  # more processes than that micro batch leaves room for
    shutil.rmtree(tmp_path / "checkpoints")
    assert planned.kept(config, tmp_path, 1) is None  # nothing to go on from: another run may have another answer


@pytest.mark.parametrize("value", ["some", "2.5", "true", "0"])
def test_other_words_are_refused(value):
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1, or auto, got"):
        validate(composed("data=digits", "recipe=demo", f"micro_batch_size={value}"))


def test_commands_that_do_not_plan_refuse_it():
    with pytest.raises(ValueError, match="micro_batch_size=auto is for `sbp train` alone"):
        plan_batches(64, "auto", 1)


def test_what_is_far_off_is_said():
    expected = Expected(8, step=0.1, peak=1000 * 2**20)
    assert differences(expected, 0.11, 900 * 2**20) == []
    slow, large = differences(expected, 0.12, 1200 * 2**20)
    assert "120.0 ms, +20 % from the forecast of 100.0 ms" in slow
    assert "1200 MiB, +20 % from the forecast of 1000 MiB" in large


def test_the_first_steps_are_compared_once():
    ticks = count()
    first = FirstSteps(Expected(8, step=0.01, peak=1), CPU, lambda: 1, clock=lambda: 0.02 * next(ticks))
    found = [first.done() for _ in range(40)]
    assert sum(bool(lines) for lines in found) == 1
    assert "+100 %" in found[auto._LAST - 1][0]
    assert FirstSteps(None, CPU, int).done() == FirstSteps(Expected(8, 1.0, 1), CPU, int).done() == []


def test_an_evaluation_among_the_first_steps_does_not_count():
    times = (0.01 * step + (60 if step > 4 else 0) for step in count())
    first = FirstSteps(Expected(8, step=0.01, peak=1), CPU, lambda: 1, clock=lambda: next(times))
    assert not any(first.done() for _ in range(40))
