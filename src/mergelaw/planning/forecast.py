"""Forecasts of losses from few points, scored where the rest is measured.

Schemes along k, for one base: ``three-point``, the merging law through k = 1, 2 and 4 (Wang et al.,
arXiv:2509.24244); ``end-point``, the law L_inf + A / k through k = 1 and k = M, exact over all
subsets if the loss is quadratic along equal-weight means. Along N, ``size``: the joint law.

Two or three points cannot show a scheme's error, so its interval comes from its record: its errors
at the study's other bases, as shares of the gain (t with as many degrees of freedom as bases), and
from the points' sampling errors. With fewer than two such bases the interval comes from standard
errors and a given misfit.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtrit

from mergelaw.errors import MergelawError
from mergelaw.laws.covariance import sampling_covariance
from mergelaw.laws.fit import fit_points
from mergelaw.laws.law import INVERSE_FIXED_N, MERGING, MERGING_FIXED_N
from mergelaw.laws.result import LEVEL, POOL
from mergelaw.planning.answer import Answer
from mergelaw.planning.curve import LISTED, Curve
from mergelaw.planning.points import at_size, base_points, without_errors

THREE_POINT, END_POINT, SIZE = "three-point", "end-point", "size"
LAWS = {THREE_POINT: MERGING_FIXED_N, END_POINT: INVERSE_FIXED_N, SIZE: MERGING}
# A record needs this many other bases.
BASES = 2
Rows = list[dict[str, Any]]
Record = list[tuple[str, np.ndarray]]


def forecast(
    points: pd.DataFrame,
    scheme: str | None = None,
    *,
    N: float | None = None,
    base: str | None = None,
    k: Sequence[float] | None = None,
    misfit: float | None = None,
    level: float = LEVEL,
    population: str = POOL,
) -> Answer:
    """Forecast a base's losses from few points.

    Args:
        points: of one method, family and domain, all bases (``points.choose``).
        scheme: None is ``three-point`` at a measured size and ``size`` elsewhere.
        N, base: the size, in billions or by a base's name. The scheme ``size`` uses the smaller
            bases at a named base, and all bases at N.
        k: numbers of experts; None is all in 1..M that the scheme does not use.
        misfit: standard deviation (nats per token) of the law's error at a point; sets the
            intervals instead of the scheme's record.
        level, population: of the intervals.

    Returns:
        table has a row per k: k, forecast, low, high (nats per token); at measured k also measured,
        error, naive error (of "same as the last point") and held (whether the interval holds the
        measured loss). details has the base, the points used and the score.

    Raises:
        MergelawError: unknown scheme, the points that it needs are missing, or the law fails.
    """
    if scheme not in (None, *LAWS):
        raise MergelawError(f"no scheme {scheme}; use {', '.join(LAWS)}")
    _, N, name = at_size(points, N, base)
    scheme = scheme or (SIZE if name is None else THREE_POINT)
    name = base if scheme == SIZE else name
    used = _used(points, scheme, N, name)
    curve = Curve(used, N, level=level, population=population, law=LAWS[scheme], misfit=misfit)
    rows = _forecasts(curve, scheme, _levels(curve.M, used, scheme) if k is None else k)
    basis, warnings = _basis(curve, misfit), list(curve.warnings)
    assumption = f"the loss falls as {curve.formula}"
    others = [] if misfit is not None or scheme == SIZE else _record(points, name, scheme, rows)
    if len(others) >= BASES:
        warnings = without_errors(used) + _set_intervals(rows, others, used, level, scheme)
        bases = ", ".join(other for other, _ in others)
        basis = f"the scheme's errors at {bases}, as shares of the gain, and the points' own errors"
        assumption = "the scheme is off at this base by as much as at the other bases"
    details = _details(points, used, scheme, name, N)
    details |= _score(rows, points[points["base"] == name], used, scheme)
    ends = None if math.isnan(rows[0]["low"]) else (rows[0]["low"], rows[0]["high"])
    return curve.answer(
        "forecast",
        _sentence(details),
        (rows[0]["forecast"], ends) if len(rows) == 1 else None,
        f"intervals: {basis}",
        assumption,
        warnings=(*warnings, *curve.beyond_pool(rows[-1]["k"])),
        table=rows,
        details=details,
    )


def _levels(M: int, used: pd.DataFrame, scheme: str) -> set[int]:
    """The k of a pool of M that a scheme does not use."""
    return set(range(1, min(M, LISTED) + 1)) - (set() if scheme == SIZE else set(used["k"]))


def _forecasts(curve: Curve, scheme: str, levels: Collection[float]) -> Rows:
    """The law's loss and interval (nats per token) at each k."""
    rows: Rows = []
    if not levels:
        raise MergelawError(f"{scheme} forecast: uses every k of a pool of {curve.M}; give other k")
    for k in sorted(levels):
        value, ends = curve.by_law(k)
        low, high = ends or (math.nan, math.nan)
        rows.append({"k": k, "forecast": value, "low": low, "high": high})
    return rows


