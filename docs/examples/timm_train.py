"""timm's own train.py, from a checkout of timm, with SBP: only the function that makes the model is another one.

python timm_train.py .../pytorch-image-models/train.py --model vit_small_patch16_224 --data-dir DIR --amp ...

SBP_KEEP_RATIO and SBP_RECOMPUTE in the environment set what they say.
"""

import os
import runpy
import sys

import timm.models

import sbp

_create_model = timm.models.create_model


def create_model(*args, **kwargs):
    keep_ratio = float(os.environ.get("SBP_KEEP_RATIO", 0.5))
    model = sbp.apply(
        _create_model(*args, **kwargs), keep_ratio=keep_ratio, recompute=os.environ.get("SBP_RECOMPUTE", "none")
    )
    print(model)
    return model


if __name__ == "__main__":
    timm.models.create_model = create_model
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
