"""Measure: measurements to buy next to narrow the interval of a forecast."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import block_diag, csr_array, diags_array

from mergelaw.errors import MergelawError
from mergelaw.laws.covariance import sampling_covariance
from mergelaw.laws.fit import Fit, fit
from mergelaw.laws.result import POOL
from mergelaw.planning.answer import Answer, with_interval
from mergelaw.planning.budget import Costs
from mergelaw.planning.curve import LISTED, Curve
from mergelaw.planning.points import SAME_SIZE

# So many purchases are tried at most.
PURCHASES = 8
# A purchase has to narrow the interval by more than this share.
LITTLE = 1e-3
Rows = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Purchase:
    """A possible measurement: name, points (N, k, variance) that it adds or replaces, and cost."""

    name: str
    points: pd.DataFrame
    cost: float


def measure(curve: Curve, k: float, costs: Costs | None = None, *, share: float = 0.5) -> Answer:
    """Measurements to buy next to bring a forecast's interval down to a share of its width.

    Candidates are a k that a base lacks, more circles where points have standard errors, and a
    size up to the one that is asked about, with its experts. The best makes the variance of
    E[L|N,k] fall most, linearised, per cost if costs are given. It is bought if the law,
    fitted again with losses as it expects them, has a narrower interval; and so on to the share.
    With one point more than parameters the misfit is hardly known, and the share may not come true.

    Args:
        curve: at the forecast's size.
        k: the forecast's number of experts.
        costs: by size.
        share: of the present width, between 0 and 1.

    Returns:
        value is the remaining share, table has a row per purchase.

    Raises:
        MergelawError: there is no interval yet.
    """
    if not 0 < share < 1:
        raise MergelawError(f"share = {share:g}; give a number between 0 and 1")
    curve.variables(k)
    left, reason = 1.0, "a measured mean needs no law"
    rows: Rows = []
    if k in curve.losses:
        value, ends = curve.losses[int(k)]
        answer = f"nothing to buy, it is measured: {with_interval(value, ends, curve.level)}"
        if ends is not None and ends[0] < ends[1]:
            more = f"{1 / share**2:.3g} times as many circles there"
            answer += f"; {more} narrow it to {share:g} of its width"
    elif curve.fails:
        return curve.measured_only("measure")
    else:
        answer, rows = _to_buy(curve, k, costs, share)
        left = rows[-1]["share"] if rows else 1.0
        reason = (
            "the law fitted again with each purchase's points where it expects them, off by a "
            f"misfit of {curve.law.misfit:.2g} nats"
        )
    return curve.answer(
        "measure",
        f"{curve.name}, k = {k:g}: {answer}",
        (left, None),
        reason,
        "the law is right and its own error stays the same; new measurements may show otherwise",
        warnings=(*curve.beyond_pool(k), *curve.warnings),
        table=rows,
    )


def _to_buy(curve: Curve, k: float, costs: Costs | None, share: float) -> tuple[str, Rows]:
    """The purchases as a sentence and as rows."""
    ends = curve.by_law(k)[1]
    if ends is None:
        raise MergelawError(
            f"{curve.name}: there is no interval to narrow, because the law has as many "
            "parameters as points; measure one more k, or give standard errors"
        )
    half = (ends[1] - ends[0]) / 2
    rows: Rows = []
    for purchase, left in _buy(curve, k, costs, share):
        price = {} if costs is None else {"cost": purchase.cost}
        row = {"buy": purchase.name, "interval after": 2 * half * left, "share": left}
        rows.append(row | price)
    if not rows:
        answer = f"nothing to buy narrows the interval of ±{half:.2g} nats; "
        answer += "" if curve.joint else f"all k of this pool of {curve.M} are measured, and "
        return f"{answer}what is left is the law's own error{curve.beside}", rows
    answer = "" if left <= share else f"{100 * share:g}% is not reached; the best is to "
    answer += f"measure {'; '.join(row['buy'] for row in rows)}: the interval narrows from "
    answer += f"±{half:.2g} to ±{half * left:.2g} nats"
    if costs is not None:
        answer += f", for {sum(row['cost'] for row in rows):.4g} {costs.unit}"
    return answer + curve.beside, rows


def _buy(
    curve: Curve, k: float, costs: Costs | None, share: float
) -> Iterator[tuple[Purchase, float]]:
    """Purchases, each the best after the earlier ones, and the share of the interval after each."""
    table = curve.table.assign(
        variance=curve.table["se"].fillna(0) ** 2 if "se" in curve.table else 0.0,
        row=np.arange(len(curve.table)),
    )
    points, candidates = table, list(_candidates(curve, table, costs))
    now, left, before = _deviation(curve, points, k), 1.0, _width(curve, curve.law, k)
    for _ in range(PURCHASES):
        if not candidates or left <= share:
            return
        after = {one: _deviation(curve, _with(points, one), k) for one in candidates}

        def worth(one: Purchase, now: float = now, after: dict[Purchase, float] = after) -> Any:
            gain = now - after[one]  # some purchases cost nothing
            return gain / one.cost if one.cost > 0 else math.copysign(math.inf, gain), gain

        best = max(candidates, key=worth)
        candidates.remove(best)
        more = _with(points, best)
        narrowed = _width(curve, _fit_with(curve, more), k) / before
        if narrowed < left * (1 - LITTLE):
            points, now, left = more, after[best], narrowed
            yield best, left


def _with(points: pd.DataFrame, purchase: Purchase) -> pd.DataFrame:
    both = pd.concat([points, purchase.points], ignore_index=True)
    both = both[["N", "k", "ce", "variance", "row"]]
    return both.drop_duplicates(["N", "k"], keep="last", ignore_index=True)


def _width(curve: Curve, fitted: Fit, k: float) -> float:
    """Width (nats per token) of the interval of E[L|N,k] by a fit of the curve's law."""
    new = curve.joint or math.isfinite(k)
    ends = fitted.predict_interval(curve.level, POOL, new, **curve.variables(k))
    return math.nan if ends is None else float(ends[1] - ends[0])


