"""The quadratic surrogate: the loss of any merge of a pool from the merges that were measured.

Along the plane that the task vectors span, a smooth loss is about quadratic in the merging weights,
L(w) = L_0 + g.w + w.H.w / 2. Merges whose weights all sum to one identify no more of that than
L = w.Q.w (the base's level and the gradient are absorbed, for 1 = sum(w)), M(M+1)/2 coefficients.
With the base and every expert at a second scale all M + M(M+1)/2 + 1 are identified.

It is written, and shrunk, as

    L = sum_i s_i w_i - sum_(i<j) D_ij w_i w_j,        s_i = Q_ii,  D_ij = s_i + s_j - 2 Q_ij,

s_i the loss of expert i alone and D_ij what two experts gain by standing in one merge. Shrinkage
pulls D_ij to their mean; with all D_ij equal it is the law 1/k of a finite pool. (Q need not be
positive semi-definite, and the centred part is tested, not made so.)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from mergelaw.errors import MergelawError
from mergelaw.laws.points import MACRO

Array = NDArray[np.float64]
# Predicted and measured losses of tested merges by domain, and the merges' groups.
Unseen = tuple[Array, Array, NDArray[np.intp]]

# Shrinkage tried, as shares of the pair part's largest squared singular value.
SHRINKAGE = (0.0, *np.geomspace(1e-6, 1e2, 33))
# Singular values below this share of the largest are rounding errors.
RANK = 1e-9
# A cell whose leverage is within this of 1 cannot be foretold from the others.
OWN = 1e-8
# The check leaves out so many parts of the merges, one after the other,
FOLDS = 8
# needs at least so many of them,
LEAST = 8
# and passes from this rank correlation on, and up to this RMSE as a share of the spread.
CORRELATION = 0.95
ERROR = 0.25


@dataclass(frozen=True)
class Check:
    """How well the surrogate foretells merges that it was not fitted to, within the same k.

    Attributes:
        correlation: Spearman's rank correlation of predicted and measured loss, each about its mean
            over the tested merges of the same k: that loss falls with k is no merit.
        rmse: root mean squared error of the losses themselves (nats per token).
        spread: standard deviation of the measured losses within k (nats per token).
        merges: number of tested merges.
    """

    correlation: float
    rmse: float
    spread: float
    merges: int

    @property
    def passed(self) -> bool:
        return self.correlation >= CORRELATION and self.rmse <= ERROR * self.spread


@dataclass(frozen=True)
class Surrogate:
    """L(w) = level + gradient.w + w.curvature.w / 2 over merging weights w, of shape (M,).

    Attributes:
        experts: the pool's M experts; the order of weights.
        domain: the evaluation domain, or ``macro``.
        level, gradient, curvature: a number, (M,) and symmetric (M, M), in nats per token. Level
            and gradient are 0 and the curvature is 2 Q unless they are known ``apart``.
        apart: whether L_0, g and H are identified; if not, weights must sum to one.
        shrinkage: of the pair part, as a share of its largest squared singular value.
        cells: number of merges that it was fitted to.
        unknown: number of coefficients that those merges leave to the shrinkage alone.
        check: the check on merges not seen; None where there were none to spare.
    """

    experts: tuple[str, ...]
    domain: str
    level: float
    gradient: Array
    curvature: Array
    apart: bool
    shrinkage: float
    cells: int
    unknown: int
    check: Check | None

    @property
    def Q(self) -> Array:
        """(M, M), with L = w.Q.w for weights that sum to one."""
        return self.level + (self.gradient[:, None] + self.gradient) / 2 + self.curvature / 2

    @property
    def centred_eigenvalues(self) -> Array:
        """Eigenvalues of P Q P, P = 1 - 11'/M, ascending, (M - 1,); >= 0 for a convex loss."""
        M = len(self.experts)
        # An orthonormal basis of what sums to zero leaves out the eigenvalue 0 of 11'.
        basis = np.linalg.qr(np.eye(M)[:, 1:] - 1 / M).Q
        return np.linalg.eigvalsh(basis.T @ self.Q @ basis)

    def predict(self, weights: ArrayLike) -> Array:
        """Loss (nats per token) at weights (..., M).

        Raises:
            MergelawError: weights of another length; or they do not sum to one and L_0, g and H are
                not known apart.
        """
        w = np.asarray(weights, dtype=float)
        if w.ndim == 0 or w.shape[-1] != len(self.experts):
            raise MergelawError(
                f"surrogate: weights of shape {w.shape}; give {len(self.experts)}, one per expert: "
                + ", ".join(self.experts)
            )
        sums = w.sum(axis=-1)
        if not self.apart and not np.allclose(sums, 1, rtol=0, atol=1e-9):
            worst = float(sums.flat[np.abs(sums - 1).argmax()])
            raise MergelawError(
                f"surrogate: weights that sum to {worst:.6g}; its merges sum to one and identify "
                "nothing else: measure the base and every expert at a second scale"
            )
        return self.level + w @ self.gradient + ((w @ self.curvature) * w).sum(axis=-1) / 2

    def pool_mean(self, k: ArrayLike) -> Array:
        """E[L|k] over all k-subsets with equal weights (nats per token), in closed form.

        L_M + (L_1 - L_M)(M/k - 1)/(M - 1), with L_1 = mean(Q_ii) and L_M = mean(Q_ij).
        """
        sizes = np.asarray(k, dtype=float)
        M = len(self.experts)
        if not ((sizes >= 1) & (sizes <= M)).all():
            raise MergelawError(f"surrogate: k must be in 1..{M}, the sizes that its pool has")
        first, last = float(np.trace(self.Q)) / M, float(self.Q.mean())
        return finite_pool(sizes, first, last, M)

    @property
    def tau2(self) -> float:
        """Scale of V_design (nats squared), for ``sampling.design_variance``.

        ||B||_F^2 / (2M(M-3)), B the pair part of the curvature: its off-diagonal entries without
        what is additive in the two experts.
        """
        M = len(self.experts)
        if M < 4:
            return 0.0  # every pair part is additive
        H = 2 * self.Q
        H = H - np.diag(np.diag(H))
        rows = H.sum(axis=1)
        additive = (rows - rows.sum() / (2 * (M - 1))) / (M - 2)
        B = H - additive[:, None] - additive
        np.fill_diagonal(B, 0)
        return float((B**2).sum()) / (2 * M * (M - 3))

    @property
    def usable(self) -> bool:
        """Whether the check was made and passed."""
        return self.check is not None and self.check.passed

    @property
    def verdict(self) -> str:
        """Whether the surrogate may be used, and why, in a sentence."""
        if self.check is None:
            return (
                "not checked, so not to be used: no merges beyond those that fix its coefficients; "
                "measure a circle at one k >= 3 or more"
            )
        told = (
            f"on {self.check.merges} merges not seen, within k: rank correlation "
            f"{self.check.correlation:.3f}, RMSE {self.check.rmse:.2g} nats against a spread of "
            f"{self.check.spread:.2g}"
        )
        if self.check.passed:
            return f"may be used: {told}"
        return f"not to be used, the loss is not quadratic enough in the weights: {told}"

    def to_dict(self) -> dict[str, Any]:
        """The surrogate as values that strict JSON can hold."""
        check = self.check
        return {
            "experts": list(self.experts),
            "domain": self.domain,
            "Q": self.Q.tolist(),
            "apart": self.apart,
            "shrinkage": self.shrinkage,
            "cells": self.cells,
            "unknown": self.unknown,
            "tau2": self.tau2,
            "smallest_centred_eigenvalue": float(self.centred_eigenvalues[0]),
            "check": None
            if check is None
            else {
                "correlation": check.correlation,
                "rmse": check.rmse,
                "spread": check.spread,
                "merges": check.merges,
                "passed": check.passed,
            },
            "usable": self.usable,
            "verdict": self.verdict,
        }


