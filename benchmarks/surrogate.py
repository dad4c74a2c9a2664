"""Quadratic surrogate: the loss of any merge of a pool, predicted from measured merges.

For weights w that sum to one, L = w.Q.w = sum_i s_i w_i - sum_(i<j) D_ij w_i w_j: s_i is the loss
of expert i alone, D_ij = s_i + s_j - 2 Q_ij the gain of two experts in one merge. Shrinkage pulls
D_ij to their mean; with all D_ij equal, E[L|k] is the law 1/k of a finite pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from mergelaw.errors import MergelawError
from mergelaw.laws.law import Array
from mergelaw.laws.points import MACRO

# Candidate shrinkages, as shares of the pair part's largest squared singular value.
SHRINKAGE = (0.0, *np.geomspace(1e-6, 1e2, 33))
# Singular values below this share of the largest are rounding errors.
RANK = 1e-9
# A cell with leverage this close to 1 cannot be predicted from the others.
FULL_LEVERAGE = 1e-8
# The check holds out this many parts of the tested merges in turn, and needs as many merges.
FOLDS = 8
# The check needs at least this rank correlation and at most this RMSE, relative to the spread.
CORRELATION = 0.95
ERROR = 0.25


@dataclass(frozen=True)
class Check:
    """Prediction of held-out merges.

    Attributes:
        correlation: Spearman's rank correlation of predicted and measured losses within the same k;
            the fall of the loss with k does not count.
        rmse: root mean squared error (nats per token).
        spread: standard deviation of the measured losses within k (nats per token).
    """

    correlation: float
    rmse: float
    spread: float


@dataclass(frozen=True)
class Surrogate:
    """L(w) = w.Q.w over merging weights w, of shape (M,), that sum to one.

    Attributes:
        experts: the pool's M experts; the order of weights.
        Q: symmetric (M, M), in nats per token.
        check: prediction of held-out merges; None if there are too few merges.
    """

    experts: tuple[str, ...]
    Q: Array
    check: Check | None

    def predict(self, weights: ArrayLike) -> Array:
        """Loss (nats per token) at weights (..., M).

        Raises:
            MergelawError: weights of another length, or that do not sum to one.
        """
        w = np.asarray(weights, dtype=float)
        if w.ndim == 0 or w.shape[-1] != len(self.experts):
            raise MergelawError(
                f"surrogate: weights of shape {w.shape}; give {len(self.experts)}, one per expert: "
                + ", ".join(self.experts)
            )
        _check_sums(w)
        losses: Array = ((w @ self.Q) * w).sum(axis=-1)
        return losses

    @property
    def tau2(self) -> float:
        """Scale of a circular design's variance (nats squared): ||B||_F^2 / (2M(M-3)).

        B is the pair part of 2 Q: off-diagonal entries less their additive part.
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
        """True if the surrogate predicts held-out merges well enough to be used."""
        check = self.check
        return (
            check is not None
            and check.correlation >= CORRELATION
            and check.rmse <= ERROR * check.spread
        )


def _check_sums(w: Array) -> None:
    sums = np.atleast_1d(w.sum(axis=-1))
    if not np.allclose(sums, 1, rtol=0, atol=1e-9):
        worst = float(sums.flat[np.abs(sums - 1).argmax()])
        raise MergelawError(
            f"surrogate: weights sum to {worst:.6g}; it describes merges whose weights sum to one: "
            "divide by the sum"
        )


def _columns(weights: Array) -> tuple[Array, Array]:
    """Columns of the coefficients s_i and mean(D), and of the coefficients D_ij - mean(D)."""
    i, j = np.triu_indices(weights.shape[1], 1)
    pairs = -weights[:, i] * weights[:, j]
    return np.hstack([weights, pairs.sum(axis=1, keepdims=True)]), pairs