def _fit_with(curve: Curve, points: pd.DataFrame) -> Fit:
    """Fit of the curve's law once the points are measured.

    New points, with a loss of NaN, get the law's loss, plus and minus its misfit by turns; new
    bases get its scatter besides, by turns too.
    """
    new = points["ce"].isna().to_numpy()
    columns = {name: points[name].to_numpy(dtype=float) for name in curve.law.law.levels}
    turns = np.cumsum(new) % 2 * 2.0 - 1
    expected = curve.law.predict(**columns) + np.nan_to_num(curve.law.misfit) * turns
    bases = points.loc[~points["N"].isin(curve.table["N"]), "N"]
    expected[bases.index] += curve.law.scatter * (1 - 2.0 * (pd.factorize(bases)[0] % 2))
    losses = np.where(new, expected, points["ce"])
    known = sampling_covariance(curve.table)
    variances = points["variance"].to_numpy(dtype=float)
    if known is None:
        covariance: Any = variances if variances.any() else None
    else:
        whole = diags_array(known) if known.ndim == 1 else known
        rows = points["row"][~new].to_numpy(dtype=int)
        before = curve.table["se"].fillna(0).to_numpy()[rows] ** 2
        left = diags_array(np.sqrt(variances[~new] / np.where(before > 0, before, 1)))
        parts = [left @ csr_array(whole)[rows][:, rows] @ left, diags_array(variances[new])]
        covariance = csr_array(block_diag(parts))
    # The old points come first, as in the covariance.
    order = np.argsort(new, kind="stable")
    table = {name: values[order] for name, values in columns.items()} | {"ce": losses[order]}
    misfit = curve.law.solution.fixed[0]
    return fit(curve.law.law, table, covariance=covariance, misfit=misfit)


