"""Curves: expected losses along k at one size, measured where they are, else by the fitted law."""

import math
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from mergelaw.errors import MergelawError
from mergelaw.laws.diagnostics import FAILS, HOLDS
from mergelaw.laws.fit import Fit, fit_points, measured_mean
from mergelaw.laws.law import MERGING, MERGING_FIXED_N, Law
from mergelaw.laws.result import LEVEL, POOL
from mergelaw.laws.summary import STATES
from mergelaw.planning.answer import Answer, Estimate, minus, with_interval
from mergelaw.planning.points import SAME_SIZE, at_size, base_points, without_errors

# The joint law is asked up to this factor in N beyond the measured sizes.
FARTHEST = 10
# Forms of the law with at least this weight are shown, and tables have at most so many rows.
SHOWN, LISTED = 0.01, 50
SLIGHT = 0.01  # of an interval's width: a form as near as this gives the same loss


class Curve:
    """Expected losses along k at one size, for one method and domain.

    A loss is the measured mean where the point is measured, and the law's where it is not. The law
    is the base's own at a measured size with three levels of k or if there are fewer than three
    sizes, else the joint law of all sizes. A law whose verdict is *fails* is not asked.

    Args:
        points: of one method, family and domain (``points.choose``).
        N, base: the size, in billions or by a base's name; by default the only one.
        level, population: of the intervals.
        law: another law to use, ``MERGING`` for the joint law at a measured size.
        misfit: of the fit (nats per token); None estimates it.

    Attributes:
        N: the size (billions); name: the base's name, or ``N = ...``.
        M: experts in the pool.
        joint: whether the law is the joint law of all sizes.
        table, fitted: the points of the law, and its fit; None if the law cannot be fitted.
        state, reasons: the law's verdict.
        warnings: reasons not to rely on the curve, as sentences.

    Raises:
        MergelawError: the size is impossible, ambiguous or too far from the measured ones.
    """

    def __init__(
        self,
        points: pd.DataFrame,
        N: float | None = None,
        *,
        base: str | None = None,
        level: float = LEVEL,
        population: str = POOL,
        law: Law | None = None,
        misfit: float | None = None,
    ):
        if not 0 < level < 1:
            raise MergelawError(f"level {level:g} is not a probability: give one between 0 and 1")
        self.level, self.population = level, population
        self.table, self.N, name = at_size(points, N, base)
        self.name, self.M = name or f"N = {self.N:.4g}", int(points["M"].max())
        if name is not None and law is not MERGING:
            curve = base_points(self.table, name)
            self.N, self.M = float(curve["N"].iloc[0]), int(curve["M"].iloc[0])
            levels, sizes = curve["k"].nunique(), self.table["N"].nunique()
            if law or levels >= MERGING_FIXED_N.levels["k"] or sizes < MERGING.levels["N"]:
                self.table, law = curve, law or MERGING_FIXED_N
        law = law or MERGING
        self.joint = law is MERGING
        self.formula = law.equation.split("=", 1)[1].strip()
        warnings = [*self._beyond_sizes(self.N), *without_errors(self.table)]
        self.fitted: Fit | None = None
        try:
            self.fitted = fit_points(law, self.table, misfit)
            verdict, warnings = self.fitted.verdict, [*warnings, *self.fitted.warnings]
        except MergelawError as error:
            verdict = {"state": FAILS, "reasons": [str(error)]}
        self.state, self.reasons = str(verdict["state"]), tuple(map(str, verdict["reasons"]))
        verdict_text = "there is no law" if self.fitted is None else f"the law {STATES[self.state]}"
        doubts = [f"{verdict_text}: {reason}" for reason in self.reasons]
        self.warnings = tuple(dict.fromkeys([*doubts, *warnings]))

    @property
    def fails(self) -> bool:
        """True where the law gives no answers."""
        return self.state == FAILS

    @property
    def law(self) -> Fit:
        """The fit of the law. Raises MergelawError if it fails."""
        if self.fitted is None:
            raise MergelawError(f"{self.name}: there is no law: {self.reasons[0]}")
        if self.fails:
            raise MergelawError(
                f"{self.name}: the law fails, so it says nothing of points that are not measured: "
                f"{self.reasons[0]}"
            )
        return self.fitted

    @cached_property
    def measured(self) -> dict[tuple[float, int], Estimate]:
        """Measured means and sampling intervals (nats per token) by size (billions) and k."""
        points = self.table.drop_duplicates(["N", "k"], keep=False)
        return {
            (float(point["N"]), int(point["k"])): measured_mean(
                point, None if self.fails else self.fitted, self.level
            )
            for point in points.to_dict("records")
        }

    @cached_property
    def losses(self) -> dict[int, Estimate]:
        """Measured means and sampling intervals (nats per token) at this size, by k."""
        near = {k: e for (N, k), e in self.measured.items() if abs(N / self.N - 1) <= SAME_SIZE}
        return dict(sorted(near.items()))

    def estimate(self, k: float, N: float | None = None) -> Estimate:
        """Loss (nats per token) and its interval: measured, or by the law. N: another size."""
        measured = self.losses.get(k) if N is None else self.measured.get((N, k))  # type: ignore[call-overload, arg-type]
        if measured is None or (self.population != POOL and not self.fails):
            value, ends = self.by_law(k, N)
            if measured is None or ends is None:
                return measured or (value, ends)
            # Other documents or experts move a measured mean as much as the law.
            return measured[0], (measured[0] - value + ends[0], measured[0] - value + ends[1])
        return measured

    def by_law(self, k: float, N: float | None = None) -> Estimate:
        """The law's loss (nats per token) at k, which may be infinite, and its interval.

        The interval is for the mean over all subsets, with the law's own error there; a measured
        base's floor has none.
        """
        variables, new = self.variables(k, N), self.joint or math.isfinite(k)
        value, ends = self.law.expectation(self.level, self.population, new, **variables)
        return float(value), None if ends is None else (float(ends[0]), float(ends[1]))

    @cached_property
    def gains(self) -> dict[int, Estimate]:
        """Gains of one more expert (nats per token) between measured means of known error."""
        losses = self.losses if "se" in self.table else {}
        return {k: minus(losses[k], losses[k + 1]) for k in losses if k + 1 in losses}

    def gain(self, k: int) -> Estimate:
        """Gain of one more expert than k (nats per token): measured, or by the law."""
        return self.gains[k] if k in self.gains else self.gain_by_law(k)

    def gain_by_law(self, k: int) -> Estimate:
        """The law's gain of one more expert than k (nats per token), and its interval."""
        first, second = self.variables(k), self.variables(k + 1)
        return self.law.difference(first, second, self.level, self.population)

    def variables(self, k: float, N: float | None = None) -> dict[str, Any]:
        """The law's variables at k experts and N (billions), by default this size."""
        if not k >= 1:
            raise MergelawError(f"k = {k:g} is no number of experts; give numbers of 1 or more")
        if not self.joint:
            return {"k": k}
        self._beyond_sizes(self.N if N is None else N)
        return {"N": self.N if N is None else N, "k": k}

    def _beyond_sizes(self, N: float) -> list[str]:
        """A warning where N (billions) is outside the measured sizes; refuses sizes far outside."""
        least, most = self.table["N"].min(), self.table["N"].max()
        factor, side = (N / most, "above") if most < N else (least / N, "below")
        if not self.joint or factor <= 1:
            return []
        text = f"N = {N:.4g} is {factor:.3g} times {side} the measured sizes, "
        text += f"{least:.4g} to {most:.4g}: "
        if factor > FARTHEST:
            raise MergelawError(
                f"{text}no law holds for sure beyond {FARTHEST} times; measure a base in between"
            )
        return [f"{text}this is extrapolated"]

    def beyond_pool(self, k: float) -> tuple[str, ...]:
        """A warning where k is above the number of experts in the pool."""
        warning = f"k = {k:g} is more than this pool of {self.M}; it takes more experts"
        return (warning,) if k > self.M else ()

    def forms(self, k: float) -> list[dict[str, Any]]:
        """Forms that the points do not exclude, heaviest first: form, weight, loss at k, floor."""
        rows = []
        for form in sorted(self.law.forms, key=lambda form: -form.weight):
            if form.weight >= SHOWN:
                with np.errstate(divide="ignore"):
                    at_k, floor = (
                        float(form.law.predict(form.parameters, **self.variables(j)))
                        for j in (k, math.inf)
                    )
                row = {"form": form.law.name.removesuffix("_fixed_N"), "weight": form.weight}
                rows.append({**row, "loss": at_k, "floor": floor})
        return rows

    def assumption(self, k: float) -> str:
        """The assumption that changes the loss at k most if it is wrong."""
        loss, ends = self.by_law(k)
        form = f"the loss falls as {self.formula}"
        effects = [(0.0, f"{form}; no other form fits nearly as well and differs")]
        mine = self.law.law.name.removesuffix("_fixed_N")
        other = next((row for row in self.forms(k) if row["form"] != mine), None)
        slight = 0.0 if ends is None else SLIGHT * (ends[1] - ends[0])
        away = 0.0 if other is None else abs(other["loss"] - loss)
        if other is not None and away > slight:
            text = f"{form}; the points do not exclude the form {other['form']} (weight "
            text += f"{other['weight']:.2f}), which gives {other['loss']:.5g} at k = {k:g}"
            effects.append((away, f"{text}, {away:.1g} nats away"))
        if self.joint and (held_out := self.law.holdout.get("N")):
            error = held_out["error"]
            text = f"without the largest size, the law missed it by {error:.2g} nats"
            effects.append((error, f"floor and tail are powers of N; {text}"))
        if k > self.M:
            fall = self.by_law(self.M)[0] - loss
            text = f"experts beyond the pool of {self.M} are like those in it; they bring"
            effects.append((fall, f"{text} {fall:.2g} nats of the fall"))
        return max(effects)[1]

    @property
    def text(self) -> str:
        """The law with its parameters and its quality."""
        values = self.law.parameters.items()
        parameters = ", ".join(f"{name} = {value:.4g}" for name, value in values)
        quality = f"R^2 = {self.law.r2:.5f} on {self.law.n_points} points"
        return f"{self.formula} with {parameters}, {quality}"

    @property
    def beside(self) -> str:
        """Suffix of the law's answers: empty, or the verdict of a law that does not hold."""
        return "" if self.state == HOLDS else f"; the law {STATES[self.state]}"

    def answer(
        self,
        question: str,
        text: str,
        estimate: Estimate | None,
        reason: str,
        assumption: str,
        **others: Any,
    ) -> Answer:
        """An answer about this curve; ``others`` are further attributes of the answer."""
        others = {"warnings": self.warnings, "population": self.population, **others}
        others["table"] = tuple(others.get("table", ()))
        value, ends = estimate or (None, None)
        return Answer(question, text, value, ends, self.level, reason, assumption, **others)

    def measured_only(self, question: str, text: str = "", k: int | None = None) -> Answer:
        """The answer where the law fails: the measured means and the best of them.

        Raises MergelawError if none is measured at this size, or too few sizes for a joint law.
        """
        if not self.losses or (self.joint and self.fitted is None):
            self.law  # noqa: B018  (raises)
        best = min(self.losses, key=lambda k: self.losses[k][0])
        lowest = with_interval(*self.losses[best], self.level)
        rows = [{"k": k, "measured": loss} for k, (loss, _) in self.losses.items()]
        return self.answer(
            question,
            f"{self.name}: {text}{'there is no law' if self.fitted is None else 'the law fails'}, "
            "so the measured means are all that is known; the lowest is "
            f"{lowest} at k = {best}",
            None if k is None else (k, None),
            self.reasons[0],
            "the measured means stand for the pool; more experts or another size are not forecast",
            table=rows,
            details={"best": {"k": best, "loss": self.losses[best][0]}},
        )
