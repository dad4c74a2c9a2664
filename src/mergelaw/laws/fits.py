"""Fits of a study: every method, base and evaluation domain, and the files that hold them."""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mergelaw.errors import MergelawError
from mergelaw.laws.diagnostics import FAILS
from mergelaw.laws.experts import outlying
from mergelaw.laws.fit import Fit, fit, fit_points, measured_mean, plain
from mergelaw.laws.law import MERGING, MERGING_FIXED_N, VARIANCE, Law
from mergelaw.laws.noise import GROUP, describe, with_macro
from mergelaw.laws.notes import Note
from mergelaw.laws.points import HELD_OUT, MACRO, points
from mergelaw.laws.pooled import pool_domains
from mergelaw.laws.result import DOCUMENTS, EXPERTS, POOL
from mergelaw.laws.summary import interval, study_text

# Distances from the floor (nats per token) for which the needed number of experts is reported.
WITHIN = (0.05, 0.02, 0.01)
# Variances of losses below this share of the loss, squared, are rounding errors.
ROUNDED = 1e-12


@dataclass(frozen=True)
class StudyFit:
    """A fit and its place in a study.

    Attributes:
        base, N: the base and its size (billions) if the law is for one base, else None.
        floors: by base, the pool's size M, the floor (k to infinity) and the loss of all M experts
            merged (nats per token), measured or else fitted, with 90% intervals except at single
            domains; empty if the law fails.
    """

    method: str
    family: str
    domain: str
    base: str | None
    N: float | None
    fit: Fit
    floors: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """The fit with its place, as values that strict JSON can hold."""
        place = ("method", "family", "domain", "base", "N")
        values = {name: getattr(self, name) for name in place}
        return {**values, **self.fit.to_dict(), "floors": list(self.floors)}


@dataclass(frozen=True)
class StudyFits:
    """All fits of a study.

    Attributes:
        variances: fits of the loss's variance over subsets, base by base.
        pooled: per method and family the joint law of all domains with shared parameters.
        refused: fits that cannot be made: method, family, domain, base, law and reason.
        warnings: warnings on the points.
        outlying: experts unlike the others (``experts.outlying``), with macro fits without them.
    """

    points: pd.DataFrame
    fits: tuple[StudyFit, ...]
    variances: tuple[StudyFit, ...]
    pooled: tuple[dict[str, Any], ...]
    refused: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]
    outlying: tuple[dict[str, Any], ...] = ()

    def to_dict(self, missing: Sequence[str] = ()) -> dict[str, Any]:
        """The content of laws.json; ``missing``: shards of the design that could not be read."""
        return {
            "units": {"ce": "nats per token", "N": "billions of non-embedding parameters"},
            "laws": {law.name: law.equation for law in (MERGING, MERGING_FIXED_N)},
            "intervals": {
                "intervals": POOL,
                "documents_intervals": DOCUMENTS,
                "experts_intervals": EXPERTS,
            },
            "fits": [item.to_dict() for item in self.fits],
            "pooled": list(self.pooled),
            "outlying": list(map(plain, self.outlying)),
            "variances": [item.to_dict() for item in self.variances],
            "refused": list(self.refused),
            "warnings": list(map(str, self.warnings)),
            "missing": list(missing),
        }


def fit_study(
    rows: pd.DataFrame,
    documents: Iterable[pd.DataFrame] = (),
    common: Collection[str] | None = None,
) -> StudyFits:
    """Fit laws to the points of evaluation rows, weighted by their errors.

    Where a base has one circle, its merges' pairs of experts give the circle's error. An expert
    that is unlike the others is named, and the laws of the rest are fitted beside.

    Args:
        rows: evaluation rows, as ``points`` takes them, with the column ``experts``.
        documents: the same rows, in any pieces, with the documents' losses (``noise.describe``).
        common: the experts that all bases have. Laws over several sizes are fitted to merges of
            these alone; None: all bases have the same experts.

    Raises:
        MergelawError: the rows lack a column or hold no merge.
    """
    if common is None:
        study = fit_all(*_described(rows, documents))
        unlike = tuple(_outlying(rows, study.fits))
        notes = [Note("outlying_expert", _outlying_text(one)) for one in unlike]
        return replace(study, outlying=unlike, warnings=(*study.warnings, *notes))
    documents = list(documents)
    shared, *pieces = (
        table[[set(common).issuperset(experts) for experts in table["experts"]]]
        for table in (rows, *documents)
    )
    note = Note(
        "common_experts",
        f"the bases have different experts, so laws over all sizes are about the {len(common)} "
        f"that all of them have ({', '.join(common) or 'none'})",
    )
    joint = shared.iloc[:0]
    if (shared["role"] == "merge").any():
        joint = _described(shared, pieces)[0]
    table, warnings = _described(rows, documents)
    return fit_all(table, [*warnings, note], joint)


