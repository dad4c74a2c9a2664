"""Fits of a study: every method, base and evaluation domain, and the files they are kept in."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mergelaw.errors import MergelawError
from mergelaw.evaluation import read_rows
from mergelaw.laws.covariance import Part
from mergelaw.laws.fit import EXPERTS, POOL, Fit, fit
from mergelaw.laws.law import MERGING, MERGING_FIXED_N, VARIANCE, Law
from mergelaw.laws.noise import GROUP, Tau2, describe, of_one_circle
from mergelaw.laws.points import MACRO, points
from mergelaw.laws.pooled import Pooled, pool_domains
from mergelaw.laws.surrogate import tau2_of

# Distances from the floor (nats per token) for which the number of experts is told.
WITHIN = (0.05, 0.02, 0.01)
# What parameters.parquet says of a fit besides its parameters.
QUALITY = ["r2", "rmse", "misfit", "scatter", "aicc", "n_points", "warnings", "doubts"]


@dataclass(frozen=True)
class StudyFit:
    """A fit and its place in a study.

    Attributes:
        method, family, domain: what was fitted.
        base, N: the base and its size (billions) if the law is for one, else None.
        fit: the fit.
        floors: per base the pool's size M, the asymptotic floor (k to infinity), and the reachable
            one, the fitted loss of the merge of all M experts (nats per token); for the macro loss,
            or where no domain is named, with their 90% intervals.
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
        place = {
            "method": self.method,
            "family": self.family,
            "domain": self.domain,
            "base": self.base,
            "N": self.N,
        }
        return {**place, **self.fit.to_dict(), "floors": list(self.floors)}


@dataclass(frozen=True)
class StudyFits:
    """All fits of a study, the points they rest on, and what could not be fitted, with reasons.

    Attributes:
        fits: of the loss; variances: of its variance over subsets, base by base.
        pooled: per method and family the joint law of all domains with what they share.
    """

    points: pd.DataFrame
    fits: tuple[StudyFit, ...]
    variances: tuple[StudyFit, ...]
    pooled: tuple[Pooled, ...]
    refused: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]


def fit_study(
    rows: pd.DataFrame, documents: Iterable[pd.DataFrame] = (), tau2: Tau2 | None = None
) -> StudyFits:
    """Fit the points of evaluation rows, as ``fit_points`` does, weighed by what cells tell.

    Args:
        rows: evaluation rows, as ``points`` takes them, with the column ``experts``.
        documents, tau2: as ``sampling_error.describe`` takes them.

    Raises:
        MergelawError: the rows lack a column or hold no merge.
    """
    table, warnings = points(rows)
    pools = _pools(rows)
    place = table[["method", "family", "base"]].itertuples(index=False, name=None)
    table, unknown = describe(table.assign(M=[pools[key] for key in place]), rows, documents, tau2)
    return fit_points(table, [*warnings, *unknown])


def fit_points(table: pd.DataFrame, warnings: Iterable[str] = ()) -> StudyFits:
    """Fit every method and family, per evaluation domain and macro: jointly, and base by base.

    Args:
        table: points, with the columns method, family, base, N, k, domain, ce and M, the number of
            experts in the pool; and if wanted ``se`` or what ``sampling_error.describe`` adds.
        warnings: what was found on the way to the points.

    Returns:
        The fits. One that cannot be made is no error; it is among ``refused``.
    """
    fits: list[StudyFit] = []
    variances: list[StudyFit] = []
    refused: list[dict[str, Any]] = []

    def attempt(law: Law, group: pd.DataFrame, base: str | None) -> None:
        first = group.iloc[0]
        place = {"method": first["method"], "family": first["family"], "domain": first["domain"]}
        try:
            fitted = _variance(law, group) if law is VARIANCE else _fit(law, group)
        except MergelawError as reason:
            if law is not VARIANCE:
                refusal = {**place, "base": base, "law": law.name, "reason": str(reason)}
                refused.append(refusal)
            return
        size = None if base is None else float(first["N"])
        floors = () if law is VARIANCE else tuple(_floors(fitted, group))
        found = variances if law is VARIANCE else fits
        found.append(StudyFit(**place, base=base, N=size, fit=fitted, floors=floors))

    for _, group in table.groupby(GROUP):
        group = group.assign(_place=range(len(group)))
        attempt(MERGING, group, None)
        for _, own in group.groupby(["N", "base"]):
            attempt(MERGING_FIXED_N, own, str(own["base"].iloc[0]))
            if "variance" in own:
                attempt(VARIANCE, own, str(own["base"].iloc[0]))
    return StudyFits(
        table, tuple(fits), tuple(variances), tuple(_pooled(fits)), tuple(refused), tuple(warnings)
    )


