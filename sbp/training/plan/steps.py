"""The kernels of one training step, from the fake step of the memory forecast, where nothing is computed.

Kernels of two batch sizes give those of any other: what each does is affine in the number of images.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from timm.layers import weight_init
from torch import nn

from sbp.training.config.run import Config
from sbp.training.memory.allocations import CudaCasts
from sbp.training.memory.forecast import TODAY, Forecast, Rules, forecast
from sbp.training.plan.operators import Kernel, Recorder


@dataclass(frozen=True)
class Step:
    """The kernels of a step with a micro batch of so many images, and the forecast of its memory."""

    micro_batch_size: int
    kernels: tuple[Kernel, ...]
    memory: Forecast


def record(config: Config, micro_batch_size: int, rules: Rules = TODAY, *, world_size: int = 1) -> Step:
    """The kernels of one optimizer step with one micro batch, as the memory forecast runs it; of a run of one phase.

    Raises ValueError for what a run with this config would raise it for, data sets aside.
    """
    recorder = Recorder()

    class Recording(rules.casts):  # type: ignore[name-defined, misc]
        """Enters the recorder within the fake mode."""

        def __enter__(self) -> CudaCasts:
            entered = super().__enter__()
            recorder.__enter__()
            return entered

        def __exit__(self, *error: Any) -> None:
            recorder.__exit__(*error)
            super().__exit__(*error)

    class Recorded(type(rules)):  # type: ignore[misc]
        casts = Recording

        def begins(self, part: str) -> None:
            recorder.part = part

        def build(self, config: Config) -> Any:
            with _uninitialised():
                model = super().build(config)
            recorder.weights |= {tuple(p.shape) for p in model.parameters()}
            return model

    memory = forecast(config, micro_batch_size, world_size=world_size, rules=Recorded())
    return Step(micro_batch_size, tuple(recorder.kernels), memory)


@contextmanager
def _uninitialised() -> Iterator[None]:
    """Leaves out what takes longest of building a model on the meta device, where weights have no values anyway."""
    normal = nn.init.trunc_normal_, weight_init._trunc_normal_
    nn.init.trunc_normal_ = lambda tensor, *args, **kwargs: tensor
    weight_init._trunc_normal_ = nn.init.trunc_normal_
    try:
        yield
    finally:
        nn.init.trunc_normal_, weight_init._trunc_normal_ = normal


def alike(small: Sequence[Kernel], large: Sequence[Kernel]) -> tuple[list[Kernel], list[Kernel]]:
    """The kernels of two steps, with one in the place of those whose figures agree in both."""
    pairs: dict[Any, list[Any]] = {}
    for pair in zip(small, large, strict=True):
        figures = tuple((k.flops, k.read, k.written, k.launches, k.rows, k.columns) for k in pair)
        key = pair[0].name, pair[0].kind, pair[0].part, pair[0].cast, figures
        pairs.setdefault(key, [*pair, 0])[2] += pair[0].count
    bare = {"shapes": (), "inputs": (), "outputs": ()}
    first, second = ([replace(one[i], count=one[2], **bare) for one in pairs.values()] for i in (0, 1))
    return first, second


def extrapolated(small: Step, large: Step, micro_batch_size: int) -> Step:
    """The step at any batch size, from those at two: what each kernel does is affine in the number of images.

    Raises ValueError where the two do not run the same kernels.
    """
    if [one.name for one in small.kernels] != [one.name for one in large.kernels]:
        raise ValueError(
            f"steps of {small.micro_batch_size} and {large.micro_batch_size} images run different operators; no "
            "forecast of other batch sizes"
        )
    share = (micro_batch_size - small.micro_batch_size) / (large.micro_batch_size - small.micro_batch_size)

    def between(one: float, other: float) -> float:
        return max(one + (other - one) * share, 0.0)

    def sizes(one: Any, other: Any) -> tuple[tuple[int, float], ...]:
        pairs = zip(one, other, strict=True)
        return tuple((number, between(size, larger)) for (number, size), (_, larger) in pairs)

    kernels = tuple(
        replace(
            one,
            flops=between(one.flops, other.flops),
            read=between(one.read, other.read),
            written=between(one.written, other.written),
            rows=between(one.rows, other.rows),
            inputs=sizes(one.inputs, other.inputs),
            outputs=sizes(one.outputs, other.outputs),
        )
        for one, other in zip(small.kernels, large.kernels, strict=True)
    )
    parts = vars(small.memory)
    memory = Forecast(**{part: round(between(size, vars(large.memory)[part])) for part, size in parts.items()})
    return Step(micro_batch_size, kernels, memory)
