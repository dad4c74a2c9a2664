"""The report's tables, for the page and as CSV files."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from mergelaw.decide.tables import Table
from mergelaw.laws.diagnostics import LADDER
from mergelaw.laws.fits import WITHIN
from mergelaw.laws.law import LAWS, MERGING, VARIANCE, Law
from mergelaw.laws.noise import WIDE
from mergelaw.laws.points import MACRO, macro_domains
from mergelaw.laws.summary import interval, pooled_text

PLACE = ["method", "family", "domain", "base", "N"]
NONE = "–"


def size_label(N: float) -> str:
    """Billions of parameters with their unit: 72B, 1.5B, 161k."""
    for unit, factor in (("B", 1.0), ("M", 1e3), ("k", 1e6)):
        if N * factor >= 0.9995:
            return f"{N * factor:.3g}{unit}"
    return f"{N * 1e9:.3g}"


def base_label(base: str, N: float) -> str:
    """A base's name and size: 1.5B-base (1.31B)."""
    return f"{base} ({size_label(N)})"


def mean_loss(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean loss by groups of rows, without groups with a loss that is not finite."""
    groups = rows.groupby(by).agg(ce=("ce", "mean"), finite=("finite", "all"))
    return groups[groups["finite"].astype(bool)].drop(columns="finite").reset_index()


def held_in(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the domains that the macro loss counts."""
    domains = macro_domains(rows)
    keys = zip(rows["family"], rows["domain"], strict=True)
    counted = [domain in domains[family, MACRO] for family, domain in keys]
    return rows[np.array(counted, dtype=bool)]


def measured(rows: pd.DataFrame, points: pd.DataFrame) -> dict[str, str]:
    """The study's methods, experts, domains and numbers of merges: label to text."""
    merges = rows[rows["role"] == "merge"]
    merge = ["method", "base", "merge"]
    pool = sorted(set(merges["experts"].explode()))
    domains = sorted(rows["domain"].unique())
    held_out = rows.loc[rows["held_out"].astype(bool), "domain"].nunique()
    macro = points["domain"] == MACRO  # without points if a domain has no finite loss
    counts = sorted(set(points.loc[macro if macro.any() else ~macro, "subsets"]))
    circles = int(points["replicates"].max())
    return {
        "Methods": ", ".join(sorted(points["method"].unique())),
        "Experts in the pool": f"{len(pool)}: {', '.join(pool)}",
        "Experts merged, k": ", ".join(map(str, sorted(points["k"].unique()))),
        "Sampling": " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        + " subsets of the pool for each k and base"
        + (f", on {circles} circles" if circles > 1 else ""),
        "Evaluation domains": f"{len(domains)}: {', '.join(domains)}"
        + (f"; {held_out} of them without an expert" if held_out else ""),
        "Merges measured": f"{len(merges.drop_duplicates(merge)):,}",
        "Cells (a merge on a domain)": f"{len(merges.drop_duplicates([*merge, 'domain'])):,}",
    }


def bases(rows: pd.DataFrame) -> Table:
    """Each base's size, its loss, and the loss of its multitask baseline."""
    losses = mean_loss(held_in(rows), ["N", "base", "role"]).set_index(["N", "base", "role"])["ce"]
    distinct = rows.drop_duplicates(["N", "base"]).sort_values(["N", "base"])
    records = []
    for N, base, family, total in distinct[["N", "base", "family", "N_total"]].to_numpy():
        values = [losses.get((N, base, role)) for role in ("base", "baseline")]
        texts = [NONE if value is None else f"{value:.4f}" for value in values]
        records.append([base, family, size_label(N), size_label(total), *texts])
    headings = ["base", "family", "N, non-embedding", "all parameters", "base, k = 0", "multitask"]
    return Table(headings, records)


def short_ladders(points: pd.DataFrame) -> dict[str, str]:
    """Ratio of largest to smallest N of each family where it is below LADDER."""
    sizes = points.groupby("family")["N"]
    ratios = sizes.max() / sizes.min()
    return {str(family): f"{r:.3g}" for family, r in ratios.items() if 1 < r < LADDER}


def floors(fits: pd.DataFrame) -> Table:
    """Floors and L(M) (nats per token), and the experts whose mean comes close to the floor."""
    records = []
    for fit in _ordered(fits):
        if not fit["floors"]:  # the law fails
            continue
        (floor,) = fit["floors"]
        cells = [
            Markup("{} <small>{}</small>").format(
                NONE if floor[name] is None else f"{floor[name]:.4f}",
                interval(ends, ".4f")
                if (ends := floor[f"{name}_interval"]) and ends[0] != ends[1]
                else "",
            )
            for name in ("asymptotic", "reachable")
        ]
        steps = [
            "none" if s["k"] is None else f"{s['k']}" if s["reachable"] else f"({s['k']})"
            for s in floor["k_within"]
        ]
        records.append([fit["method"], fit["base"], f"{floor['M']}", *cells, " / ".join(steps)])
    within = f"experts within {' / '.join(f'{nats:g}' for nats in WITHIN)}"
    headings = ["method", "base", "M", "asymptotic floor, L_inf", "all experts, L(M)", within]
    return Table(headings, records)


def parameters(fits: pd.DataFrame, law: Law, column: str) -> Table:
    """Parameters of a law's fits with intervals; warnings and doubts are numbered notes.

    Args:
        fits: the fits to list, in laws.json's form.
        law: the law that they fit.
        column: the column that tells a method's fits apart: ``domain`` or ``base``.
    """
    notes: dict[str, int] = {}
    records = []
    for fit in _ordered(fits):
        # Doubts about each domain would fill the page; tables/parameters.csv has them.
        doubts = fit["doubts"] if fit["domain"] == MACRO and law is MERGING else []
        for sentence in (sentences := [*fit["warnings"], *doubts]):
            notes.setdefault(sentence, len(notes) + 1)
        records.append(
            [
                fit["method"],
                fit["domain"] if column == "domain" else base_label(fit["base"], fit["N"]),
                *(_parameter(fit, name) for name in law.parameters),
                NONE if pd.isna(fit["r2"]) else f"{fit['r2']:.5f}",
                f"{fit['rmse']:.2g}",
                f"{fit['n_points']}",
                ", ".join(map(str, sorted(notes[sentence] for sentence in sentences))),
            ]
        )
    headings = ["method", column, *law.parameters, "R²", "RMSE", "points", "notes"]
    strong = int((fits["domain"] == MACRO).sum()) if column == "domain" else 0
    return Table(headings, records, strong=strong, notes=list(notes))


def _parameter(fit: Mapping[str, Any], name: str) -> str:
    """A parameter with its intervals for this pool and, if known, for experts like these."""
    text = Markup("{:.4g}").format(fit["parameters"][name])
    for column, form in (("intervals", "{}"), ("experts_intervals", "({})")):
        if ends := fit[column].get(name):
            text += Markup("<br><small>{}</small>").format(form.format(interval(ends, ".3g")))
    return text


def _ordered(fits: pd.DataFrame) -> list[dict[Any, Any]]:
    """Fits as records: macro first, then by method, domain and size."""
    ordered = fits.assign(later=fits["domain"] != MACRO)
    return ordered.sort_values(["later", "method", "domain", "N"]).to_dict("records")


def shared(pooled: Mapping[str, Any]) -> str:
    """A sentence on the parameters of a method's domains, pooled as far as the points say."""
    return f"{pooled['method']}: {pooled_text(pooled)}"


def rivals(fits: pd.DataFrame) -> Table | None:
    """AICc of rival laws above the best, and each law's error on held-out points.

    If there are joint fits, only they are listed: they have enough points to tell laws apart.
    """
    joint = fits["law"] == MERGING.name
    records = _ordered(fits[joint] if joint.any() else fits)
    above = [
        {rival["law"]: rival["above"] for rival in fit["rivals"] if rival["above"] is not None}
        for fit in records
    ]
    names = [law for law in LAWS if any(law in values for values in above)]
    if not names:
        return None
    rows = [
        [
            fit["method"],
            base_label(fit["base"], fit["N"]) if isinstance(fit["base"], str) else "all",
            *(f"{values[name]:.1f}" if name in values else NONE for name in names),
            *(_forecast_error(fit["left_out"].get(name)) for name in ("k", "N")),
        ]
        for fit, values in zip(records, above, strict=True)
    ]
    headings = [name.removesuffix("_fixed_N") for name in names]
    return Table(["method", "bases", *headings, "last k held out", "last N held out"], rows)


def _forecast_error(forecast: Mapping[str, float | None] | None) -> str:
    if not forecast:
        return NONE
    same = "" if forecast["same"] is None else f" ({forecast['same']:.2g})"
    return f"{forecast['error']:.2g}{same}"


def files(
    study: Mapping[str, Any], points: pd.DataFrame, parameters: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    """Tables for the CSV files, by name, from laws.json, points.parquet and parameters.parquet."""
    bounds = []
    for fit in study["fits"]:
        for floor in fit["floors"] if fit["base"] is not None else ():
            record = {name: fit[name] for name in PLACE} | {"M": floor["M"]}
            for name in ("asymptotic", "reachable"):
                record[name] = floor[name]
                ends = floor[f"{name}_interval"] or (None, None)
                record |= {f"{name}_low": ends[0], f"{name}_high": ends[1]}
            bounds.append(record | {f"k_within_{s['nats']:g}": s["k"] for s in floor["k_within"]})
    variances = [
        {name: fit[name] for name in PLACE} | fit["parameters"] | {"r2": fit["r2"]}
        for fit in study["variances"]
    ]
    sentences = {name: parameters[name].map("; ".join) for name in ("warnings", "doubts")}
    order = ["domain", "method", "N", "base"]
    return {
        "parameters": parameters.assign(**sentences).sort_values(["law", *order]),
        "floors": pd.DataFrame(bounds, columns=[*PLACE] if not bounds else None),
        "points": points.drop(columns=[*WIDE], errors="ignore"),
        "variances": pd.DataFrame(variances, columns=[*PLACE, *VARIANCE.linear, "r2"]),
        "refused": pd.DataFrame(study["refused"], columns=[*PLACE[:4], "law", "reason"]),
    }
