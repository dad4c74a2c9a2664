"""Forecasts of expected losses from few points, with intervals, scored where they can be.

Recipes along k, for one base:

- ``three-point``: the merging law through k = 1, 2 and 4 (Wang et al., arXiv:2509.24244).
- ``end-point``: L_1 and L_M alone. All subsets of a finite pool and a loss that is quadratic along
  equal-weight means give exactly L_M + (L_1 - L_M)(M/k - 1)/(M - 1), which is the law
  L_inf + A / k through the two ends.

And along N: the joint law of the sizes that are measured, at one that is not.

Two or three points cannot show by how much a recipe misses. Its intervals come from its record: it
is tried on the other bases of the study whose curves are measured, and its errors there, as shares
of the gain that it was fitted to, are what to expect here (t with as many degrees of freedom as
bases). Without at least two such bases they are profile-likelihood intervals with the points'
standard errors and a misfit that the user gives.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from mergelaw.errors import MergelawError
from mergelaw.laws.covariance import Part
from mergelaw.laws.fit import Fit, fit
from mergelaw.laws.law import INVERSE_FIXED_N, MERGING, MERGING_FIXED_N, Law
from mergelaw.laws.points import MACRO, TOO_MANY_BILLIONS, read_points
from mergelaw.laws.result import LEVEL

Array = NDArray[np.float64]

THREE_POINT, END_POINT, SIZE = "three-point", "end-point", "size"
RECIPES = (THREE_POINT, END_POINT, SIZE)
THREE_POINTS = (1, 2, 4)
# A record needs so many other bases.
BASES = 2
# A size further beyond the ladder than this share of the ladder's own length (in log N) is far.
FAR = 0.5


@dataclass(frozen=True)
class Forecast:
    """A forecast of one method's and domain's losses at a base, beside what was measured.

    Attributes:
        recipe, method, family, domain, base, N: what was forecast and how; the base's name is empty
            where the size is not one of the study's.
        used: the k that it was fitted to; for ``size`` the sizes N.
        level: of the intervals.
        table: one row per forecast k: k, ce, low, high (nats per token; NaN without an interval),
            measured (NaN if it was not), same (the naive "same as the last point"), held.
        basis: a sentence on what the intervals rest on.
        assumption: the assumption that matters most.
        warnings: sentences on what not to believe.
    """

    recipe: str
    method: str
    family: str
    domain: str
    base: str
    N: float
    used: tuple[float, ...]
    level: float
    table: pd.DataFrame
    basis: str
    assumption: str
    warnings: tuple[str, ...]

    @property
    def score(self) -> dict[str, float] | None:
        """Against what was measured: rms error and that of the naive forecast, intervals held."""
        known = self.table.dropna(subset="measured")
        if known.empty:
            return None
        with_interval = known.dropna(subset="low")
        return {
            "points": len(known),
            "error": _rms(known["ce"] - known["measured"]),
            "same": _rms(known["same"] - known["measured"]),
            "intervals": len(with_interval),
            "held": int(with_interval["held"].sum()),
        }

    def to_dict(self) -> dict[str, Any]:
        """The forecast as values that strict JSON can hold."""
        places = ("recipe", "method", "family", "domain", "base", "N", "level", "basis")
        finite = self.table.replace([math.inf, -math.inf], math.nan)
        rows = finite.astype(object).where(finite.notna(), None).to_dict("records")
        score = self.score or {}
        return {
            **{name: getattr(self, name) for name in places},
            "used": list(self.used),
            "assumption": self.assumption,
            "warnings": list(self.warnings),
            "forecast": rows,
            "score": {n: v if math.isfinite(v) else None for n, v in score.items()} or None,
        }

    def summary(self) -> str:
        """The forecast for a terminal."""
        size = f"N = {self.N:.4g}"
        where = ", ".join(filter(None, (self.method, self.domain, self.base)))
        what = "N" if self.recipe == SIZE else "k"
        used = ", ".join(f"{value:.4g}" for value in self.used)
        lines = [f"{self.recipe} forecast, {where} ({size}): from {what} = {used}"]
        percent = f"{100 * self.level:g}%"
        scored = self.table["measured"].notna().any()
        head = f"  {'k':>4}  {'forecast':>9}  {percent + ' interval':<21}"
        lines.append(head + ("  measured    error  naive error" if scored else ""))
        for row in self.table.to_dict("records"):
            low, high, found = row["low"], row["high"], row["measured"]
            ends = "none" if math.isnan(low) else f"{low:.5f} to {high:.5f}"
            line = f"  {row['k']:>4g}  {row['ce']:>9.5f}  {ends:<21}"
            if scored and not math.isnan(found):
                line += (
                    f"  {found:>8.5f}  {row['ce'] - found:>+7.5f}  {row['same'] - found:>+11.5f}"
                )
                line += "" if row["held"] or math.isnan(low) else "  outside"
            lines.append(line.rstrip())
        if self.score:
            told = f"  missed by {self.score['error']:.2g} nats (rms)"
            if not math.isnan(self.score["same"]):
                told += f', "same as the last point" by {self.score["same"]:.2g}'
            if self.score["intervals"]:
                told += f"; {self.score['held']} of {self.score['intervals']} intervals held"
            lines.append(told)
        lines += [f"  intervals: {self.basis}", f"  assumes most of all: {self.assumption}"]
        return "\n".join([*lines, *(f"  ! {warning}" for warning in self.warnings)])


# ---- points


def read(source: Path) -> tuple[pd.DataFrame, list[str]]:
    """Points of a folder that ``mergelaw fit`` wrote (or a file in it), or of a table of one's own.

    Returns:
        The points, as ``points.points`` gives them with M and perhaps se; and sentences on what was
        assumed.

    Raises:
        MergelawError: there are no points there.
    """
    folder = source if source.is_dir() else source.parent
    inside = source.is_dir() or source.name in ("laws.json", "points.parquet")
    if not inside:
        table, told = read_points(source)
        return _of_design(table), list(told)
    file = folder / "points.parquet"
    if not file.is_file():
        raise MergelawError(
            f"{source}: holds no points.parquet: give a folder that `mergelaw fit` wrote, or a "
            "table of points"
        )
    try:
        table = pd.read_parquet(file)
    except (ValueError, OSError) as error:
        raise MergelawError(f"{file}: cannot be read as a table: {error}") from None
    absent = [name for name in ("method", "family", "base", "N", "k", "domain", "ce", "M")]
    absent = [name for name in absent if name not in table]
    if absent:
        raise MergelawError(
            f"{file}: lacks the column {', '.join(absent)}: written by another version, fit again"
        )
    if "se" in table:  # where nothing was known of it
        table["se"] = table["se"].fillna(0.0)
    return _of_design(table), []


def _of_design(table: pd.DataFrame) -> pd.DataFrame:
    """Points that `mergelaw fit` wrote, with the errors of sampling alone.

    Forecasts and plans speak of these evaluation documents.
    """
    if "design" in table:
        table["_place"] = table.groupby(["method", "family", "domain"]).cumcount()
        at = table[["design", "_place"]].itertuples(index=False, name=None)
        table["se"] = [math.sqrt(max(row[place], 0.0)) for row, place in at]
    return table


def choose(
    points: pd.DataFrame,
    *,
    method: str | None = None,
    domain: str | None = None,
    family: str | None = None,
    every: Sequence[str] = (),
) -> pd.DataFrame:
    """The points of one method, family and domain: those named, or the only ones there are.

    Of several domains the macro-average is meant unless one is named. Columns in ``every`` are
    left as they are.

    Raises:
        MergelawError: there is none of that name, or there are several and none is named.
    """
    for name, wanted in (("family", family), ("domain", domain), ("method", method)):
        if name in every:
            continue
        found = sorted(points[name].unique())
        if wanted is None and name == "domain" and MACRO in found:
            wanted = MACRO
        if wanted is None and len(found) > 1:
            raise MergelawError(
                f"there are points of several values of {name}: name one with --{name}: "
                + ", ".join(found)
            )
        if wanted is not None:
            if wanted not in found:
                raise MergelawError(
                    f"no points of {name} {wanted}: there are {', '.join(found) or 'none'}"
                )
            points = points[points[name] == wanted]
    return points.sort_values(["N", "base", "k"], ignore_index=True)


def billions(N: float) -> tuple[float, list[str]]:
    """N in billions, and what was assumed: a count of parameters is taken for one."""
    if not (math.isfinite(N) and N > 0):
        raise MergelawError(f"N = {N:g}: give the size of a base in billions of parameters")
    if N < TOO_MANY_BILLIONS:
        return N, []
    return N / 1e9, [f"N = {N:g} was taken to count parameters: {N / 1e9:g} billions"]


def base_of(points: pd.DataFrame, base: str) -> pd.DataFrame:
    """The points of a base, by its name."""
    own = points[points["base"] == base]
    if own.empty:
        raise MergelawError(
            f"no points of base {base}: there are {', '.join(points['base'].unique())}"
        )
    return own.sort_values("k", ignore_index=True)


# ---- along k


def along_k(
    points: pd.DataFrame,
    base: str,
    recipe: str = THREE_POINT,
    *,
    k: Sequence[float] | None = None,
    sigma: float | None = None,
    level: float = LEVEL,
) -> Forecast:
    """Forecast a base's losses at other k from the few that the recipe uses.

    Args:
        points: of one method, family and domain, all bases (``choose``).
        base: the base's name.
        recipe: ``three-point`` or ``end-point``.
        k: numbers of experts; None is all in 1..M that the recipe does not use.
        sigma: standard deviation (nats per token) of what the law misses at a point; then it, and
            not the recipe's record at other bases, makes the intervals.
        level: of the intervals.

    Raises:
        MergelawError: unknown recipe, or the points it needs are not there.
    """
    if recipe not in (THREE_POINT, END_POINT):
        raise MergelawError(f"no recipe {recipe} along k: use {THREE_POINT} or {END_POINT}")
    _check(level, sigma)
    own = base_of(points, base)
    M = int(own["M"].iloc[0])
    law, used = _recipe(recipe, M)
    missing = [size for size in used if size not in set(own["k"])]
    if missing:
        raise MergelawError(
            f"{recipe} forecast of {base}: k = {missing[0]} is not measured: it needs k = "
            + ", ".join(map(str, used))
        )
    asked = [size for size in range(1, M + 1) if size not in used] if k is None else list(k)
    if not asked:
        raise MergelawError(
            f"{recipe} forecast of {base}: it uses every k of a pool of {M}: give other k"
        )
    if any(not math.isfinite(size) or size < 1 for size in asked):
        raise MergelawError(f"k = {', '.join(f'{s:g}' for s in asked)}: give numbers of 1 or more")
    sizes = np.array(sorted(asked), dtype=float)
    warnings = sampled(own[own["k"].isin(used)])
    if sizes[-1] > M:
        warnings.append(
            f"k = {sizes[-1]:g} is beyond this pool of {M} experts: it takes experts like these "
            "that are not there yet"
        )
    fitted = _through(own, law, used, sigma)
    centre = fitted.predict(k=sizes)
    record = None if sigma is not None else _record(points, base, recipe, sizes)
    if record is not None:
        shares, bases = record
        reach = stdtrit(len(bases), (1 + level) / 2) * shares * abs(_gain(own, used))
        low, high = centre - reach, centre + reach
        basis = f"from the recipe's errors at {', '.join(bases)}, as shares of the gain"
        if np.isnan(shares).any():
            unknown = sizes[np.isnan(shares)].min()
            warnings.append(
                f"no interval from k = {unknown:g} on: no other base was measured there"
            )
        assumption = "this base's curve departs from the recipe's as the other bases' do"
    else:
        low, high = ends_of(fitted, level, k=sizes)
        basis, assumption = _basis_of(fitted, law, sigma)
    measured = own.set_index("k")["ce"]
    last = float(measured[max(used)])
    table = _table(sizes, centre, low, high, measured, np.full(len(sizes), last))
    return Forecast(
        recipe, *_place(own), base, float(own["N"].iloc[0]), tuple(map(float, used)), level, table,
        basis, assumption, (*warnings, *(_of_points(fitted) if record is None else ())),
    )  # fmt: skip


def _recipe(recipe: str, M: int) -> tuple[Law, tuple[int, ...]]:
    if recipe == THREE_POINT:
        return MERGING_FIXED_N, THREE_POINTS
    if M < 2:
        raise MergelawError("end-point forecast: a pool of one expert has one point only")
    return INVERSE_FIXED_N, (1, M)


def _through(own: pd.DataFrame, law: Law, used: Sequence[int], sigma: float | None) -> Fit:
    return fit_points(law, own[own["k"].isin(used)], misfit=sigma)


def _gain(own: pd.DataFrame, used: Sequence[int]) -> float:
    """What the loss falls by over the points that a recipe uses."""
    losses = own.set_index("k")["ce"]
    return float(losses[min(used)] - losses[max(used)])


def _record(
    points: pd.DataFrame, base: str, recipe: str, sizes: Array
) -> tuple[Array, list[str]] | None:
    """Rms error of the recipe at other bases as a share of their gain, at each size.

    Between k that a base measured it is interpolated, beyond them it is NaN.
    """
    found: dict[str, Array] = {}
    for name in points["base"].unique():
        other = base_of(points, name)
        try:
            law, used = _recipe(recipe, int(other["M"].iloc[0]))
        except MergelawError:  # a pool that is too small for it
            continue
        if name == base or not set(used) < set(other["k"]):
            continue
        gain = _gain(other, used)
        if gain == 0:
            continue
        missed = other["ce"] - _through(other, law, used, None).predict(k=other["k"])
        shares = np.where(other["k"].isin(used), 0.0, missed / gain)
        found[name] = np.interp(sizes, other["k"], shares, left=math.nan, right=math.nan)
    if len(found) < BASES:
        return None
    return np.sqrt(np.mean(np.array(list(found.values())) ** 2, axis=0)), list(found)


# ---- along N


def along_N(
    points: pd.DataFrame,
    N: float | None = None,
    *,
    base: str | None = None,
    k: Sequence[float] | None = None,
    level: float = LEVEL,
) -> Forecast:
    """Forecast the losses of a size by the joint law of the sizes below it, or of all.

    Args:
        points: of one method, family and domain, all bases (``choose``).
        N: an unmeasured size (billions): the law of all bases at it. Or
        base: a measured one: the law of the smaller bases, scored against what was measured.
        k: numbers of experts; None is all in 1..M.
        level: of the intervals.

    Raises:
        MergelawError: both or neither of N and base; or the law cannot be fitted.
    """
    _check(level, None)
    if (N is None) == (base is None):
        raise MergelawError("forecast of a size: give either --N, or --base to score it at")
    warnings: list[str] = []
    measured = pd.Series(dtype=float)
    rest = points
    if base is not None:
        own = base_of(points, base)
        N = float(own["N"].iloc[0])
        measured, rest = own.set_index("k")["ce"], points[points["N"] < N]
        if rest.empty:
            raise MergelawError(
                f"size forecast of {base}: no smaller base is measured to forecast it from"
            )
    else:
        assert N is not None
        N, warnings = billions(N)
    fitted = fit_points(MERGING, rest)
    M = int(points["M"].max())
    sizes = np.array(sorted(range(1, M + 1) if k is None else k), dtype=float)
    if not len(sizes) or not (np.isfinite(sizes) & (sizes >= 1)).all():
        raise MergelawError("k: give numbers of experts of 1 or more")
    if sizes[-1] > M:
        warnings.append(f"k = {sizes[-1]:g} is beyond this pool of {M} experts")
    low, high = ends_of(fitted, level, N=np.full(len(sizes), N), k=sizes)
    centre = fitted.predict(N=np.full(len(sizes), N), k=sizes)
    nearest = rest[rest["N"] == rest["N"].max()].groupby("k")["ce"].mean()
    same = np.array([nearest.get(size, math.nan) for size in sizes])
    ladder = sorted(rest["N"].unique())
    warnings += [*beyond(ladder, N), *sampled(rest)]
    table = _table(sizes, centre, low, high, measured, same)
    basis, _ = _basis_of(fitted, MERGING, None)
    return Forecast(
        SIZE, *_place(points), base or "", N, tuple(ladder), level, table, basis,
        "the floor and the tail go on as powers of N beyond the measured sizes",
        (*warnings, *_of_points(fitted)),
    )  # fmt: skip


def beyond(ladder: Sequence[float], N: float) -> list[str]:
    """A warning where a size lies outside of the measured ladder, the louder the farther."""
    least, most = min(ladder), max(ladder)
    if least <= N <= most:
        return []
    above = most < N
    factor, side = (N / most, "above") if above else (least / N, "below")
    told = f"N = {N:.4g} is {factor:.3g} times {side} the measured sizes, {least:.4g} to {most:.4g}"
    length = math.log(most / least)
    if math.log(factor) <= FAR * length:
        return [f"{told}: extrapolated"]
    return [f"{told}: far beyond the ladder, measure a size in between before you rely on it"]


# ---- what both share


def fit_points(law: Law, points: pd.DataFrame, misfit: float | None = None) -> Fit:
    """A law on points of a method, family and domain, weighed by their sampling errors."""
    if "design" not in points:
        return fit(law, points, misfit=misfit)
    place = points["_place"].to_numpy()
    design = np.vstack(points["design"].to_list())[:, place]
    parts = []
    for base in points["base"].unique():
        # The design's errors of different bases are independent, each known so well.
        own = (points["base"] == base).to_numpy()
        freedom = float(points["freedom"][own].iloc[0])
        parts.append(Part(design * np.outer(own, own), freedom if freedom > 0 else math.inf))
    return fit(law, points, covariance=parts, misfit=misfit)


def sampled(points: pd.DataFrame) -> list[str]:
    """A warning where points are means over some subsets and nobody knows their errors."""
    if "subsets" not in points:
        return []
    every = [math.comb(int(M), int(k)) for M, k in zip(points["M"], points["k"], strict=True)]
    known = points["se"] > 0 if "se" in points else False
    some = points[(points["subsets"] < every) & ~np.asarray(known)]
    if some.empty:
        return []
    return [
        f"points at {len(some['k'].unique())} levels of k are means over some subsets, without "
        "standard errors: what sampling adds, to b most of all, is not in the intervals; measure "
        "three circles or more"
    ]


def ends_of(fitted: Fit, level: float, **at: ArrayLike) -> tuple[Array, Array]:
    """Interval of what will be measured: the law's own, and what it misses at a point.

    NaN where the noise is unknown.
    """
    variables: dict[str, Any] = dict(at)
    ends = fitted.predict_interval(level=level, new=True, **variables)
    if ends is None:
        unknown = np.full(fitted.predict(**at).shape, math.nan)
        return unknown, unknown
    return ends


def _basis_of(fitted: Fit, law: Law, sigma: float | None) -> tuple[str, str]:
    assumption = f"the loss falls as {law.equation.split('=')[1].strip()} says"
    if fitted.freedom == 0:
        return (
            "none: so few points cannot show their error; give --sigma, or measure the whole curve "
            "of two other bases",
            assumption,
        )
    if sigma is not None:
        return f"profile likelihood with the given misfit, {sigma:g} nats", assumption
    if math.isinf(fitted.freedom):
        return "profile likelihood with the points' standard errors", assumption
    return (
        f"profile likelihood with a misfit of {fitted.misfit:.2g} nats, from residuals",
        assumption,
    )


def _of_points(fitted: Fit) -> Iterable[str]:
    """A fit's warnings, but for the one on as many points as parameters, which the basis tells."""
    return (told for told in fitted.warnings if told.code != "saturated")


def _table(
    sizes: Array, centre: Array, low: Array, high: Array, measured: pd.Series, same: Array
) -> pd.DataFrame:
    found = np.array([measured.get(size, math.nan) for size in sizes], dtype=float)
    held = (low <= found) & (found <= high)
    return pd.DataFrame(
        {
            "k": sizes,
            "ce": centre,
            "low": low,
            "high": high,
            "measured": found,
            "same": same,
            "held": [
                bool(h) if math.isfinite(f + lo) else None
                for h, f, lo in zip(held, found, low, strict=True)
            ],
        }
    )


def _place(points: pd.DataFrame) -> tuple[str, str, str]:
    first = points.iloc[0]
    return str(first["method"]), str(first["family"]), str(first["domain"])


def _check(level: float, sigma: float | None) -> None:
    if not 0 < level < 1:
        raise MergelawError(f"level {level:g} is no probability: give one between 0 and 1")
    if sigma is not None and not (math.isfinite(sigma) and sigma > 0):
        raise MergelawError(
            f"sigma {sigma:g}: give a standard deviation above 0, in nats per token"
        )


def _rms(errors: pd.Series) -> float:
    return float(np.sqrt(np.mean(errors**2)))
