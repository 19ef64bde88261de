"""The dry run of Table 1 keeps the published batch and learning rate, and finds what is not as published."""

import shlex
from dataclasses import replace

import pytest
import torch

from scripts import dry_run
from scripts.dry_run import (
    PUBLISHED,
    BatchPlan,
    arguments,
    built,
    check,
    command,
    differences,
    fitting,
    gpu_counts,
    plans,
)
from tests.training.configs import composed

GPUS = {"vit_tiny": 8, "vit_base": 32, "convnext_tiny": 8, "convnext_base": 32}
ACCUMULATION = {"vit_tiny": 1, "vit_base": 2, "convnext_tiny": 4, "convnext_base": 2}
SMALL = ("+backbone.kwargs.depth=3", "+backbone.kwargs.embed_dim=48")


@pytest.fixture
def small_networks(monkeypatch):
    """ViTs of three narrow blocks in place of the published ones; the recipe stays."""
    own = dry_run.composed
    monkeypatch.setattr(dry_run, "composed", lambda overrides: own([*overrides, *SMALL]))


@pytest.mark.parametrize(("batch", "micro"), [(4096, 128), (4096, 64), (2048, 256), (96, 20)])
def test_the_global_batch_is_the_published_one_on_any_number_of_gpus(batch, micro):
    for gpus in [*range(1, 70), 128, 1024, batch // 2, batch, batch + 1]:
        if gpus not in gpu_counts(batch):
            assert batch % gpus or batch // gpus % 2
            with pytest.raises(ValueError, match=f"cannot be spread over {gpus} GPUs .*; take 1, 2, "):
                plans(batch, micro, gpus)
            continue
        found = plans(batch, micro, gpus)
        for plan in found:
            assert plan.micro_batch_size * plan.accumulation * gpus == batch and plan.micro_batch_size % 2 == 0
        sizes = [plan.micro_batch_size for plan in found]
        assert sizes == [n for n in range(micro, 0, -1) if n % 2 == 0 and batch % (n * gpus) == 0]


@pytest.mark.parametrize("name", dry_run.experiments())
def test_the_published_number_of_gpus_gets_the_published_configuration(name):
    config, network = composed(*arguments(name)), name.rsplit("_", 1)[0]
    first = plans(config.global_batch_size, config.micro_batch_size, GPUS[network])[0]
    assert first == BatchPlan(
        PUBLISHED[network].global_batch_size, config.micro_batch_size, GPUS[network], ACCUMULATION[network]
    )


def test_the_command_is_what_was_checked():
    plan = plans(4096, 64, 16)[0]
    one, several = (shlex.split(command("vit_base_sbp", plan, nodes, seed=3)) for nodes in (1, 4))
    assert one[:3] == ["torchrun", "--nproc_per_node=16", "train.py"]
    assert several[1:3] == ["--nnodes=4", "--nproc_per_node=4"] and "--rdzv_endpoint=HOST:29500" in several
    config = composed(*several[several.index("train.py") + 1 :])
    assert one[one.index("train.py") :] == several[several.index("train.py") :]
    assert (config.micro_batch_size, config.global_batch_size, config.seed) == (64, 4096, 3)
    assert config.run_dir == "outputs/table1/vit_base_sbp" and config.backbone.name == "vit_base_patch16_224"


def test_a_small_network_goes_all_the_way(small_networks):
    row = check("vit_tiny_sbp", gpus=16, nodes=2)
    assert row.problem is None and row.lr == pytest.approx(2e-3)
    assert row.plan == BatchPlan(2048, 128, 16, 1) and row.peak > 0 and "--nnodes=2" in row.command


@pytest.mark.long
def test_the_micro_batch_shrinks_until_it_fits(small_networks):
    config = replace(dry_run.composed(arguments("vit_tiny_baseline")), micro_batch_size=8)
    largest, peak = fitting(config, 8, None)
    smaller, fits = fitting(config, 8, (peak - 1) / 2**30)
    assert (largest.micro_batch_size, smaller.micro_batch_size) == (8, 4) and fits < peak
    assert smaller.accumulation == 2 * largest.accumulation
    with pytest.raises(ValueError, match=r"MiB for 2 images at once, and a GPU has 0\.001 GiB"):
        fitting(replace(config, micro_batch_size=2), 8, 0.001)


def test_what_is_not_as_published_is_named(small_networks):
    config = dry_run.composed(arguments("vit_tiny_sbp"))
    plan = plans(2048, 256, 8)[0]
    target = dry_run.published("vit_tiny_sbp")
    wrong = replace(
        config,
        backbone=replace(config.backbone, drop_path=0.2),
        recipe=replace(config.recipe, lr=1e-3, mixup=0.5),
        sbp=replace(config.sbp, keep_ratio=0.25),
    )
    named = [line.split(" ")[0] for line in differences(built(wrong, plan), target)]
    assert named == ["lr", "drop_path", "mixup", "keep_ratio"]


def test_a_step_that_trains_nothing_is_found(small_networks, monkeypatch):
    monkeypatch.setattr(dry_run, "SCALE", float("inf"))
    assert "a step leaves" in check("vit_tiny_baseline", gpus=8).problem


@pytest.mark.long
def test_one_that_fails_does_not_stop_the_others(small_networks, monkeypatch, capsys):
    rows = dry_run.dry_run(["vit_tiny_bsp", "vit_tiny_sbp"], gpus=8)
    assert rows[0].problem.startswith("no experiment vit_tiny_bsp") and rows[1].problem is None
    assert "take 1, 2, 4" in check("vit_tiny_sbp", gpus=7).problem
    assert "got 8 on 3 nodes" in check("vit_tiny_sbp", gpus=8, nodes=3).problem
    monkeypatch.setattr("sys.argv", ["dry_run", "vit_tiny_bsp", "vit_tiny_sbp"])
    with pytest.raises(SystemExit) as ended:
        dry_run.main()
    shown = capsys.readouterr().out
    assert ended.value.code == 1 and "8 x 256 x 1 = 2048" in shown and shown.count("torchrun ") == 1


def test_a_faster_backward_pass_of_convolutions_is_the_same():
    conv, x = torch.nn.Conv2d(4, 4, 7, padding=3, groups=4).half(), torch.randn(2, 4, 14, 14).half()
    gradients = []
    for mode in (dry_run._FastConvolutions(), torch.enable_grad()):
        conv.zero_grad()
        with mode:
            conv(x).square().mean().backward()
        gradients.append(conv.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3)
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()


@pytest.mark.slow
def test_all_eight():
    rows = dry_run.dry_run(dry_run.experiments())
    assert len(rows) == 8 and [row.problem for row in rows] == [None] * 8
