"""What cells tell of the errors of the points: the sampling design's, the documents', the pool's.

All of it goes into columns of the table of points, so that a table can be fitted again as it was.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from math import comb
from typing import Any

import numpy as np
import pandas as pd

from mergelaw.laws.covariance import Array, Part, of_circles
from mergelaw.laws.points import CIRCLE, MACRO, POINT

GROUP = ["method", "family", "domain"]
PLACE = ["method", "family", "base", "domain"]
# Columns with a list in each place.
WIDE = ("documents", "design", "without")
# (method, family, base, domain) to tau^2, the scale of the pair part (``sampling``)
Tau2 = Mapping[tuple[str, str, str, str], float]


def describe(
    table: pd.DataFrame,
    rows: pd.DataFrame,
    documents: Iterable[pd.DataFrame] = (),
    tau2: Tau2 | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """Add what is known of the points' errors to their table.

    Args:
        table: points, as ``points.points`` gives them.
        rows: the evaluation rows that they were made from.
        documents: the same rows, in any pieces, with the columns document_nll and document_tokens.
        tau2: scale of the pair part, for bases with one circle, where a surrogate may tell it;
            without it their sampling error is not known.

    Returns:
        The table with the columns

        - ``documents`` and ``design``: rows of the covariances (nats^2) with the points of the same
          method, family and domain, in the table's order; 0 where nothing is known;
        - ``freedom``: degrees of freedom of the base's part of the design; NaN if it has none;
        - ``se``: standard error (nats per token) of the two; NaN where neither is known;
        - ``variance``: of the loss over the subsets of the pool (nats^2); NaN for a single one;
        - ``without``: the loss without each expert of the pool in its turn, NaN where not all
          subsets are measured;

        and sentences on what is not known.
    """
    merges = rows[rows["role"] == "merge"].copy()
    merges["experts"] = merges["experts"].map(tuple)
    merges = _with_macro(merges)
    means = merges.pivot_table(index=[*PLACE, "k"], columns="replicate", values="ce")
    shapes = {key: _shape(own) for key, own in merges.groupby(["family", "base"])}
    left_out = _without(merges)
    variances = merges.groupby([*PLACE, "k", "merge"])["ce"].mean().groupby([*PLACE, "k"])
    spread = variances.var(ddof=0).where(variances.size() > 1)
    sums = _document_sums(documents)

    warnings: list[str] = []
    single: dict[str, set[str]] = {}
    parts = []
    for _, own in table.groupby(GROUP, sort=False):
        method, family, domain = map(str, own[GROUP].iloc[0])
        count = len(own)
        design, freedom = np.zeros((count, count)), np.full(count, np.nan)
        for base in map(str, own["base"].unique()):
            at = np.flatnonzero(own["base"] == base)
            place = (method, family, base, domain)
            circles = pd.DataFrame(means.xs(place)).reindex(own["k"].iloc[at])
            shape, balanced = shapes[family, base]
            part = _design(circles, shape, balanced, (tau2 or {}).get(place))
            if part is None:
                single.setdefault(method, set()).add(base)
            else:
                design[np.ix_(at, at)] = part.matrix
                freedom[at] = part.freedom
        shared = _documents(sums, own, (method, family, domain))
        both = np.diag(design) + (0 if shared is None else np.diag(shared))
        keys = pd.MultiIndex.from_frame(own[[*PLACE, "k"]])
        parts.append(
            pd.DataFrame(
                {
                    "documents": list(np.zeros((count, count)) if shared is None else shared),
                    "design": list(design),
                    "freedom": freedom,
                    "se": np.where(both > 0, np.sqrt(both), np.nan),
                    "variance": spread.reindex(keys).to_numpy() + np.diag(design),
                    "without": [left_out.get(key) for key in keys],
                },
                index=own.index,
            )
        )
    for method, bases in single.items():
        warnings.append(
            f"one circle only of {method} on {', '.join(sorted(bases))}, and no surrogate that "
            "holds there: how far its means are from those over all subsets is not known and not "
            "in the intervals; set circles to 3 or more"
        )
    return table.join(pd.concat(parts)), warnings


def of_one_circle(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of methods on bases with one circle, whose error only a surrogate can tell."""
    place = ["method", "family", "base"]
    drawn = rows[(rows["role"] == "merge") & (rows["replicate"] >= 0)]
    circles = drawn.groupby(place)["replicate"].nunique()
    return rows.join((circles == 1).rename("_single"), on=place).query("_single == True")[
        list(rows.columns)
    ]


