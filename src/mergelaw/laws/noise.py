"""Errors of points, estimated from cells: design, documents and pool."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from math import comb
from typing import Any

import numpy as np
import pandas as pd

from mergelaw.laws.experts import pair_scale
from mergelaw.laws.law import Array
from mergelaw.laws.notes import Note
from mergelaw.laws.points import CIRCLE, POINT, macro_domains

GROUP = ["method", "family", "domain"]
PLACE = ["method", "family", "base", "domain"]
# Columns that hold lists.
WIDE = ("documents", "sampling", "without")
# Covariance of one circle's estimates up to tau^2, by (k, k').
Shape = dict[tuple[int, int], float]
# By point and circle: [sum over subsets of the documents' NLL, number of subsets, tokens].
DocumentSums = dict[tuple[Any, ...], dict[Any, list[Any]]]


def describe(
    table: pd.DataFrame,
    rows: pd.DataFrame,
    documents: Iterable[pd.DataFrame] = (),
) -> tuple[pd.DataFrame, list[Note]]:
    """Add the points' measurement errors to their table.

    Args:
        table: points, as ``points.points`` returns them.
        rows: the evaluation rows under them.
        documents: the same rows, in any pieces, with the columns document_nll and document_tokens.

    Returns:
        Warnings on unknown errors, after the table with the columns

        - ``sampling``: rows F of a factor of a base's sampling covariance F F' (nats);
          zeros where there is none or it is unknown;
        - ``freedom``: degrees of freedom of its scale; NaN if it is exact;
        - ``documents``: rows of a factor of the covariance over documents like the evaluated ones,
          of all points of a method, family and domain (nats); None where unknown;
        - ``se``: standard error of sampling (nats per token); NaN where it has none;
        - ``variance``: of the loss over the pool's subsets (nats^2); NaN for a single subset;
        - ``without``: the loss without each expert of the pool in turn; None unless all subsets
          are measured.
    """
    merges = with_macro(rows)
    means = merges.pivot_table(index=[*PLACE, "k"], columns="replicate", values="ce")
    shapes = {key: _shape(group) for key, group in merges.groupby(["family", "base"])}
    jackknife = _jackknife(merges)
    variances = merges.groupby([*PLACE, "k", "merge"])["ce"].mean().groupby([*PLACE, "k"])
    spread = variances.var(ddof=0).where(variances.size() > 1)
    sums, averages = _document_sums(documents), macro_domains(rows[rows["role"] == "merge"])

    single: dict[str, set[str]] = {}
    parts = []
    for _, group in table.groupby(GROUP, sort=False):
        design, freedom, unknown = _group_design(group, means, shapes, merges)
        if unknown:
            single.setdefault(str(group["method"].iloc[0]), set()).update(unknown)
        shared = _documents(sums, group, averages, *map(str, group[GROUP].iloc[0]))
        variance = np.sum(design**2, axis=1)
        keys = pd.MultiIndex.from_frame(group[[*PLACE, "k"]])
        columns = {
            "documents": [None] * len(group) if shared is None else list(_compressed(shared)),
            "sampling": list(design),
            "freedom": freedom,
            "se": np.where(variance > 0, np.sqrt(variance), np.nan),
            "variance": spread.reindex(keys).to_numpy() + variance,
            "without": [jackknife.get(key) for key in keys],
        }
        parts.append(pd.DataFrame(columns, index=group.index))
    return table.join(pd.concat(parts)), [
        Note(
            "one_circle",
            f"{method} on {', '.join(sorted(bases))} was measured on one circle only, so its "
            "sampling error is unknown and missing from the intervals; set `circles: 3`",
        )
        for method, bases in single.items()
    ]


def _group_design(
    group: pd.DataFrame,
    means: pd.DataFrame,
    shapes: Mapping[Any, Shape],
    merges: pd.DataFrame,
) -> tuple[Array, Array, list[str]]:
    """Factor of the sampling covariance, its freedom, and bases where both are unknown."""
    method, family, domain = map(str, group[GROUP].iloc[0])
    count = len(group)
    design, freedom, unknown = np.zeros((count, count)), np.full(count, np.nan), []
    for base in map(str, group["base"].unique()):
        rows = np.flatnonzero(group["base"] == base)
        place = (method, family, base, domain)
        circles = pd.DataFrame(means.xs(place)).reindex(group["k"].iloc[rows])
        tau2 = None
        if len(set(circles.columns) - {-1}) == 1:
            tau2 = pair_scale(merges[(merges[PLACE] == place).all(axis=1)])
        part = _design(circles, shapes[family, base], tau2)
        if part is None:
            unknown.append(base)
        else:
            factor = _compressed(_root(part[0]))
            design[rows, : factor.shape[1]] = factor
            freedom[rows] = part[1]
    return design[:, : max(int(design.any(axis=0).sum()), 1)], freedom, unknown


def _root(matrix: Array) -> Array:
    """A factor F of a covariance F F'."""
    values, vectors = np.linalg.eigh(matrix)
    root: Array = vectors * np.sqrt(np.maximum(values, 0))
    return root


def _compressed(factor: Array) -> Array:
    """The factor's leading directions, which hold all but a millionth of its variance."""
    left, values, _ = np.linalg.svd(factor, full_matrices=False)
    rest = np.cumsum(values[::-1] ** 2)[::-1]
    kept = max(int((rest > 1e-6 * rest[0]).sum()), 1)
    compressed: Array = (left * values)[:, :kept]
    return compressed


