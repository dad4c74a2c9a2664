"""Measure the scaling law of model merging, and decide with it."""

__version__ = "0.2.0"