def finite_pool(k: ArrayLike, first: float, last: float, M: int) -> Array:
    """E[L|k] of an exactly quadratic loss over all k-subsets of M experts (nats per token).

    Args:
        k: sizes, 1..M.
        first: L_1, the mean over single experts.
        last: L_M, the merge of all.
    """
    sizes = np.asarray(k, dtype=float)
    return last + (first - last) * (M / sizes - 1) / max(M - 1, 1)


@dataclass(frozen=True)
class _Basis:
    """Columns of the surrogate at some merges: free ones, and those of D_ij - mean(D)."""

    free: Array
    pairs: Array

    @staticmethod
    def at(weights: Array, apart: bool) -> "_Basis":
        total = weights.sum(axis=1, keepdims=True)
        i, j = np.triu_indices(weights.shape[1], 1)
        pairs = -weights[:, i] * weights[:, j]
        free = [weights, pairs.sum(axis=1, keepdims=True)]
        if apart:
            free = [np.ones_like(total), total * weights / 2, *free]
        return _Basis(np.hstack(free), pairs)

    def __getitem__(self, rows: NDArray[Any]) -> "_Basis":
        return _Basis(self.free[rows], self.pairs[rows])


class _Ridge:
    """Ridge regression of several losses on one basis, with the free columns projected out."""

    def __init__(self, basis: _Basis, losses: Array):
        self.basis, self.losses = basis, losses
        self.scale = np.linalg.norm(basis.free, axis=0)
        q, r = np.linalg.qr(basis.free / np.where(self.scale > 0, self.scale, 1))
        if len(r) < r.shape[1] or np.abs(np.diag(r)).min() < RANK:
            raise np.linalg.LinAlgError("the free columns are not independent")
        self.q, self.r = q, r
        rest = basis.pairs - q @ (q.T @ basis.pairs)
        u, s, vt = np.linalg.svd(rest, full_matrices=False)
        kept = s > RANK * max(s.max(initial=0), np.linalg.norm(basis.pairs))
        self.u, self.s, self.vt = u[:, kept], s[kept], vt[kept]
        self.rank = q.shape[1] + len(self.s)
        self.rest = losses - q @ (q.T @ losses)
        self.projected = self.u.T @ losses

    def _factors(self, shrinkage: float) -> Array:
        if not len(self.s):
            return np.empty(0)
        return self.s**2 / (self.s**2 + shrinkage * self.s[0] ** 2)

    def left_out(self, shrinkage: float) -> Array | None:
        """Errors of each cell foretold from all others; None where they are not defined."""
        factors = self._factors(shrinkage)
        leverage = (self.q**2).sum(axis=1) + (self.u**2) @ factors
        # A cell that alone fixes something (an expert alone) cannot be left out.
        known = leverage < 1 - OWN
        if not known.any() or (shrinkage == 0 and not known.all()):
            return None
        residuals = self.rest - self.u @ (factors[:, None] * self.projected)
        return residuals[known] / (1 - leverage[known, None])

    def choose(self) -> NDArray[np.intp]:
        """For each loss the shrinkage, a place in ``SHRINKAGE``, with the least leave-out error."""
        saturated = self.rank >= len(self.losses)
        best = np.zeros(self.losses.shape[1], dtype=np.intp)
        if saturated or not len(self.s):
            return best  # nothing is left over to choose by: through the cells
        least = np.full(self.losses.shape[1], np.inf)
        for place, shrinkage in enumerate(SHRINKAGE):
            errors = self.left_out(shrinkage)
            if errors is None:
                continue
            squares = (errors**2).mean(axis=0)
            # Exact data leave rounding errors alone at every small shrinkage: take the smallest.
            better = squares < least * (1 - 1e-6) - 1e-24
            best[better], least[better] = place, squares[better]
        return best

    def solve(self, chosen: NDArray[np.intp]) -> tuple[Array, Array]:
        """Coefficients of the free columns and of the pairs, a column for each loss."""
        factors = np.array([self._factors(SHRINKAGE[place]) for place in chosen]).T
        factors = factors.reshape(len(self.s), len(chosen))
        pairs = self.vt.T @ (factors * self.projected / self.s[:, None])
        free = np.linalg.solve(self.r, self.q.T @ (self.losses - self.basis.pairs @ pairs))
        return free / self.scale[:, None], pairs


