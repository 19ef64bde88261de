import pytest
import torch

from sbp.training.runtime import seeding


@pytest.fixture(autouse=True)
def _threads_and_algorithms_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    seeding.set_deterministic(False)
