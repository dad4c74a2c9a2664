"""Merging: task vectors of experts, and merges of several experts into one model."""