def _details(
    points: pd.DataFrame, used: pd.DataFrame, scheme: str, base: str | None, N: float
) -> dict[str, Any]:
    place = {column: str(points[column].iloc[0]) for column in ("method", "family", "domain")}
    fitted = used["N" if scheme == SIZE else "k"].unique().tolist()
    return {"scheme": scheme, **place, "base": base, "N": N, "used": fitted}


def _basis(curve: Curve, misfit: float | None) -> str:
    """The source of the law's intervals."""
    if curve.law.freedom == 0:
        return "none: give --misfit, or measure the whole curve of two other bases"
    if misfit is not None:
        return f"the law with a misfit of {misfit:g}"
    if math.isinf(curve.law.freedom):
        return "the law with the points' standard errors"
    return "the law with its misfit"


def _used(points: pd.DataFrame, scheme: str, N: float, base: str | None) -> pd.DataFrame:
    """The points that a scheme uses to forecast a base, or for ``size`` an N."""
    if scheme == SIZE:
        used = points if base is None else points[points["N"] < N]
        if used.empty:
            raise MergelawError(f"size forecast of {base}: no smaller base; measure one first")
        return used
    if base is None:
        names = ", ".join(points["base"].unique())
        raise MergelawError(f"no base of N = {N:g} is measured; choose from {names}")
    curve = base_points(points, base)
    needed = _needed(scheme, curve)
    if missing := sorted(set(needed) - set(curve["k"])):
        raise MergelawError(
            f"{scheme} forecast of {base}: k = {missing[0]} is not measured; the scheme needs k = "
            + ", ".join(map(str, needed))
        )
    return curve[curve["k"].isin(needed)]


def _needed(scheme: str, curve: pd.DataFrame) -> tuple[int, ...]:
    """The k that a scheme along k is fitted to."""
    return (1, 2, 4) if scheme == THREE_POINT else (1, int(curve["M"].iloc[0]))


def _gain(used: pd.DataFrame) -> float:
    """Fall of the loss from the first to the last point that a scheme uses (nats per token)."""
    return float(used["ce"].iloc[0] - used["ce"].iloc[-1])


def _record(points: pd.DataFrame, base: str | None, scheme: str, rows: Rows) -> Record:
    """A scheme's errors at the other bases, as shares of their gain; NaN beyond measured k."""
    record: Record = []
    for name in points["base"].unique():
        curve = base_points(points, name)
        used = curve[curve["k"].isin(_needed(scheme, curve))]
        # A base counts if it has more points than the scheme uses and its loss changes.
        if name == base or not set(_needed(scheme, curve)) < set(curve["k"]) or not _gain(used):
            continue
        errors = curve["ce"] - fit_points(LAWS[scheme], used).predict(k=curve["k"])
        shares = np.where(curve["k"].isin(used["k"]), 0.0, errors / _gain(used))
        levels = [row["k"] for row in rows]
        record.append((name, np.interp(levels, curve["k"], shares, left=math.nan, right=math.nan)))
    return record


