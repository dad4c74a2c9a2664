"""Merging: what an expert has learned, and how several experts become one model.

Task vectors come from ``task_vector``, rules from ``methods``; ``engine`` merges in a resident
model or writes a checkpoint, ``export`` writes one with its recipe for mergekit.
"""
