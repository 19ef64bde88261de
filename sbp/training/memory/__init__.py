"""The peak memory of a training step, forecast without a GPU.

Imports tasks, and what these import.
"""