def with_macro(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of merges, with rows of their macro losses where every domain has a loss."""
    merges = rows[rows["role"] == "merge"].copy()
    merges["experts"] = merges["experts"].map(tuple)
    merge = [name for name in POINT if name != "domain"] + [*CIRCLE, "merge"]
    parts = [merges]
    for (family, name), domains in macro_domains(merges).items():
        losses = merges[(merges["family"] == family) & merges["domain"].isin(domains)]
        macro = losses.groupby(merge).agg(
            ce=("ce", "mean"), count=("ce", "size"), experts=("experts", "first")
        )
        parts.append(macro[macro["count"] == len(domains)].reset_index().assign(domain=name))
    columns = [*POINT, *CIRCLE, "merge", "experts", "ce"]
    return pd.concat([part[columns] for part in parts], ignore_index=True)


def _shape(merges: pd.DataFrame) -> Shape:
    """Covariance of one circle's estimates up to tau^2, from the experts that share subsets.

    q_ij is the share of the circle's subsets that contain both i and j, less its mean over all
    circles; the covariance is the sum over pairs of q q' / (k k')^2.
    """
    sampled = merges[merges["replicate"] >= 0]
    names = sorted(set(itertools.chain.from_iterable(merges["experts"])))
    place = {name: i for i, name in enumerate(names)}
    pool, excess = len(names), {}
    if len(sampled):
        first = sampled[sampled["replicate"] == sampled["replicate"].min()]
        for k, level in first.drop_duplicates(["k", "merge"]).groupby("k"):
            member = np.zeros((len(level), pool))
            for i, experts in enumerate(level["experts"]):
                member[i, [place[name] for name in experts]] = 1
            together = member.T @ member / len(level)
            np.fill_diagonal(together, 0)
            together -= k * (k - 1) / (pool * max(pool - 1, 1)) * (1 - np.eye(pool))
            excess[k] = together / k**2
    return {(a, b): float(np.sum(excess[a] * excess[b])) for a in excess for b in excess}


def _design(circles: pd.DataFrame, shape: Shape, tau2: float | None) -> tuple[Array, float] | None:
    """Sampling covariance of a base's points and its freedom, NaN if exact; None if unknown.

    A covariance estimated level by level from three circles has rank two and misleads as weights,
    so the variance between circles gives the scale of the shape only.
    """
    total = np.zeros((len(circles), len(circles)))
    drawn = circles.drop(columns=-1, errors="ignore")
    sampled = drawn.notna().all(axis=1).to_numpy() & bool(drawn.shape[1])
    levels = circles.index[sampled]
    unit = np.array([[shape.get((a, b), 0.0) for b in levels] for a in levels])
    if not unit.any():
        return total, np.nan  # exhaustive, or every circle has the same subsets
    means = drawn[sampled].to_numpy().T
    if len(means) > 1:
        scale = float(np.var(means, axis=0, ddof=1).sum()) / float(np.trace(unit)) / len(means)
    elif tau2 is not None:
        scale = tau2
    else:
        return None
    total[np.ix_(sampled, sampled)] = scale * unit
    return total, len(means) - 1 if len(means) > 1 else np.nan


def _jackknife(merges: pd.DataFrame) -> dict[tuple[Any, ...], list[float]]:
    """Losses at points over the subsets without one expert, for every expert in turn."""
    means_by_point: dict[tuple[Any, ...], list[float]] = {}
    for _, group in merges.groupby(["family", "base"]):
        names = sorted(set(itertools.chain.from_iterable(group["experts"])))
        pool = len(names)
        counts = Counter(group.drop_duplicates(["k", "merge"])["k"].tolist())
        whole = [k for k, count in counts.items() if k < pool and count == comb(pool, k)]
        cells = group[group["k"].isin(whole)].groupby([*PLACE, "k", "experts"])["ce"].mean()
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
        means_by_point |= {key: list(values) for key, *values in means.itertuples(name=None)}
    return means_by_point


def _document_sums(pieces: Iterable[pd.DataFrame]) -> DocumentSums:
    """Sums over subsets of the documents' NLL, by point and circle."""
    sums: DocumentSums = {}
    columns = [*PLACE, "k", *CIRCLE, "document_nll", "document_tokens"]
    for piece in pieces:
        for *place, seed, replicate, nll, tokens in piece.loc[
            piece["role"] == "merge", columns
        ].itertuples(index=False, name=None):
            circles = sums.setdefault(tuple(place), {})
            total = circles.setdefault((seed, replicate), [0.0, 0, None])
            total[0] = total[0] + np.asarray(nll, dtype=float)
            total[1] += 1
            total[2] = np.asarray(tokens, dtype=float)
    return sums


def _documents(
    sums: DocumentSums,
    points: pd.DataFrame,
    averages: Mapping[tuple[str, str], list[str]],
    method: str,
    family: str,
    domain: str,
) -> Array | None:
    """Factor of a group's covariance over documents like the evaluated ones; None if unknown."""
    if not sums:
        return None
    if domains := averages.get((family, domain)):
        parts = [_documents(sums, points, {}, method, family, name) for name in domains]
        present = [part for part in parts if part is not None]
        return np.hstack(present) / len(domains) if len(present) == len(parts) else None
    errors: list[Array] = []
    for base, k in points[["base", "k"]].itertuples(index=False):
        circles = sums.get((method, family, base, domain, k))
        if circles is None:
            return None
        nll = np.mean([total / count for total, count, _ in circles.values()], axis=0)
        tokens = next(iter(circles.values()))[2]
        errors.append((nll - nll.sum() / tokens.sum() * tokens) / tokens.sum())
    factors = []
    # Pair only bases with the same documents: tokenizers may drop different ones.
    for count in sorted({len(error) for error in errors}):
        factor = np.zeros((len(points), count))
        rows = [i for i, error in enumerate(errors) if len(error) == count]
        factor[rows] = [errors[i] for i in rows]
        factors.append(factor * math.sqrt(count / max(count - 1, 1)))
    return np.hstack(factors)