class _Ridge:
    """Ridge regression of several losses, with only the coefficients D_ij - mean(D) shrunk."""

    def __init__(self, weights: Array, losses: Array):
        free, self.pairs = _columns(weights)
        self.losses = losses
        self.scale = np.linalg.norm(free, axis=0)
        q, r = np.linalg.qr(free / np.where(self.scale > 0, self.scale, 1))
        if len(r) < r.shape[1] or np.abs(np.diag(r)).min() < RANK:
            raise MergelawError(
                f"surrogate: {len(weights)} merges do not distinguish the {weights.shape[1]} "
                "experts: measure each of them alone and some of them together"
            )
        self.q, self.r = q, r
        rest = self.pairs - q @ (q.T @ self.pairs)
        u, s, vt = np.linalg.svd(rest, full_matrices=False)
        kept = s > RANK * max(s.max(initial=0), np.linalg.norm(self.pairs))
        self.u, self.s, self.vt = u[:, kept], s[kept], vt[kept]
        self.rank = q.shape[1] + len(self.s)
        self.rest = losses - q @ (q.T @ losses)
        self.projected = self.u.T @ losses

    def _factors(self, shrinkage: float) -> Array:
        factors: Array = self.s**2 / (self.s**2 + shrinkage * self.s[:1] ** 2)
        return factors

    def _leave_one_out(self, shrinkage: float) -> Array | None:
        """Error of each cell predicted from all others; None where undefined."""
        factors = self._factors(shrinkage)
        leverage = (self.q**2).sum(axis=1) + (self.u**2) @ factors
        # Some cells determine a coefficient alone, as single experts do, and cannot be left out.
        defined = leverage < 1 - FULL_LEVERAGE
        if not defined.any() or (shrinkage == 0 and not defined.all()):
            return None
        residuals = self.rest - self.u @ (factors[:, None] * self.projected)
        errors: Array = residuals[defined] / (1 - leverage[defined, None])
        return errors

    def _shrinkages(self) -> Array:
        """Shrinkage of the least leave-one-out error, for each loss."""
        best = np.zeros(self.losses.shape[1])
        if self.rank >= len(self.losses):
            return best  # without residuals, interpolate the cells
        least = np.full(len(best), np.inf)
        for shrinkage in SHRINKAGE:
            errors = self._leave_one_out(shrinkage)
            if errors is None:
                continue
            squares = (errors**2).mean(axis=0)
            # On exact data only rounding errors remain, so take the smallest shrinkage.
            better = squares < least * (1 - 1e-6) - 1e-24
            best[better], least[better] = shrinkage, squares[better]
        return best

    def solve(self) -> tuple[Array, Array]:
        """Coefficients of the free columns and of the pairs, one column per loss."""
        factors = np.array([self._factors(shrinkage) for shrinkage in self._shrinkages()]).T
        pairs = self.vt.T @ (factors * self.projected / self.s[:, None])
        free = np.linalg.solve(self.r, self.q.T @ (self.losses - self.pairs @ pairs))
        return free / self.scale[:, None], pairs


def fit(
    weights: ArrayLike,
    losses: ArrayLike,
    experts: Sequence[str],
    domains: Sequence[str] = ("",),
) -> dict[str, Surrogate]:
    """Fit a surrogate per domain, and their mean as ``macro`` where there are several.

    Args:
        weights: (merges, M), the weights of the task vectors; each row sums to one.
        losses: (merges,) or (merges, domains), nats per token.

    Raises:
        MergelawError: shapes that do not match, values that are not finite, weights that do not sum
            to one, or merges that do not determine the experts' own losses.
    """
    w, y = np.asarray(weights, dtype=float), np.asarray(losses, dtype=float)
    y = y[:, None] if y.ndim == 1 else y
    M = len(experts)
    if w.ndim != 2 or w.shape[1] != M or y.shape != (len(w), len(domains)):
        raise MergelawError(
            f"surrogate: weights {w.shape} and losses {y.shape} do not match {M} experts and "
            f"{len(domains)} domains: give (merges, experts) and (merges, domains)"
        )
    if not (np.isfinite(w).all() and np.isfinite(y).all()):
        raise MergelawError("surrogate: a weight or a loss is not finite; leave that merge out")
    _check_sums(w)
    w, y = _distinct(w, y)
    ridge = _Ridge(w, y)
    free, pairs = ridge.solve()
    matrices = [_matrix(free[:, d], pairs[:, d], M) for d in range(len(domains))]
    checks = _checks(w, y, ridge.rank)
    if len(domains) > 1:
        domains, matrices = [*domains, MACRO], [*matrices, np.mean(matrices, axis=0)]
    return {
        domain: Surrogate(tuple(experts), Q, check)
        for domain, Q, check in zip(domains, matrices, checks, strict=False)
    }


