import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

import sbp
from sbp.training.memory.forecast import forecast, support, with_sbp
from sbp.training.memory.phases import phases
from sbp.training.plan import search
from sbp.training.plan.gpus import find
from sbp.training.plan.search import Line, fastest, line, lines, micro_batches, plan, undominated
from sbp.training.plan.settings import NOT_STUDIED, Setting, accuracy, settings
from sbp.training.plan.steps import record
from sbp.training.plan.times import How, forecast_times
from sbp.training.record.files import read_json
from tests.training.configs import composed, small

RECORDS = Path(__file__).parents[3] / "results"
T4 = find("t4")
EXACT = Setting(1.0, "qkv", "none")
MIB = 2**20


@pytest.fixture(scope="module")
def tiny():
    config = small("sbp=none", "amp=float16", "global_batch_size=96")
    return config, line(config)


def test_names_are_those_of_the_benchmark_s_arms():
    names = [one.name for one in settings(sbp.Support(mhsa_drops=("qkv", "query")))]
    assert names[:3] == ["plain", "cheap", "block"] and len(names) == len(set(names))
    assert {"sbp", "sbp_cheap", "sbp_block", "sbp_25_cheap", "sbp_query", "query_cheap", "query_25_cheap"} <= set(names)
    assert not any("query" in one.name for one in settings(sbp.Support()))
    assert [one.name for one in settings(sbp.Support(reason="any"))] == ["plain"]


def test_what_is_not_known_of_accuracy_is_said():
    config = small()
    assert accuracy(config, EXACT) == "exact gradient"
    assert accuracy(config, Setting(0.125, "query", "none")) == NOT_STUDIED
    names = ("eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vitamin_small_224", "convnextv2_tiny")
    otherwise = ("sbp.mask=random", "sbp.layers=all", "sbp.keep_ratio_end=1", "backbone.pretrained=timm")
    for one in (*(f"backbone.name={name}" for name in names), *otherwise):
        assert accuracy(small(one), Setting(0.5, "qkv", "none")) == NOT_STUDIED


ARMS = {  # dropped, mhsa_drop and keep_ratio -> the study's name for it
    ("none", "qkv", 0.5): "sbp",
    ("none", "qkv", 0.25): "ratio_0.25",
    ("none", "query", 0.5): "query",
    ("none", "query", 0.25): "query_0.25",
    ("input", "query", 0.25): "query_input_0.25",
    ("input", "qkv", 0.5): "input",
    ("input", "qkv", 0.25): "input_0.25",
}


@pytest.mark.parametrize("setting", ARMS)
@pytest.mark.parametrize("network", ["vit", "convnext"])
def test_what_is_known_of_small_networks_is_what_the_records_say(network, setting):
    def gap(folder):
        records = (read_json(RECORDS / folder / "training" / f"{arm}.json") for arm in ("plain", ARMS[setting]))
        plain, arm = ([run["top1"] for run in one.get("runs", [])] for one in records)
        return fmean(arm) - fmean(plain) if plain and arm else None

    dropped, mhsa_drop, keep_ratio = setting
    said = accuracy(small(f"sbp.dropped={dropped}", backbone=network), Setting(keep_ratio, mhsa_drop, "none"))
    of_images = (gap(f"cifar10_gpu/{network}"), gap(f"cifar10/small-{network}"), gap(f"laptop/digits-{network}"))
    photographs, smaller, digits = of_images
    lines = [] if photographs is None else [f"CIFAR-10 {photographs:+.1f}"]
    lines += [f"CIFAR-10, smaller network {smaller:+.1f}"] if not lines and smaller is not None else []
    lines += [] if digits is None else [f"digits {digits:+.0f}"]
    assert [line for line in said.split("; ") if "published" not in line] == (lines or [NOT_STUDIED])


