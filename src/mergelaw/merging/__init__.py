"""Merging: task vectors of experts, and merges of several experts into one model.

``task_vector`` computes task vectors, ``methods`` defines merge rules, ``engine`` merges in a
resident model or writes a checkpoint, and ``export`` adds a recipe for mergekit.
"""
