"""Diagnostics of fits: rival forms, hold-out forecasts, outliers, warnings and the verdict."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, stdtr

from mergelaw.errors import MergelawError
from mergelaw.laws.covariance import TYPICAL_SCATTER
from mergelaw.laws.law import (
    FLAT,
    INTERFERENCE,
    INTERFERENCE_FIXED_N,
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
# An outlier is off by more than this many typical sampling errors.
FAR = 3
# A base with more points than this is compared with a curve of its own.
OWN = 5
# Points whose share of free variance is smaller cannot be tested.
LEVERAGE = 0.01
# Columns with a smaller part orthogonal to the others are combinations of these.
RANK = 1e-10
# With more points errors are taken as independent in tests.
DENSE = 500
# Simulated tables, and numbers in all of them.
RUNS, NUMBERS = 400, 4_000_000
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
        return tuple(sorted(fits, key=_rank))

    @cached_property
    def forms(self) -> tuple[Form, ...]:
        """Forms that the points do not exclude, weighted by their marginal likelihoods."""
        return _weighted(self, self._rival_fits)

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
                "held": _held(self, rest, kept, self._left_out_forms(name)),
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

    def _left_out_forms(self, name: str) -> tuple[Form, ...]:
        """Forms of a forecast from the points without a variable's largest value."""
        if name != "k":  # rivals along N are the same
            rest = self._rests[name]
            return () if rest.posterior is None else (Form(rest.law, {}, 1.0, rest.posterior),)
        fits = [one._rests[name] for one in self._rival_fits if name in one._rests]
        return _weighted(self._rests[name], sorted(fits, key=_rank))

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

        A base with enough points is compared with a curve of its own, since bases differ. A point
        is far off if that is also more than sampling brings.
        """
        if not 3 <= self.freedom < math.inf:
            return ()
        if float(np.abs(self.solution.residuals).max()) < self.solution.errors.least:
            return ()
        left_out = _left_out(self, _own_columns(self))
        if left_out is None:
            return ()
        errors, student, freedom = left_out
        chance = 2 * stdtr(freedom, -np.abs(student)) * self.n_points
        sampling = math.sqrt(float(np.mean(self.solution.errors.variances)))
        rows = np.flatnonzero((chance < UNLIKELY) & (np.abs(errors) > FAR * sampling))
        return tuple(
            {name: float(values[i]) for name, values in self.variables.items()}
            | {"loss": float(self.loss[i]), "error": float(errors[i])}
            for i in rows[np.argsort(chance[rows])]
        )

    @cached_property
    def runs(self) -> dict[str, float] | None:
        """Runs of residuals of one sign along the last variable: found, expected and p.

        p is the probability of so few runs under the law with its errors, by simulation; None if
        the residuals are rounding errors, or smaller than the known errors of the points.
        """
        variables, residuals, errors = self.variables, self.solution.residuals, self.solution.errors
        known = math.sqrt(float(np.median(errors.variances)))
        if self.freedom == 0 or np.abs(residuals).max() < errors.least or self.rmse < known:
            return None
        along = list(variables)[-1]
        order = [
            chosen[np.argsort(variables[along][chosen])] for chosen in _groups(variables, along)
        ]
        draws = max(min(RUNS, NUMBERS // self.n_points), 1)
        normal = np.random.default_rng(0).standard_normal((self.n_points, draws))
        _, basis, whitener = _whitened(self)
        normal -= basis @ (basis.T @ normal)
        simulated = normal if whitener is None else np.linalg.solve(whitener, normal)
        counts = sum(
            1 + np.count_nonzero(np.diff(signs[rows], axis=0), axis=0)
            for signs in (np.column_stack([residuals, simulated]) > 0,)
            for rows in order
        )
        chance = (1 + np.count_nonzero(counts[1:] <= counts[0])) / (1 + draws)
        expected = float(np.mean(counts[1:]))
        return {"found": float(counts[0]), "expected": expected, "p": float(chance)}


def _whitened(fitted: Result, extra: Array | None = None) -> tuple[Array, Array, Array | None]:
    """Whitened residuals, orthonormal basis of the tangent, and V^-1/2; None for many points.

    ``extra`` (points, any): further columns of the tangent, taken out of the residuals.
    """
    solution = fitted.solution
    whiten, count = solution.problem.whiten, fitted.n_points
    columns = fitted._gradients(fitted.variables)[:, solution.free]
    columns = columns if extra is None else np.hstack([columns, extra])
    columns = columns if whiten is None else whiten(columns)
    lengths = np.linalg.norm(columns, axis=0)
    left, values, _ = np.linalg.svd(columns / np.where(lengths > 0, lengths, 1), False)
    basis = left[:, values > RANK * values[0]] if len(values) else left
    white = solution.state.residuals * solution.problem.size
    white = white - basis @ (basis.T @ white)
    dense = None if whiten is None or count > DENSE else whiten(np.eye(count))
    return white, basis, dense


def _left_out(fitted: Result, extra: Array | None = None) -> tuple[Array, Array, float] | None:
    """Errors of each point forecast from all others, linearised: nats, and over their deviations.

    The last value is the degrees of freedom of the latter; None if all points are needed.
    """
    white, basis, dense = _whitened(fitted, extra)
    freedom = len(white) - basis.shape[1] - 1
    if freedom < 1:
        return None
    if dense is None:
        left = np.maximum(1 - np.sum(basis**2, axis=1), ROUNDING)
        back, errors, rest = white, fitted.solution.residuals / left, left
    else:
        back, rest = dense.T @ white, np.sum(dense**2, axis=0)
        left = rest - np.sum((basis.T @ dense) ** 2, axis=0)
        left, rest = np.maximum(left, ROUNDING * rest), left / rest
        errors = back / left
    others = np.maximum(white @ white - back**2 / left, 0) / freedom
    with np.errstate(divide="ignore", invalid="ignore"):
        student = np.where(rest > LEVERAGE, back / np.sqrt(others * left), 0.0)
    return errors, student, freedom


def _own_columns(fitted: Diagnostics) -> Array | None:
    """Columns of a curve in k of its own, linearised, for each base with enough points."""
    if "N" not in fitted.variables or fitted.law.name not in RIVALS:
        return None
    inverse = np.unique(fitted.variables["N"], return_inverse=True)[1]
    own = inverse[:, None] == np.flatnonzero(np.bincount(inverse) > OWN)
    gradients, names = fitted._gradients(fitted.variables), fitted.law.parameters
    curve = [gradients[:, [names.index(name)]] for name in ("A0", "b")]
    return np.hstack([own, *(own * column for column in curve)])


def _left_one_out(fitted: Result) -> float:
    """Root mean squared error of each point forecast from all others, linearised (PRESS)."""
    left_out = None if fitted.solution.untested else _left_out(fitted)
    return math.nan if left_out is None else math.sqrt(np.mean(left_out[0] ** 2))


def _rank(fitted: Diagnostics) -> tuple[bool, float]:
    """Order of fits: the lowest AICc first, unknown ones last."""
    return math.isnan(fitted.aicc), fitted.aicc


def _weighted(mine: Diagnostics, fits: Sequence[Diagnostics]) -> tuple[Form, ...]:
    """Forms that the points do not exclude, by their marginal likelihoods; best AICc first."""
    if mine.posterior is None:
        return ()
    possible = [
        (fitted, fitted.posterior)
        for fitted in fits
        if fitted is mine
        or (
            # A misfit that is taken as 0 makes likelihoods that no estimated one can have.
            fitted.solution.untested == mine.solution.untested
            and not fitted.aicc > fits[0].aicc + IMPOSSIBLE
        )
    ]
    pairs = [(fitted, drawn) for fitted, drawn in possible if drawn is not None]
    evidence = np.array([drawn.evidence for _, drawn in pairs])
    weights = np.exp(evidence - logsumexp(evidence))
    return tuple(
        Form(fitted.law, fitted.parameters, float(weight), drawn)
        for (fitted, drawn), weight in zip(pairs, weights, strict=True)
    )


def _held(
    whole: Result, rest: Result, kept: NDArray[np.bool_], forms: Sequence[Form]
) -> bool | None:
    """True if the 95% interval of the held-out points' mean holds it; None if unknown."""
    if not forms or rest.freedom == math.inf:
        return None
    target = {name: values[~kept] for name, values in whole.variables.items()}
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
