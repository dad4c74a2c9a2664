"""Laws: how the expected loss of a merge depends on the base's size and the number of experts.

A law is declared by its basis: linear coefficients times functions of the variables with a few
nonlinear parameters in boxes. How it is fitted is in ``projection``.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq

from mergelaw import profile
from mergelaw.errors import MergelawError
from mergelaw.projection import ROUNDING, Problem, State

Array = NDArray[np.float64]

# The level of the intervals that are reported.
LEVEL = 0.9
# Below this ratio of the largest to the smallest N, exponents follow the bases' training budgets.
LADDER = 100
# A nonlinear parameter with a standard error over this share of its box has a flat profile.
FLAT = 0.1


@dataclass(frozen=True)
class Law:
    """A law as the sum of linear coefficients times basis functions.

    Attributes:
        name: the law's name in files and on the command line.
        equation: the law for people to read.
        levels: the variables, each with the number of different values that a fit needs.
        linear: the coefficients' names, in the order of the basis; >= 0 unless in ``signed``.
        nonlinear: the nonlinear parameters' starts, ascending; first and last are its box.
        basis: (variables and nonlinear parameters by name) to the basis functions, each an array
            over the points or a number. Written in operations that take complex numbers: the
            derivatives are taken by a complex step.
        fixed: columns that must not vary within a fit's table.
        signed: linear coefficients of either sign.
        response: the column that the law is about; a variance may be 0, a loss may not.
    """

    name: str
    equation: str
    levels: Mapping[str, int]
    linear: tuple[str, ...]
    nonlinear: Mapping[str, tuple[float, ...]]
    basis: Callable[..., tuple[Any, ...]]
    fixed: tuple[str, ...] = ()
    signed: tuple[str, ...] = ()
    response: str = "ce"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters, linear ones first."""
        return (*self.linear, *self.nonlinear)

    def predict(self, parameters: Mapping[str, float], **variables: ArrayLike) -> Array:
        """Loss (nats per token) at the variables, broadcast against each other.

        Raises:
            MergelawError: the variables are not the law's.
        """
        if set(variables) != set(self.levels):
            raise MergelawError(
                f"law {self.name} is a function of {', '.join(self.levels)}, "
                f"not of {', '.join(variables) or 'nothing'}: pass those"
            )
        arrays = dict(
            zip(variables, np.broadcast_arrays(*map(np.asarray, variables.values())), strict=True)
        )
        arrays = {name: array.astype(float) for name, array in arrays.items()}
        columns = self.basis(**arrays, **{name: parameters[name] for name in self.nonlinear})
        shape = next(iter(arrays.values())).shape
        total = np.zeros(shape)
        for name, column in zip(self.linear, columns, strict=True):
            total = total + parameters[name] * column
        return total


EXPONENT = (0.0, 0.2, 0.5, 1.2, 2.5, 5.0)
OFFSET = (0.0, 0.3, 1.0, 3.0, 8.0, 20.0)


def _laws_in_k(
    name: str,
    written: str,
    terms: Callable[..., tuple[Any, ...]],
    nonlinear: Mapping[str, tuple[float, ...]],
    further: tuple[str, ...] = (),
) -> tuple[Law, Law]:
    """A way to fall with k as two laws: over all sizes, and of one base.

    Args:
        name: the joint law's; the other's ends in _fixed_N.
        written: the terms for people, with {A} for the amplitude.
        terms: (k and nonlinear parameters by name) to what the amplitude multiplies, and to the
            functions of the further coefficients.
        nonlinear: starts, as ``Law`` has them.
        further: coefficients of further terms.
    """

    def of_size(N: Any, k: Any, beta: Any, gamma: Any, **own: Any) -> tuple[Any, ...]:
        tail, *rest = terms(k, **own)
        return (1.0, N**-beta, N**-gamma * tail, *rest)

    levels = 2 + len(nonlinear) + len(further)
    joint = Law(
        name=name,
        equation=f"E[L|N,k] = L_star + B N^-beta + {written.format(A='A0 N^-gamma')}",
        levels={"N": 3, "k": levels},
        linear=("L_star", "B", "A0", *further),
        nonlinear={"beta": EXPONENT, "gamma": EXPONENT, **nonlinear},
        basis=of_size,
    )
    one_base = Law(
        name=f"{name}_fixed_N",
        equation=f"E[L|k] = L_inf + {written.format(A='A')}",
        levels={"k": levels},
        linear=("L_inf", "A", *further),
        nonlinear=nonlinear,
        basis=lambda k, **own: (1.0, *terms(k, **own)),
        fixed=("N",),
    )
    return joint, one_base


