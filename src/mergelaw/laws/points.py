"""Points: the mean cross-entropies at each (N, k) to which laws are fitted."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from mergelaw.errors import MergelawError
from mergelaw.laws.notes import Note

MACRO, HELD_OUT = "macro", "macro_held_out"
POINT = ["method", "family", "base", "N", "k", "domain"]
CIRCLE = ["seed", "replicate"]
COLUMNS = [*POINT, *CIRCLE, "merge", "role", "ce", "finite"]
# Columns that a points table may have besides N, k and ce (or loss).
OPTIONAL = ["se", "circles", "circle", "subset", "M", "domain", "method", "family", "base"]
# Columns that tell the merges of a point apart.
MERGES = {"circle", "subset"}
# Further columns that `mergelaw fit` writes and reads.
WRITTEN = ["subsets", "replicates", "documents", "sampling", "freedom", "variance", "without"]
# A column of tables that earlier versions wrote, with covariances in another form.
EARLIER = ["design"]
# No model has so many billions of parameters, so N counts parameters.
TOO_MANY_BILLIONS = 1e4
# No base has so few parameters, so N, too large for billions, counts something else.
TOO_FEW_PARAMETERS = 1e6
# Several sizes above the first limit, or one above the second, may be in millions.
MILLIONS, MILLIONS_ALONE = 30, 1000
# The loss of a uniform guess among a million tokens is 14 nats.
MANY_NATS = 20
MOST = 1_000_000  # experts in a pool
# Guessing among 1e9 tokens has 21 nats per token.
MOST_NATS = 50


def points(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[Note]]:
    """Estimate E[L | N, k] of every method, base and evaluation domain, and of their macro-average.

    The expectation is over uniformly random k-subsets of the pool. Each circle is an unbiased
    estimate, and so is an exhaustive level: subsets are averaged within circles, then circles with
    equal weights. Domain ``macro`` is the unweighted mean over the evaluation domains of the family
    (the cross-domain loss of Wang et al., arXiv:2509.24244), where none is missing; domains that
    are held out from training have a macro of their own (``macro_domains``).

    Args:
        rows: one row per (merge, evaluation domain); N in billions of parameters, ce in nats per
            token. Only rows of role ``merge`` are used.

    Returns:
        One row per point, sorted: method, family, base, N, k, domain, ce (nats per token), subsets
        (distinct merges) and replicates (circles); and warnings on dropped points.

    Raises:
        MergelawError: a column is missing, no row is a merge, or no point has finite losses.
    """
    absent = [column for column in COLUMNS if column not in rows.columns]
    if absent:
        raise MergelawError(
            f"evaluation rows lack the columns {', '.join(absent)}: pass the rows of cells.parquet"
        )
    # Sort: the order of shards and files must not change the last bit of a mean.
    merges = rows.loc[rows["role"] == "merge", COLUMNS].sort_values([*POINT, *CIRCLE, "merge"])
    if merges.empty:
        raise MergelawError("no evaluation row has role 'merge': evaluate merges of k >= 1 first")
    merges["finite"] = merges["finite"].astype(bool) & np.isfinite(merges["ce"])

    circles = merges.groupby([*POINT, *CIRCLE]).agg(ce=("ce", "mean"))
    means = circles.groupby(POINT).agg(ce=("ce", "mean"), replicates=("ce", "size"))
    by_point = merges.groupby(POINT)
    means["subsets"] = by_point["merge"].nunique()
    # A mean over the finite losses only would be biased, so drop the whole point.
    whole = by_point["finite"].all()
    if not whole.any():
        raise MergelawError(
            "no merge has a finite loss: check the experts, and whether the methods scale their "
            "changes too far"
        )
    dropped: pd.DataFrame = means.loc[~whole].reset_index()
    table: pd.DataFrame = means.loc[whole].reset_index()

    macro, incomplete = _macro(table, merges, macro_domains(rows[rows["role"] == "merge"]))
    warnings = [
        *_dropped(dropped, "a loss is not finite; check those merges"),
        *_dropped(incomplete, "a domain has no finite loss there"),
    ]
    table = pd.concat([table, macro], ignore_index=True).sort_values(POINT, ignore_index=True)
    return table[[*POINT, "ce", "subsets", "replicates"]], warnings


def macro_domains(rows: pd.DataFrame) -> dict[tuple[str, str], list[str]]:
    """Domains of each macro-average, by family and name.

    ``macro`` counts domains that experts are trained on, as `mergelaw best` does, and
    ``macro_held_out`` the others; if there are no such domains, ``macro`` counts all.
    """
    averages: dict[tuple[str, str], list[str]] = {}
    for family, group in rows.groupby("family"):
        held = group["held_out"].astype(bool) if "held_out" in group else group["domain"].isna()
        held_out = sorted(group.loc[held, "domain"].unique())
        held_in = sorted(set(group["domain"]) - set(held_out))
        averages[str(family), MACRO] = held_in or held_out
        if held_in and held_out:
            averages[str(family), HELD_OUT] = held_out
    return averages


def _macro(
    table: pd.DataFrame, merges: pd.DataFrame, averages: dict[tuple[str, str], list[str]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Macro points where every domain of the average has a point, and the incomplete places."""
    place, parts = POINT[:-1], []
    for (family, name), domains in averages.items():
        points = table[(table["family"] == family) & table["domain"].isin(domains)]
        macro = points.groupby(place).agg(
            ce=("ce", "mean"),
            subsets=("subsets", "min"),
            replicates=("replicates", "min"),
            domains=("domain", "size"),
        )
        own = merges[merges["family"] == family]
        places = own[place].drop_duplicates().set_index(place).index
        macro = macro.reindex(places).reset_index().assign(domain=name)
        parts.append(macro.assign(whole=macro["domains"] == len(domains)))
    every = pd.concat(parts)
    whole, every = every["whole"], every.drop(columns=["domains", "whole"])
    return every[whole].astype({"subsets": int, "replicates": int}), every[~whole]