def fit(
    weights: ArrayLike,
    losses: ArrayLike,
    experts: Sequence[str],
    domains: Sequence[str] = ("",),
) -> dict[str, Surrogate]:
    """Fit a surrogate per domain, and for their macro-average where there are several.

    Args:
        weights: (merges, M), what each task vector is multiplied by. Where they do not all sum to
            one, L_0, g and H are fitted apart; a base is a row of zeros.
        losses: (merges,) or (merges, domains), nats per token.
        experts: names of the M experts.
        domains: names of the domains.

    Returns:
        Surrogates by domain. The macro one is their mean, as the macro loss is.

    Raises:
        MergelawError: shapes that do not fit, values that are not finite, or merges that leave
            undetermined what no shrinkage can stand in for.
    """
    w, y = np.asarray(weights, dtype=float), np.asarray(losses, dtype=float)
    y = y[:, None] if y.ndim == 1 else y
    names = tuple(experts)
    if w.ndim != 2 or w.shape[1] != len(names) or y.shape != (len(w), len(domains)):
        raise MergelawError(
            f"surrogate: weights {w.shape} and losses {y.shape} do not fit {len(names)} experts and"
            f" {len(domains)} domains: give (merges, experts) and (merges, domains)"
        )
    if not (np.isfinite(w).all() and np.isfinite(y).all()):
        raise MergelawError("surrogate: a weight or a loss is not finite; leave that merge out")
    w, y = _one_row_each(w, y)
    sums = w.sum(axis=1)
    apart = not np.allclose(sums, 1, rtol=0, atol=1e-9)
    basis = _Basis.at(w, apart)
    coefficients = len(names) * (len(names) + 1) // 2 + (len(names) + 1 if apart else 0)
    try:
        ridge = _Ridge(basis, y)
    except np.linalg.LinAlgError:
        ridge = None
    if apart and (ridge is None or ridge.rank < coefficients):
        raise MergelawError(
            "surrogate: weights that do not sum to one, without the cells that tell L_0, g and H "
            "apart: measure the base, every expert at two scales and every pair"
        )
    if ridge is None:
        raise MergelawError(
            f"surrogate: {len(w)} merges do not tell the {len(names)} experts apart: measure each "
            "of them alone and some of them together"
        )
    chosen = ridge.choose()
    errors = _errors_on_unseen(w, y, basis, ridge.rank)
    free, pairs = ridge.solve(chosen)
    found = {}
    for d, domain in enumerate(domains):
        level, gradient, curvature = _natural(free[:, d], pairs[:, d], len(names), apart)
        found[domain] = Surrogate(
            experts=names,
            domain=domain,
            level=level,
            gradient=gradient,
            curvature=curvature,
            apart=apart,
            shrinkage=float(SHRINKAGE[chosen[d]]),
            cells=len(w),
            unknown=coefficients - ridge.rank,
            check=None if errors is None else _check(errors[0][:, d], errors[1][:, d], errors[2]),
        )
    if len(domains) > 1:
        found[MACRO] = _macro(found, errors)
    return found


