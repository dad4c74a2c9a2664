"""Decisions on measured merges: the best one, a verdict on each expert, comparisons of two."""
