"""Rule: which merge method has the lowest expected loss."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mergelaw.errors import MergelawError
from mergelaw.laws.result import LEVEL
from mergelaw.planning.answer import Answer, Ends, with_interval
from mergelaw.planning.curve import Curve
from mergelaw.planning.points import at_size


def rule(
    points: pd.DataFrame,
    N: float | None = None,
    k: int | None = None,
    *,
    base: str | None = None,
    level: float = LEVEL,
) -> Answer:
    """Merge method with the lowest expected loss, at one size and k or over all of them.

    Args:
        points: of one family and domain, at least two methods.
        N, base: a size, in billions or by a base's name; None is every measured one.
        k: number of experts; None is 1 to all of the pool.
        level: of the intervals.

    Returns:
        The best method and its lead over the second (nats per token); table has a row per (N, k).

    Raises:
        MergelawError: no size has the curves of two methods.
    """
    sizes = sorted(points["N"].unique())
    if N is not None or base is not None:
        points, N, _ = at_size(points, N, base)
        sizes = [N]
    rows, warnings = [], []
    for size in sizes:
        curves: dict[str, Curve] = {}
        for method, table in points.groupby("method"):
            try:
                curve = curves[str(method)] = Curve(table, size, level=level)
                warnings += [f"{method} at {curve.name}: {text}" for text in curve.warnings]
            except MergelawError as error:  # the other methods can still be compared
                warnings.append(f"{method} at N = {size:.4g}: not compared: {error}")
        if len(curves) > 1:
            M = max(curve.M for curve in curves.values())
            rows += [_compared(curves, n) for n in (range(1, M + 1) if k is None else (k,))]
    if not rows:
        raise MergelawError(
            "rule: no size has the curves of two methods; measure another method at the same sizes "
            f"and k. {' '.join(warnings[:1])}"
        )
    answer, value, ends = _result(rows, level)
    return Answer(
        "rule",
        answer,
        value,
        ends,
        level,
        "each method's own law at that size; a lead's interval adds both laws' in quadrature, "
        "which is cautious because the methods share subsets and documents",
        "each method keeps the settings that were measured (scale, density, drop rate)",
        tuple(warnings),
        tuple(rows),
    )


def _result(
    rows: Sequence[Mapping[str, Any]], level: float
) -> tuple[str, float | None, Ends | None]:
    """The answer as a sentence; for a single (N, k), the lead and its interval."""
    if len(rows) == 1:
        (row,) = rows
        ends = None if math.isnan(row["low"]) else (row["low"], row["high"])
        lead = with_interval(row["ahead"], ends, level)
        verb = "ahead of" if row["clear"] else "not to be told apart from"
        answer = f"{row['size']}, k = {row['k']}: {row['best']}, {verb} {row['second']}, by {lead}"
        return answer, row["ahead"], ends
    wins = Counter(row["best"] for row in rows).most_common()
    best = "; ".join(f"{name} is best at {n} of {len(rows)} (N, k)" for name, n in wins)
    clear = sum(row["clear"] for row in rows)
    return f"{best}; {clear} of these leads are clear at {100 * level:g}%", None, None


def _compared(curves: Mapping[str, Curve], k: int) -> dict[str, Any]:
    """The best and the second method at one size and k."""
    losses = sorted((curve.loss(k), method) for method, curve in curves.items())
    (least, best), (next_least, second) = losses[:2]
    first_ends, second_ends = curves[best].interval(k), curves[second].interval(k)
    ahead, low, high = next_least - least, math.nan, math.nan
    if first_ends is not None and second_ends is not None:
        low = ahead - math.hypot(first_ends[1] - least, next_least - second_ends[0])
        high = ahead + math.hypot(least - first_ends[0], second_ends[1] - next_least)
    return {
        **{"size": curves[best].name, "k": k, "best": best, "loss": least, "second": second},
        **{"ahead": ahead, "low": low, "high": high, "clear": bool(low > 0)},
    }
