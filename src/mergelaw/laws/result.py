"""Results of fits: parameters, predictions and intervals."""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

from mergelaw.errors import MergelawError
from mergelaw.laws.covariance import Errors
from mergelaw.laws.law import Array, Law
from mergelaw.laws.posterior import Posterior, draw
from mergelaw.laws.projection import ROUNDING, STEP, Problem, State, columns_of

# Level of the reported intervals.
LEVEL = 0.9
# Populations of intervals: the mean over subsets of this pool on this evaluation set; or on other
# documents, or of other experts, from the same populations.
POOL = "this pool on this evaluation set"
DOCUMENTS = "this pool on documents like these"
EXPERTS = "experts like these on this evaluation set"
# Standard deviation of the gain that is still to come at infinity, as a share of it: forms that fit
# the measured k alike differ so much. At k it is smaller, by 1 - K/k for the largest measured K.
FURTHER = 0.5
# A point with a larger weight is not far off.
WHOLE = 0.999
# Draws at many points are fewer: so many losses in all.
MOST_DRAWN = 2_000_000
# No pool has so many experts.
MANY = 2**30


@dataclass(frozen=True)
class Solution:
    """The minimum of a fit, with points in the solver's order.

    Attributes:
        misfit, scatter: likeliest values (nats per token); NaN if unknown.
        fixed: the caller's misfit and scatter; None if not given.
        covariance: known variances (points,), sparse covariance (points, points), or None.
        documents: (points, any), factor of the documents' covariance; None if unknown.
    """

    problem: Problem
    state: State
    loss: Array
    errors: Errors
    misfit: float
    scatter: float
    fixed: tuple[float | None, float | None]
    covariance: Any
    documents: Array | None
    freedom: float

    @cached_property
    def residuals(self) -> Array:
        """Measured minus fitted losses."""
        parameters = self.problem.parameters(self.state)
        return self.loss - self.problem.law.predict(parameters, **self.problem.variables)

    @cached_property
    def deviance(self) -> float:
        """Minus twice the greatest log-likelihood, up to a constant; NaN without errors."""
        if self.freedom == 0:
            return math.nan
        misfit, scatter = self.fixed
        misfit = 0.0 if self.untested else misfit
        return self.errors.likeliest(self.residuals, None, misfit, scatter)[2]

    @property
    def untested(self) -> bool:
        """True with as many parameters as points: nothing tells the misfit, if it is not given."""
        return self.fixed[0] is None and len(self.loss) <= len(self.problem.law.parameters)

    @property
    def shares(self) -> Array:
        """Fitted losses in units of their mean."""
        predicted = self.loss - self.residuals
        return np.asarray(predicted / predicted.mean())

    @property
    def sandwich(self) -> float:
        """Errors of a robust fit by Huber's sandwich (1973), relative to those by weights alone."""
        if (self.errors.scale == 1).all():
            return 1.0
        weights = (self.errors.scale * self.shares) ** 2
        residuals, inside = self.residuals / self.shares, float(np.mean(weights > WHOLE))
        ratio = float(np.sum((weights * residuals) ** 2) / np.sum(weights * residuals**2))
        return math.sqrt(ratio * float(np.mean(weights))) / inside if inside else 1.0

    @cached_property
    def tangent(self) -> Array:
        """Derivatives of the whitened losses by all parameters, 0 for those that are not free."""
        slopes = self.problem.slopes(self.state) * self.problem.size
        return np.column_stack([self.problem.columns(self.state.theta), slopes]) * self.free

    @cached_property
    def free(self) -> NDArray[np.bool_]:
        """Mask of the parameters that are neither on a bound nor without effect."""
        return free_parameters(self.problem, self.state)

    @cached_property
    def deviations(self) -> Array:
        """Standard errors of the parameters, linearised; 0 for those that are not free."""
        unit = self.misfit if self.problem.whiten is None else 1.0
        errors: Array = np.linalg.norm(self.influence, axis=1) * unit
        return errors

    @cached_property
    def influence(self) -> Array:
        """Derivatives of the parameters by the whitened losses, (parameters, points)."""
        lengths = np.linalg.norm(self.tangent, axis=0)
        lengths[lengths == 0] = 1
        inverse: Array = np.linalg.pinv(self.tangent / lengths) / lengths[:, None]
        return inverse


def free_parameters(problem: Problem, state: State) -> NDArray[np.bool_]:
    """Mask of the parameters that are neither on a bound nor without effect."""
    idle = np.linalg.norm(problem.jacobian(state), axis=0) <= ROUNDING
    inside = (state.theta > problem.lower) & (state.theta < problem.upper)
    return np.concatenate([problem.signed | (state.coefficients > 0), inside & ~idle])