def _set_intervals(
    rows: Rows, record: Record, used: pd.DataFrame, level: float, scheme: str
) -> list[str]:
    """Set the intervals of a forecast from a scheme's record; return warnings."""
    shares = np.sqrt(np.mean([share**2 for _, share in record], axis=0))
    reach = stdtrit(len(record), (1 + level) / 2) * shares * abs(_gain(used))
    sampling = _sampling_errors(scheme, used, [row["k"] for row in rows])
    reach = np.hypot(reach, ndtri((1 + level) / 2) * sampling)
    for row, width in zip(rows, reach, strict=True):
        row["low"], row["high"] = row["forecast"] - width, row["forecast"] + width
    unknown = [row["k"] for row in rows if math.isnan(row["low"])]
    return [f"no interval from k = {k:g} on: no other base was measured there" for k in unknown[:1]]


def _sampling_errors(scheme: str, used: pd.DataFrame, k: Sequence[float]) -> np.ndarray:
    """Standard errors of a scheme's forecasts at k by those of its points, linearised: (k,)."""
    known = sampling_covariance(used)
    if known is None:
        return np.zeros(len(k))
    covariance = np.diag(known) if known.ndim == 1 else known.toarray()
    forecasts = fit_points(LAWS[scheme], used).predict(k=k)
    changes = np.zeros((len(used), len(k)))
    for row, step in enumerate(0.01 * np.sqrt(covariance.diagonal())):
        if step > 0:
            moved = used.assign(ce=used["ce"] + step * (np.arange(len(used)) == row))
            changes[row] = (fit_points(LAWS[scheme], moved).predict(k=k) - forecasts) / step
    return np.asarray(np.sqrt(np.einsum("ik,ij,jk->k", changes, covariance, changes)))


def _score(rows: Rows, curve: pd.DataFrame, used: pd.DataFrame, scheme: str) -> dict[str, Any]:
    """Add measured losses and errors to the rows; return the score, empty without any."""
    losses = curve.set_index("k")["ce"]
    last = used[used["N"] == used["N"].max()].groupby("k")["ce"].mean()
    scored = [row for row in rows if row["k"] in losses.index]
    for row in scored:
        measured = float(losses[row["k"]])
        same = last.get(row["k"], math.nan) if scheme == SIZE else last.iloc[-1]
        row |= {"measured": measured, "error": row["forecast"] - measured}
        row["naive error"] = float(same - measured)
        unknown = math.isnan(row["low"])
        row["held"] = None if unknown else bool(row["low"] <= measured <= row["high"])
    if not scored:
        return {}
    held = [row["held"] for row in scored if row["held"] is not None]
    rms = {
        name: math.sqrt(np.mean([row[name] ** 2 for row in scored]))
        for name in ("error", "naive error")
    }
    return {"score": {**rms, "points": len(scored), "intervals": len(held), "held": sum(held)}}


def _sentence(details: dict[str, Any]) -> str:
    names = filter(None, (details[name] for name in ("method", "domain", "base")))
    used = ", ".join(f"{value:.4g}" for value in details["used"])
    along = "N" if details["scheme"] == SIZE else "k"
    answer = ", ".join([f"{details['scheme']} forecast", *names])
    answer += f" (N = {details['N']:.4g}), from {along} = {used}"
    if score := details.get("score"):
        answer += f": missed by {score['error']:.2g} nats (rms)"
        if not math.isnan(score["naive error"]):
            answer += f', "same as the last point" by {score["naive error"]:.2g}'
        if score["intervals"]:
            answer += f"; {score['held']} of {score['intervals']} intervals held"
    return answer
