"""What a run trains, classification or detection: all that differs between them.

Imports config, runtime, record, data and models.
"""
