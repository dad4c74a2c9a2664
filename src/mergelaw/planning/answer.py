"""Answers to questions: a figure with its interval, the reason and the main assumption."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import pandas as pd

Ends = tuple[float, float]


@dataclass(frozen=True)
class Answer:
    """An answer to a question.

    Attributes:
        question: forecast, loss, experts, stop, budget, rule or measure.
        answer: the answer as a sentence.
        value, ends: the figure that was asked for and its interval (nats per token, or a number
            of experts); None where there is none.
        level: of the interval.
        reason: what the answer follows from.
        assumption: the assumption that moves the answer most if it is wrong.
        warnings: sentences on when not to rely on the answer.
        table: what was compared, or the curve; one column per name, one row per alternative.
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

    def summary(self) -> str:
        """The answer as text for a terminal."""
        lines = [self.answer]
        if self.table:
            table = pd.DataFrame(self.table).rename(columns=str)
            lines += ["", table.to_string(index=False, na_rep="", float_format="{:.5g}".format), ""]
        lines += [f"why: {self.reason}", f"main assumption: {self.assumption}"]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    def to_json(self) -> str:
        """The answer as one line of strict JSON; NaN and infinities become null.

        The interval's ends are low and high.
        """
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["low"], values["high"] = values.pop("ends") or (None, None)
        return json.dumps(_plain(values), allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item"):  # a number of numpy's
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_interval(value: float, ends: Ends | None, level: float, unit: str = "nats") -> str:
    """A figure with its interval, ``0.978 nats (90%: 0.976 to 0.980)``.

    As many decimals as show the interval's width with two digits.
    """
    width = math.nan if ends is None else ends[1] - ends[0]
    if ends is None or not (math.isfinite(width) and width > 0):
        return f"{value:.5g} {unit}"
    decimals = max(1 - math.floor(math.log10(width)), 0)
    low, high = (f"{end:.{decimals}f}" for end in ends)
    return f"{value:.{decimals}f} {unit} ({100 * level:g}%: {low} to {high})"


def count_with_interval(count: int, ends: Ends | None, level: float) -> str:
    """A number of experts with its interval, ``15 (90%: 14 to 16)``."""
    if ends is None:
        return f"{count}"
    low, high = ends
    text = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    text = text if math.isfinite(high) else f"{low:g} or more, perhaps never"
    return f"{count} ({100 * level:g}%: {text})"
