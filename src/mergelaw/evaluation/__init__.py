"""Evaluation: which subsets of the experts are merged, and the cross-entropy of these merges."""

from mergelaw.evaluation.table import TABLE, read_cells, read_rows

__all__ = ["TABLE", "read_cells", "read_rows"]
