"""How often each warning of a fit speaks against a true law, and finds what is wrong.

Tables that follow the merging law with its errors: every doubt about them is a false alarm. Then
pools in which one expert is bad, and tables in which one point is.

    python benchmarks/false_alarms.py > benchmarks/false_alarms.md
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from mergelaw.laws import MERGING, MERGING_FIXED_N, fit_points
from mergelaw.laws.experts import outlying
from scores import markdown

LAW = {"L_star": 0.4, "B": 0.3, "A0": 0.08, "beta": 0.4, "gamma": 0.1, "b": 0.3}
LADDER = (0.5, 1.5, 3.0, 7.0, 14.0)
MISFIT = 2e-4
DOUBTS = ("outlier", "better_rival", "holdout", "runs")
ALARMS = (*DOUBTS, "fails", "any")


def table(sizes: int, seed: int, *, scatter: float = 0.0, se: float = 0.0) -> pd.DataFrame:
    """Points of the law at nine k with a misfit, a scatter of bases and known errors (nats)."""
    random = np.random.default_rng([seed, sizes, round(1e6 * scatter), round(1e6 * se)])
    N, k = (axis.ravel() for axis in np.meshgrid(LADDER[:sizes], np.arange(1, 10)))
    ce = MERGING.predict(LAW, N=N, k=k) + np.hypot(MISFIT, se) * random.standard_normal(len(N))
    ce += scatter * random.standard_normal(sizes)[np.searchsorted(LADDER, N)]
    points = pd.DataFrame({"N": N, "k": k, "ce": ce, "base": [f"{n:g}B" for n in N], "M": 9})
    return points.assign(se=se) if se else points


def alarms(points: pd.DataFrame) -> set[str]:
    """Codes of the doubts about a table's law, with ``fails`` and ``any``."""
    fitted = fit_points(MERGING if len(set(points["N"])) > 1 else MERGING_FIXED_N, points)
    codes = {note.code for note in fitted.doubts}
    codes |= {"fails"} if fitted.verdict["state"] == "fails" else set()
    return codes | {"any"} if codes else codes


def false_alarms(tables: int) -> Iterator[dict[str, object]]:
    """A row for each setting: the share of tables of a true law with each alarm."""
    settings = {
        "one base": (1, {}, tables),
        "one base, errors known": (1, {"se": 2e-4}, tables),
        "four sizes": (4, {}, tables // 4),
        "four sizes, bases scatter": (4, {"scatter": 1e-3}, tables // 4),
    }
    for name, (sizes, noise, count) in settings.items():
        found = Counter(
            code for seed in range(count) for code in alarms(table(sizes, seed, **noise))
        )
        yield {"law": name, "tables": count, **{a: f"{found[a] / count:.0%}" for a in ALARMS}}


def bad_points(tables: int) -> Iterator[dict[str, object]]:
    """Shares of tables whose one bad point is named, and of those that name another."""
    for size in (5, 10, 30):
        named = others = 0
        for seed in range(tables):
            points = table(1, seed)
            bad = int(np.random.default_rng(seed).integers(9))
            points.loc[bad, "ce"] += size * MISFIT
            rows = [row["k"] - 1 for row in fit_points(MERGING_FIXED_N, points).outliers]
            named += bad in rows
            others += any(row != bad for row in rows)
        yield {
            "bad by": f"{size} misfits",
            "named": f"{named / tables:.0%}",
            "another named": f"{others / tables:.0%}",
        }


def pool(seed: int, bad: float, experts: int = 9) -> pd.DataFrame:
    """Macro losses of all merges up to four of a pool; the last expert is worse by ``bad`` nats."""
    random = np.random.default_rng(seed)
    effects = 0.02 * random.standard_normal(experts)
    effects[-1] += bad
    pairs = 0.005 * random.standard_normal((experts, experts))
    rows = []
    for k in range(1, 5):
        for members in combinations(range(experts), k):
            one = list(members)
            ce = 0.9 + 0.1 / k + effects[one].mean() + pairs[np.ix_(one, one)].mean()
            rows.append({"k": k, "experts": tuple(f"e{i}" for i in one), "ce": ce})
    frame = pd.DataFrame(rows).assign(family="", base="1B", method="average")
    return frame.assign(merge=frame["experts"].map("+".join))


def bad_experts(pools: int) -> Iterator[dict[str, object]]:
    """Pools in which the bad expert is named, and in which a good one is."""
    for bad in (0.0, 0.1, 0.15, 0.3):
        named = [[one["expert"] for one in outlying(pool(seed, bad))] for seed in range(pools)]
        yield {
            "worse by, nats": f"{bad:g}",
            "it is named": f"{sum('e8' in names for names in named)} of {pools}",
            "a good one is": f"{sum(bool({*names} - {'e8'}) for names in named)} of {pools}",
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, default=200, help="of one base; of four, a quarter")
    tables = parser.parse_args(arguments).tables
    print("# False alarms\n\n## Doubts about a law that is true\n")
    print("Share of tables of nine k with each doubt; at most 10% is wanted.\n")
    print(markdown(false_alarms(tables)))
    print("## One bad point among nine\n")
    print(markdown(bad_points(tables // 4)))
    print("## One bad expert among nine\n\nThe others differ by 0.02 nats (standard deviation).\n")
    print(markdown(bad_experts(tables)))


if __name__ == "__main__":
    main()