@dataclass(frozen=True)
class Form:
    """One form of the law: its best parameters, and its share in predictions."""

    law: Law
    parameters: Mapping[str, float]
    weight: float
    posterior: Posterior


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
        if variance <= (1e-12 * float(np.linalg.norm(loss))) ** 2:
            return math.nan
        return 1 - float(self.residuals @ self.residuals) / variance

    @property
    def misfit(self) -> float:
        """Standard deviation (nats per token) of the law's own error at a point; NaN if unknown."""
        return self.solution.misfit

    @property
    def scatter(self) -> float:
        """Standard deviation (nats per token) of the law's error common to a base's points."""
        return self.solution.scatter

    @property
    def freedom(self) -> float:
        """Points less free parameters; infinite without an estimated misfit, 0 without errors."""
        return self.solution.freedom

    @cached_property
    def posterior(self) -> Posterior | None:
        """Draws of the law's parameters; None where the noise is unknown."""
        solution, problem = self.solution, self.solution.problem
        if solution.freedom == 0:
            return None
        unit = solution.misfit if problem.whiten is None else 1.0
        influence = solution.influence[len(self.law.linear) :] * unit
        drawn = draw(
            self.law,
            problem.variables,
            solution.loss,
            solution.errors,
            theta=solution.state.theta,
            coefficients=solution.state.coefficients,
            influence=influence,
            misfit=solution.misfit if solution.untested else solution.fixed[0],
            scatter=solution.fixed[1],
        )
        if drawn is None or solution.sandwich == 1:
            return drawn
        centre = np.array(list(self.parameters.values()))
        values = centre + solution.sandwich * (drawn.parameters - centre)
        least = np.where(problem.signed, -math.inf, 0.0)
        most = np.full(len(least), math.inf)
        bounds = np.append(least, problem.lower), np.append(most, problem.upper)
        return replace(drawn, parameters=np.clip(values, *bounds))

    @property
    def forms(self) -> tuple[Form, ...]:
        """Forms that intervals of predictions integrate over; empty where the noise is unknown."""
        if self.posterior is None:
            return ()
        return (Form(self.law, self.parameters, 1.0, self.posterior),)

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
        """Loss (nats per token) by the law's own best parameters, at its variables by name."""
        return self.law.predict(self.parameters, **variables)

    def expected(self, **variables: ArrayLike) -> Array:
        """Loss to expect (nats per token): the mean over forms by their weight, as in intervals.

        Each form counts with its best parameters. Where nothing tells forms apart it is that of
        ``predict``; where forms without a floor weigh more than half, the floor is -infinity.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            fitted = self.predict(**variables)
            if not self.forms or self.solution.untested:
                return fitted
            losses = np.array([f.law.predict(f.parameters, **variables) for f in self.forms])
        shape = (-1, *np.ones(fitted.ndim, dtype=int))
        weights = np.array([form.weight for form in self.forms]).reshape(shape)
        finite = np.isfinite(losses)
        share = (weights * finite).sum(axis=0)
        mean = (weights * np.where(finite, losses, 0.0)).sum(axis=0) / np.maximum(share, 0.5)
        return np.asarray(np.where(share < 0.5, -math.inf, mean))

    def prediction(
        self,
        level: float = LEVEL,
        population: str = POOL,
        new: bool = False,
        **variables: ArrayLike,
    ) -> pd.DataFrame:
        """Table of the variables, the loss ce to expect, and the interval low to high."""
        arrays = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in variables.values()))
        columns = {n: a.ravel() for n, a in zip(variables, arrays, strict=True)}
        loss, ends = self.expectation(level, population, new, **columns)
        low, high = (math.nan, math.nan) if ends is None else ends
        return pd.DataFrame({**columns, "ce": loss}).assign(low=low, high=high)

    def k_within(self, nats: float, **others: float) -> int | None:
        """k_eps: experts expected to come this close to the floor; None if no number is enough.

        Args:
            nats: distance of the expected loss from its limit for k to infinity, above 0.
            others: the law's variables besides k.
        """
        if not nats > 0:
            raise MergelawError(f"nats = {nats:g}: give a distance above 0")

        floor = float(self.expected(k=math.inf, **others))
        if not math.isfinite(floor):
            return None
        count = least_count(lambda k: not self.expected(k=k, **others) > floor + nats, MANY)
        return None if math.isinf(count) else int(count)

    def interval(
        self, name: str, level: float = LEVEL, population: str = POOL
    ) -> tuple[float, float] | None:
        """Interval of a parameter, given this law; None where the noise is unknown.

        An estimate on its bound has an interval from there.

        Raises:
            MergelawError: unknown parameter or population, or an impossible level.
        """
        if name not in self.parameters:
            raise MergelawError(
                f"law {self.law.name} has no parameter {name}: it has {', '.join(self.parameters)}"
            )
        _check(level, population)
        if self.posterior is None:
            return None
        place, value = self.law.parameters.index(name), self.parameters[name]
        least = -math.inf if name in self.law.signed else 0.0
        box = self.law.nonlinear.get(name, (least, math.inf))
        low, high = _ends(self.posterior.parameters[:, place], level)
        if value <= box[0]:
            low = box[0]
            high = float(np.quantile(self.posterior.parameters[:, place], level))
        unit = np.eye(len(self.parameters))[place]
        others = np.array([parameters[name] for parameters in self.jackknife])
        reach = self._beyond(unit[None], others[:, None], level, population)
        if reach is None:
            return None
        low, high = min(low, value), max(high, value)
        if low == high == box[0] and not reach[0]:  # no draw is above the bound
            return None
        low, high = (
            value - math.hypot(value - low, reach[0]),
            value + math.hypot(high - value, reach[0]),
        )
        return max(low, box[0]), min(high, box[-1])

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
        """Intervals of ``expectation`` (nats per token); None if unknown."""
        return self.expectation(level, population, new, **variables)[1]

    def expectation(
        self,
        level: float = LEVEL,
        population: str = POOL,
        new: bool = False,
        **variables: ArrayLike,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Expected losses (nats per token) and their intervals; None if these are unknown.

        They integrate over the law's parameters, over the forms that the points do not exclude,
        and over misfit and scatter. Without a floor the lower end at k = infinity is -infinity.

        Args:
            level: nominal coverage.
            population: ``POOL``, ``DOCUMENTS`` or ``EXPERTS``.
            new: the interval is for E[L|N,k] of another base, with the law's misfit and scatter
                but without sampling error; beyond the measured sizes the scatter grows with each
                step of the ladder. Else it is for the mean that the law describes.
            variables: as in ``predict``; k may be infinite.
        """
        _check(level, population)
        centre = self.expected(**variables)
        if not self.forms:
            return centre, None
        arrays = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in variables.values()))
        flat = {name: array.ravel() for name, array in zip(variables, arrays, strict=True)}
        draws = self.draws(flat, new)
        low, high = _ends(draws, level)
        ends = self._widened(np.ravel(centre), low, high, [flat], level, population)
        if ends is None:
            return centre, None
        return centre, (ends[0].reshape(centre.shape), ends[1].reshape(centre.shape))

    def difference(
        self,
        first: Mapping[str, float],
        second: Mapping[str, float],
        level: float = LEVEL,
        population: str = POOL,
    ) -> tuple[float, tuple[float, float] | None]:
        """Expected loss at the first variables minus that at the second (nats per token).

        The losses share most of their error, so the interval of the difference is narrower than
        theirs; it is None where the noise is unknown.
        """
        _check(level, population)
        value = float(self.expected(**first) - self.expected(**second))
        if not self.forms:
            return value, None
        both = {name: np.array([first[name], second[name]], dtype=float) for name in first}
        draws = self.draws(both)
        low, high = _ends((draws[:, 0] - draws[:, 1])[:, None], level)
        places = [{name: array[:1] for name, array in both.items()}]
        places.append({name: array[1:] for name, array in both.items()})
        ends = self._widened(np.array([value]), low, high, places, level, population)
        return value, None if ends is None else (float(ends[0][0]), float(ends[1][0]))

    def draws(
        self,
        variables: Mapping[str, ArrayLike],
        new: bool = False,
        forms: Sequence[Form] | None = None,
    ) -> Array:
        """Draws of the expected loss (draws, points), each form as often as it is probable.

        Any function of them has the interval between its quantiles. Variables by name, and ``new``,
        are as in ``predict_interval``; ``forms`` replaces those of the fit.
        """
        arrays = {n: np.atleast_1d(np.asarray(v, dtype=float)) for n, v in variables.items()}
        parts: list[Array] = []
        points = len(next(iter(arrays.values())))
        for form in self.forms if forms is None else forms:
            count = len(form.posterior.parameters)
            share = form.weight * min(MOST_DRAWN / (count * points), 1)
            some = np.linspace(0, count - 1, max(round(share * count), 1)).astype(int)
            parameters = form.posterior.parameters[some]
            losses = _losses(form.law, parameters, arrays)
            random = np.random.default_rng(len(parts) + 1)
            if "k" in arrays and (arrays["k"] > (most := self.variables["k"].max())).any():
                last = _losses(form.law, parameters, arrays | {"k": np.minimum(arrays["k"], most)})
                gain = np.where(np.isfinite(losses), last - losses, 0.0)
                share = FURTHER * (1 - most / np.maximum(arrays["k"], most))
                losses = losses + random.standard_normal((len(some), 1)) * share * gain
            if new:
                noise = random.standard_normal((2, *losses.shape))
                losses = losses + form.posterior.misfit[some, None] * noise[0]
                losses += form.posterior.scatter[some, None] * noise[1] * self._steps(arrays)
            parts.append(losses)
        return np.vstack(parts)

    def _steps(self, variables: Mapping[str, Array]) -> Array | float:
        """Growth of the scatter beyond the measured sizes: 1 + steps of the ladder."""
        if "N" not in variables or "N" not in self.variables:
            return 1.0
        logs = np.log(np.unique(self.variables["N"]))
        step = (logs[-1] - logs[0]) / max(len(logs) - 1, 1) or 1.0
        far = np.log(variables["N"])
        beyond: Array = np.maximum(np.maximum(far - logs[-1], logs[0] - far), 0) / step
        return 1 + beyond

    def _widened(
        self,
        centre: Array,
        low: Array,
        high: Array,
        places: list[dict[str, Array]],
        level: float,
        population: str,
    ) -> tuple[Array, Array] | None:
        """Interval that holds the centre, wider by the population's error.

        The quantity is the loss at the first of ``places``, less that at the second.
        """
        gradients = self._gradients(places[0])
        others = [self.law.predict(parameters, **places[0]) for parameters in self.jackknife]
        if len(places) > 1:
            gradients = gradients - self._gradients(places[1])
            others = [
                loss - self.law.predict(parameters, **places[1])
                for loss, parameters in zip(others, self.jackknife, strict=True)
            ]
        reach = self._beyond(gradients, np.array(others), level, population)
        if reach is None:
            return None
        low, high = np.minimum(low, centre), np.maximum(high, centre)
        return centre - np.hypot(centre - low, reach), centre + np.hypot(high - centre, reach)

    def _gradients(self, variables: Mapping[str, Array]) -> Array:
        """Derivatives of the losses by all parameters, (points, parameters)."""
        theta = self.solution.state.theta
        coefficients = self.solution.state.coefficients * self.solution.problem.size
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = columns_of(self.law, variables, theta)
            steps = columns_of(self.law, variables, theta + 1j * STEP * np.eye(len(theta)))
        slopes = (np.nan_to_num(steps.imag) @ coefficients).T / STEP
        return np.column_stack([columns, slopes])

    def _beyond(
        self, gradients: Array, others: Array, level: float, population: str
    ) -> Array | None:
        """Half-widths that the population adds to intervals; None if unknown.

        Args:
            gradients: (quantities, parameters).
            others: (experts, quantities), values without each expert in turn.
        """
        if population == POOL:
            return np.zeros(len(gradients))
        if population == DOCUMENTS:
            solution = self.solution
            if solution.documents is None:
                return None
            white = solution.documents
            if solution.problem.whiten is not None:
                white = solution.problem.whiten(white)
            shifts = gradients @ (solution.influence @ white)
            return np.asarray(float(ndtri((1 + level) / 2)) * np.linalg.norm(shifts, axis=1))
        # t times the delete-one standard error (Tukey 1958), t on M - 1
        pool = len(self.jackknife)
        if pool < 2:
            return None
        spread = np.sqrt((pool - 1) * np.mean((others - others.mean(axis=0)) ** 2, axis=0))
        return np.asarray(float(stdtrit(pool - 1, (1 + level) / 2)) * spread)


