"""Diagnostics of fits: rival forms, hold-out forecasts, outliers, warnings and the verdict."""

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, ndtr, stdtr

from mergelaw.errors import MergelawError
from mergelaw.laws.covariance import TYPICAL_SCATTER
from mergelaw.laws.law import (
    FLAT,
    INTERFERENCE,
    INTERFERENCE_FIXED_N,
    LAWS,
    NESTED,
    RIVALS,
    Array,
    Law,
)
from mergelaw.laws.notes import Note
from mergelaw.laws.projection import ROUNDING
from mergelaw.laws.result import Form, Result

# One law is better than another if its AICc is lower by more than CLEARLY, and excludes it if by
# more than EXCLUDED.
CLEARLY, EXCLUDED = 4, 10
# Forms with a higher AICc, relative to the best, are not integrated over.
IMPOSSIBLE = 14
# Residuals have too few runs, and a point is an outlier, if chance makes them so with a lower
# probability than this.
UNLIKELY = 0.05
# If the largest N is less than this times the smallest, exponents follow training budgets.
LADDER = 100
# A parameter is undetermined if its standard error exceeds this share of its bounds' range.
FLAT_PROFILE = 0.1
# Warnings list at most this many levels of a variable.
FEW_LEVELS = 4
HOLDS, DOUBTFUL, FAILS = "holds", "doubtful", "fails"


