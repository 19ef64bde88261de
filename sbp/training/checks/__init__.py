"""What is wrong with a data set, found before training.

Imports tasks, and what these import.
"""