# E[L | N, k] of Wang et al., arXiv:2509.24244: floor L_star + B N^-beta, tail A0 N^-gamma / (k + b)
MERGING, MERGING_FIXED_N = _laws_in_k(
    "merging", "{A} / (k + b)", lambda k, b: (1.0 / (k + b),), {"b": OFFSET}
)
# The same with interference, a bounded loss that grows with k (theirs for TIES with lambda = 1).
INTERFERENCE, INTERFERENCE_FIXED_N = _laws_in_k(
    "interference",
    "{A} / (k + b) + D k / (k + q)",
    # k / (k + q), written so that k can be infinite
    lambda k, b, q: (1.0 / (k + b), 1.0 / (1.0 + q / k)),
    {"b": OFFSET, "q": (0.1, 0.5, 2.0, 8.0, 20.0)},
    ("D",),
)
# Rivals: other ways to fall with k, which a few points can hardly tell from the merging law's.
INVERSE, INVERSE_FIXED_N = _laws_in_k("inverse", "{A} / k", lambda k: (1.0 / k,), {})
POWER, POWER_FIXED_N = _laws_in_k(
    "power", "{A} k^-a", lambda k, a: (k**-a,), {"a": (0.05, 0.3, 0.6, 1.0, 1.6, 2.5, 5.0)}
)
EXPONENTIAL, EXPONENTIAL_FIXED_N = _laws_in_k(
    "exponential",
    "{A} exp(-c k)",
    lambda k, c: (np.exp(-c * k),),
    {"c": (0.02, 0.1, 0.3, 0.7, 1.2, 2.0, 4.0)},
)
LOGARITHMIC, LOGARITHMIC_FIXED_N = _laws_in_k(
    "logarithmic", "{A} (-log k)", lambda k: (-np.log(k),), {}
)

# How the loss varies over random k-subsets of a pool of M. For a loss that is quadratic along
# equal-weight means the additive part and the pair part of the experts' effects are uncorrelated,
# and sampling k of M without replacement gives each its factor; both vanish at k = M. V0 is what is
# left there: the documents' noise, about 0.
VARIANCE = Law(
    name="variance",
    equation="Var[L|k] = V0 + G (M-k)/(k(M-1)) + P (k-1)(M-k)(M-k-1)/(k^3 (M-1)(M-2)(M-3))",
    levels={"k": 3, "M": 1},
    linear=("V0", "G", "P"),
    nonlinear={},
    basis=lambda k, M: (
        1.0,
        (M - k) / (k * (M - 1)),
        (k - 1) * (M - k) * (M - k - 1) / (k**3 * (M - 1) * (M - 2) * np.maximum(M - 3, 1)),
    ),
    response="variance",
)
LAWS = {
    law.name: law
    for law in (
        *(MERGING, INVERSE, POWER, EXPONENTIAL, LOGARITHMIC, INTERFERENCE),
        *(MERGING_FIXED_N, INVERSE_FIXED_N, POWER_FIXED_N, EXPONENTIAL_FIXED_N),
        *(LOGARITHMIC_FIXED_N, INTERFERENCE_FIXED_N, VARIANCE),
    )
}


