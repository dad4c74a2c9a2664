"""Fitting a law to points: generalised least squares, intervals and diagnostics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from mergelaw.errors import MergelawError
from mergelaw.laws.covariance import Part
from mergelaw.laws.diagnostics import Diagnostics, or_none
from mergelaw.laws.law import Array, Law
from mergelaw.laws.result import LEVEL
from mergelaw.laws.solve import solve, solve_again
from mergelaw.laws.summary import fit_text


class Fit(Diagnostics):
    """A law fitted to a table, with its diagnostics."""

    def refit(self, law: Law, kept: NDArray[np.bool_] | None = None) -> "Fit":
        """Fit another law, or this one, to the same points or to those in a mask."""
        solution = self.solution
        kept = np.ones(self.n_points, dtype=bool) if kept is None else kept
        # The laws' shared exponents are about equal, so a smaller grid of starts is enough.
        starts = {
            name: tuple(sorted({box[0], self.parameters[name], box[-1]}))
            if name in ("beta", "gamma") and name in self.law.nonlinear
            else box
            for name, box in law.nonlinear.items()
        }
        table = {name: values[kept] for name, values in self.variables.items()}
        return fit(
            replace(law, nonlinear=starts),
            {**table, law.response: self.loss[kept]},
            covariance=[part.select(kept) for part in solution.parts],
            misfit=solution.misfit,
            scatter=solution.scatter,
        )

    def summary(self) -> str:
        """The fit as text: parameters, quality, hold-out forecasts, rivals and warnings."""
        return fit_text(self.to_dict(), self.law.equation)

    def to_dict(self) -> dict[str, Any]:
        """The fit as values that strict JSON can hold; undefined numbers are None."""
        return {
            "law": self.law.name,
            "parameters": dict(self.parameters),
            "level": LEVEL,
            "intervals": {n: list(map(or_none, ends)) for n, ends in self.intervals.items()},
            "experts_intervals": {
                n: list(map(or_none, ends)) for n, ends in self.experts_intervals.items()
            },
            "r2": or_none(self.r2),
            "rmse": self.rmse,
            "misfit": or_none(self.misfit),
            "scatter": or_none(self.scatter),
            "freedom": or_none(self.freedom),
            "aicc": or_none(self.aicc),
            "rivals": list(self.rivals),
            "left_out": dict(self.holdout),
            "runs": self.runs,
            "n_points": self.n_points,
            "residuals": self.residuals.tolist(),
            "warnings": list(map(str, self.warnings)),
            "doubts": list(map(str, self.doubts)),
        }


def fit(
    law: Law,
    table: pd.DataFrame | Mapping[str, ArrayLike],
    *,
    covariance: ArrayLike | Sequence[Part] | None = None,
    misfit: float | None = None,
    scatter: float | None = None,
    jackknife: Sequence[pd.DataFrame] = (),
) -> Fit:
    """Fit a law by generalised least squares; no starting values are needed.

    The points' covariance is ``covariance`` + misfit^2 1 + scatter^2 Z Z': errors of measurement,
    of the law at each point, and of the law in common at each base.

    Args:
        law: one of ``LAWS``, or a law of your own.
        table: the law's variables by name (N > 0 in billions of parameters, k >= 1) and the loss
            ``ce`` (nats per token, > 0), or the law's other response; optionally standard errors
            ``se``.
        covariance: (points, points), in the table's order, or its parts; replaces ``se``.
        misfit, scatter: standard deviations (nats per token). None estimates them from the
            residuals: misfit needs more points than parameters, scatter five sizes or more.
        jackknife: for intervals about experts like these, one table per expert: some of the rows,
            with the losses without that expert.

    Raises:
        MergelawError: missing or impossible values, or too few points or levels of a variable.
    """
    for name, value in (("misfit", misfit), ("scatter", scatter)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise MergelawError(f"{name} is {value:g}: give a standard deviation of 0 or more")
    variables, loss = _checked(law, table)
    parts = _parts(table, covariance, len(loss))
    if misfit == 0 and not parts:
        raise MergelawError(
            "misfit 0 without standard errors leaves no uncertainty at all: omit it"
        )
    # Sums of floats depend on the order of the points, so sort them.
    order = np.lexsort((loss, *reversed(variables.values())))
    ordered = {name: values[order] for name, values in variables.items()}
    selected = tuple(part.select(order) for part in parts)
    solution = solve(law, ordered, loss[order], selected, misfit, scatter)
    residuals = np.empty_like(loss)
    residuals[order] = solution.residuals
    return Fit(
        law=law,
        parameters=solution.problem.parameters(solution.state),
        residuals=residuals,
        solution=solution,
        jackknife=tuple(solve_again(solution, *_checked(law, other)) for other in jackknife),
    )


def _parts(
    table: pd.DataFrame | Mapping[str, ArrayLike],
    covariance: ArrayLike | Sequence[Part] | None,
    points: int,
) -> tuple[Part, ...]:
    """Known parts of the points' covariance, checked, without zero parts."""
    if covariance is None:
        if "se" not in table:
            return ()
        errors = np.asarray(table["se"], dtype=float)
        if not np.isfinite(errors).all() or (errors < 0).any():
            raise MergelawError(
                "column se has values below 0 or not finite: give standard errors of 0 or more"
            )
        return (Part(np.diag(errors**2)),) if errors.any() else ()
    if isinstance(covariance, Sequence) and all(isinstance(part, Part) for part in covariance):
        parts = tuple(part for part in covariance if isinstance(part, Part))
    else:
        parts = (Part(np.asarray(covariance, dtype=float)),)
    for part in parts:
        matrix = part.matrix
        if matrix.shape != (points, points) or not np.isfinite(matrix).all():
            raise MergelawError(
                f"covariance has the shape {matrix.shape} or values that are not finite: give a "
                f"finite matrix of {points} by {points}, in the order of the table's rows"
            )
        least = np.linalg.eigvalsh(matrix)[0]
        if not np.allclose(matrix, matrix.T) or least < -1e-9 * np.abs(matrix).max():
            raise MergelawError(
                "covariance is not symmetric with eigenvalues >= 0: give one that is"
            )
    return tuple(part for part in parts if part.matrix.any())


