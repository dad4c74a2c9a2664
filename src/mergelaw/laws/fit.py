"""Fits: a law's parameters from points, with intervals, and what to think of them.

The points are weighed by their covariance (``covariance``), the law is fitted by variable
projection (``projection``), intervals are profile likelihoods (``profile``).
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

from mergelaw.errors import MergelawError
from mergelaw.laws import diagnostics, profile
from mergelaw.laws.covariance import Noise, Part, deviance, restricted, weighing
from mergelaw.laws.diagnostics import or_none
from mergelaw.laws.law import Law
from mergelaw.laws.projection import ROUNDING, Array, Problem, State

# The level of the intervals that are reported.
LEVEL = 0.9
# Whom an interval speaks of: the mean over subsets of the experts that were measured, or over
# subsets of a pool of as many others that were drawn as these were.
POOL, EXPERTS = "this pool", "experts like these"
# From so many sizes on, what the law misses of a base as a whole can be told from misfit.
SIZES_FOR_SCATTER = 5
# The residuals' variances and the weights that follow from them are found in turns, so many times.
ROUNDS = 2
# A minimum that only the first weights follow from needs no more than this.
ROUGHLY = 1e-6
# No pool has so many experts.
MANY = 2**30
# What is added to a covariance so that it has an inverse, relative to its mean variance.
SINGULAR = 1e-10


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
            explains at a point; given or estimated, NaN where it can be neither.
        scatter: the same of what is common to all points of a base; 0 where there are too few
            sizes to tell.
        freedom: degrees of freedom of the residuals: infinite where nothing was estimated from
            them, 0 if the noise is unknown. An interval's own are ``freedom_of``.
        warnings: sentences on what not to believe, and what to do.
        variables, loss: the points in the solver's order.
        without: parameters without one expert of the pool, each in its turn.
    """

    law: Law
    parameters: dict[str, float]
    r2: float
    rmse: float
    n_points: int
    residuals: Array
    misfit: float
    scatter: float
    freedom: float
    warnings: tuple[str, ...]
    variables: dict[str, Array] = field(repr=False, compare=False)
    loss: Array = field(repr=False, compare=False)
    without: tuple[dict[str, float], ...] = field(repr=False, compare=False)
    _solution: "_Solution" = field(repr=False, compare=False)

    # ---- parameters and predictions

    @property
    def params(self) -> pd.Series:
        """The parameters as a Series."""
        return pd.Series(self.parameters, name=self.law.name)

    def conf_int(self, level: float = LEVEL, of: str = POOL) -> pd.DataFrame:
        """Intervals of all parameters: columns low and high; NaN where there is none."""
        ends = {name: self.interval(name, level, of) for name in self.parameters}
        rows = {n: (math.nan, math.nan) if e is None else e for n, e in ends.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["low", "high"])

    def predict(self, **variables: ArrayLike) -> Array:
        """Fitted loss (nats per token) at the law's variables, by name."""
        return self.law.predict(self.parameters, **variables)

    def prediction(
        self, level: float = LEVEL, of: str = POOL, new: bool = False, **variables: ArrayLike
    ) -> pd.DataFrame:
        """Fitted losses with their intervals: the variables, then ce, low and high.

        Options as of ``predict_interval``; low and high are NaN where there is no interval.
        """
        arrays = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in variables.values()))
        columns = {n: a.ravel() for n, a in zip(variables, arrays, strict=True)}
        table = pd.DataFrame({**columns, "ce": self.predict(**columns)})
        ends = self.predict_interval(level, of, new, **columns)
        low, high = (math.nan, math.nan) if ends is None else ends
        return table.assign(low=low, high=high)

    def k_within(self, nats: float, **others: float) -> int | None:
        """k_eps: experts needed to come so near to the floor; None if no number of them does.

        Args:
            nats: distance of the expected loss from its limit for k to infinity, above 0.
            others: the law's variables besides k.

        Raises:
            MergelawError: ``nats`` is not above 0, or the variables are not the law's.
        """
        if not nats > 0:
            raise MergelawError(f"nats = {nats:g}: a distance from the floor is above 0")

        def far(k: float) -> bool:
            return float(self.predict(k=k, **others)) > floor + nats

        with np.errstate(divide="ignore", invalid="ignore"):
            floor = float(self.predict(k=math.inf, **others))
        if not math.isfinite(floor):
            return None
        above = 1
        while far(above):
            above *= 2
            if above > MANY:
                return None
        return bisect.bisect_left(range(above), True, lo=1, key=lambda k: not far(k))

    # ---- intervals

    def interval(
        self, name: str, level: float = LEVEL, of: str = POOL
    ) -> tuple[float, float] | None:
        """Interval of a parameter; None where the noise is unknown.

        Of this pool it is a profile-likelihood interval, and an end on the parameter's bound says
        that the points do not limit it on that side. Of experts like these it is the jackknife's
        over the fits that leave one expert out; None without them.

        Raises:
            MergelawError: the law has no such parameter, or ``level`` or ``of`` is not one.
        """
        if name not in self.parameters:
            raise MergelawError(
                f"law {self.law.name} has no parameter {name}: it has {', '.join(self.parameters)}"
            )
        if _checked_of(of) == EXPERTS:
            values = [other[name] for other in self.without]
            jackknifed = self._jackknife(np.array(self.parameters[name]), np.array(values), level)
            if jackknifed is None:
                return None
            box = self.law.nonlinear.get(name, (-math.inf if name in self.law.signed else 0.0,))
            top = box[-1] if name in self.law.nonlinear else math.inf
            return max(float(jackknifed[0]), box[0]), min(float(jackknifed[1]), top)
        place = self.law.parameters.index(name)
        reach = self._reach(level, np.eye(len(self.law.parameters))[place], own=True)
        if reach is None:
            return None
        threshold, beside = reach
        problem, state = self._solution.problem, self._solution.state
        if name in self.law.nonlinear:
            j = list(self.law.nonlinear).index(name)
            ends = profile.of_nonlinear(problem, state, j, threshold)
            low, high = _wider(ends, self.parameters[name], beside)
            return max(low, problem.lower[j]), min(high, problem.upper[j])
        unit = np.eye(len(self.law.linear))[self.law.linear.index(name)]
        ends = profile.of_linear(problem, state, lambda _: unit, threshold)
        ends = ends[0] * problem.size, ends[1] * problem.size
        value = self.parameters[name]
        if name in self.law.signed or value <= 0 or ends[0] <= 0:
            low, high = _wider(ends, value, beside)
            return (low if name in self.law.signed else max(low, 0.0)), high
        # An amplitude is uncertain by a factor: it goes with an exponent of N, far from N = 1.
        logarithms = math.log(ends[0]), math.log(ends[1])
        low, high = _wider(logarithms, math.log(value), beside / value)
        with np.errstate(over="ignore"):
            return float(np.exp(low)), float(np.exp(high))

    def predict_interval(
        self, level: float = LEVEL, of: str = POOL, new: bool = False, **variables: ArrayLike
    ) -> tuple[Array, Array] | None:
        """Intervals of the expected loss (nats per token); None where there are none.

        Args:
            level: the share of intervals that hold what they are about.
            of: whom they speak of, ``POOL`` or ``EXPERTS``; see ``interval``.
            new: False: the mean that the law describes. True: E[L|N,k] of another base, which the
                law misses by as much as it missed the measured ones; its documents and its
                sampling are not in it.
            variables: as ``predict`` takes them; k may be infinite.
        """
        centre = self.predict(**variables)
        arrays = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in variables.values()))
        if _checked_of(of) == EXPERTS:
            others = [self.law.predict(other, **variables) for other in self.without]
            return self._jackknife(centre, np.array(others), level)
        if self._solution.noise.freedom == 0:
            _checked_level(level)
            return None
        low, high = np.empty(centre.shape), np.empty(centre.shape)
        for place in np.ndindex(centre.shape):
            at = {name: array[place] for name, array in zip(variables, arrays, strict=True)}
            low[place], high[place] = self._linear_interval(self._basis_at(at), level, new)
        return low, high

    def difference(
        self, first: Mapping[str, float], second: Mapping[str, float], level: float = LEVEL
    ) -> tuple[float, tuple[float, float] | None]:
        """Expected loss at the first variables minus that at the second (nats per token).

        The two losses share most of their error, so the difference is known better than either.

        Args:
            first, second: the law's variables by name; k may be infinite.
            level: of the interval.

        Returns:
            The difference and its profile-likelihood interval; None where the noise is unknown.
        """
        value = float(self.predict(**first) - self.predict(**second))
        if self._solution.noise.freedom == 0:
            return value, None
        minuend, subtrahend = self._basis_at(first), self._basis_at(second)
        return value, self._linear_interval(lambda x: minuend(x) - subtrahend(x), level)

    def _linear_interval(
        self, vector: profile.Vector, level: float, new: bool = False
    ) -> tuple[float, float]:
        """Interval of a linear combination of the coefficients; ``new`` as in predict_interval."""
        own = self._solution
        reach = self._reach(level, profile.gradient_of(own.state, vector), new=new)
        assert reach is not None
        threshold, beside = reach
        low, high = profile.of_linear(own.problem, own.state, vector, threshold)
        centre = float(np.real(vector(own.state.theta)) @ own.state.coefficients)
        size = own.problem.size
        return _wider((low * size, high * size), centre * size, beside)

    def _basis_at(self, at: Mapping[str, Any]) -> profile.Vector:
        def vector(theta: NDArray[Any]) -> NDArray[Any]:
            named = dict(zip(self.law.nonlinear, theta, strict=True))
            return np.array(self.law.basis(**at, **named))

        return vector

    def holds(self, value: float, level: float = LEVEL, **variables: ArrayLike) -> bool:
        """Whether the interval of a predicted loss holds a value: one refit instead of many."""
        at = {name: float(np.asarray(v)) for name, v in variables.items()}
        own, vector = self._solution, self._basis_at(at)
        reach = self._reach(level, profile.gradient_of(own.state, vector))
        if reach is None:
            raise MergelawError("the noise is unknown, and with it intervals: give standard errors")
        threshold, beside = reach
        centre = float(self.predict(**variables))
        far = (value - centre) ** 2 - beside**2
        if far <= 0:
            return True
        nearer = centre + math.copysign(math.sqrt(far), value - centre)
        return profile.holds(own.problem, own.state, vector, nearer / own.problem.size, threshold)

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """90% intervals of all parameters for this pool; empty where the noise is unknown."""
        found = {name: self.interval(name) for name in self.parameters}
        return {name: ends for name, ends in found.items() if ends is not None}

    @cached_property
    def experts_intervals(self) -> dict[str, tuple[float, float]]:
        """The same for experts like these; empty where no expert could be left out."""
        found = {name: self.interval(name, of=EXPERTS) for name in self.parameters}
        return {name: ends for name, ends in found.items() if ends is not None}

    def _jackknife(self, value: Array, others: Array, level: float) -> tuple[Array, Array] | None:
        """Value -+ t times the delete-one standard error (Tukey 1958), t on M - 1."""
        _checked_level(level)
        pool = len(self.without)
        if pool < 2:
            return None
        spread = np.sqrt((pool - 1) * np.mean((others - others.mean(axis=0)) ** 2, axis=0))
        reach = float(stdtrit(pool - 1, (1 + level) / 2)) * spread
        return value - reach, value + reach

    def freedom_of(self, name: str) -> float:
        """Degrees of freedom of a parameter's interval (Satterthwaite 1946)."""
        unit = np.eye(len(self.law.parameters))[self.law.parameters.index(name)]
        return self._noise_of(unit, own=True)[2]

    def _noise_of(
        self, gradient: Array, own: bool = False, new: bool = False
    ) -> tuple[float, float, float]:
        """How noisy gradient . parameters is.

        Args:
            gradient: of what is estimated, by all parameters, linear ones first.
            own: it is a parameter, that is not left out of it if it is on its bound.
            new: what a base misses of the law comes on top.

        Returns:
            Its variance over what the weights make of it; the variance beside, of what points are
            not weighed by (nats^2); and the degrees of freedom of all.
        """
        noise, solution = self._solution.noise, self._solution
        missed = float(np.sum(np.nan_to_num([self.misfit, self.scatter]) ** 2)) if new else 0.0
        if solution.problem.whitener is None:
            return 1.0, missed, noise.freedom
        used = solution.free | (gradient != 0) if own else solution.free
        tangent = solution.tangent[:, used]
        lengths = np.linalg.norm(tangent, axis=0)
        lengths[lengths == 0] = 1
        white = np.linalg.pinv(tangent / lengths).T @ (gradient[used] / lengths)
        if own and gradient[len(self.law.linear) :].any():  # of a nonlinear one, per unit loss
            white = white / solution.problem.size
        weighed, beside, freedom = noise.of(
            solution.problem.whitener.T @ white, 1.0 if new else 0.0
        )
        assumed = float(white @ white)
        # Rounding may leave variances of nothing below 0.
        ratio = max(weighed, 0.0) / assumed if assumed > 0 else 1.0
        return ratio, max(beside, 0.0) + missed, freedom

    def _reach(
        self, level: float, gradient: Array, own: bool = False, new: bool = False
    ) -> tuple[float, float] | None:
        """Excess of the scaled squares at an interval's ends, and what comes beside; or None."""
        noise, size = self._solution.noise, self._solution.problem.size
        _checked_level(level)
        if noise.freedom == 0:
            return None
        inflated, beside, freedom = self._noise_of(gradient, own, new)
        share = (1 + level) / 2
        quantile = float(ndtri(share) if math.isinf(freedom) else stdtrit(freedom, share))
        return quantile**2 * inflated * noise.variance / size**2, quantile * math.sqrt(beside)

    # ---- diagnostics

    @cached_property
    def aicc(self) -> float:
        """Akaike's criterion, corrected for few points; NaN where they are too few for it.

        Of laws fitted to the same points, the lowest describes them best for the parameters that it
        spends; a difference below 2 decides nothing.
        """
        own, count = self._solution, len(self.law.parameters)
        shapes = own.estimated
        if not shapes and own.misfit is not None:
            return deviance(own.residuals, own.known, []) + 2 * count
        spent = count + len(shapes)
        left = self.n_points - spent - 1
        if left <= 0 or not shapes:
            return math.nan
        least = (1e-13 * float(np.mean(self.loss))) ** 2
        residuals = own.residuals
        if float(np.mean(residuals**2)) < least:
            residuals = np.full_like(residuals, math.sqrt(least))
        return deviance(residuals, own.known, shapes) + 2 * spent * self.n_points / left

    @cached_property
    def rivals(self) -> tuple[dict[str, Any], ...]:
        """This law and its rivals on the same points: see ``diagnostics.rivals``."""
        return diagnostics.rivals(self)

    @cached_property
    def left_out(self) -> dict[str, dict[str, Any]]:
        """Forecasts of what was left out, by variable: see ``diagnostics.left_out``."""
        return diagnostics.left_out(self)

    @cached_property
    def runs(self) -> dict[str, float] | None:
        """Runs of residuals of one sign: see ``diagnostics.runs``."""
        return diagnostics.runs(self)

    @cached_property
    def doubts(self) -> tuple[str, ...]:
        """Sentences on what rivals, forecasts, residuals and intervals tell against the fit."""
        return tuple(diagnostics.doubts(self))

    def refit(self, law: Law, kept: NDArray[np.bool_] | None = None) -> "Fit":
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
        table = {name: values[kept] for name, values in self.variables.items()}
        parts = [part.of(kept) for part in own.given]
        return fit(
            replace(law, nonlinear=starts),
            {**table, law.response: self.loss[kept]},
            covariance=parts,
            misfit=own.misfit,
            scatter=own.scatter,
        )

    # ---- for people and machines

    def summary(self) -> str:
        """The fit as text: parameters, quality, forecasts of what was left out, rivals, doubts."""
        width = max(map(len, self.parameters))
        lines = [self.law.equation]
        for name, value in self.parameters.items():
            told = [
                f"{ends[name][0]:.5g} to {ends[name][1]:.5g}"
                for ends in (self.intervals, self.experts_intervals)
                if name in ends
            ]
            beside = f"   90%: {'   experts like these: '.join(told)}" if told else ""
            lines.append(f"  {name:<{width}} = {value:<10.5g}{beside}".rstrip())
        noise = f"  misfit {self.misfit:.2g}" if math.isfinite(self.misfit) else ""
        noise += f"  scatter over N {self.scatter:.2g}" if self.scatter > 0 else ""
        lines.append(
            f"  R^2 = {self.r2:.5f}  RMSE = {self.rmse:.3g} nats  {self.n_points} points{noise}"
        )
        for name, forecast in self.left_out.items():
            same = forecast["same"]
            beside = "" if same is None else f', "same as the last point" by {same:.3g}'
            lines.append(
                f"  {name} = {forecast['value']:g} left out is missed by "
                f"{forecast['error']:.3g} nats{beside}"
            )
        told = [
            f"{rival['law']} {rival['above']:+.1f}"
            for rival in self.rivals
            if rival["above"] is not None
        ]
        if len(self.rivals) > 1 and math.isfinite(self.aicc):
            lines.append(f"  AICc above the best: {', '.join(told)}")
        return "\n".join([*lines, *(f"  ! {told}" for told in (*self.warnings, *self.doubts))])

    def to_dict(self) -> dict[str, Any]:
        """The fit as values that strict JSON can hold; what is undefined is None."""
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
            "left_out": dict(self.left_out),
            "runs": self.runs,
            "n_points": self.n_points,
            "residuals": self.residuals.tolist(),
            "warnings": list(self.warnings),
            "doubts": list(self.doubts),
        }