class Diagnostics(Result):
    """A law fitted to a table, compared with rivals and with points held out."""

    def refit(self, law: Law, kept: NDArray[np.bool_] | None = None) -> "Diagnostics":
        """Fit another law, or this one, to the same points or to those in a mask."""
        raise NotImplementedError

    @cached_property
    def aicc(self) -> float:
        """Akaike's criterion, corrected for few points; NaN where they are too few."""
        solution = self.solution
        estimated = (solution.fixed[0] is None) + (
            solution.fixed[1] is None and len(solution.errors.starts) > 0
        )
        count = len(self.law.parameters) + estimated
        rest = self.n_points - count - 1 if estimated else math.inf
        return solution.deviance + 2 * count * (1 + (count + 1) / rest) if rest > 0 else math.nan

    @cached_property
    def warnings(self) -> tuple[Note, ...]:
        """Warnings on single parameters and on the range of the points."""
        return tuple(_warnings(self))

    @cached_property
    def doubts(self) -> tuple[Note, ...]:
        """Warnings from outliers, rivals, hold-out forecasts and residual runs."""
        return tuple(_doubts(self))

    @cached_property
    def verdict(self) -> dict[str, Any]:
        """State of the law, ``holds``, ``doubtful`` or ``fails``, and reasons for it.

        A law fails if it is no better than one without k (AICc), if the loss does not fall with k,
        or if a rival excludes it (AICc) and forecasts the largest k better. It is doubtful if
        a ``doubts`` test speaks against it, or nothing can be tested. A law that fails gives no
        floors and no numbers of experts.
        """
        failures = list(_failures(self))
        if failures:
            return {"state": FAILS, "reasons": failures}
        reasons = [str(note) for note in self.doubts]
        if self.solution.untested:
            reasons = ["as many parameters as points: nothing tests the law", *reasons]
        return {"state": DOUBTFUL if reasons else HOLDS, "reasons": reasons}

    @property
    def on_bound(self) -> tuple[str, ...]:
        """Parameters on a bound or without effect; their estimates are not to be used."""
        pairs = zip(self.law.parameters, self.solution.free, strict=True)
        return tuple(name for name, free in pairs if not free)

    @cached_property
    def _rival_fits(self) -> tuple["Diagnostics", ...]:
        """This fit and those of its rivals, best AICc first."""
        fits: list[Diagnostics] = [self]
        for law in RIVALS.get(self.law.name, ()):
            if law in (INTERFERENCE, INTERFERENCE_FIXED_N) and not _rises(self):
                continue
            with suppress(MergelawError):
                fits.append(self.refit(law))
        return tuple(sorted(fits, key=lambda other: (math.isnan(other.aicc), other.aicc)))

    @cached_property
    def forms(self) -> tuple[Form, ...]:
        """Forms that the points do not exclude, weighted by their marginal likelihoods."""
        if self.posterior is None:
            return ()
        best = self._rival_fits[0].aicc
        possible = [
            (fitted, fitted.posterior)
            for fitted in self._rival_fits
            if fitted is self
            or (
                # A misfit that is taken as 0 makes likelihoods that no estimated one can have.
                fitted.solution.untested == self.solution.untested
                and not fitted.aicc > best + IMPOSSIBLE
            )
        ]
        pairs = [(fitted, drawn) for fitted, drawn in possible if drawn is not None]
        evidence = np.array([drawn.evidence for _, drawn in pairs])
        weights = np.exp(evidence - logsumexp(evidence))
        return tuple(
            Form(fitted.law, fitted.parameters, float(weight), drawn)
            for (fitted, drawn), weight in zip(pairs, weights, strict=True)
        )

    @cached_property
    def rivals(self) -> tuple[dict[str, Any], ...]:
        """The law and its rivals on the same points, best AICc first.

        Each has law, aicc, above (the best law's), r2, rmse, loo (root mean squared error with
        each point left out in turn, linearised), left_out (error of the forecast of the largest
        k), and weight in predictions; numbers are None where there are too few points.
        """
        weights = {form.law.name: form.weight for form in self.forms}
        best = self._rival_fits[0].aicc
        return tuple(
            {
                "law": other.law.name,
                "aicc": or_none(other.aicc),
                "above": or_none(other.aicc - best),
                "r2": or_none(other.r2),
                "rmse": other.rmse,
                "loo": or_none(_left_one_out(other)),
                "left_out": or_none(other._left_out_error("k")),
                "weight": weights.get(other.law.name, 0.0) if weights else None,
            }
            for other in self._rival_fits
        )

    @cached_property
    def holdout(self) -> dict[str, dict[str, Any]]:
        """Forecasts of the points with a variable's largest value from all others, by variable.

        ``value`` is held out. ``error`` is the root mean squared error of the forecast (nats per
        token); ``same`` is that of repeating the loss at the next smaller value, or None;
        ``held`` tells whether the 95% interval of the forecasts' mean holds the measured mean.
        """
        results: dict[str, dict[str, Any]] = {}
        variables, loss = self.variables, self.loss
        for name, rest in self._rests.items():
            kept = variables[name] < variables[name].max()
            repeated = loss[~kept] - _last(variables, loss, name, kept)
            results[name] = {
                "value": float(variables[name].max()),
                "error": self._left_out_error(name),
                "same": or_none(math.sqrt(np.mean(repeated**2))),
                "held": _held(self, rest, kept),
            }
        return results

    @cached_property
    def _rests(self) -> dict[str, "Diagnostics"]:
        """Fits without the points with a variable's largest value, by variable."""
        fits = {}
        for name in self.law.levels:
            values = self.variables[name]
            with suppress(MergelawError):
                fits[name] = self.refit(self.law, values < values.max())
        return fits

    def _left_out_error(self, name: str) -> float:
        """Error (rms) at a variable's largest value, forecast from all others; NaN if unknown."""
        if name not in self._rests:
            return math.nan
        chosen = self.variables[name] == self.variables[name].max()
        target = {other: values[chosen] for other, values in self.variables.items()}
        errors = self.loss[chosen] - self._rests[name].predict(**target)
        return math.sqrt(np.mean(errors**2))

    @cached_property
    def outliers(self) -> tuple[dict[str, float], ...]:
        """Points far off the law of all others (Bonferroni, 5%): variables, loss and error (nats).

        Each point's residual is divided by its standard error with the point left out (externally
        studentised, linearised).
        """
        if not 3 <= self.freedom < math.inf:
            return ()
        white, leverage = _standard(self)
        rest = np.maximum(1 - leverage, ROUNDING)
        left = max(self.freedom - 1, 1)
        others = np.maximum(white @ white - white**2 / rest, 0) / left
        if float(np.abs(self.solution.residuals).max()) < self.solution.errors.least:
            return ()
        with np.errstate(divide="ignore", invalid="ignore"):
            student = np.abs(white) / np.sqrt(others * rest)
        chance = 2 * stdtr(left, -student) * self.n_points
        rows = np.flatnonzero((chance < UNLIKELY) & (leverage < 0.99))
        errors = self.solution.residuals / rest
        return tuple(
            {name: float(values[i]) for name, values in self.variables.items()}
            | {"loss": float(self.loss[i]), "error": float(errors[i])}
            for i in rows[np.argsort(chance[rows])]
        )

    @cached_property
    def runs(self) -> dict[str, float] | None:
        """Runs of residuals of one sign along the last variable: found, expected and p.

        p is the probability of so few runs if signs were random (Wald and Wolfowitz 1940); None if
        the residuals are rounding errors or all of one sign.
        """
        variables, residuals = self.variables, self.solution.residuals
        if np.abs(residuals).max() < self.solution.errors.least:
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


