"""Detection of objects and their masks: detectors on timm backbones, COCO data, and average precision."""
