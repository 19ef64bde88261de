"""The arms of the benchmark as settings of a run, so that what was measured can be compared with a forecast."""

from dataclasses import asdict, fields

from sbp.training.benchmark.arms import ARMS, Arm
from sbp.training.config.images import DataConfig
from sbp.training.config.model import BackboneConfig, SbpConfig
from sbp.training.config.requests import BenchmarkConfig, BenchmarkSbpConfig
from sbp.training.config.run import Config
from sbp.training.memory.forecast import Rules
from sbp.training.plan.gpus import Gpu
from sbp.training.plan.steps import Step, record
from sbp.training.plan.times import How, Times, forecast_times


class BenchmarkRules(Rules):
    """The benchmark's step: the images belong to the arm."""

    images_stay = True


def arm_config(backbone: BackboneConfig, name: str, batch_size: int, like: Config | None = None) -> Config:
    """The config of a run whose step is the arm's. Raises ValueError for an arm that is not one of ours.

    like: a run of which it has what `sbp benchmark` has keys for, too; None for the benchmark's own defaults.
    """
    if name not in ARMS or not has_forecast(ARMS[name]):
        known = [one for one, arm in ARMS.items() if has_forecast(arm)]
        raise ValueError(f"arms: no forecast of {name!r}; there are {', '.join(known)}")
    arm, given = ARMS[name], BenchmarkConfig() if like is None else like
    own = {field.name: getattr(given.sbp, field.name) for field in fields(BenchmarkSbpConfig)}
    settings = SbpConfig(enabled=False) if arm.sbp is None else SbpConfig(**asdict(SbpConfig()) | own | arm.sbp)
    return Config(
        backbone=backbone,
        sbp=settings,
        data=DataConfig(num_classes=given.data.num_classes, image_size=given.data.image_size),
        amp=given.amp,
        channels_last=given.channels_last,
        global_batch_size=batch_size,
    )


def has_forecast(arm: Arm) -> bool:
    """Not the authors' release, nor what is no setting of a run: checkpointing and PatchDropout."""
    return not (arm.release or arm.patch_drop or arm.checkpointing)


def recorded(config: Config, micro_batch_size: int) -> Step:
    """The arm's step."""
    return record(config, micro_batch_size, BenchmarkRules())


def arm_times(name: str, step: Step, gpu: Gpu, amp: str = "bfloat16") -> Times:
    """Of the arm's step."""
    arm = ARMS[name]
    how = How(arm.compile is not None, arm.graph, arm.cast_together)
    recompute = (arm.sbp or {}).get("recompute", "none") != "none"
    return forecast_times(step, gpu, how, recompute=recompute, amp=amp)