def _with_macro(merges: pd.DataFrame) -> pd.DataFrame:
    """Rows of merges, and of their macro losses where every domain has one."""
    merge = [name for name in POINT if name != "domain"] + [*CIRCLE, "merge"]
    domains = merges.groupby("family")["domain"].nunique()
    macro = merges.groupby(merge).agg(
        ce=("ce", "mean"), count=("ce", "size"), experts=("experts", "first")
    )
    macro = macro.reset_index()
    macro = macro[macro["count"] == macro["family"].map(domains)].assign(domain=MACRO)
    columns = [*POINT, *CIRCLE, "merge", "experts", "ce"]
    return pd.concat([merges[columns], macro[columns]], ignore_index=True)


def _shape(own: pd.DataFrame) -> tuple[dict[tuple[int, int], float], bool]:
    """Covariance of one circle's estimates at two k, up to tau^2, from who is with whom.

    q_ij is the share of the circle's subsets that hold both i and j, less its mean over all
    circles; the covariance is the sum over pairs of q q' / (k k')^2. With M rotations of a pattern
    that is ``sampling.design_variance``.

    Returns:
        By (k, k'); and whether every circle holds each expert equally often.
    """
    sampled = own[own["replicate"] >= 0]
    names = sorted(set(itertools.chain.from_iterable(own["experts"])))
    place = {name: i for i, name in enumerate(names)}
    pool, excess, balanced = len(names), {}, True
    if len(sampled):
        first = sampled[sampled["replicate"] == sampled["replicate"].min()]
        for k, level in first.drop_duplicates(["k", "merge"]).groupby("k"):
            member = np.zeros((len(level), pool))
            for i, experts in enumerate(level["experts"]):
                member[i, [place[name] for name in experts]] = 1
            balanced &= (len(level) > 1 and np.ptp(member.sum(axis=0)) == 0) or k == pool
            together = member.T @ member / len(level)
            np.fill_diagonal(together, 0)
            together -= k * (k - 1) / (pool * max(pool - 1, 1)) * (1 - np.eye(pool))
            excess[k] = together / k**2
    shape = {(a, b): float(np.sum(excess[a] * excess[b])) for a in excess for b in excess}
    return shape, bool(balanced)


def _design(
    circles: pd.DataFrame, shape: dict[tuple[int, int], float], balanced: bool, tau2: float | None
) -> Part | None:
    """Sampling covariance of a base's points; None where it cannot be told.

    Args:
        circles: estimates by k and replicate; a level measured exhaustively has replicate -1 only.
    """
    levels = list(circles.index)
    total = np.zeros((len(levels), len(levels)))
    drawn = circles.drop(columns=-1, errors="ignore")
    sampled = (
        drawn.notna().all(axis=1).to_numpy() if drawn.shape[1] else np.zeros(len(levels), bool)
    )
    if not sampled.any():
        return Part(total)
    means = drawn[sampled].to_numpy().T
    chosen = [k for k, kept in zip(levels, sampled, strict=True) if kept]
    own = np.array([[shape.get((a, b), 0.0) for b in chosen] for a in chosen])
    if balanced and not own.any():
        return Part(total)  # every circle has the same subsets
    if len(means) > 1 and balanced:
        part = of_circles(means, own)
    elif len(means) > 1:
        # Independent draws: of another level, other draws.
        part = Part(np.diag(np.var(means, axis=0, ddof=1)) / len(means), len(means) - 1)
    elif len(means) == 1 and balanced and tau2 is not None:
        part = Part(tau2 * own)
    else:
        return None
    total[np.ix_(sampled, sampled)] = part.matrix
    return Part(total, part.freedom)


