"""Which settings fit a GPU and which are fastest there, forecast without it.

Imports memory and benchmark, and what these import.
"""
