"""Images: sources, preprocessing, loading.

Imports config, runtime and record.
"""
