"""Fits of a study: every method, base and evaluation domain, and the files they are kept in."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mergelaw.errors import MergelawError
from mergelaw.fit import Fit, fit
from mergelaw.law import MERGING, MERGING_FIXED_N, Law
from mergelaw.points import MACRO, points

# What parameters.parquet says of a fit besides its parameters.
QUALITY = ["r2", "rmse", "misfit", "aicc", "n_points", "warnings", "doubts"]


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
    """All fits of a study, the points they rest on, and what could not be fitted, with reasons."""

    points: pd.DataFrame
    fits: tuple[StudyFit, ...]
    refused: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]


def fit_study(rows: pd.DataFrame) -> StudyFits:
    """Fit the points of evaluation rows, as ``fit_points`` does.

    Args:
        rows: evaluation rows, as ``points`` takes them, with the column ``experts``.

    Raises:
        MergelawError: the rows lack a column or hold no merge.
    """
    table, warnings = points(rows)
    pools = _pools(rows)
    place = table[["method", "family", "base"]].itertuples(index=False, name=None)
    return fit_points(table.assign(M=[pools[key] for key in place]), warnings)


def fit_points(table: pd.DataFrame, warnings: Iterable[str] = ()) -> StudyFits:
    """Fit every method and family, per evaluation domain and macro: jointly, and base by base.

    Args:
        table: points, with the columns method, family, base, N, k, domain, ce and M, the number of
            experts in the pool.
        warnings: what was found on the way to the points.

    Returns:
        The fits. One that cannot be made is no error; it is among ``refused``.
    """
    fits: list[StudyFit] = []
    refused: list[dict[str, Any]] = []

    def attempt(law: Law, group: pd.DataFrame, base: str | None) -> None:
        first = group.iloc[0]
        place = {"method": first["method"], "family": first["family"], "domain": first["domain"]}
        try:
            fitted = fit(law, group)
        except MergelawError as reason:
            refused.append({**place, "base": base, "law": law.name, "reason": str(reason)})
            return
        bases = group[["base", "N", "M"]].drop_duplicates().sort_values(["N", "base"])
        # Two more refits an end for each base are spent on what is read first only.
        whole = place["domain"] in (MACRO, "")
        floors = tuple(
            {
                "base": name,
                "N": float(N),
                "M": int(M),
                "asymptotic": _at(fitted, N, math.inf),
                "reachable": _at(fitted, N, M),
                "asymptotic_interval": _interval_at(fitted, N, math.inf) if whole else None,
                "reachable_interval": _interval_at(fitted, N, M) if whole else None,
            }
            for name, N, M in bases.itertuples(index=False)
        )
        size = None if base is None else float(first["N"])
        fits.append(StudyFit(**place, base=base, N=size, fit=fitted, floors=floors))

    for _, group in table.groupby(["method", "family", "domain"]):
        attempt(MERGING, group, None)
        for _, own in group.groupby(["N", "base"]):
            attempt(MERGING_FIXED_N, own, str(own["base"].iloc[0]))
    return StudyFits(table, tuple(fits), tuple(refused), tuple(warnings))


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


def write_fits(rows: pd.DataFrame, output: Path, missing: list[str]) -> dict[str, Any]:
    """Fit a study and write it, as ``write`` does.

    Args:
        rows: evaluation rows, as ``fit_study`` takes them.
        output: the folder to write into; made if it is not there.
        missing: shards of the plan that could not be read, for people to know.

    Returns:
        Counts of points, fits, refused fits and missing shards.

    Raises:
        MergelawError: as ``fit_study``.
    """
    return write(fit_study(rows), output, missing)


def write(study: StudyFits, output: Path, missing: list[str]) -> dict[str, Any]:
    """Write fits: laws.json, parameters.parquet, points.parquet and summary.txt.

    Returns:
        Counts of points, fits, refused fits and missing shards.
    """
    output.mkdir(parents=True, exist_ok=True)
    laws = {
        "units": {"ce": "nats per token", "N": "billions of non-embedding parameters"},
        "laws": {law.name: law.equation for law in (MERGING, MERGING_FIXED_N)},
        "fits": [fitted.to_dict() for fitted in study.fits],
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
                    f"{name}_{end}": values["intervals"].get(name, (None, None))[side]
                    for name in names
                    for side, end in enumerate(("low", "high"))
                },
                **{name: values[name] for name in QUALITY},
            }
        )
    numbers = [*names, *(f"{name}_{end}" for name in names for end in ("low", "high"))]
    table = pd.DataFrame(records, columns=[*columns, *numbers, *QUALITY])
    return table.astype(dict.fromkeys(["N", *numbers, "r2", "rmse", "misfit", "aicc"], float))


def summary(study: StudyFits, missing: Sequence[str] = ()) -> str:
    """The study for a terminal: macro first, a paragraph per fit."""
    lines = [
        "Losses in nats per token, N in billions of non-embedding parameters. Intervals are 90% "
        "profile-likelihood ones, of the mean over subsets of this pool.",
        "",
    ]
    for heading, sentences in (("Missing", missing), ("Warnings", study.warnings)):
        if sentences:
            lines += [f"{heading}:", *(f"  {sentence}" for sentence in sentences), ""]
    for item in sorted(study.fits, key=lambda f: (f.domain != MACRO, f.domain, f.method)):
        where = item.base or "all sizes"
        if item.base and not item.base.startswith("N="):  # then its name says it
            where += f" (N = {item.N:g})"
        lines += [_place(item.method, item.family, item.domain, where), item.fit.summary()]
        lines += [
            f"  {floor['base']}: floor {floor['asymptotic']:.5g}"
            f"{_told(floor['asymptotic_interval'])}, reachable with these {floor['M']} experts "
            f"{floor['reachable']:.5g}{_told(floor['reachable_interval'])}"
            for floor in item.floors
        ]
        lines.append("")
    if study.refused:
        lines.append("Not fitted:")
        lines += [
            f"  {_place(r['method'], r['family'], r['domain'], r['base'] or 'all sizes')}: "
            f"{r['reason']}"
            for r in study.refused
        ]
    return "\n".join(lines).rstrip() + "\n"


def first_reason(study: StudyFits) -> str:
    """Why nothing could be fitted: the reason for the law that asks for least."""
    return str(study.refused[-1]["reason"])


def _told(ends: list[float] | None) -> str:
    return "" if ends is None else f" ({ends[0]:.5g} to {ends[1]:.5g})"


def _place(*names: str) -> str:
    """Where a fit belongs; a table of one's own need not name everything."""
    return ", ".join(name for name in names if name)
