"""Typed configs: what configs/ and the command line make, with a schema that knows every key."""

from collections.abc import Sequence
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from sbp.cli.torchrun import ROOT
from sbp.training.config.describe import as_text
from sbp.training.config.model import SbpConfig
from sbp.training.config.requests import BenchmarkConfig, CalibrateConfig, EvalConfig, ExportConfig
from sbp.training.config.rules import validate
from sbp.training.config.run import Config

C = TypeVar("C", bound=Config | EvalConfig | ExportConfig | BenchmarkConfig | CalibrateConfig)


KINDS: dict[str, type] = {}  # of which a command's keys are the fields


def register(name: str, kind: type) -> None:
    """The keys of configs/NAME.yaml are the fields of this dataclass."""
    KINDS[name] = kind
    ConfigStore.instance().store(name=f"{name}_schema", node=kind)


register("train", Config)
register("eval", EvalConfig)
register("export", ExportConfig)
register("benchmark", BenchmarkConfig)

# Beside the package in a checkout, within it where it was installed from a wheel.
CONFIGS = next(one for one in (ROOT / "configs", ROOT / "sbp" / "configs") if (one / "train.yaml").is_file())


def typed(given: DictConfig, kind: type[C]) -> C:
    """The composed config as plain dataclasses. Raises OmegaConf's errors for a key or value the schema lacks.

    Hydra lets `+sbp.typo=1` through, even into a typed config; merging into the schema once more does not.
    """
    plain = OmegaConf.to_container(given, resolve=True)
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), plain))  # type: ignore[return-value]


def composed(overrides: Sequence[str]) -> Config:
    """The config that `python train.py *overrides` runs with, validated."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return validate(typed(compose("train", list(overrides)), Config))


def all_keys(*, _root_: DictConfig) -> str:
    """The keys of a command with their meaning, for --help."""
    plain: Any = OmegaConf.to_container(OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"]))
    text = as_text(KINDS[_root_.hydra.job.name], plain)
    return text.replace("$", "$$")  # Hydra fills in what stands behind a single one


OmegaConf.register_new_resolver("all_keys", all_keys, replace=True)
OmegaConf.register_new_resolver("or_one", lambda number: number or 1, replace=True)


def for_attention(name: str, mhsa_drop: str) -> str:
    """sbp.mhsa_drop of a timm model of this name: the published one where there is no attention."""
    return SbpConfig.mhsa_drop if name.startswith("convnext") else mhsa_drop


OmegaConf.register_new_resolver("for_attention", for_attention, replace=True)
