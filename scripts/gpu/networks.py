"""The networks that are measured, as published, or tiny ones in their place."""

from dataclasses import dataclass, replace
from typing import Any

from sbp.training.config.model import BackboneConfig, DetectorConfig
from sbp.training.config.requests import BenchmarkConfig, BenchmarkDataConfig

MEMORY_GIB = 24  # of the largest batch: that of a common card


@dataclass(frozen=True)
class Network:
    """As published. compile_seconds: estimated, for one compiled arm."""

    backbone: BackboneConfig
    batch_size: int
    eager_seconds: float
    compile_seconds: float
    detector: str | None = None


NETWORKS = {
    "vit_base": Network(BackboneConfig("vit_base_patch16_224", 0.3, {"img_size": 224}), 64, 180, 80),
    "convnext_base": Network(BackboneConfig("convnext_base", 0.3, {"ls_init_value": 1e-6}), 64, 180, 140),
    "vit_tiny": Network(BackboneConfig("vit_tiny_patch16_224", 0.0, {"img_size": 224}), 256, 180, 80),
    "convnext_tiny": Network(BackboneConfig("convnext_tiny", 0.1, {"ls_init_value": 1e-6}), 128, 150, 90),
    "mask_rcnn_convnext_tiny": Network(
        BackboneConfig("convnext_tiny", 0.4, {"ls_init_value": 1.0}), 2, 180, 0, "mask_rcnn"
    ),
    "cascade_mask_rcnn_convnext_base": Network(
        BackboneConfig("convnext_base", 0.7, {"ls_init_value": 1.0}), 2, 240, 0, "cascade_mask_rcnn"
    ),
}
SMALL: dict[str, dict[str, Any]] = {
    "vit": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
    "convnext": {"depths": (1, 1, 3, 1), "dims": (8, 8, 16, 16), "patch_size": 4},
}


def benchmark_config(name: str, arms: list[str], device: str, small: bool, release: str | None) -> BenchmarkConfig:
    network = NETWORKS[name]
    config = BenchmarkConfig(
        backbone=network.backbone, arms=arms, batch_size=network.batch_size, device=device, release=release,
        rounds=20, memory_gib=MEMORY_GIB, seconds=480,
    )  # fmt: skip
    if network.detector:
        config.task, config.detector = "detection", DetectorConfig(network.detector)
        config.data = BenchmarkDataConfig(image_size=800, num_classes=80)
    if small:
        family = "vit" if name.startswith("vit") else "convnext"
        config.backbone = BackboneConfig(network.backbone.name, network.backbone.drop_path, SMALL[family])
        config.data = BenchmarkDataConfig(image_size=32 if family == "vit" else 64, max_size=96, num_classes=10)
        config.detector = replace(config.detector, fpn_channels=8, hidden_size=16, rois_per_image=16)
        config.batch_size, config.rounds, config.warmup, config.memory_gib = 4, 2, 1, 1
        config.compile_backend, config.threads = "aot_eager_decomp_partition", 1
    return config