def _outlying(rows: pd.DataFrame, fits: Sequence[StudyFit]) -> Iterator[dict[str, Any]]:
    """Experts unlike the others, with the macro fits with and without each."""
    merges = with_macro(rows)
    for outlier in outlying(merges[merges["domain"] == MACRO]):
        rest = rows[[outlier["expert"] not in experts for experts in rows["experts"]]]
        try:
            study = fit_all(_described(rest, ())[0].query("domain == @MACRO"))
        except MergelawError:
            continue
        without = {(one.method, one.family, one.base): one.fit for one in study.fits}
        yield outlier | {
            "fits": [
                {
                    "method": one.method,
                    "base": one.base,
                    "law": one.fit.law.name,
                    **{
                        name: {"parameters": fit.parameters, "verdict": fit.verdict}
                        for name, fit in (("with", one.fit), ("without", other))
                    },
                }
                for one in fits
                if one.domain == MACRO and one.base in (outlier["base"], None)
                if (other := without.get((one.method, one.family, one.base))) is not None
            ]
        }


def _outlying_text(outlier: Mapping[str, Any]) -> str:
    verb = "raises" if outlier["effect"] > 0 else "lowers"
    return (
        f"expert {outlier['expert']} is unlike the others on {outlier['base']}: it {verb} the "
        f"macro loss of a merge of k by {abs(outlier['effect']):.3g} / k nats "
        f"(90%: {interval(outlier['interval'], '.3g')}, / k); laws.json has the laws without it"
    )


def _described(
    rows: pd.DataFrame, documents: Iterable[pd.DataFrame]
) -> tuple[pd.DataFrame, list[Note]]:
    """Points with their errors and the size of their base's pool, and warnings."""
    table, warnings = points(rows)
    pools = _pools(rows)
    place = table[["method", "family", "base"]].itertuples(index=False, name=None)
    table = table.assign(M=[pools[key] for key in place])
    table, unknown = describe(table, rows, documents)
    return table, [*warnings, *unknown]


def fit_all(
    table: pd.DataFrame, warnings: Iterable[str] = (), joint: pd.DataFrame | None = None
) -> StudyFits:
    """Fit every method and family, per evaluation domain and macro: jointly, and base by base.

    Args:
        table: points as of ``read_points``; optionally with the columns of ``noise.describe``.
        warnings: warnings on the points, kept with the fits.
        joint: the points of laws over several sizes, if not all of ``table``.
    """
    fits: list[StudyFit] = []
    variances: list[StudyFit] = []
    refused: list[dict[str, Any]] = []

    def attempt(law: Law, group: pd.DataFrame, base: str | None) -> None:
        first = group.iloc[0]
        place = {"method": first["method"], "family": first["family"], "domain": first["domain"]}
        try:
            fitted = _fit_variance(group) if law is VARIANCE else fit_points(law, group)
        except MergelawError as error:
            if law is not VARIANCE:
                refused.append({**place, "base": base, "law": law.name, "reason": str(error)})
            return
        size = None if base is None else float(first["N"])
        floors = () if law is VARIANCE else tuple(_floors(fitted, group))
        results = variances if law is VARIANCE else fits
        results.append(StudyFit(**place, base=base, N=size, fit=fitted, floors=floors))

    groups = dict(iter(table.groupby(GROUP)))
    shared = groups if joint is None else dict(iter(joint.groupby(GROUP)))
    for key, group in groups.items():
        if key in shared:
            attempt(MERGING, shared[key], None)
        for (_, base), one_base in group.groupby(["N", "base"]):
            attempt(MERGING_FIXED_N, one_base, str(base))
            if "variance" in one_base:
                attempt(VARIANCE, one_base, str(base))
    return StudyFits(
        table, tuple(fits), tuple(variances), tuple(_pooled(fits)), tuple(refused), tuple(warnings)
    )


def _pooled(fits: Sequence[StudyFit]) -> Iterator[dict[str, Any]]:
    """Pooled fits of each method and family with more than one domain."""
    groups: dict[tuple[str, str], dict[str, Fit]] = {}
    for item in fits:
        if item.base is None and item.domain not in (MACRO, HELD_OUT):
            groups.setdefault((item.method, item.family), {})[item.domain] = item.fit
    for (method, family), domains in groups.items():
        pooled = pool_domains(domains)
        if pooled is not None:
            yield {"method": method, "family": family, **pooled}


