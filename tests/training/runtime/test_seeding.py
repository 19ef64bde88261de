"""Random numbers, and the algorithms that use them."""

import os

import torch

from sbp.training.engine import setup
from sbp.training.engine.train import train
from sbp.training.runtime import seeding
from tests.training.configs import QUICK, small


def test_a_run_can_ask_for_deterministic_algorithms_and_the_next_one_has_its_own_choice(tmp_path):
    train(small(*QUICK, "deterministic=true", "sbp.mask=random", "recipe.ema_decay=0.9"), tmp_path)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
    setup.prepare_process(small())
    assert not torch.are_deterministic_algorithms_enabled()


def test_seeds_are_torchs_and_nothing_is_noted_for_devices_that_are_not_started():
    seed = seeding.seed_host(3, 4)
    found = torch.rand(3)
    torch.manual_seed(seed)
    assert torch.equal(found, torch.rand(3))
    before = len(torch.cuda._queued_calls)
    seeding.seed_host(3, 4)
    assert len(torch.cuda._queued_calls) == before
