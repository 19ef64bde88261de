"""What data, detectors and their costs have in common: what an image is to teach, and to what size it is padded."""

from typing import Any

Target = dict[str, Any]  # of one image; `Detector.forward` and augmentation.py say what it holds
MULTIPLE = 32  # px: the stride of a ConvNeXt's last stage


def padded(side: int) -> int:
    """The side of a batch, in pixels, into which an image's fits."""
    return -(-side // MULTIPLE) * MULTIPLE
