"""Points: what a law is fitted to, the mean cross-entropy at each (N, k)."""

from pathlib import Path

import numpy as np
import pandas as pd

from mergelaw.errors import MergelawError

MACRO = "macro"
POINT = ["method", "family", "base", "N", "k", "domain"]
CIRCLE = ["seed", "replicate"]
COLUMNS = [*POINT, *CIRCLE, "merge", "role", "ce", "finite"]
# A table of one's own has N, k and ce (or loss), and may have these.
OPTIONAL = ["se", "M", "domain", "method", "family", "base"]
# What `mergelaw fit` writes beside these, and takes again.
WRITTEN = [
    *("subsets", "replicates", "documents", "design", "freedom", "variance", "without"),
]
# No model has so many billions of parameters: such an N counts parameters.
TOO_MANY_BILLIONS = 1e4
MOST = 1_000_000  # experts in a pool


def points(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Estimate E[L | N, k] of every method, base and evaluation domain, and of their macro-average.

    The expectation is over uniformly random k-subsets of the pool. Every replicate of the plan (a
    circle, or the one pass over an exhaustive level) estimates it without bias, so subsets are
    averaged within a replicate and replicates with equal weights after that; a subset that is in
    several replicates counts in each.

    Domain ``macro`` is the unweighted mean over all evaluation domains of the family, held-in and
    held-out alike: the cross-domain loss of Wang et al. (arXiv:2509.24244). Where one of the
    domains is missing, so is the macro point, for a mean over other domains is another quantity.

    Args:
        rows: one row per (merge, evaluation domain); N in billions of parameters, ce in nats per
            token. Only rows of role ``merge`` are used.

    Returns:
        One row per point, sorted: method, family, base, N, k, domain, ce (nats per token), subsets
        (different merges) and replicates; and one sentence for whatever had to be dropped.

    Raises:
        MergelawError: a column is missing, or no row is a merge.
    """
    absent = [column for column in COLUMNS if column not in rows.columns]
    if absent:
        raise MergelawError(
            f"evaluation rows lack the columns {', '.join(absent)}: pass what `evaluate` wrote"
        )
    # Sorted, so that the order of shards and files cannot change the last bit of a mean.
    merges = rows.loc[rows["role"] == "merge", COLUMNS].sort_values([*POINT, *CIRCLE, "merge"])
    if merges.empty:
        raise MergelawError("no evaluation row has role 'merge': evaluate a plan with k >= 1 first")
    merges["finite"] = merges["finite"].astype(bool) & np.isfinite(merges["ce"])

    circles = merges.groupby([*POINT, *CIRCLE]).agg(ce=("ce", "mean"))
    means = circles.groupby(POINT).agg(ce=("ce", "mean"), replicates=("ce", "size"))
    by_point = merges.groupby(POINT)
    means["subsets"] = by_point["merge"].nunique()
    # A mean over the subsets that happen to be finite would be biased: the point goes as a whole.
    whole = by_point["finite"].all()
    dropped: pd.DataFrame = means.loc[~whole].reset_index()
    table: pd.DataFrame = means.loc[whole].reset_index()

    macro, incomplete = _macro(table, merges)
    warnings = [
        *_sentences(dropped, "a loss there is not finite; look at these merges' rows"),
        *_sentences(incomplete, "not every evaluation domain has a finite loss there"),
    ]
    table = pd.concat([table, macro], ignore_index=True).sort_values(POINT, ignore_index=True)
    return table[[*POINT, "ce", "subsets", "replicates"]], warnings


def _macro(table: pd.DataFrame, merges: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Macro points where every domain of the family has one, and the places where not."""
    place = POINT[:-1]
    macro = table.groupby(place).agg(
        ce=("ce", "mean"),
        subsets=("subsets", "min"),
        replicates=("replicates", "min"),
        domains=("domain", "size"),
    )
    places = merges[place].drop_duplicates().set_index(place).index
    macro = macro.reindex(places).reset_index().assign(domain=MACRO)
    expected = macro["family"].map(merges.groupby("family")["domain"].nunique())
    complete = macro["domains"] == expected
    counts = {"subsets": int, "replicates": int}
    return macro[complete].drop(columns="domains").astype(counts), macro[~complete]


def _sentences(dropped: pd.DataFrame, reason: str) -> list[str]:
    return [
        f"{method} on {base}, {domain}: no point at k = {', '.join(map(str, group['k']))}: {reason}"
        for (method, base, domain), group in dropped.groupby(["method", "base", "domain"])
    ]


def read_points(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read a table of points that was measured elsewhere.

    Args:
        path: CSV or Parquet, one row per point, with the columns N (billions of parameters), k and
            loss or ce (nats per token), and if wanted se (standard error of the loss), M (experts
            in the pool), domain, method, family and base (names that tell points apart). subsets
            and replicates, which ``mergelaw fit`` writes, are allowed too.

    Returns:
        The points as ``points`` gives them, with M and, if it was there, se; and sentences on what
        was assumed. Names that were not given are empty; a base is named by its N.

    Raises:
        MergelawError: the table cannot be read or has unknown or missing columns, values that
            cannot be, two units of N, or points that disagree.
    """
    table = _read(path).rename(columns=lambda name: str(name).strip())
    twice = ", ".join(dict.fromkeys(table.columns[table.columns.duplicated()]))
    if twice:
        raise MergelawError(f"{path}: has the column {twice} twice: keep the one that is meant")
    if "loss" in table and "ce" in table:
        raise MergelawError(f"{path}: has the columns loss and ce: keep the one that is meant")
    given = ", ".join(map(str, table))
    table = table.rename(columns={"loss": "ce"})
    absent = [
        "ce (or loss)" if name == "ce" else name for name in ("N", "k", "ce") if name not in table
    ]
    if absent:
        raise MergelawError(f"{path}: lacks the column {', '.join(absent)}: it has {given}; add it")
    known = ["N", "k", "ce", *OPTIONAL]
    unknown = [str(name) for name in table if name not in (*known, *WRITTEN)]
    if unknown:
        raise MergelawError(
            f"{path}: unknown column {', '.join(unknown)}: drop it, or rename it to one of "
            f"{', '.join(known)}"
        )
    if table.empty:
        raise MergelawError(f"{path}: has no rows: add one for each point")
    table, warnings = _written(table)
    for name in ("N", "k", "ce", "se", "M"):
        if name in table:
            table[name] = _numbers(path, table, name)
    warnings += _mend_N(path, table)
    if "M" not in table:
        table["M"] = table["k"].max()
        warnings.append(
            f"M is not given: taken to be the largest k, {table['k'].max():g}; add a column M"
        )
    if (table["k"] > table["M"]).any():
        raise MergelawError(f"{path}: has a k above M: a pool of M experts has no such merges")
    for name in ("method", "family", "domain", "base"):
        empty = table["N"].map("N={:.6g}".format) if name == "base" else ""
        if name not in table:
            table[name] = None
        names = table[name].astype(object)
        table[name] = names.where(names.notna(), empty).astype(str)
    columns = [*POINT, "ce", *(name for name in ("se",) if name in table), "M"]
    distinct = table[columns].drop_duplicates()
    if len(distinct) < len(table):
        warnings.append(f"{len(table) - len(distinct)} rows repeat others and were dropped")
    again = distinct[distinct.duplicated(POINT, keep=False)].sort_values(POINT)
    if len(again):
        first, second = again.iloc[0], again.iloc[1]
        raise MergelawError(
            f"{path}: the point N = {first['N']:g}, k = {first['k']} is there twice, with losses "
            f"{first['ce']:g} and {second['ce']:g}: give their mean, or tell them apart in a "
            "column method, family, domain or base"
        )
    more = [name for name in WRITTEN if name in table]
    distinct = distinct.join(table[more])
    return distinct.sort_values(POINT, ignore_index=True), warnings


def _written(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """A table that `mergelaw fit` wrote, or a part of one, ready to be fitted again."""
    plain = table.drop(columns=[name for name in WRITTEN if name in table])
    if not {"documents", "design", "se"} <= set(table):
        return plain, []
    plain = plain.assign(se=plain["se"].fillna(0))  # where nothing was known
    size = table.groupby(["method", "family", "domain"])["k"].transform("size")
    if all((size == table[name].map(np.size)).all() for name in ("documents", "design")):
        return table.assign(se=plain["se"]), []
    return plain, ["points were left out of a written table: of its covariances only se is used"]


def _read(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise MergelawError(f"{path}: there is no such file: correct the path")
    if path.suffix not in (".csv", ".parquet"):
        raise MergelawError(f"{path}: is neither .csv nor .parquet: save the points as one of them")
    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's parsers raise ValueErrors
        reason = " ".join(str(error).split())  # they may take several lines
        raise MergelawError(f"{path}: cannot be read as a table: {reason}") from None
    # A Parquet file may keep an index: columns, if it has names, else places of other tables.
    return table.reset_index(drop=table.index.names == [None])


def _numbers(path: Path, table: pd.DataFrame, name: str) -> pd.Series:
    """A column's values, checked; the first that cannot be is named with its row."""
    given = table[name]
    values = pd.to_numeric(given, errors="coerce").astype(float)
    finite = np.isfinite(values)
    whole = finite & (values == values.round())
    rules = {
        "N": (finite & (values > 0), "a number above 0, in billions of parameters"),
        "k": (whole & (values >= 1) & (values <= MOST), "a whole number of experts, 1 to 1e6"),
        "ce": (finite & (values > 0), "a cross-entropy above 0"),
        "se": (finite & (values >= 0), "a standard error of 0 or more"),
        "M": (whole & (values >= 1) & (values <= MOST), "the whole number of experts in the pool"),
    }
    allowed, meaning = rules[name]
    if not allowed.all():
        row = int(np.flatnonzero(~allowed)[0])
        raise MergelawError(
            f"{path}: row {row + 1} has {name} = {given.iloc[row]}: give {meaning}, or drop the row"
        )
    return values.astype(int) if name in ("k", "M") else values


def _mend_N(path: Path, table: pd.DataFrame) -> list[str]:
    """See to it that N is in billions."""
    counted = table["N"] >= TOO_MANY_BILLIONS
    if not counted.any():
        return []
    if not counted.all():
        raise MergelawError(
            f"{path}: N = {table['N'].max():g} stands beside N = {table['N'].min():g}: give all in "
            "billions of parameters"
        )
    table["N"] /= 1e9
    return ["N was taken to count parameters and was divided by 1e9; give it in billions"]