def _fit_variance(group: pd.DataFrame) -> Fit:
    """Fit the variance law to the loss's variances over the subsets of one base."""
    table = group[group["variance"] > (ROUNDED * group["ce"]) ** 2]
    # A variance's error is a share of the variance; equal weights would fit k = 1 only.
    error = table["variance"] * np.sqrt(2 / (table["subsets"] - 1).clip(lower=1))
    columns = {name: table[name] for name in ("k", "M", "variance")}
    return fit(VARIANCE, {**columns, "se": error})


def _floors(fitted: Fit, group: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Floors of each base, and numbers of experts that come close to them."""
    if fitted.verdict["state"] == FAILS:
        return
    # Only the losses that are read first have intervals.
    with_intervals = group["domain"].iloc[0] in (MACRO, HELD_OUT, "")
    bases = group[["base", "N", "M"]].drop_duplicates().sort_values(["N", "base"])
    for name, N, M in bases.itertuples(index=False):
        size = {"N": N} if "N" in fitted.law.levels else {}
        needed = {nats: fitted.k_within(nats, **size) for nats in WITHIN}
        whole = group[(group["base"] == name) & (group["k"] == M)].to_dict("records")
        reachable, reachable_ends = _expected(fitted, M, size)
        if whole:
            reachable, reachable_ends = measured_mean(whole[0], fitted)
        asymptotic, asymptotic_ends = _expected(fitted, math.inf, size)
        yield {
            "base": name,
            "N": float(N),
            "M": int(M),
            "asymptotic": plain(asymptotic),
            "reachable": reachable,
            "measured": bool(whole),
            "asymptotic_interval": plain(asymptotic_ends) if with_intervals else None,
            "reachable_interval": plain(reachable_ends) if with_intervals else None,
            "k_within": [
                {"nats": nats, "k": k, "reachable": k is not None and k <= M}
                for nats, k in needed.items()
            ],
        }


def _expected(
    fitted: Fit, k: float, size: Mapping[str, Any]
) -> tuple[float, tuple[float, float] | None]:
    loss, ends = fitted.expectation(k=k, **size)
    return float(loss), None if ends is None else (float(ends[0]), float(ends[1]))


def _pools(rows: pd.DataFrame) -> dict[tuple[str, str, str], int]:
    """Number of distinct experts in a base's merges, by (method, family, base)."""
    place = ["method", "family", "base"]
    merges = rows[rows["role"] == "merge"].drop_duplicates([*place, "merge"])
    experts = merges[[*place, "experts"]].explode("experts").drop_duplicates()
    return dict(Counter(experts[place].itertuples(index=False, name=None)))


def write(study: StudyFits, output: Path, missing: Sequence[str] = ()) -> dict[str, Any]:
    """Write laws.json, parameters.parquet, points.parquet and summary.txt; return their counts."""
    output.mkdir(parents=True, exist_ok=True)
    laws = study.to_dict(missing)
    text = json.dumps(laws, ensure_ascii=False, allow_nan=False, indent=1)
    (output / "laws.json").write_text(text + "\n", encoding="utf-8")
    parameter_table(laws["fits"]).to_parquet(output / "parameters.parquet", index=False)
    study.points.to_parquet(output / "points.parquet", index=False)
    (output / "summary.txt").write_text(study_text(laws), encoding="utf-8")
    return {
        "points": len(study.points),
        "fits": len(study.fits),
        "refused": len(study.refused),
        "missing": len(missing),
    }


def parameter_table(fits: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per fit of laws.json, with its parameters and the ends of their intervals."""
    place = ["method", "family", "domain", "law", "base", "N"]
    quality = ["r2", "rmse", "misfit", "scatter", "aicc", "n_points"]
    names = [*MERGING.parameters, *MERGING_FIXED_N.parameters[:-1]]
    ends = [(kind, side) for kind in ("", "experts_") for side in ("low", "high")]
    numbers = [*names, *(f"{name}_{kind}{side}" for name in names for kind, side in ends)]
    records = []
    for fitted in fits:
        record = {name: fitted[name] for name in (*place, *quality, "warnings", "doubts")}
        record |= fitted["parameters"]
        for kind in ("", "experts_"):
            for name, (low, high) in fitted[f"{kind}intervals"].items():
                record |= {f"{name}_{kind}low": low, f"{name}_{kind}high": high}
        records.append(record)
    table = pd.DataFrame(records, columns=[*place, *numbers, *quality, "warnings", "doubts"])
    return table.astype(dict.fromkeys(["N", *numbers, *quality[:-1]], float))
