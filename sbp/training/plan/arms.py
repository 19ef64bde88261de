"""The arms of the benchmark as settings of a run, so that what was measured can be compared with a forecast."""

from dataclasses import asdict

from sbp.training.benchmark.arms import ARMS
from sbp.training.config.images import DataConfig
from sbp.training.config.model import BackboneConfig, SbpConfig
from sbp.training.config.run import Config
from sbp.training.memory.forecast import Rules
from sbp.training.plan.gpus import Gpu
from sbp.training.plan.steps import Step, record
from sbp.training.plan.times import How, Times, forecast_times


class BenchmarkRules(Rules):
    """The benchmark's step: the images belong to the arm."""

    images_stay = True


def arm_config(
    backbone: BackboneConfig, name: str, batch_size: int, image_size: int = 224, amp: str = "bfloat16"
) -> Config:
    """The config of a run whose step is the arm's. Raises ValueError for an arm that is not one of ours."""
    arm = ARMS.get(name)
    if arm is None or arm.release or arm.patch_drop or arm.checkpointing:
        known = [one for one, arm in ARMS.items() if not (arm.release or arm.patch_drop or arm.checkpointing)]
        raise ValueError(f"arms: no forecast of {name!r}; there are {', '.join(known)}")
    settings = SbpConfig(enabled=False) if arm.sbp is None else SbpConfig(**asdict(SbpConfig()) | arm.sbp)
    data = DataConfig(num_classes=1000, image_size=image_size)
    return Config(backbone=backbone, sbp=settings, data=data, amp=amp, global_batch_size=batch_size)


def recorded(config: Config, micro_batch_size: int) -> Step:
    """The arm's step."""
    return record(config, micro_batch_size, BenchmarkRules())


def arm_times(name: str, step: Step, gpu: Gpu, amp: str = "bfloat16") -> Times:
    """Of the arm's step."""
    arm = ARMS[name]
    how = How(arm.compile is not None, arm.graph, arm.cast_together)
    recompute = (arm.sbp or {}).get("recompute", "none") != "none"
    return forecast_times(step, gpu, how, recompute=recompute, amp=amp)
