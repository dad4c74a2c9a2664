"""Measure the scaling law of model merging, and plan with it."""

__version__ = "0.1.0"