def fit_rows(rows: pd.DataFrame) -> dict[str, Surrogate]:
    """Fit the surrogates of a base to evaluation rows, per evaluation domain and macro.

    Rows of one method give L = w.Q.w in the relative weights of the merges. Rows of several linear
    methods (average; task arithmetic at other scales) are merges of the same vectors with weights
    of different sums: with the base's own rows they tell L_0, g and H apart.

    Args:
        rows: evaluation rows (``evaluate.read_rows``) of one family, base and training seed.

    Raises:
        MergelawError: as ``fit``; or rows of several bases or of methods that do not go together.
    """
    experts, weights, losses = _merges(rows)
    return fit(weights, losses.to_numpy(), experts, list(losses.columns))


def tau2_of(rows: pd.DataFrame) -> dict[tuple[str, str, str, str], float]:
    """Scale of V_design where a surrogate may tell it: standard errors from a single circle.

    Args:
        rows: evaluation rows of a study.

    Returns:
        tau^2 (nats squared) by (method, family, base, domain), macro among the domains, for every
        surrogate whose check passed; one training seed each.
    """
    found = {}
    merges = rows[rows["role"] == "merge"]
    for (method, family, base), own in merges.groupby(["method", "family", "base"]):
        try:
            surrogates = fit_rows(own)
        except MergelawError:
            continue  # several seeds, or too few merges: then there is nothing to tell
        for domain, surrogate in surrogates.items():
            if surrogate.usable:
                found[str(method), str(family), str(base), domain] = surrogate.tau2
    return found


