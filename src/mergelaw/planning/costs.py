"""Costs of training, merging, evaluating and serving by the size of a base."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mergelaw.errors import MergelawError
from mergelaw.laws.points import TOO_MANY_BILLIONS

KINDS = ("training", "merging", "evaluation", "serving")


@dataclass(frozen=True)
class Costs:
    """Costs at each size.

    Attributes:
        table: one row per size: N (billions), training (one expert), merging and evaluation (one
            merge), serving (a million tokens), all in the same unit; NaN where unknown.
        unit: its name.
    """

    table: pd.DataFrame
    unit: str = "units"

    @classmethod
    def read(cls, path: Path) -> "Costs":
        """Read a CSV file with the column N and any of the others; missing columns cost 0."""
        try:
            table = pd.read_csv(path)
        except (ValueError, OSError) as error:
            raise MergelawError(f"{path}: {error}; give a CSV of costs by N") from None
        unknown = [str(name) for name in table if name not in ("N", *KINDS)]
        if unknown or "N" not in table or table.empty:
            raise MergelawError(
                f"{path}: needs rows with the column N and any of {', '.join(KINDS)}"
                + (f", not {', '.join(unknown)}" if unknown else "")
            )
        costs = table.apply(pd.to_numeric, errors="coerce").astype(float)
        wrong = ~np.isfinite(costs) | (costs < 0)
        wrong["N"] |= ~costs["N"].between(0, TOO_MANY_BILLIONS, inclusive="neither")
        if wrong.any(axis=None):
            row, column = np.argwhere(wrong.to_numpy())[0]
            raise MergelawError(
                f"{path}: row {row + 1} has {table.columns[column]} = {table.iloc[row, column]}; "
                "give N in billions above 0, and costs of 0 or more"
            )
        return cls(costs.reindex(columns=["N", *KINDS], fill_value=0.0))

    def at(self, N: float, kind: str) -> float:
        """Cost of one kind at a size (billions); a power law in N between and beyond the sizes.

        A cost of 0 at this size stays 0. A kind without any cost above 0 is free.
        """
        here = self.table.loc[np.isclose(self.table["N"], N), kind].dropna()
        priced = self.table[self.table[kind] > 0].groupby("N")[kind].mean()
        if priced.empty or (len(here) and not here.any()):
            return 0.0
        sizes, costs = np.log(priced.index.to_numpy(dtype=float)), np.log(priced.to_numpy())
        if len(sizes) == 1:  # proportional to N
            return float(np.exp(costs[0] + math.log(N) - sizes[0]))
        if sizes[0] <= math.log(N) <= sizes[-1]:
            return float(np.exp(np.interp(math.log(N), sizes, costs)))
        slope, start = np.polyfit(sizes, costs, 1)
        return float(np.exp(start + slope * math.log(N)))

    def of_merge(self, N: float) -> float:
        """Cost of one merge with its evaluation at a size (billions)."""
        return self.at(N, "merging") + self.at(N, "evaluation")
