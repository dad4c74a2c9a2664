"""Fitting a law to points: generalised least squares, intervals and diagnostics."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

from mergelaw.errors import MergelawError
from mergelaw.laws.covariance import (
    Errors,
    checked_covariance,
    errors_of,
    sampling_covariance,
)
from mergelaw.laws.diagnostics import Diagnostics
from mergelaw.laws.law import Array, Law
from mergelaw.laws.projection import Problem, State
from mergelaw.laws.result import LEVEL, POOL, Solution, free_parameters
from mergelaw.laws.summary import fit_text

# What a law needs several of, and what to do if there are too few.
WANTED = {
    "N": ("sizes N of bases", "add bases; every base has a law of its own"),
    "k": ("numbers of experts k", "measure merges of other k, or train more experts"),
}
# Rounds of robust weights at most.
REWEIGHTED = 50


class Fit(Diagnostics):
    """A law fitted to a table, with its diagnostics."""

    def refit(self, law: Law, kept: NDArray[np.bool_] | None = None) -> "Fit":
        """Fit another law, or this one, to the same points or to those in a mask."""
        solution = self.solution
        kept = np.ones(self.n_points, dtype=bool) if kept is None else kept
        table = {name: values[kept] for name, values in self.variables.items()}
        covariance = solution.covariance
        if covariance is not None:
            covariance = covariance[kept] if covariance.ndim == 1 else covariance[kept][:, kept]
        misfit, scatter = solution.fixed
        near = solution.state.theta if law is self.law else None
        scale = solution.errors.scale[kept]
        return _fitted(
            law, table, self.loss[kept], covariance, misfit, scatter, near=near, scale=scale
        )

    def summary(self) -> str:
        """The fit as text: parameters, quality, verdict, hold-out forecasts, forms and warnings."""
        return fit_text(self.to_dict(), self.law.equation)

    def to_dict(self) -> dict[str, Any]:
        """The fit as values that strict JSON can hold; undefined numbers are None."""
        values = {
            "law": self.law.name,
            "parameters": dict(self.parameters),
            "on_bound": list(self.on_bound),
            "level": LEVEL,
            "population": POOL,
            "intervals": self.intervals,
            "experts_intervals": self.experts_intervals,
            "verdict": self.verdict,
            "r2": self.r2,
            "rmse": self.rmse,
            "misfit": self.misfit,
            "scatter": self.scatter,
            "freedom": self.freedom,
            "aicc": self.aicc,
            "rivals": self.rivals,
            "left_out": self.holdout,
            "outliers": self.outliers,
            "runs": self.runs,
            "n_points": self.n_points,
            "residuals": self.residuals.tolist(),
            "warnings": list(map(str, self.warnings)),
            "doubts": list(map(str, self.doubts)),
        }
        return {name: plain(value) for name, value in values.items()}


def plain(value: Any) -> Any:
    """The value as strict JSON can hold it: no tuples, no infinite or undefined numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def fit(
    law: Law,
    table: pd.DataFrame | Mapping[str, ArrayLike],
    *,
    covariance: Any = None,
    documents: ArrayLike | None = None,
    misfit: float | None = None,
    scatter: float | None = None,
    jackknife: Sequence[pd.DataFrame] = (),
    robust: bool = False,
) -> Fit:
    """Fit a law by generalised least squares; no starting values are needed.

    The points' covariance is ``covariance`` + misfit^2 1 + scatter^2 Z Z': errors of measurement,
    of the law at each point, and of the law in common at each base. Points of a study, which carry
    their errors, are fitted by ``fit_points``.

    Args:
        law: one of ``LAWS``, or a law of your own.
        table: the law's variables by name (N > 0 in billions of parameters, k >= 1) and the loss
            ``ce`` (nats per token, > 0), or the law's other response; optionally standard errors
            ``se``, independent between points.
        covariance: (points, points), in the table's order; replaces ``se``. One between bases
            replaces the scatter.
        documents: (points, any), a factor F of the covariance F F' over documents like the
            evaluated ones. It widens intervals of that population and weights nothing.
        misfit, scatter: standard deviations (nats per token). None estimates them: the misfit from
            residuals, which needs more points than parameters, the scatter also from a prior.
        jackknife: for intervals about experts like these, one table per expert: some of the rows,
            with the losses without that expert.
        robust: as if logarithms were fitted, points far off the law get less weight (Huber 1964,
            its scale from the median); intervals are those of Huber's sandwich (1973).

    Raises:
        MergelawError: missing or impossible values, or too few points or levels of a variable.
    """
    for name, value in (("misfit", misfit), ("scatter", scatter)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise MergelawError(f"{name} is {value:g}: give a standard deviation of 0 or more")
    variables, loss = _checked(law, table)
    noise = _noise(table, covariance, len(loss))
    if misfit == 0 and noise is None:
        raise MergelawError(
            "misfit 0 without standard errors leaves no uncertainty at all: omit it"
        )
    # Sums of floats depend on the order of the points, so sort them.
    order = np.lexsort((loss, *reversed(variables.values())))
    if noise is not None:
        noise = noise[order] if noise.ndim == 1 else noise[order][:, order]
    factor = None if documents is None else np.asarray(documents, dtype=float)[order]
    ordered = {name: values[order] for name, values in variables.items()}
    once = partial(_fitted, law, ordered, loss[order], noise, misfit, scatter)
    once = partial(once, documents=factor, order=np.argsort(order), jackknife=jackknife)
    fitted = once()
    return _reweighted(fitted, once) if robust else fitted


def _reweighted(fitted: Fit, once: Callable[..., Fit]) -> Fit:
    """The fit repeated with weights from its own residuals, until these stay the same."""
    from statsmodels.robust.norms import HuberT
    from statsmodels.robust.scale import mad

    scale = np.ones(len(fitted.loss))
    for _ in range(REWEIGHTED):
        share = fitted.solution.shares
        residuals = fitted.solution.residuals / share
        deviation = max(float(mad(residuals, center=0)), fitted.solution.errors.least)
        weights = np.sqrt(HuberT().weights(residuals / deviation)) / share
        if np.abs(weights - scale).max() < 1e-6:
            break
        scale = weights
        fitted = once(near=fitted.solution.state.theta, scale=scale)
    return fitted


def fit_points(law: Law, points: pd.DataFrame, misfit: float | None = None) -> Fit:
    """Fit a law to points of one method, family and domain with all that they carry.

    Every fit of a study, a report, a forecast and a plan is made here, so they give one answer.

    Args:
        points: N, k, ce, base and, if known, the errors of ``noise.describe`` or ``se``.
        misfit: standard deviation (nats per token); None estimates it.

    Raises:
        MergelawError: as ``fit``.
    """
    documents = None
    if "documents" in points and points["documents"].notna().all():
        documents = np.vstack(points["documents"].to_list())
    tables: list[pd.DataFrame] = []
    if "without" in points:
        rest = points[points["without"].notna()]
        few = any(rest[name].nunique() < levels for name, levels in law.levels.items())
        one_pool = len({*map(len, rest["without"])}) == 1
        if one_pool and not few and len(rest) >= len(law.parameters):
            tables = [rest.assign(ce=ce) for ce in np.transpose(rest["without"].to_list())]
    table = points.drop(columns=[name for name in ("se",) if name in points])
    return fit(
        law,
        table,
        covariance=sampling_covariance(points),
        documents=documents,
        misfit=misfit,
        jackknife=tables,
    )


def measured_mean(
    point: Mapping[Any, Any], fitted: Fit | None, level: float = LEVEL
) -> tuple[float, tuple[float, float] | None]:
    """A measured mean loss and its sampling interval (nats per token); None if that is unknown.

    Without a standard error the law's misfit, the residuals' spread, stands for it.

    Args:
        point: a row of a table of points; fitted: the law of its base.
    """
    loss, error = float(point["ce"]), float(point.get("se", math.nan))
    freedom = float(point.get("freedom", math.nan))
    freedom = float(point.get("circles", math.nan)) - 1 if math.isnan(freedom) else freedom
    some = error == 0 and point.get("subsets", math.inf) < math.comb(
        int(point["M"]), int(point["k"])
    )
    if math.isnan(error) or some:
        error, freedom = (math.nan, 0.0) if fitted is None else (fitted.misfit, fitted.freedom)
    share = (1 + level) / 2
    reach = error * float(stdtrit(freedom, share) if 0 < freedom < math.inf else ndtri(share))
    return loss, None if math.isnan(reach) else (loss - reach, loss + reach)


def _fitted(
    law: Law,
    variables: Mapping[str, Array],
    loss: Array,
    covariance: Any,
    misfit: float | None,
    scatter: float | None,
    documents: Array | None = None,
    order: NDArray[np.intp] | None = None,
    jackknife: Sequence[pd.DataFrame] = (),
    near: Array | None = None,
    scale: Array | None = None,
) -> Fit:
    """Fit of checked points in the solver's order; residuals are put in the ``order``."""
    _check_levels(law, variables, loss)
    shares_bases = {"N", "k"} <= variables.keys() and len(np.unique(variables["N"])) < len(loss)
    errors = errors_of(loss, variables["N"] if shares_bases else None, covariance, scale)
    plain_problem = Problem(law, variables, loss)
    state = plain_problem.minimum(near)
    used = misfit
    if misfit is None and covariance is not None and len(loss) <= len(law.parameters):
        used = 0.0  # the standard errors are all that is known
    if used is None and len(loss) <= len(law.parameters):
        problem, likeliest, freedom = plain_problem, (math.nan, scatter or 0.0), 0.0
    else:
        problem, state, likeliest = _weighted(plain_problem, state, errors, used, scatter)
        free = int(free_parameters(problem, state).sum())
        freedom = float(len(loss) - free) if used is None else math.inf
    solution = Solution(
        problem=problem,
        state=state,
        loss=loss,
        errors=errors,
        misfit=likeliest[0],
        scatter=likeliest[1],
        fixed=(misfit, scatter),
        covariance=covariance,
        documents=documents,
        freedom=freedom,
    )
    return Fit(
        law=law,
        parameters=problem.parameters(state),
        residuals=solution.residuals if order is None else solution.residuals[order],
        solution=solution,
        jackknife=tuple(_again(solution, *_checked(law, other)) for other in jackknife),
    )


def _weighted(
    plain_problem: Problem,
    state: State,
    errors: Errors,
    misfit: float | None,
    scatter: float | None,
) -> tuple[Problem, State, tuple[float, float]]:
    """Weighted minimum, with the likeliest misfit and scatter."""
    law, variables = plain_problem.law, plain_problem.variables
    loss = plain_problem.loss * plain_problem.size
    problem = plain_problem
    # Equal errors do not weight the points, and losses without noise need no weights.
    exact = state.squares * plain_problem.size**2 < len(loss) * errors.least**2
    even = not errors.variances.any() and (exact or not len(errors.starts))
    even = even and bool((errors.scale == 1).all())
    for _ in range(1 if even else 2):
        left = loss - law.predict(problem.parameters(state), **variables)
        slopes = plain_problem.slopes(state) * problem.size
        tangent = np.column_stack([plain_problem.columns(state.theta), slopes])
        tangent = tangent[:, free_parameters(problem, state)]
        likeliest = errors.likeliest(left, tangent, misfit, scatter)[:2]
        if not even:
            problem = Problem(law, variables, loss, errors.whitener(*likeliest))
            state = problem.descend(problem.project(state.theta))
    return problem, state, likeliest


def _again(solution: Solution, variables: Mapping[str, Array], loss: Array) -> dict[str, float]:
    """Parameters of a law refitted to other losses at some points."""
    problem = Problem(solution.problem.law, variables, loss)
    return problem.parameters(problem.descend(problem.project(solution.state.theta)))


def _noise(table: pd.DataFrame | Mapping[str, ArrayLike], covariance: Any, points: int) -> Any:
    """Known variances (points,) or sparse covariance, checked; None if all are 0."""
    if covariance is not None:
        if getattr(covariance, "ndim", 2) == 1:  # made by fit_points
            return covariance
        matrix = checked_covariance(covariance, points)
        return matrix if matrix.nnz else None
    if "se" not in table:
        return None
    errors = np.asarray(table["se"], dtype=float)
    if not np.isfinite(errors).all() or (errors < 0).any():
        raise MergelawError(
            "column se has values below 0 or not finite: give standard errors of 0 or more"
        )
    return errors**2 if errors.any() else None


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
                f"law {law.name} is for one value of {name}: the table has several; split it"
            )
    return columns, loss


def _check_levels(law: Law, variables: Mapping[str, Array], loss: Array) -> None:
    for name, levels in law.levels.items():
        distinct = np.unique(variables[name])
        if len(distinct) < levels:
            listed = ", ".join(f"{value:.4g}" for value in distinct)
            what, more = WANTED.get(name, (f"values of {name}", f"measure more values of {name}"))
            raise MergelawError(
                f"{_kind(law)} needs {levels} {what}, and {len(distinct)} "
                f"{'is' if len(distinct) == 1 else 'are'} measured ({listed}): {more}"
            )
    if len(loss) < len(law.parameters):
        raise MergelawError(
            f"{_kind(law)} needs {len(law.parameters)} points, one for each parameter, and "
            f"{len(loss)} are measured: measure more levels of " + " or ".join(law.levels)
        )


def _kind(law: Law) -> str:
    return "a law over sizes" if "N" in law.levels else "a law of one base"
