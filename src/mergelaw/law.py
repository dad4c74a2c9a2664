"""Laws: how the expected loss of a merge depends on the base's size and the number of experts.

A law is declared by its basis: linear coefficients times functions of the variables with a few
nonlinear parameters in boxes. How it is fitted is in ``projection``.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri, stdtrit

from mergelaw import profile
from mergelaw.errors import MergelawError
from mergelaw.projection import ROUNDING, Problem, State

Array = NDArray[np.float64]

# The level of the intervals that are reported.
LEVEL = 0.9
# A law is clearly better than another from this difference in AICc on.
CLEARLY = 2
# The chance below which residuals have too few runs.
FEW_RUNS = 0.05
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


# What a law is compared with: all that its points can hardly tell from it.
RIVALS = {
    MERGING.name: (INVERSE, POWER, EXPONENTIAL, LOGARITHMIC, INTERFERENCE),
    MERGING_FIXED_N.name: (
        *(INVERSE_FIXED_N, POWER_FIXED_N, EXPONENTIAL_FIXED_N),
        *(LOGARITHMIC_FIXED_N, INTERFERENCE_FIXED_N),
    ),
}
# These are the merging law with b = 0, and speak for it as it does itself.
NESTED = (INVERSE.name, INVERSE_FIXED_N.name)


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

    @cached_property
    def aicc(self) -> float:
        """Akaike's criterion, corrected for few points; NaN where they are too few for it.

        Of laws fitted to the same points, the lowest describes them best for the parameters that it
        spends; a difference below 2 decides nothing.
        """
        own, count = self._solution, len(self.law.parameters)
        if own.given is not None:
            return _deviance(own, own.given) + 2 * count
        left = self.n_points - count - 2  # the noise is a parameter too
        if left <= 0:
            return math.nan
        least = max(float(np.mean(self.residuals**2)), (1e-13 * float(np.mean(own.loss))) ** 2)
        trials = [math.sqrt(least)]
        if own.known is not None:
            trials = [0.0, *np.geomspace(1e-3, 1, 61) * trials[0]]
        deviance = min(_deviance(own, trial) for trial in trials)
        return deviance + 2 * (count + 1) * self.n_points / left

    @cached_property
    def rivals(self) -> tuple[dict[str, Any], ...]:
        """This law and its rivals on the same points, best first: law, aicc, above, r2, rmse.

        ``above`` is the AICc over that of the best; both are None where there are too few points.
        A rival that cannot be fitted is left out, and so is interference if no loss rises with k.
        """
        fits = [self]
        for law in RIVALS.get(self.law.name, ()):
            if law in (INTERFERENCE, INTERFERENCE_FIXED_N) and not self._rises():
                continue
            with suppress(MergelawError):
                fits.append(self._refit(law))
        ordered = sorted(fits, key=lambda other: (math.isnan(other.aicc), other.aicc))
        best = ordered[0].aicc
        return tuple(
            {
                "law": other.law.name,
                "aicc": _or_none(other.aicc),
                "above": _or_none(other.aicc - best),
                "r2": _or_none(other.r2),
                "rmse": other.rmse,
            }
            for other in ordered
        )

    @cached_property
    def left_out(self) -> dict[str, dict[str, Any]]:
        """Forecasts of what was left out, by variable, wherever the rest can be fitted.

        The points with the variable's largest value are predicted from all others. ``error`` is the
        root mean squared error, ``same`` that of saying "same as the last point", i.e. the loss at
        the next value below, all else equal (nats per token); ``value`` is what was left out.
        """
        own = self._solution
        found: dict[str, dict[str, Any]] = {}
        for name in self.law.levels:
            values = own.variables[name]
            kept = values < values.max()
            with suppress(MergelawError):
                rest = self._refit(self.law, kept)
                out = {other: column[~kept] for other, column in own.variables.items()}
                errors = own.loss[~kept] - rest.predict(**out)
                repeated = own.loss[~kept] - _last(own.variables, own.loss, name, kept)
                found[name] = {
                    "value": float(values.max()),
                    "error": math.sqrt(np.mean(errors**2)),
                    "same": _or_none(math.sqrt(np.mean(repeated**2))),
                }
        return found

    @cached_property
    def runs(self) -> dict[str, float] | None:
        """Runs of residuals of one sign along the last variable: found, expected and p.

        p is the chance of so few if signs were random (Wald and Wolfowitz 1940, normal
        approximation); None if the residuals are rounding errors or all of one sign.
        """
        own = self._solution
        residuals = own.loss - self.law.predict(self.parameters, **own.variables)
        if np.abs(residuals).max() < 1e-12 * np.abs(own.loss).max():
            return None
        *others, along = own.variables
        groups = np.unique(
            np.column_stack([own.variables[name] for name in others] or [np.zeros(len(residuals))]),
            axis=0,
            return_inverse=True,
        )[1].ravel()
        found = expected = variance = 0.0
        for group in range(groups.max() + 1):
            chosen = np.flatnonzero(groups == group)
            signs = residuals[chosen[np.argsort(own.variables[along][chosen])]] > 0
            total, above = len(signs), int(signs.sum())
            pairs = 2 * above * (total - above)
            found += 1 + np.count_nonzero(signs[1:] != signs[:-1])
            expected += 1 + pairs / total
            variance += pairs * (pairs - total) / (total**2 * (total - 1)) if total > 1 else 0
        if variance <= 0:
            return None
        # half a run: what is counted is whole
        chance = float(ndtr((found + 0.5 - expected) / math.sqrt(variance)))
        return {"found": found, "expected": expected, "p": chance}

    @cached_property
    def doubts(self) -> tuple[str, ...]:
        """Sentences on what rivals, forecasts, residuals and intervals tell against the fit."""
        return tuple(_doubts(self))

    def _refit(self, law: Law, kept: NDArray[np.bool_] | None = None) -> "Fit":
        """Another law, or this one, on the same points or some; exponents start from here."""
        own = self._solution
        kept = np.ones(self.n_points, dtype=bool) if kept is None else kept
        # What a law shares with this one is about the same, which makes for a smaller grid.
        starts = {
            name: tuple(sorted({box[0], self.parameters[name], box[-1]}))
            if name in ("beta", "gamma") and name in self.law.nonlinear
            else box
            for name, box in law.nonlinear.items()
        }
        table = {name: values[kept] for name, values in own.variables.items()}
        return fit(
            replace(law, nonlinear=starts),
            {**table, law.response: own.loss[kept]},
            covariance=None if own.known is None else own.known[np.ix_(kept, kept)],
            misfit=own.given,
        )

    def _rises(self) -> bool:
        """Whether with all else equal the loss at the largest k is above one at a smaller k."""
        own = self._solution
        table = pd.DataFrame({**own.variables, "loss": own.loss}).sort_values("k")
        others = [name for name in own.variables if name != "k"]
        groups = [group for _, group in table.groupby(others)] if others else [table]
        return any(group["loss"].iloc[-1] > group["loss"].min() for group in groups)

    def _threshold(self, level: float) -> float | None:
        """Excess of the scaled squares at the ends of an interval."""
        if not 0 < level < 1:
            raise MergelawError(f"level {level:g} is no probability: give one between 0 and 1")
        if self.freedom == 0:
            return None
        share = (1 + level) / 2
        known = math.isinf(self.freedom)
        quantile = float(ndtri(share) if known else stdtrit(self.freedom, share))
        return quantile**2 * self._solution.variance / self._solution.problem.size**2

    def summary(self) -> str:
        """The fit as text: parameters, quality, forecasts of what was left out, rivals, doubts."""
        width = max(map(len, self.parameters))
        lines = [self.law.equation]
        for name, value in self.parameters.items():
            ends = self.intervals.get(name)
            told = f"   90%: {ends[0]:.5g} to {ends[1]:.5g}" if ends else ""
            lines.append(f"  {name:<{width}} = {value:<10.5g}{told}".rstrip())
        lines.append(f"  R^2 = {self.r2:.5f}  RMSE = {self.rmse:.3g} nats  {self.n_points} points")
        for name, forecast in self.left_out.items():
            same = forecast["same"]
            beside = "" if same is None else f', "same as the last point" by {same:.3g}'
            lines.append(
                f"  {name} = {forecast['value']:g} left out is missed by "
                f"{forecast['error']:.3g} nats{beside}"
            )
        told = ", ".join(
            f"{rival['law']} {rival['above']:+.1f}"
            for rival in self.rivals
            if rival["above"] is not None
        )
        if len(self.rivals) > 1 and math.isfinite(self.aicc):
            lines.append(f"  AICc above the best: {told}")
        return "\n".join([*lines, *(f"  ! {told}" for told in (*self.warnings, *self.doubts))])

    def to_dict(self) -> dict[str, Any]:
        """The fit as values that strict JSON can hold; what is undefined is None."""
        return {
            "law": self.law.name,
            "parameters": dict(self.parameters),
            "level": LEVEL,
            "intervals": {
                name: [end if math.isfinite(end) else None for end in ends]
                for name, ends in self.intervals.items()
            },
            "r2": _or_none(self.r2),
            "rmse": self.rmse,
            "misfit": _or_none(self.misfit),
            "freedom": _or_none(self.freedom),
            "aicc": _or_none(self.aicc),
            "rivals": list(self.rivals),
            "left_out": dict(self.left_out),
            "runs": self.runs,
            "n_points": self.n_points,
            "residuals": self.residuals.tolist(),
            "warnings": list(self.warnings),
            "doubts": list(self.doubts),
        }


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _deviance(own: "_Solution", misfit: float) -> float:
    """Minus twice the log-likelihood of the residuals under a misfit, up to a constant."""
    variances, vectors = own.spectrum
    variances = variances + misfit**2
    if variances.min() <= 0:
        return math.inf
    return float(np.sum(np.log(variances) + (vectors.T @ own.residuals) ** 2 / variances))


def _last(variables: Mapping[str, Array], loss: Array, name: str, kept: NDArray[np.bool_]) -> Array:
    """For each point left out the loss at the next value of ``name``, all else equal, or NaN."""
    table = pd.DataFrame({**variables, "_loss": loss})
    others = [other for other in variables if other != name]
    last = table[kept].sort_values(name, kind="stable")
    if not others:
        highest = last[last[name] == last[name].max()]
        return np.full(int((~kept).sum()), highest["_loss"].mean())
    # Several points at one place would be a mean; the last of them is near enough.
    final = last.groupby(others)["_loss"].last().rename("_last")
    return table[~kept].join(final, on=others)["_last"].to_numpy()


def _doubts(fitted: Fit) -> Iterable[str]:
    """What a reader has to know that the fit alone does not show."""
    law = fitted.law
    for name, ends in fitted.intervals.items():
        box = law.nonlinear.get(name)
        if box is not None and ends[1] >= box[-1] and fitted.parameters[name] < box[-1]:
            yield (
                f"the interval of {name} reaches the end of its box, {box[-1]:g}: the points do "
                "not limit it upwards; measure more levels of " + " or ".join(law.levels)
            )
    told = [rival for rival in fitted.rivals if rival["aicc"] is not None]
    own = min((r["aicc"] for r in told if r["law"] in (law.name, *NESTED)), default=-math.inf)
    better = [rival for rival in told if rival["aicc"] < own - CLEARLY]
    if better:
        yield (
            f"law {better[0]['law']} describes the points better (AICc lower by "
            f"{own - better[0]['aicc']:.1f}): compare its forecasts before you extrapolate"
        )
    for name, forecast in fitted.left_out.items():
        same = forecast["same"]
        if same is not None and forecast["error"] > same:
            yield (
                f"with {name} = {forecast['value']:g} left out, the law misses it by "
                f'{forecast["error"]:.2g} nats and "same as the last point" by {same:.2g}: '
                f"do not forecast larger {name} with it"
            )
    if fitted.runs is not None and fitted.runs["p"] < FEW_RUNS:
        yield (
            f"residuals keep their sign: {fitted.runs['found']:g} runs where about "
            f"{fitted.runs['expected']:.1f} are expected; the law's form misses something, look at "
            "its rivals"
        )


@dataclass(frozen=True)
class _Solution:
    """What a fit was found with, points in the solver's order.

    Attributes:
        problem, state: the least-squares problem and its minimum.
        variance: variance of a whitened point.
        variables, loss: the points.
        known: their covariance as given, or None.
        given: the misfit as given, or None.
        residuals: measured minus fitted.
    """

    problem: Problem
    state: State
    variance: float
    variables: Mapping[str, Array]
    loss: Array
    known: Array | None
    given: float | None
    residuals: Array

    @cached_property
    def spectrum(self) -> tuple[Array, Array]:
        """Eigenvalues and eigenvectors of the known covariance."""
        if self.known is None:
            return np.zeros(len(self.loss)), np.eye(len(self.loss))
        values, vectors = np.linalg.eigh(self.known)
        return np.maximum(values, 0), vectors


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
    unchecked = []
    if known is not None and misfit is None and len(loss) <= len(law.parameters):
        unchecked.append(
            "as many parameters as points: what the law itself misses is unknown, and intervals "
            "hold the given standard errors only; measure more levels of " + " or ".join(law.levels)
        )
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
        warnings=(*_warnings(problem, state, noise), *unchecked),
        _solution=_Solution(
            problem,
            state,
            noise.variance,
            sorted_variables,
            ordered,
            known,
            misfit,
            residuals[order],
        ),
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
