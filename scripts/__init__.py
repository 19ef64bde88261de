"""Entry points beside train.py and eval.py, and what the entry points share."""
