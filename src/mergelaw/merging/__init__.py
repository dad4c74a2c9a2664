"""Merging: task vectors, the engine and its methods."""