def difference_estimate(rows: pd.DataFrame) -> pd.DataFrame:
    """Estimate E[L|k] by surrogate and circles: closer than circles alone, and as unbiased.

    The surrogate is fitted to the merges that were not drawn (all singles and pairs, and whatever
    other level was measured exhaustively). Its pool mean, plus the circles' mean of measured minus
    predicted, has the expectation of a circle's plain mean whether or not the loss is quadratic.

    Args:
        rows: evaluation rows of one family, base, training seed and method.

    Returns:
        One row per (domain, k), macro among the domains: ce, its standard error se over circles
        (nats per token; 0 where the level is exhaustive, NaN for a single circle), plain (the mean
        over circles) and circles.

    Raises:
        MergelawError: not all singles and pairs were measured; or as ``fit_rows``.
    """
    rows = rows[rows["role"] == "merge"]
    drawn = rows["replicate"] >= 0
    experts, weights, _ = _merges(rows[~drawn])
    M = len(experts)
    sizes = (weights != 0).sum(axis=1)
    everyone = {name for names in rows["experts"] for name in names}
    needed = M + M * (M - 1) // 2
    if everyone != set(experts) or (sizes <= 2).sum() < needed:
        raise MergelawError(
            "difference estimate: not all single experts and pairs are measured; set "
            f"exhaustive_up_to: {len(everyone) * (len(everyone) - 1) // 2} or more"
        )
    surrogates = fit_rows(rows[~drawn])
    place = ["k", "replicate", "merge"]
    wide = rows.pivot_table(index=place, columns="domain", values="ce", dropna=False)
    wide = wide.dropna(how="all")
    if wide.shape[1] > 1:
        wide[MACRO] = wide.mean(axis=1, skipna=False)
    members = rows.drop_duplicates("merge").set_index("merge")["experts"]
    relative = np.array(
        [np.isin(experts, members[name]) / len(members[name]) for _, _, name in wide.index]
    )
    records = []
    for domain, ce in wide.items():
        surrogate = surrogates[str(domain)]
        table = pd.DataFrame({"ce": ce, "error": ce - surrogate.predict(relative)})
        # A circle with a loss that is not finite goes as a whole, or its mean would be biased.
        circles = table.groupby(place[:2]).agg(_mean).dropna().reset_index()
        for k in sorted(set(circles["k"])):
            group = circles[circles["k"] == k]
            plain, R = float(group["ce"].mean()), len(group)
            if (group["replicate"] < 0).all():
                records.append((domain, k, plain, 0.0, plain, 0))
                continue
            mean = float(surrogate.pool_mean(k) + group["error"].mean())
            se = float(group["error"].std(ddof=1)) / np.sqrt(R) if R > 1 else np.nan
            records.append((domain, k, mean, se, plain, R))
    return pd.DataFrame(records, columns=["domain", "k", "ce", "se", "plain", "circles"])


def _mean(values: pd.Series) -> float:
    return float(values.mean(skipna=False))


def _merges(rows: pd.DataFrame) -> tuple[tuple[str, ...], Array, pd.DataFrame]:
    """Experts, weights (merges, M) and losses (merges by domains) of a base's rows."""
    for name in ("family", "base", "seed"):
        if len(rows[name].unique()) > 1:
            raise MergelawError(
                f"surrogate: rows of several values of {name}: it is for one pool of one base, "
                "pass the rows of one"
            )
    methods = sorted(set(rows.loc[rows["role"] == "merge", "recipe"]))
    if not methods:
        raise MergelawError("surrogate: no row is a merge: evaluate a plan with k >= 1 first")
    # One method's weights are relative, and sum to one; the base has none among them.
    several = len(methods) > 1
    used = rows[rows["role"].isin(["merge", "base"] if several else ["merge"])]
    used = used[used["finite"].astype(bool)]
    experts = tuple(dict.fromkeys(name for names in used["experts"] for name in names))
    place = {name: i for i, name in enumerate(experts)}
    scales = {recipe: _scale(recipe) if several else None for recipe in methods}
    wide = used.pivot_table(index=["recipe", "merge"], columns="domain", values="ce").dropna()
    first = used.drop_duplicates(["recipe", "merge"]).set_index(["recipe", "merge"])
    first = first.loc[wide.index, ["experts", "weights"]]
    weights = np.zeros((len(first), len(experts)))
    for row, (recipe, names, given) in enumerate(
        zip(first.index.get_level_values("recipe"), first["experts"], first["weights"], strict=True)
    ):
        if not len(names):
            continue
        relative = np.asarray(given, dtype=float)
        scale = scales[recipe]
        if scale is None or scale[1]:
            relative = relative / relative.sum()
        weights[row, [place[name] for name in names]] = relative * (scale[0] if scale else 1)
    return experts, weights, wide


