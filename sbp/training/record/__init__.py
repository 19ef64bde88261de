"""What a run leaves behind: files, status, metrics, checkpoints, incidents, progress.

Imports config and runtime.
"""
