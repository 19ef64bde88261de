"""Runs: what they are built from, their steps and epochs, evaluation and export.

Imports memory, tasks, and what these import.
"""
