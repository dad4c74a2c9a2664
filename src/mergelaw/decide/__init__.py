"""Decisions on measured merges: the best one, a verdict on each expert, comparisons of two."""

from mergelaw.decide.best import Best, best
from mergelaw.decide.experts import Verdict, experts, flagged, verdicts
from mergelaw.decide.measured import Difference, Measured, by_base
from mergelaw.decide.objective import Objective

__all__ = [
    "Best",
    "Difference",
    "Measured",
    "Objective",
    "Verdict",
    "best",
    "by_base",
    "experts",
    "flagged",
    "verdicts",
]
