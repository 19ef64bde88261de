"""Random numbers that are derived from what they are for, so that a checkpoint need not hold generator states."""

import os
import random
from collections.abc import Sequence

import numpy as np
import torch

# The second element of every key: two uses of random numbers never share a stream.
ORDER, SAMPLE, STEP, WEIGHTS, PROBE = range(5)


def seed_everything(*key: int) -> None:
    """Seeds the generators of random, numpy and torch (all devices) from a key of non-negative integers."""
    seed = seed_host(*key)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def seed_host(*key: int) -> int:
    """The same but for devices, for what is seeded for each image. Returns the seed of torch's generators.

    torch.manual_seed would note a call for each kind of device that the process has not started, with a stack trace:
    milliseconds, and memory that is never given back.
    """
    python, numpy, first, second = (int(word) for word in np.random.SeedSequence(key).generate_state(4))
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(first << 32 | second)
    return first << 32 | second


def set_deterministic(wanted: bool) -> None:
    """Whether torch takes only algorithms that give the same bits each time. To be called before CUDA computes."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(wanted)


def permutation(length: int, *key: int) -> np.ndarray:
    """A permutation of range(length) that depends on the key alone. (length,) int64."""
    return np.random.default_rng(np.random.SeedSequence(key)).permutation(length)


def permutation_in_windows(lengths: Sequence[int], window: int, *key: int) -> np.ndarray:
    """As `permutation` of range(sum(lengths)), but `window` blocks at a time, of these lengths, in random order."""
    rng = np.random.default_rng(np.random.SeedSequence(key))
    blocks = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    order = rng.permutation(len(blocks))
    windows = [order[first : first + window] for first in range(0, len(order), window)]
    return np.concatenate([rng.permutation(np.concatenate([blocks[block] for block in some])) for some in windows])


def whole_number(below: int, *key: int) -> int:
    """One of range(below) that depends on the key alone."""
    return int(np.random.default_rng(np.random.SeedSequence(key)).integers(below))