@dataclass(frozen=True)
class Fit:
    """A law fitted to a table.

    Attributes:
        law: the law.
        parameters: its parameters; losses in nats per token, N in the table's unit.
        r2: share of the losses' variance about their mean that the fit explains; NaN if they have
            none.
        rmse: root mean squared residual (nats per token).
        n_points: number of points.
        residuals: measured minus fitted (nats per token), in the order of the table's rows.
        misfit: standard deviation (nats per token) of what neither the law nor the given covariance
            explains; given or estimated, NaN where it can be neither.
        freedom: degrees of freedom of the noise: infinite where it was given, 0 if it is unknown.
        warnings: sentences on what not to believe, and what to do.
    """

    law: Law
    parameters: dict[str, float]
    r2: float
    rmse: float
    n_points: int
    residuals: Array
    misfit: float
    freedom: float
    warnings: tuple[str, ...]
    _solution: "_Solution" = field(repr=False, compare=False)

    def predict(self, **variables: ArrayLike) -> Array:
        """Fitted loss (nats per token) at the law's variables, by name."""
        return self.law.predict(self.parameters, **variables)

    def interval(self, name: str, level: float = LEVEL) -> tuple[float, float] | None:
        """Profile-likelihood interval of a parameter; None where the noise is unknown.

        An end on the parameter's bound says that the points do not limit it on that side.
        """
        threshold = self._threshold(level)
        if name not in self.parameters:
            raise MergelawError(
                f"law {self.law.name} has no parameter {name}: it has {', '.join(self.parameters)}"
            )
        if threshold is None:
            return None
        problem, state = self._solution.problem, self._solution.state
        if name in self.law.nonlinear:
            return profile.of_nonlinear(
                problem, state, list(self.law.nonlinear).index(name), threshold
            )
        unit = np.eye(len(self.law.linear))[self.law.linear.index(name)]
        low, high = profile.of_linear(problem, state, lambda _: unit, threshold)
        return low * problem.size, high * problem.size

    def predict_interval(
        self, level: float = LEVEL, **variables: ArrayLike
    ) -> tuple[Array, Array] | None:
        """Profile-likelihood intervals of the expected loss (nats per token); None without noise.

        They are about the mean that the law describes: a new measurement has its own noise besides.
        Variables as ``predict`` takes them; k may be infinite.
        """
        centre = self.predict(**variables)
        threshold = self._threshold(level)
        if threshold is None:
            return None
        problem, state = self._solution.problem, self._solution.state
        arrays = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in variables.values()))
        low, high = np.empty(centre.shape), np.empty(centre.shape)
        for place in np.ndindex(centre.shape):
            at = {name: array[place] for name, array in zip(variables, arrays, strict=True)}

            def vector(theta: NDArray[Any], at: dict[str, Any] = at) -> NDArray[Any]:
                named = dict(zip(self.law.nonlinear, theta, strict=True))
                return np.array(self.law.basis(**at, **named))

            low[place], high[place] = profile.of_linear(problem, state, vector, threshold)
        return low * problem.size, high * problem.size

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """90% intervals of all parameters; empty where the noise is unknown."""
        found = {name: self.interval(name) for name in self.parameters}
        return {name: ends for name, ends in found.items() if ends is not None}

    def _threshold(self, level: float) -> float | None:
        """Excess of the scaled squares at the ends of an interval."""
        if not 0 < level < 1:
            raise MergelawError(f"level {level:g} is no probability: give one between 0 and 1")
        if self.freedom == 0:
            return None
        quantile = float(stats.t.ppf((1 + level) / 2, self.freedom))
        return quantile**2 * self._solution.variance / self._solution.problem.size**2

    def summary(self) -> str:
        """The fit in a few lines of text."""
        values = "  ".join(f"{name} = {value:.5g}" for name, value in self.parameters.items())
        return "\n".join(
            [
                self.law.equation,
                f"  {values}",
                f"  R^2 = {self.r2:.5f}  RMSE = {self.rmse:.3g} nats  {self.n_points} points",
                *(f"  ! {warning}" for warning in self.warnings),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """The fit as values that strict JSON can hold; an undefined R^2 is None."""
        return {
            "law": self.law.name,
            "parameters": dict(self.parameters),
            "r2": None if math.isnan(self.r2) else self.r2,
            "rmse": self.rmse,
            "n_points": self.n_points,
            "residuals": self.residuals.tolist(),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class _Solution:
    """What a fit was found with: the problem, its minimum, and the variance of a whitened point."""

    problem: Problem
    state: State
    variance: float


def fit(
    law: Law,
    table: pd.DataFrame | Mapping[str, ArrayLike],
    *,
    covariance: ArrayLike | None = None,
    misfit: float | None = None,
) -> Fit:
    """Fit a law by generalised least squares; no starting values are needed.

    The covariance of the points is V = covariance + misfit^2 1. The first is what is known of the
    measurement (design, documents); the second is what the law itself misses, which sampling
    variance does not cover and without which points with little of that would get all the weight.

    Args:
        law: one of ``LAWS``, or a law of your own.
        table: the law's variables by name (N > 0 in billions of parameters, k >= 1) and the loss
            ``ce`` (nats per token, > 0), or the law's other response; one value per point. If it
            has a column ``se``, standard errors, the covariance is diag(se^2).
        covariance: instead, the covariance of the losses, (points, points), in the order of the
            table's rows.
        misfit: standard deviation (nats per token); None estimates it from the residuals, for
            which there must be more points than parameters.

    Raises:
        MergelawError: values are missing or impossible, there are fewer points than parameters, or
            too few levels of a variable.
    """
    variables, loss = _checked(law, table)
    known = _covariance(table, covariance, len(loss))
    if misfit is not None and not (math.isfinite(misfit) and misfit >= 0):
        raise MergelawError(f"misfit is {misfit:g}: give a standard deviation of 0 or more")
    if misfit == 0 and (known is None or not known.any()):
        raise MergelawError(
            "misfit 0 without standard errors says that nothing is uncertain: omit it"
        )
    # One order of the points, whatever the table's: sums of floats then have one value.
    order = np.lexsort((loss, *reversed(variables.values())))
    ordered, sorted_variables = loss[order], {n: v[order] for n, v in variables.items()}
    if known is not None:
        known = known[np.ix_(order, order)]
    problem, state, noise = _solve(law, sorted_variables, ordered, known, misfit)

    coefficients = state.coefficients * problem.size
    parameters = {
        name: float(value)
        for name, value in zip(law.parameters, [*coefficients, *state.theta], strict=True)
    }
    residuals = np.empty_like(loss)
    residuals[order] = ordered - law.predict(parameters, **sorted_variables)
    squares = float(residuals @ residuals)
    variance = float(np.sum((ordered - ordered.mean()) ** 2))
    # Losses that differ by rounding alone have no variance to explain.
    rounding = 1e-12 * float(np.linalg.norm(ordered))
    return Fit(
        law=law,
        parameters=parameters,
        r2=1 - squares / variance if variance > rounding**2 else math.nan,
        rmse=math.sqrt(squares / len(loss)),
        n_points=len(loss),
        residuals=residuals,
        misfit=noise.misfit,
        freedom=noise.freedom,
        warnings=tuple(_warnings(problem, state, noise)),
        _solution=_Solution(problem, state, noise.variance),
    )


@dataclass(frozen=True)
class _Noise:
    """The misfit's standard deviation, its degrees of freedom, a whitened point's variance."""

    misfit: float
    freedom: float
    variance: float


def _covariance(
    table: pd.DataFrame | Mapping[str, ArrayLike], covariance: ArrayLike | None, points: int
) -> Array | None:
    """The known covariance of the points, checked; None if there is none."""
    if covariance is not None:
        matrix = np.asarray(covariance, dtype=float)
        if matrix.shape != (points, points) or not np.isfinite(matrix).all():
            raise MergelawError(
                f"covariance has the shape {matrix.shape} or values that are not finite: "
                f"give a finite one of {points} by {points}, in the order of the table"
            )
        least = np.linalg.eigvalsh(matrix)[0]
        if not np.allclose(matrix, matrix.T) or least < -1e-9 * np.abs(matrix).max():
            raise MergelawError("covariance is not symmetric with eigenvalues >= 0: correct it")
        return matrix
    if "se" not in table:
        return None
    errors = np.asarray(table["se"], dtype=float)
    if not np.isfinite(errors).all() or (errors < 0).any():
        raise MergelawError("column se has values below 0 or not finite: give standard errors")
    return np.diag(errors**2)


def _solve(
    law: Law, variables: Mapping[str, Array], loss: Array, known: Array | None, misfit: float | None
) -> tuple[Problem, State, _Noise]:
    """The minimum, and how noisy the points are."""
    points = len(loss)
    if known is None or not known.any():
        problem = Problem(law, variables, loss)
        state = problem.minimum()
        if misfit:
            return problem, state, _Noise(misfit, math.inf, misfit**2)
        if points <= len(law.parameters):
            return problem, state, _Noise(math.nan, 0, math.nan)
        freedom = float(points - _free(problem, state))
        variance = state.squares * problem.size**2 / freedom
        return problem, state, _Noise(math.sqrt(variance), freedom, variance)
    freedom = math.inf
    if misfit is None:
        misfit, freedom = _estimate_misfit(law, variables, loss, known)
    covariance = known + misfit**2 * np.eye(points)
    # A point without any error would have infinite weight.
    least = 1e-12 * float(np.mean(loss))
    if np.linalg.eigvalsh(covariance)[0] < least**2:
        covariance += least**2 * np.eye(points)
    problem = Problem(law, variables, loss, covariance)
    return problem, problem.minimum(), _Noise(misfit, freedom, 1.0)


def _estimate_misfit(
    law: Law, variables: Mapping[str, Array], loss: Array, known: Array
) -> tuple[float, float]:
    """The misfit with which the weighted squares are what they should be (Paule and Mandel 1982).

    Returns:
        Its standard deviation and the noise's degrees of freedom, by Satterthwaite's rule: those
        of the residuals where the misfit is all there is, infinite where the covariance is.
    """
    points = len(loss)
    if points <= len(law.parameters):
        return 0.0, math.inf
    plain = Problem(law, variables, loss)
    theta = plain.minimum().theta
    freedom = points - _free(plain, plain.project(theta))

    def excess(misfit: float) -> float:
        problem = Problem(law, variables, loss, known + misfit**2 * np.eye(points))
        state = problem.descend(problem.project(theta))
        return state.squares * problem.size**2 - freedom

    largest = math.sqrt(plain.project(theta).squares * plain.size**2 / freedom)
    smallest = max(1e-3 * largest, 1e-9 * float(np.mean(loss)))
    if largest <= smallest or excess(smallest) <= 0:
        return 0.0, math.inf
    misfit = float(brentq(excess, smallest, largest * 1.01, xtol=1e-4 * largest))
    share = float(np.mean(misfit**2 / (np.diag(known) + misfit**2)))
    return misfit, freedom / share**2


def _free(problem: Problem, state: State) -> int:
    """Number of parameters that the points moved: neither on a bound nor without effect."""
    idle = np.linalg.norm(problem.jacobian(state), axis=0) <= ROUNDING
    inside = (state.theta > problem.lower) & (state.theta < problem.upper)
    return int(np.sum(problem.signed | (state.coefficients > 0)) + np.sum(inside & ~idle))


def _checked(
    law: Law, table: pd.DataFrame | Mapping[str, ArrayLike]
) -> tuple[dict[str, Array], Array]:
    """The law's variables and the loss as arrays of floats, or one line on what is wrong."""
    names = (*law.levels, law.response)
    for name in names:
        if name not in table:
            raise MergelawError(f"law {law.name} needs a column {name}: add it to the table")
    columns = {name: np.asarray(table[name], dtype=float) for name in names}
    for name, values in columns.items():
        if not np.isfinite(values).all():
            raise MergelawError(f"column {name} has values that are not finite: drop those points")
        least = values.min(initial=math.inf)
        if least < 0 or (least == 0 and name != "variance"):
            raise MergelawError(f"column {name} has the value {least:g}: it must be above 0")
    loss = columns.pop(law.response)
    if "k" in columns and (columns["k"] < 1).any():
        raise MergelawError(
            f"column k has the value {columns['k'].min():g}: a law is fitted to merges, k >= 1"
        )
    if "k" in columns and "M" in columns and (columns["k"] > columns["M"]).any():
        raise MergelawError("column k has values above M: a pool of M experts has no such merges")
    for name in law.fixed:
        if name in table and len(np.unique(np.asarray(table[name]))) > 1:
            raise MergelawError(
                f"law {law.name} is for one value of {name} and the table has several: "
                f"fit them one by one, or fit a law of {name}"
            )
    for name, levels in law.levels.items():
        found = np.unique(columns[name])
        if len(found) < levels:
            listed = ", ".join(f"{value:g}" for value in found)
            raise MergelawError(
                f"law {law.name} needs {levels} different values of {name}, the table has "
                f"{len(found)} ({listed}): measure more, or fit a law without {name}"
            )
    if len(loss) < len(law.parameters):
        raise MergelawError(
            f"law {law.name} has {len(law.parameters)} parameters and the table {len(loss)} "
            "points: measure more levels of " + " or ".join(law.levels)
        )
    return columns, loss


def _warnings(problem: Problem, state: State, noise: _Noise) -> Iterable[str]:
    """What somebody who reads the parameters has to know."""
    law = problem.law
    for name, value in zip(law.linear, state.coefficients, strict=True):
        if value == 0 and name not in law.signed:
            yield f"{name} is on its bound 0: the points ask for less; leave out its term"
    jacobian = problem.jacobian(state)
    lengths = np.linalg.norm(jacobian, axis=0)
    on_bound = (state.theta <= problem.lower) | (state.theta >= problem.upper)
    idle = lengths <= ROUNDING
    for name, value, bound, no_effect in zip(
        law.nonlinear, state.theta, on_bound, idle, strict=True
    ):
        if no_effect:
            yield f"{name} has no effect on the fitted losses: do not read its value"
        elif bound:
            direction = "less" if value <= law.nonlinear[name][0] else "more"
            yield (
                f"{name} is on its bound {value:g}: the points ask for {direction}; take it as "
                "given, not as measured"
            )
    free = np.flatnonzero(~on_bound & ~idle)
    if noise.freedom == 0:
        yield (
            "as many parameters as points: the fit passes through them and cannot show its error, "
            "and without that there are no intervals; measure more levels of "
            + " or ".join(law.levels)
            + ", or give the points' standard errors"
        )
    elif len(free):
        scaled = jacobian[:, free] / lengths[free]
        spread = np.sqrt(np.diag(np.linalg.pinv(scaled.T @ scaled))) / lengths[free]
        errors = spread * math.sqrt(noise.variance) / problem.size
        for j, error in zip(free, errors, strict=True):
            if error > FLAT * (problem.upper[j] - problem.lower[j]):
                name = list(law.nonlinear)[j]
                yield (
                    f"{name} is hardly determined (standard error about {error:.2g}): many values "
                    "fit as well; measure more levels of " + " or ".join(law.levels)
                )
    if "N" in law.levels:
        sizes = np.unique(problem.variables["N"])
        ratio = sizes[-1] / sizes[0]
        if ratio < LADDER:
            yield (
                f"the ladder spans a factor of {ratio:.3g} in N, less than {LADDER}: its exponents "
                "reflect the bases' training budgets and are not to be extrapolated"
            )
        if len(sizes) == 3 and "L_star" in law.linear:
            yield (
                "three sizes fix L_star, B and beta without a check of the floor's form: "
                "add a size before extrapolating in N"
            )
