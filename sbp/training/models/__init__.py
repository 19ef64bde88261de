"""Networks, the weights that they start from, and what optimizes them: timm's.

Imports config, runtime and record.
"""
