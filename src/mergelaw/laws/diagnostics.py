"""Diagnostics of fits: rivals, hold-out forecasts, residual runs, and warnings."""

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from mergelaw.errors import MergelawError
from mergelaw.laws.law import INTERFERENCE, INTERFERENCE_FIXED_N, NESTED, RIVALS, Array, Law
from mergelaw.laws.notes import Note
from mergelaw.laws.projection import ROUNDING, Problem
from mergelaw.laws.result import Result
from mergelaw.laws.solve import ROUNDED, Solution

# One law is clearly better than another if its AICc is lower by more than this.
CLEARLY = 2
# Residuals have too few runs if chance gives so few with a lower probability than this.
FEW_RUNS = 0.05
# If the largest N is less than this times the smallest, exponents follow training budgets.
LADDER = 100
# A parameter is undetermined if its standard error exceeds this share of its bounds' range.
FLAT = 0.1
# Warnings list at most this many levels of a variable.
FEW_LEVELS = 4


class Diagnostics(Result):
    """A law fitted to a table, compared with rivals and with points held out."""

    def refit(self, law: Law, kept: NDArray[np.bool_] | None = None) -> Result:
        """Fit another law, or this one, to the same points or to those in a mask."""
        raise NotImplementedError

    @cached_property
    def warnings(self) -> tuple[Note, ...]:
        """Warnings on single parameters and on the range of the points."""
        return tuple(_warnings(self.solution))

    @cached_property
    def doubts(self) -> tuple[Note, ...]:
        """Warnings from intervals, rivals, hold-out forecasts and residual runs."""
        return tuple(_doubts(self))

    @cached_property
    def rivals(self) -> tuple[dict[str, Any], ...]:
        """The law and its rivals on the same points: law, aicc, above, r2, rmse, best first.

        ``above`` is the AICc above the best law's; both are None where there are too few points.
        """
        fits: list[Result] = [self]
        for law in RIVALS.get(self.law.name, ()):
            if law in (INTERFERENCE, INTERFERENCE_FIXED_N) and not _rises(self):
                continue
            with suppress(MergelawError):
                fits.append(self.refit(law, None))
        ordered = sorted(fits, key=lambda other: (math.isnan(other.aicc), other.aicc))
        best = ordered[0].aicc
        return tuple(
            {
                "law": other.law.name,
                "aicc": or_none(other.aicc),
                "above": or_none(other.aicc - best),
                "r2": or_none(other.r2),
                "rmse": other.rmse,
            }
            for other in ordered
        )

    @cached_property
    def holdout(self) -> dict[str, dict[str, Any]]:
        """Forecasts of the points with a variable's largest value from all others, by variable.

        ``value`` is held out. ``error`` is the root mean squared error of the forecast (nats per
        token); ``same`` is that of repeating the loss at the next smaller value, or None.
        """
        results: dict[str, dict[str, Any]] = {}
        variables, loss = self.variables, self.loss
        for name in self.law.levels:
            values = variables[name]
            kept = values < values.max()
            with suppress(MergelawError):
                rest = self.refit(self.law, kept)
                target = {other: column[~kept] for other, column in variables.items()}
                errors = loss[~kept] - rest.predict(**target)
                repeated = loss[~kept] - _last(variables, loss, name, kept)
                results[name] = {
                    "value": float(values.max()),
                    "error": math.sqrt(np.mean(errors**2)),
                    "same": or_none(math.sqrt(np.mean(repeated**2))),
                }
        return results

    @cached_property
    def runs(self) -> dict[str, float] | None:
        """Runs of residuals of one sign along the last variable: found, expected and p.

        p is the probability of so few runs if signs were random (Wald and Wolfowitz 1940); None if
        the residuals are rounding errors or all of one sign.
        """
        variables, residuals = self.variables, self.solution.residuals
        if np.abs(residuals).max() < ROUNDED * np.abs(self.loss).max():
            return None
        along = list(variables)[-1]
        count = expected = variance = 0.0
        for chosen in _groups(variables, along):
            signs = residuals[chosen[np.argsort(variables[along][chosen])]] > 0
            total, above = len(signs), int(signs.sum())
            pairs = 2 * above * (total - above)
            count += 1 + np.count_nonzero(signs[1:] != signs[:-1])
            expected += 1 + pairs / total
            variance += pairs * (pairs - total) / (total**2 * (total - 1)) if total > 1 else 0
        if variance <= 0:
            return None
        # continuity correction of half a run
        chance = float(ndtr((count + 0.5 - expected) / math.sqrt(variance)))
        return {"found": count, "expected": expected, "p": chance}