def _losses(law: Law, parameters: Array, variables: Mapping[str, Array]) -> Array:
    """Losses (draws, points) at each row of parameters; terms without weight are 0."""
    chosen = {name: variables[name] for name in law.levels}
    named = dict(zip(law.parameters, parameters.T[:, :, None], strict=True))
    total = np.zeros((len(parameters), len(next(iter(chosen.values())))))
    with np.errstate(divide="ignore", invalid="ignore"):
        columns = law.basis(**chosen, **{name: named[name] for name in law.nonlinear})
        for name, column in zip(law.linear, columns, strict=True):
            total += np.where(named[name] == 0, 0.0, column * named[name])
    return total


def _ends(draws: Array, level: float) -> Any:
    """Equal-tailed quantiles of draws; infinite losses are no error."""
    return np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0, method="nearest")


def _check(level: float, population: str) -> None:
    if population not in (POOL, DOCUMENTS, EXPERTS):
        raise MergelawError(
            f"population = {population!r}: give {POOL!r}, {DOCUMENTS!r} or {EXPERTS!r}"
        )
    if not 0 < level < 1:
        raise MergelawError(f"level {level:g} is not a probability: give one between 0 and 1")


def least_count(holds: Callable[[int], bool], most: int) -> float:
    """Least k >= 1 from which on a condition holds; infinite above ``most``."""
    end = 1
    while not holds(end):
        end *= 2
        if end > most:
            return math.inf
    return bisect.bisect_left(range(end), True, lo=end // 2 + 1, key=holds)
