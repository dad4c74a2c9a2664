"""What a fit does not show by itself: rivals, forecasts of what was left out, runs, doubts."""

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtr

from mergelaw.errors import MergelawError
from mergelaw.laws.covariance import Noise
from mergelaw.laws.law import INTERFERENCE, INTERFERENCE_FIXED_N, NESTED, RIVALS
from mergelaw.laws.projection import ROUNDING, Array, Problem, State

if TYPE_CHECKING:
    from mergelaw.laws.fit import Fit

# A law is clearly better than another from this difference in AICc on.
CLEARLY = 2
# The chance below which residuals have too few runs.
FEW_RUNS = 0.05
# Below this ratio of the largest to the smallest N, exponents follow the bases' training budgets.
LADDER = 100
# A nonlinear parameter with a standard error over this share of its box has a flat profile.
FLAT = 0.1
# So many levels of a variable are few.
FEW_LEVELS = 4


def rivals(fitted: "Fit") -> tuple[dict[str, Any], ...]:
    """A law and its rivals on the same points, best first: law, aicc, above, r2, rmse.

    ``above`` is the AICc over that of the best; both are None where there are too few points. A
    rival that cannot be fitted is left out, and so is interference if no loss rises with k.
    """
    fits = [fitted]
    for law in RIVALS.get(fitted.law.name, ()):
        if law in (INTERFERENCE, INTERFERENCE_FIXED_N) and not _rises(fitted):
            continue
        with suppress(MergelawError):
            fits.append(fitted.refit(law))
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


def left_out(fitted: "Fit") -> dict[str, dict[str, Any]]:
    """Forecasts of what was left out, by variable, wherever the rest can be fitted.

    The points with the variable's largest value are predicted from all others. ``error`` is the
    root mean squared error, ``same`` that of saying "same as the last point", i.e. the loss at the
    next value below, all else equal (nats per token); ``value`` is what was left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in fitted.law.levels:
        values = fitted.variables[name]
        kept = values < values.max()
        with suppress(MergelawError):
            rest = fitted.refit(fitted.law, kept)
            out = {other: column[~kept] for other, column in fitted.variables.items()}
            errors = fitted.loss[~kept] - rest.predict(**out)
            repeated = fitted.loss[~kept] - _last(fitted.variables, fitted.loss, name, kept)
            found[name] = {
                "value": float(values.max()),
                "error": math.sqrt(np.mean(errors**2)),
                "same": or_none(math.sqrt(np.mean(repeated**2))),
            }
    return found


def runs(fitted: "Fit") -> dict[str, float] | None:
    """Runs of residuals of one sign along the last variable: found, expected and p.

    p is the chance of so few if signs were random (Wald and Wolfowitz 1940, normal approximation);
    None if the residuals are rounding errors or all of one sign.
    """
    residuals = fitted.loss - fitted.predict(**fitted.variables)
    if np.abs(residuals).max() < 1e-12 * np.abs(fitted.loss).max():
        return None
    *others, along = fitted.variables
    groups = np.unique(
        np.column_stack([fitted.variables[name] for name in others] or [np.zeros(len(residuals))]),
        axis=0,
        return_inverse=True,
    )[1].ravel()
    found = expected = variance = 0.0
    for group in range(groups.max() + 1):
        chosen = np.flatnonzero(groups == group)
        signs = residuals[chosen[np.argsort(fitted.variables[along][chosen])]] > 0
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


def warnings(problem: Problem, state: State, noise: Noise) -> Iterable[str]:
    """What somebody who reads the parameters has to know."""
    law = problem.law
    more = " or ".join(law.levels)
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
            yield _on_bound(problem, name, float(value))
    free = np.flatnonzero(~on_bound & ~idle)
    if noise.freedom == 0:
        yield (
            "as many parameters as points: the fit passes through them and cannot show its error, "
            f"and without that there are no intervals; measure more levels of {more}, or give the "
            "points' standard errors"
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
                    f"fit as well; measure more levels of {more}"
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


def _on_bound(problem: Problem, name: str, value: float) -> str:
    """What a parameter on its bound means, and which levels would tell it from the bound."""
    if value > problem.law.nonlinear[name][0]:
        return (
            f"{name} is on its bound {value:g}: the points ask for more; take it as given, not as "
            "measured"
        )
    along = "N" if name in ("beta", "gamma") else "k"
    if "k" in problem.variables and along in problem.variables:
        levels = np.unique(problem.variables[along])
        if len(levels) <= FEW_LEVELS:
            listed = ", ".join(f"{level:g}" for level in levels)
            further = f"k = {levels[-1] + 2:g} or more" if along == "k" else "sizes"
            return (
                f"{name} is on its bound {value:g}: with {along} in {{{listed}}} it cannot be told "
                f"from {value:g}; add {further}"
            )
    return (
        f"{name} is on its bound {value:g}: the points ask for less; take it as given, not as "
        "measured"
    )


def doubts(fitted: "Fit") -> Iterable[str]:
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


def or_none(value: float) -> float | None:
    """A number that JSON can hold."""
    return float(value) if math.isfinite(value) else None


def _rises(fitted: "Fit") -> bool:
    """Whether with all else equal the loss at the largest k is above one at a smaller k."""
    table = pd.DataFrame({**fitted.variables, "loss": fitted.loss}).sort_values("k")
    others = [name for name in fitted.variables if name != "k"]
    groups = [group for _, group in table.groupby(others)] if others else [table]
    return any(group["loss"].iloc[-1] > group["loss"].min() for group in groups)


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
