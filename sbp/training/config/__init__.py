"""What a run can be told: every key with its meaning, default and limits.

Imports nothing else of the framework.
"""
