"""Rule: which merge method has the lowest expected loss."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from mergelaw.errors import MergelawError
from mergelaw.laws.result import LEVEL, POOL
from mergelaw.planning.answer import Answer, minus, with_interval
from mergelaw.planning.curve import Curve
from mergelaw.planning.points import at_size


def rule(
    points: pd.DataFrame,
    N: float | None = None,
    k: int | None = None,
    *,
    base: str | None = None,
    level: float = LEVEL,
    population: str = POOL,
) -> Answer:
    """Merge method with the lowest loss, at one size and k or over all of them.

    Args:
        points: of one family and domain, at least two methods.
        N, base: a size, in billions or by a base's name; None is every measured one.
        k: number of experts; None is all that are measured.
        level, population: of the intervals.

    Returns:
        The best method and its lead over the second (nats per token); table has a row per (N, k).

    Raises:
        MergelawError: no size and k has the losses of two methods.
    """
    sizes = sorted(points["N"].unique())
    if N is not None or base is not None:
        points, N, _ = at_size(points, N, base)
        sizes = [N]
    rows: list[dict[str, Any]] = []
    warnings: dict[str, list[str]] = {}
    for size in sizes:
        curves = _curves(points, size, level, population, warnings)
        rows += _leads(curves, k, warnings)
    if not rows:
        raise MergelawError(
            "rule: no size has the curves of two methods; measure another method at the same sizes "
            f"and k{''.join(f'; {text}' for text in _grouped(warnings)[:1])}"
        )
    value, ends = None, None
    if len(rows) == 1:
        (row,) = rows
        value, ends = row["ahead"], None if math.isnan(row["low"]) else (row["low"], row["high"])
        verb = "ahead of" if row["clear"] else "not to be told apart from"
        answer = f"{row['size']}, k = {row['k']}: {row['best']}, {verb} {row['second']}, by "
        answer += with_interval(value, ends, level)
    else:
        answer = _wins(rows, level)
    return Answer(
        "rule",
        answer,
        value,
        ends,
        level,
        "measured means where there are any, each method's own law elsewhere; a lead's interval "
        "adds both in quadrature, which is cautious because methods share subsets and documents",
        "each method keeps the settings that were measured (scale, density, drop rate)",
        _grouped(warnings),
        tuple(rows),
        population=population,
    )


def _wins(rows: Sequence[Mapping[str, Any]], level: float) -> str:
    wins = Counter(row["best"] for row in rows).most_common()
    best = "; ".join(f"{name} is best at {n} of {len(rows)} (N, k)" for name, n in wins)
    clear = sum(row["clear"] for row in rows)
    return f"{best}; {clear} of these leads are clear at {100 * level:g}%"


def _grouped(warnings: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Each warning once, after the places that it is about."""
    return tuple(f"{', '.join(places)}: {text}" for text, places in warnings.items())


def _curves(
    points: pd.DataFrame, N: float, level: float, population: str, warnings: dict[str, list[str]]
) -> dict[str, Curve]:
    """Each method's curve at one size; adds warnings on methods that have none."""
    curves: dict[str, Curve] = {}
    for method, table in points.groupby("method"):
        try:
            curves[str(method)] = Curve(table, N, level=level, population=population)
        except MergelawError as error:  # the other methods can still be compared
            place = f"{method} at N = {N:.4g}"
            warnings.setdefault(f"not compared: {error}", []).append(place)
    return curves


def _leads(
    curves: Mapping[str, Curve], k: int | None, warnings: dict[str, list[str]]
) -> Iterator[dict[str, Any]]:
    """The best method and its lead over the second, at k or at each measured k of one size.

    Adds warnings on the laws that are asked, which measured losses are not.
    """
    measured = sorted({int(count) for c in curves.values() for count in c.table["k"]})
    levels = measured if k is None else [k]
    for method, curve in curves.items():
        if not set(levels) <= set(curve.losses):
            for text in curve.warnings:
                warnings.setdefault(text, []).append(f"{method} at {curve.name}")
    for count in levels:
        losses = {
            method: curve.estimate(count)
            for method, curve in curves.items()
            if not curve.fails or count in curve.losses
        }
        best, second, *_ = [*sorted(losses, key=lambda m: losses[m][0]), "", ""]
        if second:
            ahead, ends = minus(losses[second], losses[best])
            low, high = ends or (math.nan, math.nan)
            row: dict[str, Any] = {"size": curves[best].name, "k": count, "best": best}
            row |= {"loss": losses[best][0], "second": second, "ahead": ahead}
            yield row | {"low": low, "high": high, "clear": bool(low > 0)}