def _dropped(table: pd.DataFrame, reason: str) -> list[Note]:
    return [
        Note(
            "dropped",
            f"{method} on {base}, {domain}: no point at k = {', '.join(map(str, group['k']))}: "
            f"{reason}",
        )
        for (method, base, domain), group in table.groupby(["method", "base", "domain"])
    ]


def read_points(path: Path) -> tuple[pd.DataFrame, list[Note]]:
    """Read a table of points that were measured elsewhere.

    Args:
        path: CSV or Parquet with the columns N (billions of parameters), k and loss or ce (nats per
            token), and optionally se (standard error of the loss), circles (how many give it), M
            (experts in the pool), domain, method, family and base. Instead of se a table may have a
            row for each ``circle``, empty where all subsets are measured, or for each ``subset``.
            Columns that ``mergelaw fit`` writes are accepted too.

    Returns:
        The points in the form of ``points``, with M and, if present, se; and warnings on
        assumptions. Missing names are empty; a base without a name is named after its N.

    Raises:
        MergelawError: the table cannot be read, or its columns or values are impossible.
    """
    table, warnings = _written(_named(path, _read(path)))
    for name in ("N", "k", "ce", "se", "circles", "M"):
        if name in table:
            table[name] = _numbers(path, table, name)
    warnings += _in_billions(path, table)
    if table["ce"].max() > MANY_NATS:
        text = (
            f"a loss of {table['ce'].max():.4g} nats per token is more than a model without "
            "training has: give the mean per token, in nats"
        )
        warnings.append(Note("unit", text))
    if "se" in table and "sampling" not in table and table["se"].any():
        text = "standard errors are taken as independent between points" + (
            "" if "circles" in table else ", and as exact; add a column circles if few give them"
        )
        warnings.append(Note("se_assumed", text))
    if "M" not in table:
        largest = table["k"].max()
        table["M"] = largest
        warnings.append(
            Note(
                "pool_assumed",
                f"M is not given: assumed to be the largest k, {largest:g}; add a column M",
            )
        )
    if (table["k"] > table["M"]).any():
        raise MergelawError(f"{path}: has a k above M: a pool of M experts has no such merge")
    for name in ("method", "family", "domain", "base"):
        empty = table["N"].map("N={:.6g}".format) if name == "base" else ""
        if name not in table:
            table[name] = None
        names = table[name].astype(object)
        names = names.where(names.notna(), empty).astype(str)
        table[name] = names.map(lambda text: " ".join(text.split())).astype(str)  # one line
    if MERGES & set(table):
        table, note = _means(path, table)
        warnings.append(note)
    distinct, notes = _distinct(path, table)
    return distinct, [*warnings, *notes]


