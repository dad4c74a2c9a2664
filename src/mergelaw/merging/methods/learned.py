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
    import pandas as pd

    from mergelaw.merging.kernels import Rule

FEWEST = 4  # calibration documents of a domain, of which a third is held out
COEFFICIENTS = "coefficients.parquet"  # columns: merge, expert, tensor, block, coefficient, norm


def read_coefficients(folder: Path) -> dict[tuple[str, ...], pd.DataFrame]:
    """Tables of learned coefficients by the experts of the merge, in canonical order."""
    import pandas as pd

    merges = pd.read_parquet(folder / COEFFICIENTS).groupby("merge")
    return {tuple(table["expert"].unique()): table for _, table in merges}


def weights_of(table: pd.DataFrame) -> dict[str, list[float]]:
    """Learned weights of a merge by tensor, in the order of its experts."""
    weights = table["coefficient"].to_numpy().reshape(table["expert"].nunique(), -1)
    return dict(zip(table["tensor"], weights.T.tolist(), strict=False))


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
    subsets: Literal["pool", "design"] = Field(
        "pool",
        description="what is learned: the merge of each base's whole pool, or every merge of the "
        "design, so that a law is fitted",
    )

    def recipe(self) -> dict[str, Any]:
        """The settings without ``subsets``: which merges are learned does not change a merge."""
        return self.model_dump(by_alias=True, exclude={"subsets"})

    def rule(self, weights: Sequence[float]) -> Rule:
        from mergelaw.merging.kernels import Rule

        return Rule("", weights)

    def mergekit(self) -> dict[str, Any]:
        return {"merge_method": "task_arithmetic", "parameters": {"normalize": False}}