def _without(merges: pd.DataFrame) -> dict[tuple[Any, ...], list[float]]:
    """The loss at each point from the subsets without one expert, for every expert in its turn.

    Only where all subsets of the pool are measured; the merge of all has nothing without one.
    """
    found: dict[tuple[Any, ...], list[float]] = {}
    for _, own in merges.groupby(["family", "base"]):
        names = sorted(set(itertools.chain.from_iterable(own["experts"])))
        pool = len(names)
        counts = Counter(own.drop_duplicates(["k", "merge"])["k"].tolist())
        whole = [k for k, count in counts.items() if k < pool and count == comb(pool, k)]
        cells = own[own["k"].isin(whole)].groupby([*PLACE, "k", "experts"])["ce"].mean()
        if not len(cells):
            continue
        frame = cells.reset_index("experts")
        columns = {
            name: frame["ce"].where(
                np.array([name not in experts for experts in frame["experts"]], dtype=bool)
            )
            for name in names
        }
        means = pd.DataFrame(columns).groupby(level=[*PLACE, "k"]).mean()
        found |= {key: list(values) for key, *values in means.itertuples(name=None)}
    return found


def _document_sums(pieces: Iterable[pd.DataFrame]) -> dict[tuple[Any, ...], dict[Any, list[Any]]]:
    """By point and circle: sum over subsets of the documents' NLL, their number, the tokens."""
    sums: dict[tuple[Any, ...], dict[Any, list[Any]]] = {}
    columns = [*PLACE, "k", *CIRCLE, "document_nll", "document_tokens"]
    for piece in pieces:
        for *place, seed, replicate, nll, tokens in piece.loc[
            piece["role"] == "merge", columns
        ].itertuples(index=False, name=None):
            circles = sums.setdefault(tuple(place), {})
            sofar = circles.setdefault((seed, replicate), [0.0, 0, None])
            sofar[0] = sofar[0] + np.asarray(nll, dtype=float)
            sofar[1] += 1
            sofar[2] = np.asarray(tokens, dtype=float)
    return sums


def _documents(
    sums: Mapping[tuple[Any, ...], Mapping[Any, list[Any]]],
    own: pd.DataFrame,
    group: tuple[str, str, str],
) -> Array | None:
    """Covariance of a group's points over documents like those that were evaluated, or None.

    A loss is the ratio of sums over documents, NLL over tokens, so its error is the mean of the
    documents' NLL less what their tokens would cost at that loss; cells share the documents. The
    domains' documents are independent of each other, of which the macro loss is the mean.
    """
    method, family, domain = group
    if not sums:
        return None
    if domain == MACRO:
        domains = sorted({place[3] for place in sums if place[:2] == (method, family)})
        parts = [_documents(sums, own, (method, family, name)) for name in domains]
        total = sum((part for part in parts if part is not None), np.zeros((len(own), len(own))))
        return total / len(domains) ** 2 if all(p is not None for p in parts) else None
    errors: list[Array] = []
    for base, k in own[["base", "k"]].itertuples(index=False):
        circles = sums.get((method, family, base, domain, k))
        if circles is None:
            return None
        nll = np.mean([total / count for total, count, _ in circles.values()], axis=0)
        tokens = next(iter(circles.values()))[2]
        errors.append((nll - nll.sum() / tokens.sum() * tokens) / tokens.sum())
    covariance = np.zeros((len(own), len(own)))
    # Another tokenizer may have dropped other documents: then they cannot be paired.
    for count in {len(error) for error in errors}:
        at = [i for i, error in enumerate(errors) if len(error) == count]
        table = np.array([errors[i] for i in at])
        if count > 1:
            covariance[np.ix_(at, at)] = table @ table.T * count / (count - 1)
    return covariance