def _means(path: Path, table: pd.DataFrame) -> tuple[pd.DataFrame, Note]:
    """Points of a table with a row for each circle or subset, with the sampling errors these show.

    Subsets are independent draws without replacement. The errors of one circle's levels hang
    together, by a correlation that all levels share; their sizes are shared by all places.
    """
    if "se" in table:
        raise MergelawError(
            f"{path}: has the column se beside {' and '.join(sorted(MERGES & set(table)))}: drop "
            "one, the others give the standard errors too"
        )
    point = [*POINT, "M"]
    if "circle" not in table:
        merges = table.groupby(point)["ce"].agg(["mean", "var", "size"]).reset_index()
        every = [math.comb(M, k) for M, k in zip(merges["M"], merges["k"], strict=True)]
        rest = 1 - np.minimum(merges["size"] / np.array(every, dtype=float), 1)
        merges["se"] = np.sqrt(merges["var"].fillna(0) / merges["size"] * rest)
        alone = (merges["size"] == 1) & (rest > 0)
        merges["circles"] = merges["size"].clip(lower=2)
        table = merges.rename(columns={"mean": "ce"})[[*point, "ce", "se", "circles"]]
        text = "standard errors come from the subsets, as independent draws"
    else:
        means = table.groupby([*point, "circle"], dropna=False)["ce"].mean().reset_index()
        table = means.groupby(point)["ce"].agg(["mean", "var", "size"]).reset_index()
        table = table.rename(columns={"mean": "ce"})
        place = [name for name in POINT if name != "k"]
        variance = (table["var"] / table["size"]).fillna(0)
        scale = variance.groupby([table[name] for name in place]).transform("mean")
        shape = (variance / scale.where(scale > 0, 1)).groupby(table["k"]).transform("mean")
        table["se"] = np.sqrt(scale * shape)
        alone = (table["size"] == 1) & means.groupby(point)["circle"].count().gt(0).to_numpy()
        common = _correlation(means, place)
        table["sampling"] = None
        for rows in table.groupby(place).indices.values():
            errors = table["se"].to_numpy()[rows]
            factor = np.column_stack(
                [math.sqrt(common) * errors, math.sqrt(1 - common) * np.diag(errors)]
            )
            table.loc[rows, "sampling"] = pd.Series(list(factor), index=rows)
        table["freedom"] = (table["size"].groupby([table[n] for n in place]).transform("max")) - 1.0
        table = table.drop(columns=["var", "size"])
        text = f"standard errors come from the circles, with a correlation of {common:.2f}"
    if alone.any():
        text += f"; {int(alone.sum())} points have one only, so their errors are unknown"
    return table, Note("se_assumed", text)


def _correlation(means: pd.DataFrame, place: list[str]) -> float:
    """Correlation of circles' errors between levels, the mean over all places and pairs."""
    pairs: list[float] = []
    for _, rows in means.dropna(subset="circle").groupby(place):
        wide = rows.pivot_table(index="circle", columns="k", values="ce").corr().to_numpy()
        pairs.extend(wide[np.triu_indices(len(wide), 1)])
    values = np.array(pairs)[np.isfinite(pairs)]
    return float(np.clip(values.mean(), 0, 0.99)) if len(values) else 0.0


def _distinct(path: Path, table: pd.DataFrame) -> tuple[pd.DataFrame, list[Note]]:
    """The points, sorted, each once; refuses two losses of one point."""
    columns = [*POINT, "ce", *(n for n in ("se", "circles") if n in table), "M"]
    distinct = table[columns].drop_duplicates()
    repeated = len(table) - len(distinct)
    text = f"{repeated} rows repeat others and were dropped"
    repeats = distinct[distinct.duplicated(POINT, keep=False)].sort_values(POINT)
    if len(repeats):
        first, second = repeats.iloc[0], repeats.iloc[1]
        raise MergelawError(
            f"{path}: the point N = {first['N']:g}, k = {first['k']} appears twice, with losses "
            f"{first['ce']:g} and {second['ce']:g}: give their mean, or distinguish them by a "
            "column method, family, domain or base"
        )
    distinct = distinct.join(table[[name for name in WRITTEN if name in table]])
    notes = [Note("repeated", text)] if repeated else []
    return distinct.sort_values(POINT, ignore_index=True), notes


