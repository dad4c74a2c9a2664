"""Curves: expected losses along k at one size, the law that questions are asked of."""

import math
from typing import Any

import pandas as pd

from mergelaw.errors import MergelawError
from mergelaw.laws.fit import fit_points
from mergelaw.laws.law import LAWS, MERGING, MERGING_FIXED_N, Law
from mergelaw.laws.result import LEVEL
from mergelaw.planning.answer import Ends
from mergelaw.planning.points import at_size, base_points, beyond_sizes, sampled_without_errors

# A rival is not excluded if its AICc is at most this much above the best.
NOT_EXCLUDED = 10


class Curve:
    """Expected losses along k at one size, for one method and domain.

    The law is the base's own curve at a measured size, else the joint law of all sizes.

    Args:
        points: of one method, family and domain (``points.choose``).
        N, base: the size, in billions or by a base's name; by default the only one.
        level: of the intervals.
        law: another law to use, ``MERGING`` for the joint law at a measured size.
        misfit: of the fit (nats per token); None estimates it.

    Attributes:
        N: the size (billions); name: the base's name, or ``N = ...``.
        M: experts in the pool.
        measured: whether the size is one of the study's.
        joint: whether the law is the joint law of all sizes.
        table, fitted: the points of the law, and its fit.
        formula, parameters: the law's right-hand side and the fitted parameters, as text.
        warnings: reasons not to rely on the curve, as sentences.

    Raises:
        MergelawError: the size is impossible or ambiguous, or the law cannot be fitted.
    """

    def __init__(
        self,
        points: pd.DataFrame,
        N: float | None = None,
        *,
        base: str | None = None,
        level: float = LEVEL,
        law: Law | None = None,
        misfit: float | None = None,
    ):
        self.level = level
        self.table, self.N, name = at_size(points, N, base)
        self.measured, self.name = name is not None, name or f"N = {self.N:.4g}"
        self.M = int(points["M"].max())
        if name is not None and law is not MERGING:
            curve = base_points(self.table, name)
            self.N, self.M = float(curve["N"].iloc[0]), int(curve["M"].iloc[0])
            if law is not None or curve["k"].nunique() >= len(MERGING_FIXED_N.parameters):
                self.table, law = curve, law or MERGING_FIXED_N
        law = law or MERGING
        self.joint = law is MERGING
        self.fitted = fit_points(law, self.table, misfit)
        self.formula = law.equation.split("=", 1)[1].strip()
        values = self.fitted.parameters.items()
        self.parameters = ", ".join(f"{parameter} = {value:.4g}" for parameter, value in values)
        beyond = beyond_sizes(points, self.N) if self.joint else []
        self.warnings = (*beyond, *sampled_without_errors(self.table), *self.fitted.warnings)

    def loss(self, k: float, N: float | None = None) -> float:
        """Expected loss (nats per token); k may be infinite. N: another size (billions)."""
        return float(self.fitted.predict(**self.variables(k, N)))

    def interval(self, k: float) -> Ends | None:
        """Interval of the mean loss over all subsets; None where the noise is unknown."""
        ends = self.fitted.predict_interval(level=self.level, new=True, **self.variables(k))
        return None if ends is None else (float(ends[0]), float(ends[1]))

    def difference(
        self, k: float, other: float, N: float | None = None, other_N: float | None = None
    ) -> tuple[float, Ends | None]:
        """Loss of k experts minus that of another number of them, and its interval (nats).

        N and other_N are the bases' sizes (billions); None is this one.
        """
        first, second = self.variables(k, N), self.variables(other, other_N)
        return self.fitted.difference(first, second, self.level)

    def variables(self, k: float, N: float | None = None) -> dict[str, Any]:
        """The law's variables at k experts and N (billions), by default this size."""
        if not k >= 1:
            raise MergelawError(f"k = {k:g} is no number of experts; give numbers of 1 or more")
        return {"N": self.N if N is None else N, "k": k} if self.joint else {"k": k}

    def beyond_pool(self, k: float) -> tuple[str, ...]:
        """A warning where k is above the number of experts in the pool."""
        warning = f"k = {k:g} is not reachable with this pool of {self.M}; it takes more experts"
        return (warning,) if k > self.M else ()

    def assumption(self, k: float) -> str:
        """The assumption that changes the loss at k most if it is wrong."""
        effects = [self._effect_of_form(k)]
        if not self.measured:
            error, check = math.inf, "there are too few sizes to check it"
            if held_out := self.fitted.holdout.get("N"):
                error = held_out["error"]
                check = f"fitted without the largest size, the law missed it by {error:.2g} nats"
            effects.append((error, f"floor and tail are powers of N; {check}"))
        if k > self.M:
            fall = self.loss(self.M) - self.loss(k)
            beyond = f"experts beyond the pool of {self.M} are like those in it; they bring"
            effects.append((fall, f"{beyond} {fall:.2g} nats of the fall"))
        return max(effects)[1]

    def _effect_of_form(self, k: float) -> tuple[float, str]:
        """Distance at k to the farthest rival law that is not excluded, and a sentence on it."""
        rivals = []
        for rival in self.fitted.rivals:
            above, name = rival["above"], rival["law"]
            if name != self.fitted.law.name and above is not None and above <= NOT_EXCLUDED:
                loss = float(fit_points(LAWS[name], self.table).predict(**self.variables(k)))
                rivals.append((abs(loss - self.loss(k)), name.removesuffix("_fixed_N"), loss))
        if not rivals:
            compared = [rival for rival in self.fitted.rivals if rival["aicc"] is not None]
            check = "no rival form fits nearly as well" if len(compared) > 1 else "unchecked"
            return 0.0, f"the loss falls as {self.formula}; {check}"
        effect, name, loss = max(rivals)
        return effect, (
            f"the loss falls as {self.formula}; the points do not exclude the rival {name}, which "
            f"gives {loss:.5g} at k = {k:g}, {effect:.1g} nats away"
        )
