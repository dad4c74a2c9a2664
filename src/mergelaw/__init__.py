"""Measure the scaling law of model merging, and decide with it.

For a notebook::

    study = mergelaw.Study(mergelaw.load("config/config.yaml"))
    cells = mergelaw.read_rows([...])  # folders of evaluations
    fitted = mergelaw.fit(mergelaw.MERGING_FIXED_N, table)  # columns k and ce

Names are imported when they are used, so that ``import mergelaw`` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergelaw.config import load
    from mergelaw.evaluation import read_rows
    from mergelaw.laws import MERGING, MERGING_FIXED_N, Law, fit, read_points
    from mergelaw.merging.engine import Merger
    from mergelaw.merging.task_vector import TaskVector
    from mergelaw.workflow.study import Study

__version__ = "0.2.0"

_MODULES = {
    "Law": "laws",
    "MERGING": "laws",
    "MERGING_FIXED_N": "laws",
    "Merger": "merging.engine",
    "Study": "workflow.study",
    "TaskVector": "merging.task_vector",
    "fit": "laws",
    "load": "config",
    "read_rows": "evaluation",
    "read_points": "laws",
}
__all__ = [
    "MERGING",
    "MERGING_FIXED_N",
    "Law",
    "Merger",
    "Study",
    "TaskVector",
    "fit",
    "load",
    "read_points",
    "read_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mergelaw' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mergelaw.{_MODULES[name]}"), name)
