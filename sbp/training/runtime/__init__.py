"""Where a run takes place: processes, signals, random numbers, precision, compiled and captured passes.

Imports nothing else of the framework.
"""