def _candidates(curve: Curve, table: pd.DataFrame, costs: Costs | None) -> Iterator[Purchase]:
    """Possible measurements; each costs 1 if there are no costs."""

    def price(N: float, merges: float, experts: int = 0) -> float:
        if costs is None:
            return 1.0
        return experts * costs.at(N, "training") + merges * costs.of_merge(N)

    usual = float(table["variance"].median())
    for base, rows in table.groupby("base"):
        N, M = float(rows["N"].iloc[0]), int(rows["M"].iloc[0])
        for k in sorted(set(range(1, min(M, LISTED) + 1)) - set(rows["k"])):
            points = pd.DataFrame({"N": [N], "k": float(k), "variance": usual})
            yield Purchase(f"k = {k} at {base}", points, price(N, min(M, math.comb(M, k))))
        if (rows["variance"] > 0).any():
            circles = int(rows["replicates"].max()) if "replicates" in rows else 1
            cost = price(N, M * int((rows["variance"] > 0).sum()) * circles)
            better = rows.assign(variance=rows["variance"] / 2)
            yield Purchase(f"as many circles again at {base}", better, cost)
    levels, sizes = sorted(table["k"].unique()), sorted(table["N"].unique())
    new = [math.sqrt(a * b) for a, b in pairwise([*sizes, curve.N]) if b > 1.5 * a]
    merges = sum(min(curve.M, math.comb(curve.M, int(k))) for k in levels)
    for N in sorted({*new, 2 * sizes[-1], 4 * sizes[-1]}) if curve.joint else ():
        if max(curve.N, sizes[-1]) > N and abs(N / curve.N - 1) > SAME_SIZE:
            name = f"a base of N = {N:.3g} with its {curve.M} experts, at k = "
            name += ", ".join(f"{k:g}" for k in levels)
            points = pd.DataFrame({"N": N, "k": np.array(levels, dtype=float), "variance": usual})
            yield Purchase(name, points, price(N, merges, curve.M))


def _deviation(curve: Curve, points: pd.DataFrame, k: float) -> float:
    """Standard deviation (nats per token) of E[L|N,k] once the points are measured, linearised.

    It ranks purchases, because fitting the law again for each of them takes too long. Generalised
    least squares: with the law's tangent J at the points, their covariance V and the tangent g and
    own error s at the question it is sqrt(g' (J' V^-1 J)^-1 g + s^2).
    """
    fitted, N = curve.law, points["N"].to_numpy(dtype=float)
    misfit = max(np.nan_to_num(fitted.misfit), 1e-6 * float(curve.table["ce"].mean()))
    scatter = float(np.nan_to_num(fitted.scatter)) if curve.joint else 0.0
    variance = misfit**2 + points["variance"].to_numpy(dtype=float)
    V = np.diag(variance) + scatter**2 * np.equal.outer(N, N)

    def tangent(variables: Mapping[str, Any]) -> np.ndarray:
        best, columns = fitted.parameters, []
        for name, value in best.items():
            step = 1e-5 * max(abs(value), 1e-3)
            moved = fitted.law.predict({**best, name: value + step}, **variables)
            columns.append((moved - fitted.law.predict(best, **variables)) / step)
        return np.column_stack(columns)

    J = tangent({name: points[name].to_numpy(dtype=float) for name in fitted.law.levels})
    g = tangent({name: np.array([value]) for name, value in curve.variables(k).items()})[0]
    lengths = np.linalg.norm(J, axis=0)
    J, g = J[:, lengths > 0] / lengths[lengths > 0], g[lengths > 0] / lengths[lengths > 0]
    mean = g @ np.linalg.pinv(J.T @ np.linalg.solve(V, J), rcond=1e-13, hermitian=True) @ g
    return math.sqrt(max(float(mean), 0.0) + misfit**2 + scatter**2)