def _checked(
    law: Law, table: pd.DataFrame | Mapping[str, ArrayLike]
) -> tuple[dict[str, Array], Array]:
    """The law's variables and the loss as arrays of floats, checked."""
    names = (*law.levels, law.response)
    for name in names:
        if name not in table:
            raise MergelawError(f"law {law.name} needs a column {name}: add it to the table")
    columns = {name: np.asarray(table[name], dtype=float) for name in names}
    for name, values in columns.items():
        if not np.isfinite(values).all():
            raise MergelawError(f"column {name} has values that are not finite: drop those rows")
        least = values.min(initial=math.inf)
        if least < 0 or (least == 0 and name != "variance"):
            raise MergelawError(f"column {name} has the value {least:g}: give values above 0")
    loss = columns.pop(law.response)
    if "k" in columns and (columns["k"] < 1).any():
        raise MergelawError(
            f"column k has the value {columns['k'].min():g}: drop the row, a merge has k >= 1"
        )
    if "k" in columns and "M" in columns and (columns["k"] > columns["M"]).any():
        raise MergelawError("column k has values above M: a pool of M experts has no such merge")
    for name in law.fixed:
        if name in table and len(np.unique(np.asarray(table[name]))) > 1:
            raise MergelawError(
                f"law {law.name} is for one value of {name} but the table has several: "
                f"fit them separately, or fit a law of {name}"
            )
    for name, levels in law.levels.items():
        distinct = np.unique(columns[name])
        if len(distinct) < levels:
            listed = ", ".join(f"{value:g}" for value in distinct)
            raise MergelawError(
                f"law {law.name} needs {levels} different values of {name}, the table has "
                f"{len(distinct)} ({listed}): measure more, or fit a law without {name}"
            )
    if len(loss) < len(law.parameters):
        raise MergelawError(
            f"law {law.name} has {len(law.parameters)} parameters and the table {len(loss)} "
            "points: measure more levels of " + " or ".join(law.levels)
        )
    return columns, loss