@dataclass(frozen=True)
class _Solution:
    """What a fit was found with, points in the solver's order.

    Attributes:
        problem, state: the least-squares problem and its minimum.
        noise: the covariance that it was weighed with.
        given: the covariance as given.
        misfit, scatter: as given, or None.
        estimated: matrices whose variances were to be estimated (None: the identity).
        residuals: measured minus fitted.
    """

    problem: Problem
    state: State
    noise: Noise
    given: tuple[Part, ...]
    misfit: float | None
    scatter: float | None
    estimated: tuple[Array | None, ...]
    residuals: Array

    @cached_property
    def known(self) -> Array:
        """All of the covariance that is not to be estimated."""
        count = len(self.residuals)
        total = sum(weighing(self.given), np.zeros((count, count)))
        if self.misfit:
            total = total + self.misfit**2 * np.eye(count)
        base = _same_base(self.problem.variables)
        if self.scatter and base is not None:
            total = total + self.scatter**2 * base
        return total

    @cached_property
    def tangent(self) -> Array:
        """Derivatives of the whitened losses by all parameters."""
        return self.problem.tangent(self.state)

    @cached_property
    def free(self) -> NDArray[np.bool_]:
        return _free(self.problem, self.state)


def fit(
    law: Law,
    table: pd.DataFrame | Mapping[str, ArrayLike],
    *,
    covariance: ArrayLike | Sequence[Part] | None = None,
    misfit: float | None = None,
    scatter: float | None = None,
    without: Sequence[pd.DataFrame] = (),
) -> Fit:
    """Fit a law by generalised least squares; no starting values are needed.

    The covariance of the points is V = covariance + misfit^2 1 + scatter^2 Z Z'. The first is what
    is known of the measurement (design, documents); the others are what the law itself misses, at
    each point and of each base, which sampling variance does not cover and without which points
    with little of that would get all the weight.

    Args:
        law: one of ``LAWS``, or a law of your own.
        table: the law's variables by name (N > 0 in billions of parameters, k >= 1) and the loss
            ``ce`` (nats per token, > 0), or the law's other response; one value per point. If it
            has a column ``se``, standard errors, the covariance is diag(se^2).
        covariance: instead, the covariance of the losses, (points, points), in the order of the
            table's rows; or the parts that it is the sum of.
        misfit: standard deviation (nats per token); None estimates it from the residuals, for
            which there must be more points than parameters.
        scatter: standard deviation (nats per token); None estimates it from the residuals of a law
            of N and k, if there are at least five sizes, and is 0 otherwise.
        without: tables of the same with an expert of the pool left out, for intervals that speak
            of experts like these; rows that the table has too, same columns.

    Raises:
        MergelawError: values are missing or impossible, there are fewer points than parameters, or
            too few levels of a variable.
    """
    variables, loss = _checked(law, table)
    for name, value in (("misfit", misfit), ("scatter", scatter)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise MergelawError(f"{name} is {value:g}: give a standard deviation of 0 or more")
    given = _parts(table, covariance, len(loss))
    if misfit == 0 and not any(part.matrix.any() for part in given):
        raise MergelawError(
            "misfit 0 without standard errors says that nothing is uncertain: omit it"
        )
    # One order of the points, whatever the table's: sums of floats then have one value.
    order = np.lexsort((loss, *reversed(variables.values())))
    ordered, sorted_variables = loss[order], {n: v[order] for n, v in variables.items()}
    parts = tuple(part.of(order) for part in given)
    problem, state, noise, estimated = _solve(
        law, sorted_variables, ordered, parts, misfit, scatter
    )
    coefficients = state.coefficients * problem.size
    parameters = {
        name: float(value)
        for name, value in zip(law.parameters, [*coefficients, *state.theta], strict=True)
    }
    warnings = list(diagnostics.warnings(problem, state, noise))
    if parts and misfit is None and len(loss) <= len(law.parameters):
        warnings.append(
            "as many parameters as points: what the law itself misses is unknown, and intervals "
            "hold the given standard errors only; measure more levels of " + " or ".join(law.levels)
        )
    residuals = np.empty_like(loss)
    residuals[order] = ordered - law.predict(parameters, **sorted_variables)
    squares = float(residuals @ residuals)
    variance = float(np.sum((ordered - ordered.mean()) ** 2))
    # Losses that differ by rounding alone have no variance to explain.
    rounding = 1e-12 * float(np.linalg.norm(ordered))
    fitted = Fit(
        law=law,
        parameters=parameters,
        r2=1 - squares / variance if variance > rounding**2 else math.nan,
        rmse=math.sqrt(squares / len(loss)),
        n_points=len(loss),
        residuals=residuals,
        misfit=noise.misfit,
        scatter=noise.scatter,
        freedom=noise.freedom,
        warnings=tuple(warnings),
        variables=sorted_variables,
        loss=ordered,
        without=(),
        _solution=_Solution(
            problem, state, noise, parts, misfit, scatter, estimated, residuals[order]
        ),
    )
    others = [
        dict(zip(law.parameters, map(float, _left_out_experts(fitted, other)), strict=True))
        for other in without
    ]
    return replace(fitted, without=tuple(others))


def _solve(
    law: Law,
    variables: Mapping[str, Array],
    loss: Array,
    parts: tuple[Part, ...],
    misfit: float | None,
    scatter: float | None,
) -> tuple[Problem, State, Noise, tuple[Array | None, ...]]:
    """The minimum, how noisy the points are, and which variances were to be estimated."""
    points = len(loss)
    plain = Problem(law, variables, loss)
    enough = points > len(law.parameters)
    base = _same_base(variables)
    known = list(parts)
    if misfit:
        known.append(Part(misfit**2 * np.eye(points)))
    if scatter and base is not None:
        known.append(Part(scatter**2 * base))
    estimated: tuple[Array | None, ...] = (None,) if misfit is None and enough else ()
    sizes = len(np.unique(variables.get("N", np.empty(0))))
    grouped = scatter is None and base is not None and enough and sizes >= SIZES_FOR_SCATTER
    if grouped:
        estimated += (base,)
    even = not parts and not scatter and not grouped
    state = plain.minimum() if even else plain.minimum(enough=ROUGHLY)
    least = 1e-12 * float(np.mean(loss))
    if grouped and not parts and state.squares * plain.size**2 < points * least**2:
        even, estimated = True, estimated[:-1]  # losses without any noise
    if even:  # equal errors are no weights
        return plain, state, _even_noise(plain, state, misfit, enough), estimated
    none = np.zeros((points, points))
    total, whole = sum(weighing(known), none), sum(weighing(known, whole=True), none)
    # A point without any error would have infinite weight.
    # Where as many points are exact as the law has parameters it can go through them, and whether
    # it misses anything the others hardly tell: that it misses nothing is then no finding.
    exact = int(np.sum(np.diag(whole) == 0))
    pinned = misfit is None and enough and exact >= len(law.parameters)
    little = max(least**2, SINGULAR * float(np.trace(total)) / points) * np.eye(points)
    total, whole = total + little, whole + little
    problem, variances, spread = Problem(law, variables, loss, total), np.zeros(0), np.zeros((0, 0))
    for _ in range(ROUNDS if estimated else 0):
        near = plain.project(state.theta)
        tangent = plain.tangent(near)[:, _free(plain, near)]
        residuals = near.residuals * plain.size
        variances, spread = restricted(residuals, tangent, whole, estimated, pinned)
        weighed = total
        for shape, variance in zip(estimated, variances, strict=True):
            weighed = weighed + variance * (np.eye(points) if shape is None else shape)
        problem = Problem(law, variables, loss, weighed)
        state = problem.descend(problem.project(state.theta))
    state = problem.minimum(state.theta)
    found = {
        "misfit" if s is None else "scatter": math.sqrt(v)
        for s, v in zip(estimated, variances, strict=True)
    }
    above = variances > 0
    shapes = [np.eye(points) if shape is None else shape for shape in estimated]
    return (
        problem,
        state,
        Noise(
            misfit=found.get("misfit", misfit or 0.0),
            scatter=found.get("scatter", scatter or 0.0),
            variance=1.0,
            freedom=float(points - _free(problem, state).sum()) if above.any() else math.inf,
            parts=tuple(known),
            shapes=tuple(shape for shape, kept in zip(shapes, above, strict=True) if kept),
            variances=variances[above],
            uncertainty=spread,
        ),
        estimated,
    )


def _even_noise(problem: Problem, state: State, misfit: float | None, enough: bool) -> Noise:
    """The noise of points that are not weighed."""
    if misfit:
        return Noise(misfit, 0.0, misfit**2, math.inf)
    if not enough:
        return Noise(math.nan, 0.0, math.nan, 0)
    freedom = float(len(problem.loss) - _free(problem, state).sum())
    variance = state.squares * problem.size**2 / freedom
    return Noise(math.sqrt(variance), 0.0, variance, freedom)


def _same_base(variables: Mapping[str, Array]) -> Array | None:
    """Whether two points are of one base, (points, points) of 0 and 1; None without bases."""
    if not {"N", "k"} <= variables.keys():
        return None
    return (variables["N"][:, None] == variables["N"]).astype(float)


def _free(problem: Problem, state: State) -> NDArray[np.bool_]:
    """Which parameters the points moved: neither on a bound nor without effect."""
    idle = np.linalg.norm(problem.jacobian(state), axis=0) <= ROUNDING
    inside = (state.theta > problem.lower) & (state.theta < problem.upper)
    return np.concatenate([problem.signed | (state.coefficients > 0), inside & ~idle])


def _left_out_experts(fitted: Fit, table: pd.DataFrame | Mapping[str, ArrayLike]) -> Array:
    """Parameters of the law on other losses at some of the fit's points, weighed as those were."""
    own, law = fitted._solution, fitted.law
    variables, loss = _checked(law, table)
    same = [fitted.variables[name] == values[:, None] for name, values in variables.items()]
    places = np.argmax(np.all(same, axis=0), axis=1)
    covariance = None
    if own.problem.whitener is not None:
        covariance = np.linalg.inv(own.problem.whitener.T @ own.problem.whitener)
        covariance = covariance[np.ix_(places, places)]
    problem = Problem(law, variables, loss, covariance)
    state = problem.descend(problem.project(own.state.theta))
    return np.concatenate([state.coefficients * problem.size, state.theta])


def _parts(
    table: pd.DataFrame | Mapping[str, ArrayLike],
    covariance: ArrayLike | Sequence[Part] | None,
    points: int,
) -> tuple[Part, ...]:
    """The known covariance of the points, checked, without what is 0."""
    if covariance is None:
        if "se" not in table:
            return ()
        errors = np.asarray(table["se"], dtype=float)
        if not np.isfinite(errors).all() or (errors < 0).any():
            raise MergelawError("column se has values below 0 or not finite: give standard errors")
        return (Part(np.diag(errors**2)),) if errors.any() else ()
    if isinstance(covariance, Sequence) and all(isinstance(part, Part) for part in covariance):
        parts = tuple(part for part in covariance if isinstance(part, Part))
    else:
        parts = (Part(np.asarray(covariance, dtype=float)),)
    for part in parts:
        matrix = part.matrix
        if matrix.shape != (points, points) or not np.isfinite(matrix).all():
            raise MergelawError(
                f"covariance has the shape {matrix.shape} or values that are not finite: "
                f"give a finite one of {points} by {points}, in the order of the table"
            )
        least = np.linalg.eigvalsh(matrix)[0]
        if not np.allclose(matrix, matrix.T) or least < -1e-9 * np.abs(matrix).max():
            raise MergelawError("covariance is not symmetric with eigenvalues >= 0: correct it")
    return tuple(part for part in parts if part.matrix.any())


def _wider(ends: tuple[float, float], centre: float, beside: float) -> tuple[float, float]:
    """An interval with an independent error beside what it was found from."""
    low, high = ends
    return (
        centre - math.hypot(centre - low, beside),
        centre + math.hypot(high - centre, beside),
    )


def _checked_of(of: str) -> str:
    if of not in (POOL, EXPERTS):
        raise MergelawError(f"of = {of!r}: an interval speaks of {POOL!r} or of {EXPERTS!r}")
    return of


def _checked_level(level: float) -> None:
    if not 0 < level < 1:
        raise MergelawError(f"level {level:g} is no probability: give one between 0 and 1")


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