def fit_rows(rows: pd.DataFrame) -> dict[str, Surrogate]:
    """Fit the surrogates of a base to evaluation rows, per evaluation domain and macro.

    Args:
        rows: evaluation rows of one method, family, base and training seed.

    Raises:
        MergelawError: as ``fit``; or rows of several bases, seeds or methods.
    """
    rows = rows[rows["role"] == "merge"]
    if rows.empty:
        raise MergelawError("surrogate: no row is a merge: evaluate merges of k >= 1 first")
    for name in ("family", "base", "seed", "recipe"):
        if len(rows[name].unique()) > 1:
            raise MergelawError(
                f"surrogate: rows of several values of {name}: pass the rows of one method and base"
            )
    rows = rows[rows["finite"].astype(bool)]
    experts = tuple(dict.fromkeys(name for names in rows["experts"] for name in names))
    place = {name: i for i, name in enumerate(experts)}
    losses = rows.pivot_table(index="merge", columns="domain", values="ce").dropna()
    first = rows.drop_duplicates("merge").set_index("merge").loc[losses.index]
    weights = np.zeros((len(first), len(experts)))
    for row, names, values in zip(weights, first["experts"], first["weights"], strict=True):
        relative = np.asarray(values, dtype=float)
        row[[place[name] for name in names]] = relative / relative.sum()
    return fit(weights, losses.to_numpy(), experts, list(losses.columns))


def tau2_of(rows: pd.DataFrame) -> dict[tuple[str, str, str, str], float]:
    """Scales tau^2 (nats^2) of single circles' sampling error, from surrogates that passed."""
    scales = {}
    merges = rows[rows["role"] == "merge"]
    for (method, family, base), group in merges.groupby(["method", "family", "base"]):
        try:
            surrogates = fit_rows(group)
        except MergelawError:
            continue  # several seeds, or too few merges
        for domain, surrogate in surrogates.items():
            if surrogate.usable:
                scales[str(method), str(family), str(base), domain] = surrogate.tau2
    return scales


def _distinct(w: Array, y: Array) -> tuple[Array, Array]:
    """Distinct merges, sorted; losses of repeated merges are averaged."""
    _, first, inverse = np.unique(w.round(12), axis=0, return_index=True, return_inverse=True)
    counts = np.bincount(inverse.ravel())
    means = np.zeros((len(first), y.shape[1]))
    np.add.at(means, inverse.ravel(), y)
    return w[first], means / counts[:, None]


def _matrix(free: Array, pairs: Array, M: int) -> Array:
    """Q from the coefficients."""
    D = np.zeros((M, M))
    i, j = np.triu_indices(M, 1)
    D[i, j] = D[j, i] = pairs + free[-1]
    alone = free[:M]
    return (alone[:, None] + alone - D) / 2


def _checks(w: Array, y: Array, rank: int) -> list[Check | None]:
    """Checks of each domain and their mean, on merges beyond pairs; parts are held out in turn."""
    unchecked: list[Check | None] = [None] * (y.shape[1] + 1)
    sizes = (w != 0).sum(axis=1)
    group = np.unique(sizes, return_inverse=True)[1].ravel()
    crowd = np.bincount(group)[group]
    tested = np.flatnonzero((sizes >= 3) & (crowd >= 3))
    if len(tested) < FOLDS or len(w) - rank < 1:
        return unchecked
    # Each part has an equal share of each k; parts are the same in every run.
    order = np.random.default_rng(0).permutation(len(tested))
    order = order[np.argsort(group[tested[order]], kind="stable")]
    part = np.empty(len(tested), dtype=int)
    part[order] = np.arange(len(tested)) % FOLDS
    predicted = np.empty((len(tested), y.shape[1]))
    for fold in range(FOLDS):
        held_out = tested[part == fold]
        kept = np.setdiff1d(np.arange(len(w)), held_out)
        try:
            coefficients = _Ridge(w[kept], y[kept]).solve()
        except MergelawError:
            return unchecked
        free, pairs = _columns(w[held_out])
        predicted[part == fold] = free @ coefficients[0] + pairs @ coefficients[1]
    measured = y[tested]
    pairs_of_losses = [*zip(predicted.T, measured.T, strict=True)]
    pairs_of_losses.append((predicted.mean(axis=1), measured.mean(axis=1)))
    return [_check(one, other, group[tested]) for one, other in pairs_of_losses]


def _check(predicted: Array, measured: Array, group: NDArray[np.intp]) -> Check:
    from scipy.stats import spearmanr  # scipy.stats takes long to import

    def centred(values: Array) -> Array:
        means = np.bincount(group, values) / np.maximum(np.bincount(group), 1)
        return values - means[group]

    within = centred(measured)
    constant = np.ptp(within) == 0 or np.ptp(centred(predicted)) == 0
    return Check(
        correlation=0.0 if constant else float(spearmanr(centred(predicted), within).statistic),
        rmse=float(np.sqrt(np.mean((predicted - measured) ** 2))),
        spread=float(np.sqrt(np.mean(within**2))),
    )
