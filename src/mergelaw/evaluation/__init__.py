"""Evaluation: which subsets are merged, and their cross-entropy."""
