"""Scaling laws: points, their errors, fits and diagnostics."""