def _scale(recipe: str) -> tuple[float, bool]:
    """What a linear method multiplies the vectors with, and whether their mean or their sum."""
    method = json.loads(recipe)
    if method["method"] == "average":
        return 1.0, True
    if method["method"] == "task_arithmetic":
        return float(method["lambda"]), bool(method["normalize"])
    raise MergelawError(
        f"surrogate: rows of {method['method']} beside those of another method: only average and "
        "task_arithmetic merge the same vectors, pass the rows of one method"
    )


def _one_row_each(w: Array, y: Array) -> tuple[Array, Array]:
    """Merges in one order, whatever the table's; one that is there twice counts once."""
    _, first, inverse = np.unique(w.round(12), axis=0, return_index=True, return_inverse=True)
    counts = np.bincount(inverse.ravel())
    means = np.zeros((len(first), y.shape[1]))
    np.add.at(means, inverse.ravel(), y)
    return w[first], means / counts[:, None]


def _natural(free: Array, pairs: Array, M: int, apart: bool) -> tuple[float, Array, Array]:
    """Level, gradient and curvature of a solution in the columns of ``_Basis``."""
    D = np.zeros((M, M))
    i, j = np.triu_indices(M, 1)
    D[i, j] = D[j, i] = pairs + free[-1]
    if apart:
        level, own, gradient = float(free[0]), free[1 : M + 1], free[M + 1 : -1]
    else:
        level, own, gradient = 0.0, 2 * free[:M], np.zeros(M)
    curvature = (own[:, None] + own) / 2 - D
    return level, gradient, curvature


def _errors_on_unseen(w: Array, y: Array, basis: _Basis, rank: int) -> Unseen | None:
    """Predicted and measured losses (tested merges, domains) of merges left out, and their group.

    Tested are merges beyond singles and pairs, which are what the surrogate is made of, in parts;
    every tested merge is foretold from all others but those of its part.
    """
    sizes = (w != 0).sum(axis=1)
    groups = np.unique(
        np.column_stack([sizes, w.sum(axis=1).round(9)]), axis=0, return_inverse=True
    )
    group = groups[1].ravel()
    crowd = np.bincount(group)[group]
    tested = np.flatnonzero((sizes >= 3) & (crowd >= 3))
    if len(tested) < LEAST or len(w) - rank < 1:
        return None
    # Parts that are alike in k, and the same ones every time.
    order = np.random.default_rng(0).permutation(len(tested))
    order = order[np.argsort(group[tested[order]], kind="stable")]
    part = np.empty(len(tested), dtype=int)
    part[order] = np.arange(len(tested)) % FOLDS
    predicted = np.empty((len(tested), y.shape[1]))
    for fold in range(FOLDS):
        out = tested[part == fold]
        kept = np.setdiff1d(np.arange(len(w)), out)
        if not len(out):
            continue
        try:
            ridge = _Ridge(basis[kept], y[kept])
        except np.linalg.LinAlgError:
            return None
        free, pairs = ridge.solve(ridge.choose())
        predicted[part == fold] = basis.free[out] @ free + basis.pairs[out] @ pairs
    return predicted, y[tested], group[tested]


def _check(predicted: Array, measured: Array, group: NDArray[np.intp]) -> Check:
    from scipy.stats import spearmanr

    def centred(values: Array) -> Array:
        means = np.bincount(group, values) / np.maximum(np.bincount(group), 1)
        return values - means[group]

    within = centred(measured)
    constant = np.ptp(within) == 0 or np.ptp(centred(predicted)) == 0
    return Check(
        correlation=0.0 if constant else float(spearmanr(centred(predicted), within).statistic),
        rmse=float(np.sqrt(np.mean((predicted - measured) ** 2))),
        spread=float(np.sqrt(np.mean(within**2))),
        merges=len(measured),
    )


def _macro(domains: Mapping[str, Surrogate], errors: Unseen | None) -> Surrogate:
    parts = list(domains.values())
    first = parts[0]
    return Surrogate(
        experts=first.experts,
        domain=MACRO,
        level=float(np.mean([part.level for part in parts])),
        gradient=np.mean([part.gradient for part in parts], axis=0),
        curvature=np.mean([part.curvature for part in parts], axis=0),
        apart=first.apart,
        shrinkage=float(np.mean([part.shrinkage for part in parts])),
        cells=first.cells,
        unknown=first.unknown,
        check=None
        if errors is None
        else _check(errors[0].mean(axis=1), errors[1].mean(axis=1), errors[2]),
    )
