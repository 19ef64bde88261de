"""Time and memory of ways to train a network, measured beside one another.

Imports tasks, and what these import.
"""
