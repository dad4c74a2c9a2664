"""Points: what a law is fitted to, the mean cross-entropy at each (N, k)."""

import numpy as np
import pandas as pd

from mergelaw.errors import MergelawError

MACRO = "macro"
POINT = ["method", "family", "base", "N", "k", "domain"]
CIRCLE = ["seed", "replicate"]
COLUMNS = [*POINT, *CIRCLE, "merge", "role", "ce", "finite"]


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