@pytest.mark.parametrize("how", [How(), How(graph=True, cast_together=True), How(compile=True)])
def test_a_line_says_what_a_fake_step_of_that_batch_says(tiny, how):
    config, found = tiny
    step = record(replace(config, global_batch_size=64), 64)
    times = found.times(64, T4, how, accumulation=1, recompute=False, amp="float16")
    exact = forecast_times(step, T4, how, amp="float16")
    assert (times.kernels, times.step) == pytest.approx((exact.kernels, exact.step), rel=1e-3)
    assert times.launches == exact.launches
    assert found.peak(64, accumulates=False) == pytest.approx(step.memory.peak, rel=0.02)


def test_a_peak_with_gradients_of_the_micro_batch_before(tiny):
    config, found = tiny
    assert found.peak(48, accumulates=True) == pytest.approx(forecast(config, 48).peak, rel=0.03)


@pytest.mark.long
@pytest.mark.parametrize(
    "recipe",
    ["recipe.optimizer=lamb", "recipe.optimizer=sgd", "recipe.optimizer=AdamW", "backbone.frozen=true sbp=none"],
)
def test_however_small_the_batch_what_the_update_needs_is_in_the_peak(recipe):
    """Copies of the weights for some optimizers; of frozen weights nothing, not even their gradients."""
    config = small("backbone.kwargs.embed_dim=384", "global_batch_size=64", *recipe.split())
    found = line(config)
    for size in (2, 32):
        assert found.own_peak(size, accumulates=True) == pytest.approx(forecast(config, size).peak, rel=0.04)


def test_the_largest_batch_is_the_last_that_fits(tiny):
    _, found = tiny
    largest = found.largest(64 * MIB, accumulates=False)
    assert found.peak(largest, False) <= 64 * MIB < found.peak(largest + 1, False)
    assert found.largest(1.0, accumulates=False) == 0


@pytest.mark.parametrize("accumulates", [False, True])
def test_where_the_update_is_the_peak_of_both_fake_steps_the_largest_batch_is_the_last_that_fits(tiny, accumulates):
    """The line between their peaks is level then, and says nothing of larger batches."""
    update = 10 * tiny[1].large.memory.peak
    steps = {key: getattr(tiny[1], key) for key in ("small", "large")}
    found = Line(**{key: replace(one, memory=replace(one.memory, update=update)) for key, one in steps.items()})
    assert found.own_peak(32, accumulates) == found.own_peak(128, accumulates) == update
    largest = found.largest(1.5 * update, accumulates)
    assert found.own_peak(largest, accumulates) <= 1.5 * update < found.own_peak(largest + 1, accumulates)


def test_a_setting_keeps_what_a_run_says_of_epochs_unless_all_are_exact():
    config = small("recipe.epochs=4", "sbp.keep_ratio_end=0.75", "sbp.exact_epochs=1", "sbp.exact_recompute=block")
    quarter, exact = Setting(0.25, "query", "none"), Setting(1.0, "qkv", "cheap")
    assert quarter.overrides(config)[3:] == [
        "sbp.keep_ratio_end=0.75",
        "sbp.exact_epochs=1",
        "sbp.exact_recompute=block",
    ]
    assert list(phases(quarter.applied(config))) == ["keep_ratio 0.25", "keep_ratio 0.75", "exact epochs"]
    assert exact.overrides(config)[3:] == [] and list(phases(exact.applied(config))) == ["all epochs"]


def test_phases_that_runs_share_are_forecast_once(tiny):
    config, found = tiny
    asked = []

    def forecast(configs):
        asked.extend(configs)
        return [replace(found) for _ in configs]

    sbp = replace(config, sbp=replace(config.sbp, enabled=True), recipe=replace(config.recipe, epochs=2))
    run = with_sbp(sbp, exact_epochs=1, exact_recompute="block")
    one, other, alike = search.of_runs([run, with_sbp(run, mhsa_drop="query"), sbp], forecast)
    assert len(asked) == 3 and [len(each.later) for each in (one, other, alike)] == [1, 1, 0]
    assert one.later[0] is other.later[0]


