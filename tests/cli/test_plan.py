import json
import logging
import shlex
from types import SimpleNamespace

import pytest

from sbp.cli import plan
from sbp.cli.plan import report
from sbp.training.config.requests import PlanConfig
from sbp.training.plan.arms import arm_config
from tests.training.configs import composed

TINY = ("backbone=vit_demo", "backbone.kwargs.depth=1", "backbone.kwargs.embed_dim=48", "data=digits", "recipe=short")
FIELDS = {"kernel_ms", "launches", "step_ms", "peak", "images_per_second"}


def config(*overrides):
    return composed(*TINY, *overrides, name="plan", kind=PlanConfig)


@pytest.mark.long
def test_a_plan_says_what_is_fastest_and_writes_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    files = {"json": tmp_path / "plan.json", "figure": tmp_path / "plan.png"}
    report(config("gpu=l40s", "global_batch_size=64", *(f"{key}={path}" for key, path in files.items())), tmp_path)
    written = json.loads(files["json"].read_text())
    assert set(written) == {"gpu", "arms"} and written["gpu"] == "l40s"
    assert all(set(one) == FIELDS for one in written["arms"].values())
    assert files["figure"].stat().st_size > 10_000
    assert "fastest    sbp train" in caplog.text and "exact gradient" in caplog.text


def test_what_is_to_be_trained_is_what_was_planned(monkeypatch):
    """Of the command line there stays what the plan does not decide."""
    given = ["backbone=vit_tiny", "sbp.enabled=false", "++sbp.keep_ratio=0.3", "sbp.mask=random", "gpu=l40s", "amp=off"]
    choices = {"backbone": "vit_tiny", "data": "imagenet", "recipe": "short", "logger": "none"}
    hydra = SimpleNamespace(overrides=SimpleNamespace(task=given), runtime=SimpleNamespace(choices=choices))
    monkeypatch.setattr(plan, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: hydra))
    own = ["backbone=vit_tiny", "sbp.mask=random", "data.image_size=64"]
    assert plan._given(config("image_size=64")) == ["data=imagenet", "recipe=short", *own]
    given.append("processes=4")
    assert plan._given(config("processes=4")) == ["data=imagenet", "recipe=short", *own[:2], "processes=4"]
    assert plan._given(config("world_size=4"))[-1] == "processes=4"
    given.append("experiment=table1/vit_tiny_sbp")
    assert plan._given(config())[0] == "backbone=vit_tiny"


def test_arms_of_the_benchmark_at_one_batch(tmp_path):
    path = tmp_path / "arms.json"
    report(config("gpu=h100", "arms=[plain,sbp_query,query_25_cheap]", "batch_size=8", f"json={path}"), tmp_path)
    arms = json.loads(path.read_text())["arms"]
    assert list(arms) == ["plain", "sbp_query", "query_25_cheap"]
    for one in arms.values():
        assert one["images_per_second"] == pytest.approx(8000 / one["step_ms"])
        assert one["step_ms"] >= one["kernel_ms"] > 0


def test_arms_have_the_keys_that_the_benchmark_has():
    like = config("sbp.keep_ratio=0.25", "sbp.mask=random", "channels_last=true", "data.num_classes=7", "amp=float16")
    arm = arm_config(like.backbone, "sbp_query", 8, like)
    assert (arm.sbp.keep_ratio, arm.sbp.mask, arm.sbp.mhsa_drop) == (0.25, "random", "query")
    assert arm.channels_last and (arm.data.num_classes, arm.data.image_size, arm.amp) == (7, 32, "float16")
    assert arm_config(like.backbone, "query_25_cheap", 8, config("sbp.keep_ratio=0.75")).sbp.keep_ratio == 0.25


@pytest.mark.long
def test_what_is_to_be_given_to_train_is_quoted_for_a_shell(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    shards = 'data.train_split="train-{0000..1023}.tar"'
    monkeypatch.setattr(plan, "_given", lambda _: [shards, "data.root=/my data"])
    report(config("gpu=l40s", "global_batch_size=64"), tmp_path)
    (line,) = (line for line in caplog.text.splitlines() if "fastest " in line)
    assert shlex.split(line.partition("fastest")[2])[:4] == ["sbp", "train", shards, "data.root=/my data"]


def test_a_gpu_without_bfloat16_is_planned_for_in_float16(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    report(config("gpu=t4", "arms=[plain]"), tmp_path)
    assert "float16, as t4 has no bfloat16" in caplog.text


@pytest.mark.parametrize(
    "override, message",
    [
        ("gpu=v100", "gpu must be one of h100"),
        ("arms=[release]", "no forecast of 'release'"),
        ("parallel=fsdp", "a plan is of parallel=ddp"),
        ("world_size=2 processes=4", "world_size=2 and processes=4 are the same thing"),
        pytest.param("memory_gib=0.0001", "nothing fits into 0.0 GiB", marks=pytest.mark.long),
    ],
)
def test_what_cannot_be_planned_is_one_clear_error(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        report(config("global_batch_size=8", *override.split()), tmp_path)
