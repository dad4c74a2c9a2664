"""Rule: which merge method has the lowest expected loss."""

import math
from collections import Counter
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
    warnings: list[str] = []
    for size in sizes:
        curves: dict[str, Curve] = {}
        for method, table in points.groupby("method"):
            try:
                curve = Curve(table, size, level=level, population=population)
                curves[str(method)] = curve
                warnings += [f"{method} at {curve.name}: {text}" for text in curve.warnings]
            except MergelawError as error:  # the other methods can still be compared
                warnings.append(f"{method} at N = {size:.4g}: not compared: {error}")
        measured = sorted({int(count) for c in curves.values() for count in c.table["k"]})
        for count in measured if k is None else (k,):
            known = {m: c for m, c in curves.items() if not c.fails or count in c.losses}
            losses = {method: curve.estimate(count) for method, curve in known.items()}
            best, second, *_ = [*sorted(losses, key=lambda m: losses[m][0]), "", ""]
            if second:
                ahead, ends = minus(losses[second], losses[best])
                low, high = ends or (math.nan, math.nan)
                row: dict[str, Any] = {"size": curves[best].name, "k": count, "best": best}
                row |= {"loss": losses[best][0], "second": second, "ahead": ahead}
                rows.append(row | {"low": low, "high": high, "clear": bool(low > 0)})
    if not rows:
        raise MergelawError(
            "rule: no size has the curves of two methods; measure another method at the same sizes "
            f"and k. {' '.join(warnings[:1])}"
        )
    value, ends = None, None
    if len(rows) == 1:
        (row,) = rows
        value, ends = row["ahead"], None if math.isnan(row["low"]) else (row["low"], row["high"])
        verb = "ahead of" if row["clear"] else "not to be told apart from"
        answer = f"{row['size']}, k = {row['k']}: {row['best']}, {verb} {row['second']}, by "
        answer += with_interval(value, ends, level)
    else:
        wins = Counter(row["best"] for row in rows).most_common()
        answer = "; ".join(f"{name} is best at {n} of {len(rows)} (N, k)" for name, n in wins)
        clear = sum(row["clear"] for row in rows)
        answer += f"; {clear} of these leads are clear at {100 * level:g}%"
    return Answer(
        "rule",
        answer,
        value,
        ends,
        level,
        "measured means where there are any, each method's own law elsewhere; a lead's interval "
        "adds both in quadrature, which is cautious because methods share subsets and documents",
        "each method keeps the settings that were measured (scale, density, drop rate)",
        tuple(dict.fromkeys(warnings)),
        tuple(rows),
        population=population,
    )
