"""Plans: six questions to a law, answered with an interval, the reason and what is assumed.

``loss``: what to expect at (N, k). ``experts``: how many reach a target. ``stop``: from where on
one more gains too little. ``budget``: a larger base or more experts next. ``rule``: which merge
method. ``measure``: what to measure next for a narrower interval.

At a measured size the answers come from that base's own curve, elsewhere from the joint law.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from mergelaw.artifacts import lineage
from mergelaw.errors import MergelawError
from mergelaw.laws.fit import fit
from mergelaw.laws.law import LAWS, MERGING, MERGING_FIXED_N, Law
from mergelaw.laws.result import LEVEL
from mergelaw.planning.forecast import base_of, beyond, billions, ends_of, fit_points, sampled

Array = NDArray[np.float64]

# A size that differs from a measured one by less than this share of it is that one.
SAME_SIZE = 0.02
# Rivals whose AICc is no more above the best than this are not excluded.
NOT_EXCLUDED = 10
# More experts than this nobody merges; a search for their number ends here.
MOST = 100_000
# Purchases that ``measure`` looks ahead.
PURCHASES = 8
COSTS = ("training", "merging", "evaluation", "serving")


@dataclass(frozen=True)
class Answer:
    """An answer to a question.

    Attributes:
        question: which of the six.
        answer: the answer as a sentence.
        value, low, high: the figure that was asked for and its interval (nats per token, or a
            number of experts); None where there is none, and an infinite end is None as well.
        level: of the interval.
        reason: a sentence on what the answer follows from.
        assumption: the assumption that matters most, with what hangs on it.
        warnings: sentences on what not to believe.
        table: what the answer was chosen from, or what it consists of.
    """

    question: str
    answer: str
    value: float | None
    low: float | None
    high: float | None
    level: float
    reason: str
    assumption: str
    warnings: tuple[str, ...] = ()
    table: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The answer as values that strict JSON can hold."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        own |= {name: _finite(own[name]) for name in ("value", "low", "high")}
        rows = [
            {name: _finite(v) if isinstance(v, float) else v for name, v in row.items()}
            for row in self.table
        ]
        return {**own, "warnings": list(self.warnings), "table": rows}

    def summary(self) -> str:
        """The answer for a terminal."""
        lines = [self.answer]
        if self.table:
            lines += ["", *_aligned(self.table), ""]
        lines += [f"why: {self.reason}", f"assumes most of all: {self.assumption}"]
        return "\n".join([*lines, *(f"! {warning}" for warning in self.warnings)])


def bases_of(points: pd.DataFrame, N: float) -> list[str]:
    """The names of the bases of a size (billions): of those about as large the nearest; or none."""
    sizes = points[["base", "N"]].drop_duplicates().sort_values("base")
    away = (sizes["N"] / billions(N)[0] - 1).abs()
    return sizes["base"][(away <= SAME_SIZE) & (away == away.min())].to_list()


def measured_base(points: pd.DataFrame, N: float) -> str:
    """The name of the base of a size (billions)."""
    names = bases_of(points, N)
    if not names:
        sizes = points.sort_values("N").drop_duplicates("base")
        listed = ", ".join(f"{b} ({n:.4g})" for b, n in zip(sizes["base"], sizes["N"], strict=True))
        raise MergelawError(f"no base of N = {N:g} is measured: there are {listed}")
    return _the_one(names, N)


def _the_one(names: Sequence[str], N: float) -> str:
    if len(names) > 1:
        raise MergelawError(f"N = {N:g} is the size of {', '.join(names)}: name one with --base")
    return names[0]


# ---- a size's curve


class Curve:
    """Expected losses along k at one size, for one method and domain.

    Attributes:
        N: the size (billions); name: the base's, or N.
        M: experts in the pool.
        measured: whether the size is one of the study's; then its own curve is the law.
        fitted: the fit that answers.
        warnings: what to know before its answers are believed.
    """

    def __init__(self, points: pd.DataFrame, N: float, level: float = LEVEL, joint: bool = False):
        self.level, self.points = level, points
        near = bases_of(points, N)
        self.M = int(points["M"].max())
        self.measured = bool(near)
        self.N, self.name, self.warnings = N, f"N = {N:.4g}", []
        self._at: dict[str, float] = {}
        self.table = points
        law = MERGING
        if self.measured:
            # The joint law is of sizes, whichever base of a size gives it its name.
            self.name = near[0] if joint else _the_one(near, N)
            own = base_of(points, self.name)
            self.N = float(min(own["N"], key=lambda size: abs(size / N - 1)))
            self.M = int(own["M"].iloc[0])
            if not joint and own["k"].nunique() >= len(MERGING_FIXED_N.parameters):
                law, self.table = MERGING_FIXED_N, own
        self.fitted = fit_points(law, self.table)
        if law is MERGING:
            self._at = {"N": self.N}
            self.warnings += beyond(sorted(points["N"].unique()), self.N)
        self.warnings += [*sampled(self.table), *self.fitted.warnings]

    @property
    def law(self) -> Law:
        return self.fitted.law

    def loss(self, k: float) -> float:
        """Expected loss (nats per token); k may be infinite."""
        return float(self.fitted.predict(k=k, **self._at))

    def interval(self, k: float) -> tuple[float, float] | None:
        """Of what would be measured over all subsets; None where the noise is unknown."""
        low, high = (float(end) for end in ends_of(self.fitted, self.level, k=k, **self._at))
        return None if math.isnan(low) else (low, high)

    def difference(
        self, k: float, other: float, N: float | None = None
    ) -> tuple[float, tuple[float, float] | None]:
        """L(k) - L(other), the other at N if it is given, and its profile-likelihood interval."""
        other_at = {**self._at, "k": other} | ({} if N is None else {"N": N})
        return self.fitted.difference({**self._at, "k": k}, other_at, self.level)

    def assumption(self, k: float) -> str:
        """What moves the answer at k most if it is wrong."""
        own = self.loss(k)
        told = [self._form(own, k)]
        if not self.measured:
            left = self.fitted.holdout.get("N")
            if left is None:
                told.append((math.inf, "the floor is a power law in N: too few sizes to check it"))
            else:
                told.append(
                    (
                        left["error"],
                        "floor and tail are powers of N: with the largest measured size left out "
                        f"the law missed it by {left['error']:.2g} nats",
                    )
                )
        if k > self.M:
            rest = self.loss(self.M) - own
            told.append(
                (
                    rest,
                    f"experts beyond the pool of {self.M} are like those in it: {rest:.2g} nats of "
                    "the fall come from experts that are not there yet",
                )
            )
        return max(told)[1]

    def _form(self, own: float, k: float) -> tuple[float, str]:
        found = []
        for rival in self.fitted.rivals:
            above, name = rival["above"], rival["law"]
            if name == self.law.name or above is None or above > NOT_EXCLUDED:
                continue
            with suppress(MergelawError):
                other = float(fit_points(LAWS[name], self.table).predict(k=k, **self._at))
                found.append((abs(other - own), name, other))
        if not found:
            known = [r for r in self.fitted.rivals if r["aicc"] is not None]
            compared = "no rival form fits nearly as well" if len(known) > 1 else "unchecked"
            return 0.0, f"the loss falls as {_tail(self.law)}: {compared}"
        effect, name, other = max(found)
        short = name.removesuffix("_fixed_N")
        return effect, (
            f"the loss falls as {_tail(self.law)}: the rival {short} is not excluded by the points "
            f"and says {other:.5g} at k = {k:g}, {effect:.1g} nats from it"
        )


def _tail(law: Law) -> str:
    return law.equation.split("=", 1)[1].strip()


# ---- costs


@dataclass(frozen=True)
class Costs:
    """What one thing costs at each size.

    Attributes:
        table: one row per size: N (billions), training (one expert), merging and evaluation (one
            merge), serving (a million tokens), all in the same unit.
        unit: its name.
    """

    table: pd.DataFrame
    unit: str = "units"

    @classmethod
    def read(cls, path: Path, unit: str = "units") -> "Costs":
        """From a CSV file with the column N and any of the others; what is not there is free."""
        if not path.is_file():
            raise MergelawError(f"{path}: there is no such file: give a CSV of costs by N")
        try:
            table = pd.read_csv(path)
        except (ValueError, OSError) as error:
            raise MergelawError(f"{path}: cannot be read as a table: {error}") from None
        unknown = [str(name) for name in table if name not in ("N", *COSTS)]
        if unknown or "N" not in table or table.empty:
            raise MergelawError(
                f"{path}: needs rows with the column N and any of {', '.join(COSTS)}"
                + (f", not {', '.join(unknown)}" if unknown else "")
            )
        for name in table:
            values = pd.to_numeric(table[name], errors="coerce")
            bad = ~np.isfinite(values) | ((values <= 0) if name == "N" else (values < 0))
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                raise MergelawError(
                    f"{path}: row {row + 1} has {name} = {table[name].iloc[row]}: give a number "
                    + ("above 0" if name == "N" else "of 0 or more")
                )
            table[name] = values.astype(float)
        table["N"] = [billions(N)[0] for N in table["N"]]
        return cls(table.reindex(columns=["N", *COSTS], fill_value=0.0), unit)

    @classmethod
    def measured(cls, laws: Path) -> "Costs":
        """From the lineage of fitted laws: the seconds that their study's jobs took.

        Raises:
            MergelawError: the laws were not made by the pipeline, or their inputs are gone.
        """
        from mergelaw.evaluation import read_rows

        folder = laws if laws.is_dir() else laws.parent
        if not (folder / lineage.LINEAGE).is_file():
            raise MergelawError(f"{laws}: no lineage that tells what things cost: give --costs")
        evals = [folder / entry["path"] for entry in lineage.read(folder)["inputs"].values()]
        if not evals:
            raise MergelawError(
                f"{laws}: fitted to points of your own, which say nothing of costs: give --costs"
            )
        rows = read_rows(evals)
        rows = rows[rows["role"] == "merge"]
        merges = rows.groupby(["base", "N", "cell"]).first().reset_index()
        by_size = merges.groupby(["base", "N"]).agg(
            merging=("merge_seconds", "mean"),
            evaluation=("eval_seconds", "sum"),
            merges=("merge", "nunique"),
            methods=("method", "nunique"),
            tokens=("tokens", "sum"),
        )
        # One merge is evaluated on every domain, by each method.
        per_merge = merges.groupby(["base", "N", "method", "merge"])["eval_seconds"].sum()
        by_size["serving"] = by_size["evaluation"] / by_size["tokens"] * 1e6
        by_size["evaluation"] = per_merge.groupby(["base", "N"]).mean()
        by_size["training"] = math.nan
        for (base, N), own in _training_seconds(evals).items():
            if (base, N) in by_size.index:
                by_size.loc[(base, N), "training"] = float(np.mean(own))
        table = by_size.reset_index()[["N", *COSTS]].sort_values("N", ignore_index=True)
        return cls(table, "seconds")

    def at(self, N: float, what: str) -> float:
        """One thing's cost at a size: between and beyond the given ones a power law in N.

        A price of 0 at this very size is 0; NaN is a price that is not known.
        """
        given = self.table.loc[np.isclose(self.table["N"], N), what].dropna()
        if len(given) and not given.any():
            return 0.0
        known = self.table[self.table[what] > 0].groupby("N")[what].mean()
        if known.empty:
            return 0.0
        sizes, costs = np.log(known.index.to_numpy(dtype=float)), np.log(known.to_numpy())
        if len(sizes) == 1:
            return float(np.exp(costs[0] + math.log(N) - sizes[0]))  # as the size
        if sizes[0] <= math.log(N) <= sizes[-1]:
            return float(np.exp(np.interp(math.log(N), sizes, costs)))
        slope, start = np.polyfit(sizes, costs, 1)
        return float(np.exp(start + slope * math.log(N)))


def _training_seconds(evals: Sequence[Path]) -> dict[tuple[str, float], list[float]]:
    """Wall seconds of the trainings behind evaluations, by base and its size."""
    import pyarrow.parquet as pq

    found: dict[tuple[str, float], list[float]] = {}
    seen: set[Path] = set()
    for artifact in evals:
        head = pq.read_table(artifact / "cells.parquet", columns=["base", "N"]).slice(0, 1)
        place = (head["base"][0].as_py(), head["N"][0].as_py())
        for name, entry in lineage.read(artifact)["inputs"].items():
            vector = Path(os.path.normpath(artifact / entry["path"]))
            if not name.startswith("task-vector:") or vector in seen:
                continue
            seen.add(vector)
            expert = vector / lineage.read(vector)["inputs"]["expert"]["path"]
            made = lineage.read(Path(os.path.normpath(expert)))
            if "training" in made["recipe"]:
                found.setdefault(place, []).append(float(made["wall_seconds"]))
    return found


# ---- the six questions


def loss(points: pd.DataFrame, N: float, k: float, level: float = LEVEL) -> Answer:
    """The loss to expect of k experts on a base of size N.

    Args:
        points: of one method, family and domain (``forecast.choose``).
        N: size (billions).
        k: number of experts, 1 or more.
        level: of the interval.

    Raises:
        MergelawError: N, k or level cannot be; or no law can be fitted.
    """
    N, warnings = _asked(N, k, level)
    curve = Curve(points, N, level)
    value, ends = curve.loss(k), curve.interval(k)
    beyond_pool = _beyond_pool(curve, k)
    return Answer(
        "loss",
        f"{curve.name}, k = {k:g}: expect {value:.5g} nats per token{_told(ends, level)}",
        value,
        *_pair(ends),
        level,
        f"{_tail(curve.law)} with {_parameters(curve)}, R^2 = {curve.fitted.r2:.5f} on "
        f"{curve.fitted.n_points} points; floor {curve.loss(math.inf):.5g}, reachable with this "
        f"pool of {curve.M}: {curve.loss(curve.M):.5g}",
        curve.assumption(k),
        (*warnings, *beyond_pool, *_no_interval(ends), *curve.warnings),
    )


def experts(points: pd.DataFrame, N: float, target: float, level: float = LEVEL) -> Answer:
    """How many experts reach a target loss on a base of size N.

    Args:
        points, N, level: as of ``loss``.
        target: loss (nats per token).

    Raises:
        MergelawError: the target is at or below the floor; or as ``loss``.
    """
    N, warnings = _asked(N, 1, level)
    if not (math.isfinite(target) and target > 0):
        raise MergelawError(f"target {target:g}: give a loss above 0, in nats per token")
    curve = Curve(points, N, level)
    floor = curve.loss(math.inf)
    if target <= floor:
        raise MergelawError(
            f"target {target:g} is below the floor of {curve.name}, {floor:.5g}"
            f"{_told(curve.interval(math.inf), level)}: no number of experts is expected to reach "
            "it; take a larger base or another method"
        )
    count = _first(lambda k: curve.loss(k) <= target)
    ends = curve.interval(count or 1)
    low = high = None
    if ends is not None:
        low = _first(lambda k: _end(curve, k, 0) <= target)
        high = _first(lambda k: _end(curve, k, 1) <= target)
    if count is None:
        answer = f"{curve.name}: {target:g} is so near the floor that no pool reaches it"
    elif count > curve.M:
        answer = (
            f"{curve.name}: {target:g} takes {count} experts: not reachable with this pool of "
            f"{curve.M}, whose reachable floor is {curve.loss(curve.M):.5g}"
        )
    else:
        plural = "s" if count > 1 else ""
        answer = (
            f"{curve.name}: {count} expert{plural} of {curve.M} reach {target:g} nats per token"
        )
    if ends is not None:
        answer += f" ({_counts(low, high)} at {100 * level:g}%)"
    return Answer(
        "experts",
        answer,
        count,
        low,
        math.inf if ends is not None and high is None else high,
        level,
        f"{_tail(curve.law)} with {_parameters(curve)} falls to it at k = A / (target - floor) - b,"
        f" rounded up; floor {floor:.5g}; k = 1 gives {curve.loss(1):.5g}",
        curve.assumption(count or MOST),
        (*warnings, *_no_interval(ends), *curve.warnings),
    )


def stop(points: pd.DataFrame, N: float, threshold: float, level: float = LEVEL) -> Answer:
    """From how many experts on one more gains less than a threshold, on a base of size N.

    Args:
        points, N, level: as of ``loss``.
        threshold: gain of one more expert that is just worth it (nats per token).

    Raises:
        MergelawError: as ``loss``.
    """
    N, warnings = _asked(N, 1, level)
    if not (math.isfinite(threshold) and threshold > 0):
        raise MergelawError(f"threshold {threshold:g}: give a gain above 0, in nats per token")
    curve = Curve(points, N, level)

    def gain(k: float) -> float:
        return curve.loss(k) - curve.loss(k + 1)

    count = _first(lambda k: gain(k) < threshold) or MOST
    known = curve.difference(1, 2)[1] is not None
    low = high = None
    if known:
        low = _first(lambda k: _gain_end(curve, k, 0) < threshold)
        high = _first(lambda k: _gain_end(curve, k, 1) < threshold)
    value, ends = curve.difference(count, count + 1)
    if count > curve.M:
        answer = (
            f"{curve.name}: use all {curve.M} experts, the last one still gains "
            f"{gain(curve.M - 1) if curve.M > 1 else gain(1):.2g} nats; by the law one more pays "
            f"up to k = {count}"
        )
    else:
        answer = (
            f"{curve.name}: stop at {count} of {curve.M} experts; the next one gains "
            f"{value:.3g} nats{_told(ends, level)}, less than {threshold:g}"
        )
    if known:
        answer += f" (k: {_counts(low, high)} at {100 * level:g}%)"
    rows = tuple(
        {
            "k": k,
            "loss": curve.loss(k),
            "next gains": gain(k),
            "of the way to the floor": _share(curve, k, math.inf),
            f"of the way to k = {curve.M}": _share(curve, k, curve.M),
        }
        for k in range(1, curve.M + 1)
    )
    return Answer(
        "stop",
        answer,
        count,
        low,
        math.inf if known and high is None else high,
        level,
        f"one more expert gains A / ((k + b)(k + 1 + b)), with {_parameters(curve)}",
        curve.assumption(count),
        (*warnings, *_no_interval(ends), *curve.warnings),
        rows,
    )


def budget(
    points: pd.DataFrame,
    N: float,
    k: int,
    costs: Costs,
    *,
    amount: float | None = None,
    have: int | None = None,
    serve: float = 0.0,
    sizes: Sequence[float] | None = None,
    level: float = LEVEL,
) -> Answer:
    """Whether the next unit of budget goes to a larger base or to more experts.

    More experts at N cost the training of those that are not there and a merge with its
    evaluation. A larger base costs the training of all its experts and what it serves dearer; the
    base itself is taken to exist.

    Args:
        points, level: as of ``loss``; at least three sizes.
        N, k: what there is now: k experts merged on a base of size N.
        costs: what things cost.
        amount: what may be spent; None compares gains per unit of cost.
        have: experts trained at N so far; None is k.
        serve: million tokens to be served.
        sizes: larger bases to consider (billions); None is all measured or priced ones.

    Raises:
        MergelawError: no larger size; nothing can be bought for the amount; or as ``loss``.
    """
    N, warnings = _asked(N, k, level)
    for name, number in (("budget", amount), ("serve", serve)):
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise MergelawError(f"{name} {number:g}: give an amount of 0 or more")
    now = Curve(points, N, level, joint=True)
    have = max(k, have or 0)
    if sizes is None:
        known = {*points["N"].unique(), *costs.table["N"]}
        sizes = sorted(size for size in known if size > now.N * (1 + SAME_SIZE))
    else:
        sizes = sorted(billions(size)[0] for size in sizes)
    if not sizes or min(sizes) <= now.N:
        raise MergelawError(
            f"no base larger than {now.name} to compare with: name some with --size, in billions"
        )
    rows: list[dict[str, Any]] = []

    def price(size: float, count: int) -> float:
        new = max(count - have, 0) if size == now.N else count
        one = costs.at(size, "merging") + costs.at(size, "evaluation")
        dearer = costs.at(size, "serving") - costs.at(now.N, "serving")
        return new * costs.at(size, "training") + one + max(serve * dearer, 0.0)

    for size in (now.N, *sizes):
        first = k + 1 if size == now.N else 1
        for count in range(first, max(k, now.M) + 2 if size == now.N else now.M + 1):
            cost = price(size, count)
            if cost <= 0 and amount is None:
                raise MergelawError(
                    f"costs: N = {size:.4g}, k = {count} costs nothing, so no gain per cost can be "
                    "compared: give --budget, or what merging and evaluation cost"
                )
            gain = now.loss(k) - float(now.fitted.predict(N=size, k=count))
            rows.append(
                {
                    "step": "more experts" if size == now.N else "larger base",
                    "N": size,
                    "k": count,
                    "cost": cost,
                    "gain": gain,
                    "gain per cost": gain / cost if cost > 0 else None,
                }
            )
    affordable = [row for row in rows if amount is None or row["cost"] <= amount]
    if not affordable:
        cheapest = min(rows, key=lambda row: row["cost"])
        raise MergelawError(
            f"a budget of {amount:g} {costs.unit} buys no step: the cheapest is "
            f"{cheapest['step']}, N = {cheapest['N']:.4g}, k = {cheapest['k']}, for "
            f"{cheapest['cost']:.4g}"
        )
    by = "gain per cost" if amount is None else "gain"
    best = [
        max((row for row in affordable if row["step"] == step), key=lambda row: row[by])
        for step in dict.fromkeys(row["step"] for row in affordable)
    ]
    best.sort(key=lambda row: -row[by])
    chosen = best[0]
    value, ends = now.difference(k, float(chosen["k"]), float(chosen["N"]))
    what = f"{chosen['step']}, k = {chosen['k']} at N = {chosen['N']:.4g}"
    answer = (
        f"{what}: gains {value:.3g} nats{_told(ends, level)} over k = {k} at {now.name} for "
        f"{chosen['cost']:.4g} {costs.unit}"
    )
    told = "the rest cannot be bought"
    if len(best) > 1:
        other = best[1]
        there = Curve(points, float(chosen["N"]), level, joint=True)
        ahead, reach = there.difference(float(chosen["k"]), float(other["k"]), float(other["N"]))
        told = (
            f"the best {other['step']}, k = {other['k']} at N = {other['N']:.4g}, gains "
            f"{other['gain']:.3g} for {other['cost']:.4g}"
        )
        if amount is not None and reach is not None and reach[1] >= 0:
            answer += "; the two ways cannot be told apart"
        elif amount is not None:
            told += f": {-ahead:.3g} nats less"
    elif amount is not None:
        other_step = "larger base" if chosen["step"] == "more experts" else "more experts"
        least = min(row["cost"] for row in rows if row["step"] == other_step)
        told = f"no {other_step} is to be had for less than {least:.4g} {costs.unit}"
    measure_of = "per unit of cost" if amount is None else f"for {amount:g} {costs.unit}"
    if float(chosen["gain"]) <= 0:
        answer = f"neither: no step for this budget lowers the expected loss of {now.name}, k = {k}"
    return Answer(
        "budget",
        answer,
        value,
        *_pair(ends),
        level,
        f"compared {measure_of}: {told}",
        "experts on a larger base gain as the joint law says (one training recipe over all sizes); "
        + now.assumption(k),
        (*warnings, *_no_interval(ends), *now.warnings),
        tuple(best),
    )


def rule(
    points: pd.DataFrame,
    N: float | None = None,
    k: int | None = None,
    level: float = LEVEL,
) -> Answer:
    """Which merge method has the lowest expected loss, at a size and k or over all of them.

    Args:
        points: of one family and domain, at least two methods.
        N, k: where; None is every measured size, every k of the pool.
        level: of the intervals.

    Raises:
        MergelawError: fewer than two methods can be fitted; or as ``loss``.
    """
    warnings: list[str] = []
    if N is not None or k is not None:
        N_checked, warnings = _asked(1.0 if N is None else N, k or 1, level)
        N = None if N is None else N_checked
    methods = sorted(points["method"].unique())
    sizes = sorted(points["N"].unique()) if N is None else [N]
    curves: dict[tuple[str, float], Curve] = {}
    for method in methods:
        for size in sizes:
            bases = bases_of(points[points["method"] == method], size)
            if bases:
                _the_one(bases, size)
            with suppress(MergelawError):
                curves[method, size] = Curve(points[points["method"] == method], size, level)
    fitted = [method for method in methods if any((method, size) in curves for size in sizes)]
    if len(fitted) < 2:
        raise MergelawError(
            f"rule: needs the curves of two methods or more, there are {len(fitted)}: measure "
            "another method at the same sizes and k"
        )
    rows = []
    for size in sizes:
        there = {method: curves[method, size] for method in fitted if (method, size) in curves}
        if len(there) < 2:
            continue
        M = max(curve.M for curve in there.values())
        for count in range(1, M + 1) if k is None else (k,):
            rows.append(_compared(there, count))
    if not rows:
        raise MergelawError(
            "rule: no size has the curves of two methods: measure another method at the same "
            "sizes and k"
        )
    clear = [row for row in rows if row["clear"]]
    first = rows[0]
    reach: tuple[float, float] | None = None
    if len(rows) == 1:
        reach = first["low"], first["high"]
        answer = f"{first['size']}, k = {first['k']}: {first['best']}"
        if first["clear"]:
            answer += f", ahead of {first['second']} by {first['ahead']:.2g} nats"
        else:
            answer += f", not to be told apart from {first['second']} ({first['ahead']:.2g} nats)"
        answer += _told(None if math.isnan(reach[0]) else reach, level)
    else:
        wins = pd.Series([row["best"] for row in rows]).value_counts()
        answer = "; ".join(
            f"{name} is best at {n} of {len(rows)} (N, k)" for name, n in wins.items()
        )
        answer += f"; {len(clear)} of these are clear at {100 * level:g}%"
    chosen = next(iter(curves.values()))
    return Answer(
        "rule",
        answer,
        first["ahead"] if len(rows) == 1 else None,
        *_pair(None if reach is None or math.isnan(reach[0]) else reach),
        level,
        "each method's own law at that size; intervals of the lead add both laws' in quadrature, "
        "which is cautious, for the methods share subsets and documents",
        "each rule at the setting that was measured (scale, density, drop rate): another setting "
        "is another rule",
        (*warnings, *(beyond(sorted(points["N"].unique()), chosen.N))),
        tuple(rows),
    )


def _compared(curves: dict[str, Curve], k: int) -> dict[str, Any]:
    losses = sorted((curve.loss(k), method) for method, curve in curves.items())
    (least, best), (next_least, second) = losses[:2]
    ends = curves[best].interval(k), curves[second].interval(k)
    ahead, low, high = next_least - least, math.nan, math.nan
    if ends[0] is not None and ends[1] is not None:
        low = ahead - math.hypot(ends[0][1] - least, next_least - ends[1][0])
        high = ahead + math.hypot(least - ends[0][0], ends[1][1] - next_least)
    return {
        "size": curves[best].name,
        "k": k,
        "best": best,
        "loss": least,
        "second": second,
        "ahead": ahead,
        "low": low,
        "high": high,
        "clear": bool(low > 0),
    }


@dataclass(frozen=True)
class _Purchase:
    """Something to measure: a sentence, the points it adds, and what it costs."""

    what: str
    points: pd.DataFrame = field(repr=False)
    cost: float


def measure(
    points: pd.DataFrame,
    N: float,
    k: float,
    costs: Costs | None = None,
    *,
    share: float = 0.5,
    level: float = LEVEL,
) -> Answer:
    """Which measurements to buy next to bring a forecast's interval down to a share of itself.

    Every candidate (a level of k that a base lacks, a size with its experts, more circles where
    points have standard errors) is added to the points at its expected loss and the law is fitted
    again, with the noise that was found; the one that narrows the interval of E[L|N,k] most, per
    cost if costs are given, is bought, until the share is reached.

    Args:
        points, N, k, level: as of ``loss``.
        costs: what things cost.
        share: of the present width, between 0 and 1.

    Raises:
        MergelawError: there is no interval yet; or as ``loss``.
    """
    N, warnings = _asked(N, k, level)
    if not 0 < share < 1:
        raise MergelawError(f"share {share:g}: give a number between 0 and 1")
    curve = Curve(points, N, level)
    sigma = curve.fitted.misfit
    if curve.fitted.freedom == 0 or math.isnan(sigma):
        raise MergelawError(
            f"{curve.name}: there is no interval to narrow, for as many parameters as points "
            "cannot show their error: measure one more level of k, or give standard errors"
        )
    # Without any misfit of its own, the noise is the points' standard errors.
    least = 1e-9 * float(curve.table["ce"].mean())
    table = curve.table
    start = _width(curve, table, max(sigma, least), k)
    width, rows = start, []
    bought: list[_Purchase] = []
    candidates = list(_candidates(curve, points, costs))
    while candidates and width > share * start and len(bought) < PURCHASES:
        tried = []
        for place, candidate in enumerate(candidates):
            with suppress(MergelawError):
                more = _with(table, candidate.points)
                narrowed = _width(curve, more, max(sigma, least), k)
                saved, cost = width - narrowed, candidate.cost if costs else 1.0
                worth = saved / cost if cost > 0 else math.copysign(math.inf, saved)
                tried.append(((worth, saved, -place), narrowed, more))
        if not tried or max(tried, key=lambda t: t[0])[1] >= width * (1 - 1e-3):
            break
        (_, _, place), width, table = max(tried, key=lambda t: t[0])
        candidate = candidates.pop(-place)
        bought.append(candidate)
        row = {"buy": candidate.what, "interval after": width, "share": width / start}
        rows.append(row | ({"cost": candidate.cost} if costs else {}))
    reached = width <= share * start
    listed = "; ".join(purchase.what for purchase in bought)
    half = f"{start / 2:.2g}"
    if not bought:
        answer = (
            f"{curve.name}, k = {k:g}: nothing to buy narrows the interval of +-{half} nats; "
            + _stuck(curve)
        )
    elif reached:
        answer = (
            f"{curve.name}, k = {k:g}: measure {listed}: +-{half} becomes +-{width / 2:.2g} nats"
        )
    else:
        answer = (
            f"{curve.name}, k = {k:g}: {100 * share:g}% is not reached; the best to measure is "
            f"{listed}: +-{half} becomes +-{width / 2:.2g} nats"
        )
    if costs and bought:
        answer += f", for {sum(p.cost for p in bought):.4g} {costs.unit}"
    ends = curve.interval(k)
    return Answer(
        "measure",
        answer,
        width / start,
        None,
        None,
        level,
        f"the law was fitted again with each of {len(candidates) + len(bought)} candidates at its "
        f"expected loss, with a misfit of {sigma:.2g} nats; the interval is that of the mean",
        "the law is right and its misfit stays what it is: what is measured then may also show "
        "that it is not",
        (*warnings, *_beyond_pool(curve, k), *_no_interval(ends), *curve.warnings),
        tuple(rows),
    )


def _candidates(curve: Curve, points: pd.DataFrame, costs: Costs | None) -> Iterator[_Purchase]:
    """What could be measured next. Points without a loss take the one that the law expects."""
    joint = curve.law is MERGING

    def price(N: float, merges: float, experts: int = 0) -> float:
        if costs is None:
            return 0.0
        one = costs.at(N, "merging") + costs.at(N, "evaluation")
        return experts * costs.at(N, "training") + merges * one

    levels = sorted(curve.table["k"].unique())
    for base, own in curve.table.groupby("base"):
        N, M = float(own["N"].iloc[0]), int(own["M"].iloc[0])
        for k in range(1, M + 1):
            if k not in set(own["k"]):
                yield _Purchase(
                    f"k = {k} at {base}",
                    _new(curve, own, N, [k]),
                    price(N, min(M, math.comb(M, k))),
                )
        if "se" in own and (own["se"] > 0).any():
            circles = int(own["replicates"].max()) if "replicates" in own else 1
            merges = M * int((own["se"] > 0).sum()) * circles
            better = own.assign(se=own["se"] / math.sqrt(2))
            yield _Purchase(f"as many circles again at {base}", better, price(N, merges))
    if not joint:
        return
    sizes = sorted(points["N"].unique())
    between = [math.sqrt(a * b) for a, b in pairwise(sizes) if b > 1.5 * a]
    new = {*between, 2 * sizes[-1], 4 * sizes[-1]} | (set() if curve.measured else {curve.N})
    for N in sorted(new):
        yield _Purchase(
            f"a base of N = {N:.3g} with its {curve.M} experts, at k = "
            + ", ".join(f"{k:g}" for k in levels),
            _new(curve, curve.table, N, levels),
            price(N, sum(min(curve.M, math.comb(curve.M, int(k))) for k in levels), curve.M),
        )


def _new(curve: Curve, like: pd.DataFrame, N: float, ks: Sequence[float]) -> pd.DataFrame:
    sizes = {"N": np.full(len(ks), N)} if curve.law is MERGING else {}
    added = pd.DataFrame(
        {"N": N, "k": ks, "M": curve.M, "ce": curve.fitted.predict(k=np.array(ks), **sizes)}
    )
    base = str(like["base"].iloc[0]) if len(like["N"].unique()) == 1 else f"N={N:.6g}"
    if "se" in like:
        added["se"] = float(like["se"].median())
    return added.assign(base=base)


def _with(table: pd.DataFrame, added: pd.DataFrame) -> pd.DataFrame:
    """Points with others added; those of the same base and k take their place."""
    both = pd.concat([table, added], ignore_index=True)
    return both.drop_duplicates(["base", "k"], keep="last")


def _width(curve: Curve, table: pd.DataFrame, sigma: float, k: float) -> float:
    """Width of the interval of the expected loss if these were the points."""
    at: dict[str, Any] = {"N": curve.N} if curve.law is MERGING else {}
    ends = fit(curve.law, table, misfit=sigma).predict_interval(level=curve.level, k=k, **at)
    assert ends is not None
    # The noise was estimated from residuals, of which there are more now.
    share = (1 + curve.level) / 2
    freedom = curve.fitted.freedom + len(table) - len(curve.table)
    widened = 1.0 if math.isinf(freedom) else float(stdtrit(freedom, share) / ndtri(share))
    return float(ends[1] - ends[0]) * widened


def _stuck(curve: Curve) -> str:
    if curve.law is MERGING:
        return "what is left is what the law misses"
    return (
        f"all k of this pool of {curve.M} are measured, and what is left is what the law misses of "
        "them"
    )


# ---- what the questions share


def _asked(N: float, k: float, level: float) -> tuple[float, list[str]]:
    if not 0 < level < 1:
        raise MergelawError(f"level {level:g} is no probability: give one between 0 and 1")
    if not (k >= 1):
        raise MergelawError(f"k = {k:g}: give a number of experts of 1 or more")
    return billions(N)


def _first(holds: Callable[[int], bool]) -> int | None:
    """The least whole number from 1 on where something holds that goes on holding; None: never."""
    low, high = 0, 1
    while not holds(high):
        low, high = high, high * 2
        if high > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _end(curve: Curve, k: float, side: int) -> float:
    ends = curve.interval(k)
    assert ends is not None
    return ends[side]


def _gain_end(curve: Curve, k: float, side: int) -> float:
    ends = curve.difference(k, k + 1)[1]
    assert ends is not None
    return ends[side]


def _share(curve: Curve, k: float, last: float) -> float:
    """Share of the fall from k = 1 to the last that k experts bring."""
    whole = curve.loss(1) - curve.loss(last)
    return (curve.loss(1) - curve.loss(k)) / whole if whole > 0 else math.nan


def _beyond_pool(curve: Curve, k: float) -> list[str]:
    if k <= curve.M:
        return []
    return [f"k = {k:g} is not reachable with this pool of {curve.M}: it takes more experts"]


def _no_interval(ends: tuple[float, float] | None) -> list[str]:
    return [] if ends is not None else ["no interval: too few points to show their error"]


def _parameters(curve: Curve) -> str:
    return ", ".join(f"{name} = {value:.4g}" for name, value in curve.fitted.parameters.items())


def _told(ends: tuple[float, float] | None, level: float) -> str:
    return "" if ends is None else f" ({100 * level:g}%: {ends[0]:.5g} to {ends[1]:.5g})"


def _counts(low: int | None, high: int | None) -> str:
    if high is None:
        return f"{low or 'more than any'} or more, perhaps never"
    return f"{low} to {high}" if low != high else f"{low}"


def _pair(ends: tuple[float, float] | None) -> tuple[float | None, float | None]:
    return (None, None) if ends is None else ends


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _aligned(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows as columns of text."""

    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return "" if math.isnan(value) else f"{value:.4g}"
        return str(value)

    table = [[*rows[0]], *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def to_json(answer: Any) -> str:
    """An answer or a forecast as one line of strict JSON."""
    return json.dumps(answer.to_dict(), allow_nan=False, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    return value.item()  # numpy's numbers
