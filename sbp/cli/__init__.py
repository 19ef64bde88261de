"""The commands. With train.py, eval.py and scripts/ all that knows Hydra."""