def _warnings(solution: Solution) -> Iterable[Note]:
    problem, state = solution.problem, solution.state
    law = problem.law
    for name, value in zip(law.linear, state.coefficients, strict=True):
        if value == 0 and name not in law.signed:
            yield Note(
                "bound",
                f"{name} hit its bound 0: the points do not support its term; drop the term",
            )
    jacobian = problem.jacobian(state)
    lengths = np.linalg.norm(jacobian, axis=0)
    on_bound = (state.theta <= problem.lower) | (state.theta >= problem.upper)
    idle = lengths <= ROUNDING
    for place, name in enumerate(law.nonlinear):
        if idle[place]:
            yield Note(
                "idle", f"{name} has no effect on the fitted losses: its estimate is meaningless"
            )
        elif on_bound[place]:
            yield Note("bound", _on_bound(problem, name, float(state.theta[place])))
    free = np.flatnonzero(~on_bound & ~idle)
    more = " or ".join(law.levels)
    if solution.noise.freedom == 0:
        yield Note(
            "saturated",
            "as many parameters as points: the fit passes through the points and its error is "
            f"unknown, so there are no intervals; measure more levels of {more}, or give the "
            "points' standard errors",
        )
    elif len(free):
        scaled = jacobian[:, free] / lengths[free]
        spread = np.sqrt(np.diag(np.linalg.pinv(scaled.T @ scaled))) / lengths[free]
        errors = spread * math.sqrt(solution.noise.variance) / problem.size
        for j, error in zip(free, errors, strict=True):
            if error > FLAT * (problem.upper[j] - problem.lower[j]):
                yield Note(
                    "undetermined",
                    f"{list(law.nonlinear)[j]} is hardly determined (standard error about "
                    f"{error:.2g}): many values fit as well; measure more levels of {more}",
                )
    if "N" in law.levels:
        sizes = np.unique(problem.variables["N"])
        if sizes[-1] / sizes[0] < LADDER:
            yield Note(
                "short_ladder",
                f"the sizes span a factor of {sizes[-1] / sizes[0]:.3g} in N, less than {LADDER}: "
                "the exponents reflect the bases' training budgets; do not extrapolate them",
            )
        if len(sizes) == 3 and "L_star" in law.linear:
            yield Note(
                "three_sizes",
                "three sizes determine L_star, B and beta without a check of the floor's form: "
                "add a size before extrapolating in N",
            )
    if solution.parts and solution.misfit is None and len(solution.loss) <= len(law.parameters):
        yield Note(
            "no_misfit",
            "as many parameters as points: the law's own error is unknown, and intervals hold the "
            f"given standard errors only; measure more levels of {more}",
        )


def _on_bound(problem: Problem, name: str, value: float) -> str:
    """Warning that a parameter is on its bound, and the levels that would move it off."""
    text = f"{name} hit its bound {value:g}"
    along = "N" if name in ("beta", "gamma") else "k"
    at_lower = value <= problem.law.nonlinear[name][0]
    if at_lower and "k" in problem.variables and along in problem.variables:
        levels = np.unique(problem.variables[along])
        if len(levels) <= FEW_LEVELS:
            listed = ", ".join(f"{level:g}" for level in levels)
            needed = f"k = {levels[-1] + 2:g} or more" if along == "k" else "sizes"
            return f"{text}: {along} in {{{listed}}} cannot tell it from {value:g}; add {needed}"
    return f"{text}; its estimate is unreliable"


def _doubts(fitted: Diagnostics) -> Iterable[Note]:
    law = fitted.law
    for name, ends in fitted.intervals.items():
        bounds = law.nonlinear.get(name)
        if bounds is not None and ends[1] >= bounds[-1] and fitted.parameters[name] < bounds[-1]:
            yield Note(
                "open_interval",
                f"the interval of {name} reaches its upper bound {bounds[-1]:g}: the points do not "
                "limit it upwards; measure more levels of " + " or ".join(law.levels),
            )
    scored = [rival for rival in fitted.rivals if rival["aicc"] is not None]
    aicc = min((r["aicc"] for r in scored if r["law"] in (law.name, *NESTED)), default=-math.inf)
    better = [rival for rival in scored if rival["aicc"] < aicc - CLEARLY]
    if better:
        yield Note(
            "better_rival",
            f"law {better[0]['law']} describes the points better (AICc lower by "
            f"{aicc - better[0]['aicc']:.1f}): compare its forecasts before extrapolating",
        )
    for name, forecast in fitted.holdout.items():
        if forecast["same"] is not None and forecast["error"] > forecast["same"]:
            yield Note(
                "holdout",
                f"with {name} = {forecast['value']:g} held out, the law misses it by "
                f'{forecast["error"]:.2g} nats and "same as the last point" by '
                f"{forecast['same']:.2g}: do not forecast larger {name} with this law",
            )
    sign_runs = fitted.runs
    if sign_runs is not None and sign_runs["p"] < FEW_RUNS:
        yield Note(
            "runs",
            f"residuals keep their sign: {sign_runs['found']:g} runs, about "
            f"{sign_runs['expected']:.1f} expected; the law's form misses something, compare its "
            "rivals",
        )


def or_none(value: float) -> float | None:
    """The number, or None if it is not finite, since JSON has no such numbers."""
    return float(value) if math.isfinite(value) else None


def _groups(variables: Mapping[str, Array], along: str) -> Iterable[NDArray[np.intp]]:
    """Indices of points that differ in one variable only, group by group."""
    others = [values for name, values in variables.items() if name != along]
    others = others or [np.zeros(len(variables[along]))]
    numbers = np.unique(np.column_stack(others), axis=0, return_inverse=True)[1].ravel()
    return [np.flatnonzero(numbers == number) for number in range(numbers.max() + 1)]


def _rises(fitted: Result) -> bool:
    """Whether the loss at the largest k exceeds a loss at a smaller k, all else equal."""
    k, loss = fitted.variables["k"], fitted.loss
    groups = _groups(fitted.variables, "k")
    return any(loss[chosen[np.argmax(k[chosen])]] > loss[chosen].min() for chosen in groups)


def _last(variables: Mapping[str, Array], loss: Array, name: str, kept: NDArray[np.bool_]) -> Array:
    """For each held-out point, the loss at the next smaller value of ``name``, or NaN."""
    values = variables[name]
    last = np.full(len(loss), math.nan)
    for chosen in _groups(variables, name):
        rest = chosen[kept[chosen]]
        if len(rest):
            last[chosen] = loss[rest[values[rest] == values[rest].max()]].mean()
    return last[~kept]