def _named(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The table with checked column names, the loss as ``ce``."""
    table = table.rename(columns=lambda name: str(name).strip())
    twice = ", ".join(dict.fromkeys(table.columns[table.columns.duplicated()]))
    if twice:
        raise MergelawError(f"{path}: has the column {twice} twice: keep one of them")
    if "loss" in table and "ce" in table:
        raise MergelawError(f"{path}: has the columns loss and ce: keep one of them")
    present = ", ".join(map(str, table))
    table = table.rename(columns={"loss": "ce"})
    absent = [
        "ce (or loss)" if name == "ce" else name for name in ("N", "k", "ce") if name not in table
    ]
    if absent:
        raise MergelawError(
            f"{path}: lacks the column {', '.join(absent)}: it has {present}; add it"
        )
    allowed = ["N", "k", "ce", *OPTIONAL]
    unknown = [str(name) for name in table if name not in (*allowed, *WRITTEN, *EARLIER)]
    if unknown:
        raise MergelawError(
            f"{path}: unknown column {', '.join(unknown)}: drop it, or rename it to one of "
            f"{', '.join(allowed)}"
        )
    if table.empty:
        raise MergelawError(f"{path}: has no rows: add one for each point")
    return table


def _written(table: pd.DataFrame) -> tuple[pd.DataFrame, list[Note]]:
    """A table that `mergelaw fit` wrote, or a part of one, ready to be fitted again."""
    if {"documents", "sampling", "se"} <= set(table):
        return table.assign(se=table["se"].fillna(0)), []  # NaN: unknown
    return table.drop(columns=[name for name in (*WRITTEN, *EARLIER) if name in table]), []


def _read(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise MergelawError(f"{path}: no such file: correct the path")
    if path.suffix not in (".csv", ".parquet"):
        raise MergelawError(f"{path}: is neither .csv nor .parquet: save the points as one of them")
    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's parsers raise ValueErrors
        reason = " ".join(str(error).split())  # may have several lines
        raise MergelawError(
            f"{path}: cannot be read as a table ({reason}): save the points again"
        ) from None
    # Parquet may keep an index: columns if it has names, else row numbers of another table.
    return table.reset_index(drop=table.index.names == [None])


def _numbers(path: Path, table: pd.DataFrame, name: str) -> pd.Series:
    """A column's values, checked; the error names the first impossible value with its row."""
    cells = table[name]
    values = pd.to_numeric(cells, errors="coerce").astype(float)
    finite = np.isfinite(values)
    whole = finite & (values == values.round())
    rules = {
        "N": (finite & (values > 0), "a number above 0, in billions of parameters"),
        "k": (whole & (values >= 1) & (values <= MOST), "a whole number of experts, 1 to 1e6"),
        "ce": (
            finite & (values > 0) & (values < MOST_NATS),
            f"a cross-entropy in nats per token, above 0 and below {MOST_NATS}",
        ),
        "se": (finite & (values >= 0), "a standard error of 0 or more"),
        "circles": (whole & (values >= 2), "the whole number of circles behind se, 2 or more"),
        "M": (whole & (values >= 1) & (values <= MOST), "the whole number of experts in the pool"),
    }
    allowed, rule = rules[name]
    if not allowed.all():
        row = int(np.flatnonzero(~allowed)[0])
        raise MergelawError(
            f"{path}: row {row + 1} has {name} = {cells.iloc[row]}: give {rule}, or drop the row"
        )
    return values.astype(int) if name in ("k", "M") else values


def _in_billions(path: Path, table: pd.DataFrame) -> list[Note]:
    """Convert N to billions where it counts parameters; warn where it may be in millions."""
    least, most = table["N"].min(), table["N"].max()
    if most < TOO_MANY_BILLIONS:
        if least < MILLIONS or (least == most and most < MILLIONS_ALONE):
            return []
        text = (
            f"N = {least:g} to {most:g} was read as billions of parameters; if these are millions, "
            "every size and exponent is wrong: divide N by 1000"
        )
        return [Note("unit", text)]
    if least < TOO_MANY_BILLIONS:
        raise MergelawError(
            f"{path}: has N = {most:g} beside N = {least:g}: give all in billions of parameters"
        )
    if least < TOO_FEW_PARAMETERS:
        raise MergelawError(
            f"{path}: N = {least:g} is too large for billions of parameters and too small for a "
            "count of them (millions?): give N in billions"
        )
    table["N"] /= 1e9
    text = "N was read as a count of parameters and divided by 1e9; give it in billions"
    return [Note("unit", text)]