def _standard(fitted: Result) -> tuple[Array, Array]:
    """Whitened residuals and leverages of a fit's points."""
    solution = fitted.solution
    tangent = solution.tangent[:, solution.free]
    q = np.linalg.qr(tangent / np.linalg.norm(tangent, axis=0)).Q
    return solution.state.residuals * solution.problem.size, np.sum(q**2, axis=1)


def _left_one_out(fitted: Result) -> float:
    """Root mean squared error of each point forecast from all others, linearised (PRESS)."""
    if fitted.solution.untested:
        return math.nan
    rest = np.maximum(1 - _standard(fitted)[1], 1e-6)
    return math.sqrt(np.mean((fitted.solution.residuals / rest) ** 2))


def _held(whole: Result, rest: Result, kept: NDArray[np.bool_]) -> bool | None:
    """True if the 95% interval of the held-out points' mean holds it; None if unknown."""
    if rest.posterior is None or rest.freedom == math.inf:
        return None
    target = {name: values[~kept] for name, values in whole.variables.items()}
    forms = [Form(rest.law, rest.parameters, 1.0, rest.posterior)]
    draws = rest.draws(target, new=True, forms=forms).mean(axis=1)
    # The points have sampling errors besides.
    variance = float(np.mean(whole.solution.errors.variances[~kept])) / int((~kept).sum())
    draws = draws + math.sqrt(variance) * np.random.default_rng(0).standard_normal(len(draws))
    low, high = np.quantile(draws, [0.025, 0.975])
    return bool(low <= whole.loss[~kept].mean() <= high)


def _failures(fitted: Diagnostics) -> Iterable[str]:
    law = fitted.law
    if law.name not in RIVALS:
        return
    if fitted.parameters[law.linear[-1]] <= 0:
        yield "the loss does not fall with k; compare the measured losses"
        return
    best = _own_aicc(fitted)
    flat = fitted.refit(FLAT[law.name])
    if not best < flat.aicc and math.isfinite(best):
        yield (
            "no gain from more experts is seen: a loss that stays the same with k fits the points "
            "as well; compare the measured losses"
        )
    first = fitted._rival_fits[0]
    if not best - first.aicc > EXCLUDED:
        return
    mine, other = fitted._left_out_error("k"), first._left_out_error("k")
    if other < mine:
        yield (
            f"the points exclude it: the form {_form(first.law)} fits them far better (AICc lower "
            f"by {best - first.aicc:.1f}) and misses the largest k by {other:.2g} nats instead of "
            f"{mine:.2g}"
        )


def _own_aicc(fitted: Diagnostics) -> float:
    """Lowest AICc of the law and of those nested in it; NaN with too few points."""
    names = (fitted.law.name, *NESTED)
    scores = [other.aicc for other in fitted._rival_fits if other.law.name in names]
    return min((score for score in scores if math.isfinite(score)), default=math.nan)


def _warnings(fitted: Diagnostics) -> Iterable[Note]:
    solution, law = fitted.solution, fitted.law
    problem, state = solution.problem, solution.state
    for name, value in zip(law.linear, state.coefficients, strict=True):
        if value == 0 and name not in law.signed:
            yield Note(
                "bound",
                f"{name} hit its bound 0: the points do not support its term; drop the term",
            )
    lengths = np.linalg.norm(problem.jacobian(state), axis=0)
    on_bound = (state.theta <= problem.lower) | (state.theta >= problem.upper)
    more = " or ".join(law.levels)
    errors = solution.deviations[len(law.linear) :]
    for place, name in enumerate(law.nonlinear):
        if lengths[place] <= ROUNDING:
            yield Note(
                "idle", f"{name} has no effect on the fitted losses: its estimate is meaningless"
            )
        elif on_bound[place]:
            yield Note("bound", _on_bound(fitted, name, float(state.theta[place])))
        elif fitted.freedom and errors[place] > FLAT_PROFILE * np.ptp(law.nonlinear[name]):
            yield Note(
                "undetermined",
                f"{name} is hardly determined (standard error about {errors[place]:.2g}): many "
                f"values fit as well; measure more levels of {more}",
            )
    if solution.freedom == 0:
        yield Note(
            "saturated",
            "as many parameters as points: the fit passes through the points and its error is "
            f"unknown, so there are no intervals; measure more levels of {more}, or give the "
            "points' standard errors",
        )
    elif fitted.n_points <= len(law.parameters):
        yield Note(
            "no_misfit",
            "as many parameters as points: the law's own error is unknown, and intervals hold the "
            f"given standard errors only; measure more levels of {more}",
        )
    if "N" in law.levels:
        yield from _on_sizes(fitted)