def _pooled(fits: list[StudyFit]) -> Iterator[Pooled]:
    """What the domains of each method and family share, where there is more than one."""
    joint = [item for item in fits if item.base is None and item.domain != MACRO]
    for method, family in dict.fromkeys((item.method, item.family) for item in joint):
        own = {i.domain: i.fit for i in joint if (i.method, i.family) == (method, family)}
        found = pool_domains(method, family, own)
        if found is not None:
            yield found


def _fit(law: Law, group: pd.DataFrame) -> Fit:
    """A law on the points of a method, family and domain, or of one of its bases."""
    parts = None
    at = group["_place"].to_numpy()
    if "documents" in group:
        documents, design = (
            np.vstack(group[name].to_list())[:, at] for name in ("documents", "design")
        )
        parts = [Part(documents, weigh=False)]
        for _, own in group.groupby("base"):
            # The design's errors of different bases are independent, each known so well.
            place = group.index.get_indexer(own.index)
            matrix = np.zeros_like(design)
            matrix[np.ix_(place, place)] = design[np.ix_(place, place)]
            freedom = float(own["freedom"].iloc[0])
            parts.append(Part(matrix, freedom if freedom > 0 else math.inf))
    without = []
    if "without" in group:
        there = group[group["without"].notna()]
        without = [there.assign(ce=ce) for ce in np.transpose(there["without"].to_list())]
        few = any(there[name].nunique() < levels for name, levels in law.levels.items())
        without = [] if few or len(there) < len(law.parameters) else without
    return fit(law, group, covariance=parts, without=without)


def _variance(law: Law, group: pd.DataFrame) -> Fit:
    """The variance law on how the loss varies over the subsets of one base."""
    # Rounding errors are no variance.
    table = group[group["variance"] > (1e-12 * group["ce"]) ** 2]
    # A variance of n values is known within a share of it, and equal weights would fit k = 1 only.
    error = table["variance"] * np.sqrt(2 / (table["subsets"] - 1).clip(lower=1))
    columns = {name: table[name] for name in ("k", "M", "variance")}
    return fit(law, {**columns, "se": error})


