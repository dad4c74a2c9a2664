"""Results of fits: parameters, predictions and intervals."""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

from mergelaw.errors import MergelawError
from mergelaw.laws import profile
from mergelaw.laws.covariance import deviance, weighing
from mergelaw.laws.law import Array, Law
from mergelaw.laws.solve import ROUNDED, Solution

# Level of the reported intervals.
LEVEL = 0.9
# An interval is for the mean over subsets of this pool, or of another pool of as many experts
# from the same population.
POOL, EXPERTS = "this pool", "experts like these"
# No pool has so many experts.
MANY = 2**30


@dataclass(frozen=True)
class Result:
    """A law fitted to a table: parameters, predictions and intervals.

    Attributes:
        parameters: by name; losses in nats per token, N in the table's unit.
        residuals: measured minus fitted (nats per token), in the order of the table's rows.
        solution: the solver's result, with the points in its own order.
        jackknife: parameters without one expert of the pool, for each expert in turn.
    """

    law: Law
    parameters: dict[str, float]
    residuals: Array
    solution: Solution = field(repr=False, compare=False)
    jackknife: tuple[dict[str, float], ...] = field(repr=False, compare=False)

    @property
    def n_points(self) -> int:
        """Number of points."""
        return len(self.residuals)

    @property
    def variables(self) -> dict[str, Array]:
        """The law's variables at the points, in the solver's order."""
        return dict(self.solution.problem.variables)

    @property
    def loss(self) -> Array:
        """Losses (nats per token) of the points, in the solver's order."""
        return self.solution.loss

    @property
    def rmse(self) -> float:
        """Root mean squared residual (nats per token)."""
        return math.sqrt(float(self.residuals @ self.residuals) / self.n_points)

    @property
    def r2(self) -> float:
        """Share of the losses' variance that the fit explains; NaN if they have none."""
        loss = self.loss
        variance = float(np.sum((loss - loss.mean()) ** 2))
        if variance <= (ROUNDED * float(np.linalg.norm(loss))) ** 2:
            return math.nan
        return 1 - float(self.residuals @ self.residuals) / variance

    @property
    def misfit(self) -> float:
        """Standard deviation (nats per token) of the law's own error at a point; NaN if unknown."""
        return self.solution.noise.misfit

    @property
    def scatter(self) -> float:
        """Standard deviation (nats per token) of the law's error common to a base's points."""
        return self.solution.noise.scatter

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the residuals; see ``covariance.Noise``."""
        return self.solution.noise.freedom

    @cached_property
    def aicc(self) -> float:
        """Akaike's criterion, corrected for few points; NaN where they are too few."""
        solution, count = self.solution, len(self.law.parameters)
        shapes, residuals = solution.estimated, solution.residuals
        fixed = sum(weighing(solution.fixed), np.zeros((self.n_points, self.n_points)))
        if not shapes and solution.misfit is not None:
            return deviance(residuals, fixed, []) + 2 * count
        n_free = count + len(shapes)
        left = self.n_points - n_free - 1
        if left <= 0 or not shapes:
            return math.nan
        least = (1e-13 * float(np.mean(self.loss))) ** 2
        if float(np.mean(residuals**2)) < least:
            residuals = np.full_like(residuals, math.sqrt(least))
        return deviance(residuals, fixed, shapes) + 2 * n_free * self.n_points / left

    @property
    def params(self) -> pd.Series:
        """The parameters as a Series."""
        return pd.Series(self.parameters, name=self.law.name)

    def conf_int(self, level: float = LEVEL, population: str = POOL) -> pd.DataFrame:
        """Intervals of all parameters: columns low and high, NaN if unknown."""
        ends = {name: self.interval(name, level, population) for name in self.parameters}
        rows = {name: e or (math.nan, math.nan) for name, e in ends.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["low", "high"])

    def predict(self, **variables: ArrayLike) -> Array:
        """Fitted loss (nats per token) at the law's variables, by name."""
        return self.law.predict(self.parameters, **variables)

    def prediction(
        self,
        level: float = LEVEL,
        population: str = POOL,
        new: bool = False,
        **variables: ArrayLike,
    ) -> pd.DataFrame:
        """Table of the variables, the fitted loss ce, and the interval low to high."""
        arrays = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in variables.values()))
        columns = {n: a.ravel() for n, a in zip(variables, arrays, strict=True)}
        table = pd.DataFrame({**columns, "ce": self.predict(**columns)})
        ends = self.predict_interval(level, population, new, **columns)
        low, high = (math.nan, math.nan) if ends is None else ends
        return table.assign(low=low, high=high)

    def k_within(self, nats: float, **others: float) -> int | None:
        """k_eps: experts needed to come this close to the floor; None if no number is enough.

        Args:
            nats: distance of the expected loss from its limit for k to infinity, above 0.
            others: the law's variables besides k.
        """
        if not nats > 0:
            raise MergelawError(f"nats = {nats:g}: give a distance above 0")

        def too_far(k: float) -> bool:
            return float(self.predict(k=k, **others)) > floor + nats

        with np.errstate(divide="ignore", invalid="ignore"):
            floor = float(self.predict(k=math.inf, **others))
        if not math.isfinite(floor):
            return None
        above = 1
        while too_far(above):
            above *= 2
            if above > MANY:
                return None
        return bisect.bisect_left(range(above), True, lo=1, key=lambda k: not too_far(k))

    def interval(
        self, name: str, level: float = LEVEL, population: str = POOL
    ) -> tuple[float, float] | None:
        """Interval of a parameter; None where the noise is unknown.

        ``POOL`` gives a profile-likelihood interval; the points do not limit an end that is on the
        parameter's bound. ``EXPERTS`` gives the jackknife's, or None.

        Raises:
            MergelawError: unknown parameter or population, or an impossible level.
        """
        if name not in self.parameters:
            raise MergelawError(
                f"law {self.law.name} has no parameter {name}: it has {', '.join(self.parameters)}"
            )
        _check(level, population)
        if population == EXPERTS:
            return self._experts_interval(name, level)
        value, law = self.parameters[name], self.law
        unit = np.eye(len(law.parameters))[law.parameters.index(name)]
        reach = self._reach(level, unit, parameter=True)
        if reach is None:
            return None
        threshold, extra = reach
        problem, state = self.solution.problem, self.solution.state
        if name in law.nonlinear:
            j = list(law.nonlinear).index(name)
            ends = profile.nonlinear_interval(problem, state, j, threshold)
            low, high = _widened(ends, value, extra)
            return max(low, problem.lower[j]), min(high, problem.upper[j])
        vector = unit[: len(law.linear)]
        ends = profile.linear_interval(problem, state, lambda _: vector, threshold)
        ends = ends[0] * problem.size, ends[1] * problem.size
        if name in law.signed or value <= 0 or ends[0] <= 0:
            low, high = _widened(ends, value, extra)
            return (low if name in law.signed else max(low, 0.0)), high
        # Amplitudes are uncertain by a factor: far from N = 1 they vary with an exponent of N.
        logarithms = math.log(ends[0]), math.log(ends[1])
        low, high = _widened(logarithms, math.log(value), extra / value)
        with np.errstate(over="ignore"):
            return float(np.exp(low)), float(np.exp(high))

    def _experts_interval(self, name: str, level: float) -> tuple[float, float] | None:
        values = [parameters[name] for parameters in self.jackknife]
        ends = self._jackknifed(np.array(self.parameters[name]), np.array(values), level)
        if ends is None:
            return None
        least = -math.inf if name in self.law.signed else 0.0
        bounds = self.law.nonlinear.get(name, (least, math.inf))
        return max(float(ends[0]), bounds[0]), min(float(ends[1]), bounds[-1])

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """90% intervals of all parameters for this pool; empty where the noise is unknown."""
        ends = {name: self.interval(name) for name in self.parameters}
        return {name: pair for name, pair in ends.items() if pair is not None}

    @cached_property
    def experts_intervals(self) -> dict[str, tuple[float, float]]:
        """90% intervals of all parameters for experts like these; empty without a jackknife."""
        ends = {name: self.interval(name, population=EXPERTS) for name in self.parameters}
        return {name: pair for name, pair in ends.items() if pair is not None}

    def predict_interval(
        self,
        level: float = LEVEL,
        population: str = POOL,
        new: bool = False,
        **variables: ArrayLike,
    ) -> tuple[Array, Array] | None:
        """Intervals of the expected loss (nats per token); None if unknown.

        Args:
            level: nominal coverage.
            population: ``POOL`` or ``EXPERTS``; see ``interval``.
            new: the interval is for E[L|N,k] of another base, with the law's misfit and scatter
                but without sampling error; else for the mean that the law describes.
            variables: as in ``predict``; k may be infinite.
        """
        centre = self.predict(**variables)
        _check(level, population)
        if population == EXPERTS:
            others = [self.law.predict(other, **variables) for other in self.jackknife]
            return self._jackknifed(centre, np.array(others), level)
        if self.freedom == 0:
            return None
        arrays = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in variables.values()))
        low, high = np.empty(centre.shape), np.empty(centre.shape)
        for place in np.ndindex(centre.shape):
            values = {name: array[place] for name, array in zip(variables, arrays, strict=True)}
            low[place], high[place] = self._linear_interval(self._basis_at(values), level, new)
        return low, high

    def difference(
        self, first: Mapping[str, float], second: Mapping[str, float], level: float = LEVEL
    ) -> tuple[float, tuple[float, float] | None]:
        """Expected loss at the first variables minus that at the second (nats per token).

        The losses share most of their error, so the profile-likelihood interval of the difference
        is narrower than theirs; it is None where the noise is unknown.
        """
        value = float(self.predict(**first) - self.predict(**second))
        _check(level, POOL)
        if self.freedom == 0:
            return value, None
        minuend, subtrahend = self._basis_at(first), self._basis_at(second)
        return value, self._linear_interval(lambda x: minuend(x) - subtrahend(x), level)

    def _linear_interval(
        self, vector: profile.Vector, level: float, new: bool = False
    ) -> tuple[float, float]:
        """Interval of vector(theta) . coefficients; ``new`` as in ``predict_interval``."""
        problem, state = self.solution.problem, self.solution.state
        reach = self._reach(level, profile.gradient_of(state, vector), new=new)
        assert reach is not None
        threshold, extra = reach
        low, high = profile.linear_interval(problem, state, vector, threshold)
        centre = float(np.real(vector(state.theta)) @ state.coefficients)
        return _widened((low * problem.size, high * problem.size), centre * problem.size, extra)

    def _basis_at(self, values: Mapping[str, Any]) -> profile.Vector:
        def vector(theta: NDArray[Any]) -> NDArray[Any]:
            named = dict(zip(self.law.nonlinear, theta, strict=True))
            return np.array(self.law.basis(**values, **named))

        return vector

    def _jackknifed(self, value: Array, others: Array, level: float) -> tuple[Array, Array] | None:
        """Value -+ t times the delete-one standard error (Tukey 1958), t on M - 1."""
        pool = len(self.jackknife)
        if pool < 2:
            return None
        spread = np.sqrt((pool - 1) * np.mean((others - others.mean(axis=0)) ** 2, axis=0))
        reach = float(stdtrit(pool - 1, (1 + level) / 2)) * spread
        return value - reach, value + reach

    def freedom_of(self, name: str) -> float:
        """Degrees of freedom of a parameter's interval (Satterthwaite 1946)."""
        unit = np.eye(len(self.law.parameters))[self.law.parameters.index(name)]
        return self._noise_of(unit, parameter=True)[2]

    def _noise_of(
        self, gradient: Array, parameter: bool = False, new: bool = False
    ) -> tuple[float, float, float]:
        """Variance of gradient . parameters relative to the weights', extra variance, freedom.

        The gradient has linear parameters first. A ``parameter`` counts even if it is on its bound;
        ``new`` adds the law's error at a new base.
        """
        solution, noise, problem = self.solution, self.solution.noise, self.solution.problem
        missed = float(np.sum(np.nan_to_num([self.misfit, self.scatter]) ** 2)) if new else 0.0
        if problem.whitener is None:
            return 1.0, missed, noise.freedom
        used = solution.free | (gradient != 0) if parameter else solution.free
        tangent = solution.tangent[:, used]
        lengths = np.linalg.norm(tangent, axis=0)
        lengths[lengths == 0] = 1
        white = np.linalg.pinv(tangent / lengths).T @ (gradient[used] / lengths)
        if parameter and gradient[len(self.law.linear) :].any():  # nonlinear ones are per unit loss
            white = white / problem.size
        weighed, extra, freedom = noise.variance_of(problem.whitener.T @ white, float(new))
        assumed = float(white @ white)
        # Rounding can make a zero variance slightly negative.
        ratio = max(weighed, 0.0) / assumed if assumed > 0 else 1.0
        return ratio, max(extra, 0.0) + missed, freedom

    def _reach(
        self, level: float, gradient: Array, parameter: bool = False, new: bool = False
    ) -> tuple[float, float] | None:
        """Excess of the scaled squares at an interval's ends, and half-width to add to it."""
        noise, size = self.solution.noise, self.solution.problem.size
        if noise.freedom == 0:
            return None
        inflated, extra, freedom = self._noise_of(gradient, parameter, new)
        share = (1 + level) / 2
        quantile = float(ndtri(share) if math.isinf(freedom) else stdtrit(freedom, share))
        return quantile**2 * inflated * noise.variance / size**2, quantile * math.sqrt(extra)


def _widened(ends: tuple[float, float], centre: float, extra: float) -> tuple[float, float]:
    """An interval around the centre, widened by an independent error."""
    low, high = ends
    return centre - math.hypot(centre - low, extra), centre + math.hypot(high - centre, extra)


def _check(level: float, population: str) -> None:
    if population not in (POOL, EXPERTS):
        raise MergelawError(f"population = {population!r}: give {POOL!r} or {EXPERTS!r}")
    if not 0 < level < 1:
        raise MergelawError(f"level {level:g} is not a probability: give one between 0 and 1")
