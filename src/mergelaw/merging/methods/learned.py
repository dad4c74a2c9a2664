"""Learned: coefficients for every expert and part of the model, fitted to calibration documents.

The module ``decide.learned`` fits them; here they are weights by tensor. Related: aTLAS (Zhang et
al. 2024), AdaMerging (Yang et al. 2024), Expert Merging (2509.25712).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mergelaw.merging.methods.base import Method

if TYPE_CHECKING:
    from mergelaw.merging.kernels import Rule

FEWEST = 4  # calibration documents of a domain, of which a third is held out
COEFFICIENTS = "coefficients.parquet"  # columns: expert, tensor, block, coefficient, norm


def read_coefficients(folder: Path, experts: Sequence[str]) -> dict[str, list[float]]:
    """Learned weights by tensor, in the order of ``experts``."""
    import pandas as pd

    table = pd.read_parquet(folder / COEFFICIENTS)
    columns = [table[table["expert"] == expert].set_index("tensor") for expert in experts]
    return {
        str(name): [float(column.loc[name, "coefficient"]) for column in columns]
        for name in columns[0].index
    }


class Learned(Method):
    """theta = theta_0 + sum_i c_ib v_ib, with c learned for each expert i and part b."""

    method: Literal["learned"] = "learned"
    by: Literal["auto", "scale", "expert", "block", "tensor"] = Field(
        "auto",
        description="parts with coefficients of their own; auto: the finest that holds on "
        "held-out calibration documents",
    )
    gradients: int = Field(
        5, ge=1, le=100, description="most gradients of the calibration loss for one granularity"
    )

    def rule(self, weights: Sequence[float]) -> Rule:
        from mergelaw.merging.kernels import Rule

        return Rule("", weights)

    def mergekit(self) -> dict[str, Any]:
        return {"merge_method": "task_arithmetic", "parameters": {"normalize": False}}
