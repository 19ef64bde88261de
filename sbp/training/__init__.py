"""The training framework: plain Python, without Hydra. `train.py` and `eval.py` put its parts together."""