def _on_sizes(fitted: Diagnostics) -> Iterable[Note]:
    sizes = np.unique(fitted.variables["N"])
    if sizes[-1] / sizes[0] < LADDER:
        yield Note(
            "short_ladder",
            f"the sizes span a factor of {sizes[-1] / sizes[0]:.3g} in N, less than {LADDER}: "
            "the exponents reflect the bases' training budgets; do not extrapolate them",
        )
    if len(sizes) == 3 and "L_star" in fitted.law.linear:
        yield Note(
            "three_sizes",
            "three sizes determine L_star, B and beta without a check of the floor's form: "
            "add a size before extrapolating in N",
        )
    if 3 <= len(sizes) < 5 and len(fitted.solution.errors.starts):
        yield Note(
            "scatter_prior",
            f"{len(sizes)} sizes hardly show how far bases scatter around the law: intervals use "
            f"a prior, typically {TYPICAL_SCATTER:.0%} of the losses' range over N; add sizes to "
            "narrow them",
        )


def _on_bound(fitted: Diagnostics, name: str, value: float) -> str:
    """Warning that a parameter is on its bound, and the levels that would move it off."""
    text = f"{name} hit its bound {value:g}"
    along = "N" if name in ("beta", "gamma") else "k"
    if value <= fitted.law.nonlinear[name][0] and {"k", along} <= fitted.variables.keys():
        levels = np.unique(fitted.variables[along])
        if len(levels) <= FEW_LEVELS:
            listed = ", ".join(f"{level:g}" for level in levels)
            needed = f"k = {levels[-1] + 2:g} or more" if along == "k" else "sizes"
            return f"{text}: {along} in {{{listed}}} cannot tell it from {value:g}; add {needed}"
    return f"{text}; its estimate is unreliable"


def _doubts(fitted: Diagnostics) -> Iterable[Note]:
    for outlier in fitted.outliers:
        place = ", ".join(f"{name} = {outlier[name]:.4g}" for name in fitted.variables)
        yield Note(
            "outlier",
            f"the point {place} is {outlier['error']:+.2g} nats off the law of all others: check "
            "it, or fit with robust=True",
        )
    first, aicc = fitted._rival_fits[0], _own_aicc(fitted)
    if first.aicc < aicc - CLEARLY:
        yield Note(
            "better_rival",
            f"the form {_form(first.law)} fits the points better (AICc lower by "
            f"{aicc - first.aicc:.1f}): forecasts and their intervals include it",
        )
    for name, forecast in fitted.holdout.items():
        if forecast["held"] is False:
            same = (
                ""
                if forecast["same"] is None
                else (f' ("same as the last point" by {forecast["same"]:.2g})')
            )
            yield Note(
                "holdout",
                f"with {name} = {forecast['value']:g} held out, its forecast misses by "
                f"{forecast['error']:.2g} nats{same}, more than its 95% interval: distrust "
                f"forecasts of larger {name}",
            )
    sign_runs = fitted.runs
    if sign_runs is not None and sign_runs["p"] < UNLIKELY:
        yield Note(
            "runs",
            f"the points lie off the law in a row, not at random ({sign_runs['found']:g} runs of "
            f"one side, about {sign_runs['expected']:.0f} expected): the law misses something",
        )


def _form(law: Law) -> str:
    """The law's form in k with its name, as in "power (A k^-a)"."""
    terms = law.equation.split(" + ", 2 if "N" in law.levels else 1)[-1]
    return f"{law.name.removesuffix('_fixed_N')} ({terms})"


def or_none(value: float) -> float | None:
    """The number, or None if it is not finite, since JSON has no such numbers."""
    return float(value) if math.isfinite(value) else None


def _groups(variables: Mapping[str, Array], along: str) -> Iterable[NDArray[np.intp]]:
    """Indices of points that differ in one variable only, group by group."""
    others = [values for name, values in variables.items() if name != along]
    others = others or [np.zeros(len(variables[along]))]
    numbers = np.unique(np.column_stack(others), axis=0, return_inverse=True)[1].ravel()
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)


def _rises(fitted: Result) -> bool:
    """True if the loss at the largest k exceeds a loss at a smaller k, all else equal."""
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
