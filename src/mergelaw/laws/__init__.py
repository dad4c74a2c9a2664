"""Scaling laws of merging: points and their errors, fits with intervals, diagnostics.

``fit(LAW, table)`` fits one law, ``fit_all(points)`` all laws of a table; ``LAWS`` lists the laws.
"""

from mergelaw.laws.fit import Fit, fit, fit_points
from mergelaw.laws.fits import fit_all, fit_study
from mergelaw.laws.law import LAWS, MERGING, MERGING_FIXED_N, Law
from mergelaw.laws.points import points, read_points
from mergelaw.laws.result import DOCUMENTS, EXPERTS, LEVEL, POOL

__all__ = [
    "DOCUMENTS",
    "EXPERTS",
    "LAWS",
    "LEVEL",
    "MERGING",
    "MERGING_FIXED_N",
    "POOL",
    "Fit",
    "Law",
    "fit",
    "fit_all",
    "fit_points",
    "fit_study",
    "points",
    "read_points",
]
