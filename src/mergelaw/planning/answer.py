"""Answers to questions: a figure with its interval, the reason and the main assumption."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from mergelaw.laws.fit import plain
from mergelaw.laws.result import POOL

Ends = tuple[float, float]
# A loss, a difference of losses or a number of experts, and its interval if that is known.
Estimate = tuple[float, Ends | None]


@dataclass(frozen=True)
class Answer:
    """An answer to a question.

    Attributes:
        question: forecast, loss, experts, stop, budget, rule or measure.
        answer: the answer as a sentence.
        value, ends: the figure and its interval (nats per token, or a number of experts), if any.
        level, population: of the interval; the population is what it speaks of.
        reason: facts that lead to the answer.
        assumption: the one that changes the answer most if it is wrong.
        warnings: reasons not to rely on the answer, as sentences.
        table: one row per alternative, or per point of the curve.
        details: further facts by name.
    """

    question: str
    answer: str
    value: float | None
    ends: Ends | None
    level: float
    reason: str
    assumption: str
    warnings: tuple[str, ...] = ()
    table: tuple[Mapping[str, Any], ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    population: str = POOL

    def summary(self) -> str:
        """The answer as text for a terminal."""
        lines = [self.answer]
        if self.table:
            table = pd.DataFrame(self.table).rename(columns=str)
            lines += ["", table.to_string(index=False, na_rep="", float_format="{:.5g}".format), ""]
        lines += [f"why: {self.reason}", f"main assumption: {self.assumption}"]
        lines.append(f"intervals: {100 * self.level:g}%, for {self.population}")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    def to_json(self) -> str:
        """The answer as a line of strict JSON, ends as low and high; null where not finite."""
        values = asdict(self)
        values["low"], values["high"] = values.pop("ends") or (None, None)
        return json.dumps(plain(values), allow_nan=False, ensure_ascii=False)


def with_interval(value: float, ends: Ends | None, level: float, unit: str = "nats") -> str:
    """A figure and interval to two digits of its width: ``0.978 nats (90%: 0.976 to 0.980)``.

    An interval without a lower or upper end says so; one without a width is left out.
    """
    width = 0.0 if ends is None else ends[1] - ends[0]
    if ends is None or not width > 0:
        return f"{value:.5g} {unit}"
    if math.isinf(width):
        sides = [f"above {ends[0]:.5g}"] if math.isfinite(ends[0]) else []
        sides += [f"below {ends[1]:.5g}"] if math.isfinite(ends[1]) else []
        return f"{value:.5g} {unit} ({100 * level:g}%: {sides[0] if sides else 'anything'})"
    decimals = max(1 - math.floor(math.log10(width)), 0)
    low, high = (f"{end:.{decimals}f}" for end in ends)
    return f"{value:.{decimals}f} {unit} ({100 * level:g}%: {low} to {high})"


def minus(first: Estimate, second: Estimate) -> Estimate:
    """Difference of two losses with independent errors."""
    (value, ends), (other, other_ends) = first, second
    difference = value - other
    if ends is None or other_ends is None:
        return difference, None
    below = math.hypot(value - ends[0], other_ends[1] - other)
    above = math.hypot(ends[1] - value, other - other_ends[0])
    return difference, (difference - below, difference + above)