def test_the_peak_of_a_line_is_that_of_its_phases(tiny):
    _, found = tiny
    more = replace(found, small=_heavier(found.small), large=_heavier(found.large))
    for first, later in ((found, more), (more, found)):
        run = replace(first, later=(later,))
        assert run.peak(64, False) == more.peak(64, False) > found.peak(64, False)
        assert run.own_peak(64, False) == first.peak(64, False)
        assert run.largest(64 * MIB, False) == more.largest(64 * MIB, False)


def _heavier(step):
    memory = replace(step.memory, passes=2 * step.memory.passes)
    return replace(step, memory=memory)


def test_micro_batches_divide_the_share():
    config = small("global_batch_size=24")
    assert micro_batches(config, world_size=2) == [12, 6, 4, 3, 2, 1]
    mixing = replace(config, recipe=replace(config.recipe, mixup=0.2))
    assert micro_batches(mixing, world_size=2) == [12, 6, 4, 2]
    with pytest.raises(ValueError, match="cannot be spread evenly over 5 processes"):
        micro_batches(config, world_size=5)


def test_where_a_whole_batch_does_not_fit_it_is_accumulated(tiny):
    config, found = tiny
    whole = fastest(config, EXACT, found, How(), T4, 1e12)
    less = fastest(config, EXACT, found, How(), T4, 0.8 * whole.peak)
    assert (whole.micro_batch_size, whole.accumulation) == (96, 1)
    assert less.micro_batch_size * less.accumulation == 96 and less.accumulation > 1
    assert less.peak <= 0.8 * whole.peak and less.times.step > whole.times.step
    assert fastest(config, EXACT, found, How(), T4, 1e3) is None


def test_a_plan_leaves_out_what_another_setting_beats(tiny):
    config, exact = tiny
    masked = line(small("amp=float16", "global_batch_size=96"))
    points = plan(config, T4, 1e12, forecast=lambda runs: [masked if one.sbp.enabled else exact for one in runs])
    shown = undominated(points)
    assert points[0] in shown and len(shown) < len(points)
    steps = [one.times.step for one in points]
    assert steps == sorted(steps)
    for one in shown:
        alike = [other for other in shown if other.setting.keep_ratio == one.setting.keep_ratio]
        rivals = [other for other in alike if other.setting.mhsa_drop == one.setting.mhsa_drop and other is not one]
        assert not any(other.times.step < one.times.step and other.peak <= one.peak for other in rivals)
    assert not any(one.how.compile and one.setting.recompute == "cheap" for one in points)


def test_overrides_make_the_run_that_was_forecast(tiny):
    config, found = tiny
    setting = Setting(0.25, "query", "cheap")
    point = fastest(config, setting, found, How(), T4, 1e12)
    run = small(*(one for one in point.overrides(config) if one != "amp=float16"), "amp=float16")
    assert (run.sbp.keep_ratio, run.sbp.mhsa_drop, run.sbp.recompute) == (0.25, "query", "cheap")
    assert run.micro_batch_size == point.micro_batch_size and run.compile is False


def test_settings_of_a_run():
    for config, attends in (
        (small(), True),
        (small(backbone="convnext"), False),
        (composed("task=detection", "backbone=swin_demo"), True),
    ):
        found = support(config)
        assert found and ("query" in found.mhsa_drops) == attends
    assert not support(small("sbp=none", "backbone.frozen=true"))


@pytest.mark.long
def test_forecasts_in_other_processes_where_autograd_has_run_in_this_one():
    config = small()
    here = line(config)
    assert [one.small.memory for one in lines([config, config])] == [here.small.memory] * 2


ASKED_BEFORE_AND_AFTER = """
import torch
from sbp.training.plan import search
assert search._can_fork()
def backward(self): raise RuntimeError("autograd's threads are gone")
torch.Tensor.backward = backward
assert not search._can_fork()
"""


def test_a_process_is_not_forked_where_a_backward_pass_fails_in_the_fork(monkeypatch):
    def backward(self):
        raise RuntimeError("autograd's threads are gone")

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    assert not search._can_fork()


@pytest.mark.long
def test_a_process_is_forked_until_a_backward_pass_would_fail_in_the_fork():
    subprocess.run([sys.executable, "-c", ASKED_BEFORE_AND_AFTER], check=True)
