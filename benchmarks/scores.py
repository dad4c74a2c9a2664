"""Scores of forecasts against held-out losses, and Markdown tables, for the benchmarks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mergelaw.errors import MergelawError
from mergelaw.planning import Curve, loss

Forecast = tuple[float, float, float]
NOTHING = (math.nan, math.nan, math.nan)


def ask(points: pd.DataFrame, k: Iterable[float], **size: Any) -> list[Forecast]:
    """``plan loss`` at each k: loss, low and high (nats per token); NaN where it has none.

    Args:
        points: of one method and domain; k: numbers of experts; size: N (billions) or base.
    """
    try:
        curve = Curve(points, **size)
    except MergelawError:
        return [NOTHING for _ in k]
    return [_answer(curve, count) for count in k]


def _answer(curve: Curve, k: float) -> Forecast:
    try:
        answer = loss(curve, k)
    except MergelawError:
        return NOTHING
    value = math.nan if answer.value is None else answer.value
    return (value, *(answer.ends or (math.nan, math.nan)))


def score(
    forecasts: Sequence[Forecast], measured: Sequence[float], naive: Sequence[float]
) -> dict[str, Any]:
    """Counts and errors: forecasts, answered, intervals, held, error, naive error (rms), width."""
    values, low, high = np.array(forecasts, dtype=float).reshape(-1, 3).T
    truth, same = np.asarray(measured, dtype=float), np.asarray(naive, dtype=float)
    known, bounded = np.isfinite(values), ~np.isnan(low)
    held = (low <= truth) & (truth <= high)
    finite = np.isfinite(high - low)
    return {
        "forecasts": len(truth),
        "answered": int(known.sum()),
        "intervals": int(bounded.sum()),
        "held": int(held[bounded].sum()),
        "error": rms((values - truth)[known]),
        "naive": rms((same - truth)[known]),
        "width": float(np.mean((high - low)[finite])) if finite.any() else math.nan,
    }


def rms(errors: np.ndarray) -> float:
    errors = errors[np.isfinite(errors)]
    return float(np.sqrt(np.mean(errors**2))) if len(errors) else math.nan


def pooled(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The scores of several tables as one: counts add up, errors by their squares."""
    table = pd.DataFrame(scores)
    total = {
        name: int(table[name].sum()) for name in ("forecasts", "answered", "intervals", "held")
    }
    weight = table["answered"]
    for name in ("error", "naive"):
        mean = np.average(table[name].fillna(0) ** 2, weights=weight) if weight.any() else math.nan
        total[name] = math.sqrt(mean)
    return {**total, "width": float(table["width"].median())}


def described(score: Mapping[str, Any]) -> dict[str, str]:
    """A score as cells of a table, losses in 1e-3 nats."""
    share = f"{score['held'] / score['intervals']:.0%}" if score["intervals"] else "-"
    return {
        "answered": f"{score['answered']} of {score['forecasts']}",
        "held": f"{score['held']} of {score['intervals']} ({share})",
        "error": f"{1e3 * score['error']:.3g}",
        "naive": f"{1e3 * score['naive']:.3g}",
        "width": f"{1e3 * score['width']:.3g}",
    }


def markdown(rows: Iterable[Mapping[str, object]]) -> str:
    """Rows as a Markdown table, with the first row's columns."""
    rows = list(rows)
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    lines += [f"| {' | '.join(str(value) for value in row.values())} |" for row in rows]
    return "\n".join(lines) + "\n"