def _floors(fitted: Fit, group: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Per base what could be reached, and with how many experts."""
    # Refits for an interval's ends are spent on what is read first only.
    whole = group["domain"].iloc[0] in (MACRO, "")
    bases = group[["base", "N", "M"]].drop_duplicates().sort_values(["N", "base"])
    for name, N, M in bases.itertuples(index=False):
        yield {
            "base": name,
            "N": float(N),
            "M": int(M),
            "asymptotic": _at(fitted, N, math.inf),
            "reachable": _at(fitted, N, M),
            "asymptotic_interval": _interval_at(fitted, N, math.inf) if whole else None,
            "reachable_interval": _interval_at(fitted, N, M) if whole else None,
            "k_within": [
                {"nats": eps, "k": k, "reachable": k is not None and k <= M}
                for eps in WITHIN
                for k in [fitted.k_within(eps, **({"N": N} if "N" in fitted.law.levels else {}))]
            ],
        }


def _at(fitted: Fit, N: float, k: float) -> float:
    """Fitted loss at a size and a number of experts, whether or not the law has N."""
    values = {"N": N, "k": k}
    return float(fitted.predict(**{name: values[name] for name in fitted.law.levels}))


def _interval_at(fitted: Fit, N: float, k: float) -> list[float] | None:
    """The same with its interval; None where there is none."""
    values: dict[str, Any] = {"N": N, "k": k}
    ends = fitted.predict_interval(**{name: values[name] for name in fitted.law.levels})
    if ends is None or not all(map(math.isfinite, map(float, ends))):
        return None
    return [float(end) for end in ends]


def _pools(rows: pd.DataFrame) -> dict[tuple[str, str, str], int]:
    """Number of different experts in a base's merges, by (method, family, base)."""
    place = ["method", "family", "base"]
    merges = rows[rows["role"] == "merge"].drop_duplicates([*place, "merge"])
    experts = merges[[*place, "experts"]].explode("experts").drop_duplicates()
    return dict(Counter(experts[place].itertuples(index=False, name=None)))


def write_fits(
    rows: pd.DataFrame,
    output: Path,
    missing: list[str],
    documents: Iterable[pd.DataFrame] = (),
    tau2: Tau2 | None = None,
) -> dict[str, Any]:
    """Fit a study and write it, as ``write`` does.

    Args:
        rows, documents, tau2: as ``fit_study`` takes them.
        output: the folder to write into; made if it is not there.
        missing: shards of the plan that could not be read, for people to know.

    Returns:
        Counts of points, fits, refused fits and missing shards.

    Raises:
        MergelawError: as ``fit_study``.
    """
    return write(fit_study(rows, documents, tau2), output, missing)


def write_artifacts(evals: Sequence[Path], output: Path, missing: list[str]) -> dict[str, Any]:
    """Fit the evaluations in folders and write the fits, with all that the cells tell of errors.

    Where a base has one circle, a surrogate that passed its check tells the circle's error.

    Returns and raises as ``write_fits``.
    """
    rows = read_rows(evals)
    documents = (read_rows([path], documents=True) for path in evals)
    return write_fits(rows, output, missing, documents, tau2_of(of_one_circle(rows)))


def write(study: StudyFits, output: Path, missing: list[str]) -> dict[str, Any]:
    """Write fits: laws.json, parameters.parquet, points.parquet and summary.txt.

    Returns:
        Counts of points, fits, refused fits and missing shards.
    """
    output.mkdir(parents=True, exist_ok=True)
    laws = {
        "units": {"ce": "nats per token", "N": "billions of non-embedding parameters"},
        "laws": {law.name: law.equation for law in (MERGING, MERGING_FIXED_N)},
        "intervals": {"intervals": POOL, "experts_intervals": EXPERTS},
        "fits": [fitted.to_dict() for fitted in study.fits],
        "pooled": [pooled.to_dict() for pooled in study.pooled],
        "variances": [fitted.to_dict() for fitted in study.variances],
        "refused": list(study.refused),
        "warnings": list(study.warnings),
        "missing": missing,
    }
    text = json.dumps(laws, ensure_ascii=False, allow_nan=False, indent=1)
    (output / "laws.json").write_text(text + "\n", encoding="utf-8")
    _parameters(study).to_parquet(output / "parameters.parquet", index=False)
    study.points.to_parquet(output / "points.parquet", index=False)
    (output / "summary.txt").write_text(summary(study, missing), encoding="utf-8")
    return {
        "points": len(study.points),
        "fits": len(study.fits),
        "refused": len(study.refused),
        "missing": len(missing),
    }


def _parameters(study: StudyFits) -> pd.DataFrame:
    """One row per fit, a column per parameter of any law."""
    columns = ["method", "family", "domain", "law", "base", "N"]
    names = (*MERGING.parameters, *MERGING_FIXED_N.parameters[:-1])
    records = []
    for fitted in study.fits:
        values = fitted.to_dict()
        records.append(
            {
                **{column: values[column] for column in columns},
                **{name: values["parameters"].get(name) for name in names},
                **{
                    f"{name}_{of}{end}": values[f"{of}intervals"].get(name, (None, None))[side]
                    for name in names
                    for of in ("", "experts_")
                    for side, end in enumerate(("low", "high"))
                },
                **{name: values[name] for name in QUALITY},
            }
        )
    ends = ("low", "high", "experts_low", "experts_high")
    numbers = [*names, *(f"{name}_{end}" for name in names for end in ends)]
    table = pd.DataFrame(records, columns=[*columns, *numbers, *QUALITY])
    return table.astype(dict.fromkeys(["N", *numbers, *QUALITY[:-3]], float))


def summary(study: StudyFits, missing: Sequence[str] = ()) -> str:
    """The study for a terminal: macro first, a paragraph per fit."""
    lines = [
        "Losses in nats per token, N in billions of non-embedding parameters. Intervals are 90% "
        f"profile-likelihood ones, of the mean over subsets of {POOL}; where every subset was "
        f"measured, the jackknife's of {EXPERTS} stand beside.",
        "",
    ]
    for heading, sentences in (("Missing", missing), ("Warnings", study.warnings)):
        if sentences:
            lines += [f"{heading}:", *(f"  {sentence}" for sentence in sentences), ""]
    for pooled in study.pooled:
        place = _place(pooled.method, pooled.family, "domains together")
        lines += [place, f"  {pooled.summary()}", ""]
    for item in sorted(study.fits, key=lambda f: (f.domain != MACRO, f.domain, f.method)):
        lines += [_place(item.method, item.family, item.domain, _where(item)), item.fit.summary()]
        for floor in item.floors:
            lines.append(
                f"  {floor['base']}: floor {floor['asymptotic']:.5g}"
                f"{_told(floor['asymptotic_interval'])}, reachable with these {floor['M']} experts "
                f"{floor['reachable']:.5g}{_told(floor['reachable_interval'])}"
            )
            lines.append(f"    {_within(floor)}")
        lines.append("")
    if study.variances:
        lines += ["Variance over the subsets of this pool", VARIANCE.equation]
        for item in sorted(study.variances, key=lambda f: (f.domain != MACRO, f.domain, f.method)):
            values = "  ".join(f"{n} = {v:.3g}" for n, v in item.fit.parameters.items())
            quality = f"R^2 = {item.fit.r2:.4f}"
            place = _place(item.method, item.family, item.domain, _where(item))
            lines.append(f"  {place}: {values}  {quality}")
        lines.append("")
    if study.refused:
        lines.append("Not fitted:")
        lines += [
            f"  {_place(r['method'], r['family'], r['domain'], r['base'] or 'all sizes')}: "
            f"{r['reason']}"
            for r in study.refused
        ]
    return "\n".join(lines).rstrip() + "\n"


def _where(item: StudyFit) -> str:
    where = item.base or "all sizes"
    if item.base and not item.base.startswith("N="):  # then its name says it
        where += f" (N = {item.N:g})"
    return where


def _within(floor: dict[str, Any]) -> str:
    """How many experts come how near to the floor."""
    told = []
    for step in floor["k_within"]:
        needed = "no number" if step["k"] is None else f"{step['k']}"
        beyond = "" if step["reachable"] else ", not reachable with this pool"
        told.append(f"{step['nats']:g} nats: {needed}{beyond}")
    return f"experts to come within {'; '.join(told)}"


def first_reason(study: StudyFits) -> str:
    """Why nothing could be fitted: the reason for the law that asks for least."""
    return str(study.refused[-1]["reason"])


def _told(ends: list[float] | None) -> str:
    return "" if ends is None else f" ({ends[0]:.5g} to {ends[1]:.5g})"


def _place(*names: str) -> str:
    """Where a fit belongs; a table of one's own need not name everything."""
    return ", ".join(name for name in names if name)
