"""Measure: measurements to buy next to narrow the interval of a forecast."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd
from scipy.special import ndtri, stdtrit

from mergelaw.errors import MergelawError
from mergelaw.laws.fit import fit
from mergelaw.planning.answer import Answer
from mergelaw.planning.costs import Costs
from mergelaw.planning.curve import Curve

# Plans end after this many purchases.
PURCHASES = 8
# A purchase has to narrow the interval by more than this share.
LITTLE = 1e-3


@dataclass(frozen=True, eq=False)
class Purchase:
    """A possible measurement: name, points that it adds or replaces, and cost."""

    name: str
    points: pd.DataFrame
    cost: float


def measure(curve: Curve, k: float, costs: Costs | None = None, *, share: float = 0.5) -> Answer:
    """Measurements to buy next to bring a forecast's interval down to a share of its width.

    Each candidate (a k that a base lacks, a size with its experts, more circles where points have
    standard errors) is added to the points at its expected loss, and the law is fitted again with
    the present misfit. The candidate that narrows the interval of E[L|N,k] most, per cost if costs
    are given, is bought; this repeats until the share is reached.

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
    if curve.interval(k) is None:
        raise MergelawError(
            f"{curve.name}: there is no interval to narrow, because the law has as many parameters "
            "as points; measure one more k, or give standard errors"
        )
    candidates = list(_candidates(curve, costs))
    bought, widths = _buy(curve, candidates, k, share)
    rows = [
        {"buy": purchase.name, "interval after": width, "share": width / widths[0]}
        | ({"cost": purchase.cost} if costs else {})
        for purchase, width in zip(bought, widths[1:], strict=True)
    ]
    before, after = (f"±{width / 2:.2g}" for width in (widths[0], widths[-1]))
    if not bought:
        answer = f"nothing to buy narrows the interval of {before} nats; "
        answer += "" if curve.joint else f"all k of this pool of {curve.M} are measured, and "
        answer += "what is left is the law's misfit"
    else:
        reached = widths[-1] <= share * widths[0]
        listed = "; ".join(purchase.name for purchase in bought)
        answer = "" if reached else f"{100 * share:g}% is not reached; the best is to "
        answer += f"measure {listed}: the interval narrows from {before} to {after} nats"
        answer += f", for {sum(p.cost for p in bought):.4g} {costs.unit}" if costs else ""
    return Answer(
        "measure",
        f"{curve.name}, k = {k:g}: {answer}",
        widths[-1] / widths[0],
        None,
        curve.level,
        f"the law was fitted again with each of {len(candidates)} candidates at its expected loss, "
        f"with a misfit of {curve.fitted.misfit:.2g} nats; the interval is that of the mean",
        "the law is right and its misfit stays the same; the new measurements may show otherwise",
        (*curve.beyond_pool(k), *curve.warnings),
        tuple(rows),
    )


def _buy(
    curve: Curve, candidates: Sequence[Purchase], k: float, share: float
) -> tuple[list[Purchase], list[float]]:
    """Purchases, each the best after the earlier ones; the interval's width before and after."""
    table, left = curve.table, list(candidates)
    bought: list[Purchase] = []
    widths = [_width(curve, table, k)]

    def worth(purchase: Purchase) -> tuple[float, float]:
        """Narrowing of the interval per cost, then in all, since some purchases cost nothing."""
        nats = widths[-1] - after[purchase]
        return nats / purchase.cost if purchase.cost > 0 else math.copysign(math.inf, nats), nats

    while left and widths[-1] > share * widths[0] and len(bought) < PURCHASES:
        after = {one: _width(curve, _with(table, one.points), k) for one in left}
        best = max(left, key=worth)
        if after[best] >= widths[-1] * (1 - LITTLE):
            break
        table = _with(table, best.points)
        left.remove(best)
        bought.append(best)
        widths.append(after[best])
    return bought, widths


def _candidates(curve: Curve, costs: Costs | None) -> Iterator[Purchase]:
    """Possible measurements; each costs 1 if there are no costs."""

    def price(N: float, merges: float, experts: int = 0) -> float:
        if costs is None:
            return 1.0
        return experts * costs.at(N, "training") + merges * costs.of_merge(N)

    def expected(peers: pd.DataFrame, base: str, N: float, ks: Sequence[float]) -> pd.DataFrame:
        losses = [curve.loss(k, N) for k in ks]
        points = pd.DataFrame({"N": N, "k": ks, "M": curve.M, "ce": losses, "base": base})
        return points.assign(se=float(peers["se"].median())) if "se" in peers else points

    for base, table in curve.table.groupby("base"):
        N, M = float(table["N"].iloc[0]), int(table["M"].iloc[0])
        for k in sorted(set(range(1, M + 1)) - set(table["k"])):
            cost = price(N, min(M, math.comb(M, k)))
            yield Purchase(f"k = {k} at {base}", expected(table, str(base), N, [k]), cost)
        if "se" in table and (table["se"] > 0).any():
            circles = int(table["replicates"].max()) if "replicates" in table else 1
            merges = M * int((table["se"] > 0).sum()) * circles
            better = table.assign(se=table["se"] / math.sqrt(2))
            yield Purchase(f"as many circles again at {base}", better, price(N, merges))
    if not curve.joint:
        return
    levels, sizes = sorted(curve.table["k"].unique()), sorted(curve.table["N"].unique())
    between = [math.sqrt(a * b) for a, b in pairwise(sizes) if b > 1.5 * a]
    new = {*between, 2 * sizes[-1], 4 * sizes[-1]} | (set() if curve.measured else {curve.N})
    merges = sum(min(curve.M, math.comb(curve.M, int(k))) for k in levels)
    for N in sorted(new):
        name = f"a base of N = {N:.3g} with its {curve.M} experts, at k = "
        name += ", ".join(f"{k:g}" for k in levels)
        points = expected(curve.table, f"N={N:.6g}", N, levels)
        yield Purchase(name, points, price(N, merges, curve.M))


def _with(table: pd.DataFrame, added: pd.DataFrame) -> pd.DataFrame:
    """Points with others added; these replace points of the same base and k."""
    points = pd.concat([table, added], ignore_index=True)
    return points.drop_duplicates(["base", "k"], keep="last")


def _width(curve: Curve, table: pd.DataFrame, k: float) -> float:
    """Width (nats per token) of the expected loss's interval once the table is measured."""
    # A misfit of 0 leaves the points' standard errors as the only noise.
    misfit = max(curve.fitted.misfit, 1e-9 * float(curve.table["ce"].mean()))
    fitted = fit(curve.fitted.law, table, misfit=misfit)
    low, high = fitted.predict_interval(curve.level, **curve.variables(k)) or (math.nan, math.nan)
    # The misfit was estimated from residuals, and new points add to their degrees of freedom.
    freedom = curve.fitted.freedom + len(table) - len(curve.table)
    share = (1 + curve.level) / 2
    widened = 1.0 if math.isinf(freedom) else float(stdtrit(freedom, share) / ndtri(share))
    return float(high - low) * widened
