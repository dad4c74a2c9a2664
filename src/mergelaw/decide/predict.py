"""Losses of merges that are not measured, predicted from those that are.

The prediction of a merge method is an expansion plus a Gaussian process that is fitted to the
measured merges of that method. Without gradients the expansion is 0, and the process is quadratic
in the merge's coefficients. Every prediction has a standard deviation, and every method a check on
measured merges that were left out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mergelaw.decide.measured import Array, Measured, Model
from mergelaw.errors import MergelawError
from mergelaw.merging.methods import Method, method_of

LEARNED = "learned"  # its coefficients are not a function of the experts' weights
ALL_SUBSETS = 10  # experts of whose subsets all are candidates
CANDIDATES = 2000  # about the most candidates of a larger pool
FITTED = 600  # measured merges of a method that a fit uses
SHRINKAGES = (0.0, *np.geomspace(1e-2, 1e8, 11))  # variances of terms, relative to the misfit's
LEVEL = 0.9  # one-sided confidence of a verdict
CORRELATION = 0.95  # a usable prediction's least rank correlation within k
ERROR = 0.25  # its largest RMSE, relative to the spread within k

Subsets = NDArray[np.bool_]


@dataclass(frozen=True)
class Check:
    """Prediction of measured merges of a method, each left out in turn.

    Attributes:
        merges: how many of them there are with two or more experts.
        correlation: rank correlation within k of predicted and measured losses; the fall with k
            does not count. NaN where no k has three merges.
        tail: the same among the third with the lowest predictions.
        error: RMSE over the standard deviation within k.
        verdict: ``usable`` if the correlation is at least .95 with 90% confidence, and the error
            at most .25, also in the lowest third.
    """

    merges: int
    correlation: float
    tail: float
    error: float
    verdict: Literal["usable", "not usable"]


class Process:
    """Gaussian process regression of several outputs that share their kernel.

    The kernel is a constant plus linear and squared terms in ``features``, (n, p), each with a
    variance that is chosen by the marginal likelihood, relative to the misfit's. ``residuals``,
    (n, outputs), are those of leaving each point out.
    """

    def __init__(self, features: Array, outputs: Array):
        self._features = features
        n = len(features)
        if not n:
            return
        scale = np.sqrt((features**2).mean(axis=0))
        self._scale = np.where(scale > 0, scale, 1.0)
        terms = self._terms(features)
        best = math.inf
        for linear in SHRINKAGES:
            for squared in SHRINKAGES:
                shares = np.array([SHRINKAGES[-1], linear, squared])
                kernel = np.tensordot(shares, terms, 1) + np.eye(n)
                sign, logdet = np.linalg.slogdet(kernel)
                inverse = np.linalg.inv(kernel)
                squares = np.einsum("nd,nm,md->d", outputs, inverse, outputs)
                score = len(squares) * logdet + n * np.log(np.maximum(squares, 1e-300)).sum()
                if sign > 0 and score < best:
                    best, self._shares, self._inverse = float(score), shares, inverse
        self._weights = self._inverse @ outputs
        leverage = self._inverse.diagonal()[:, None]
        self.residuals = self._weights / leverage
        # Leave-one-out residuals have variance covariance / leverage.
        self.covariance = (self.residuals * leverage).T @ self.residuals / max(n - 1, 1)

    def _terms(self, features: Array) -> Array:
        product = (features / self._scale) @ (self._features / self._scale).T
        product = product / features.shape[1]
        return np.stack([np.ones_like(product), product, product**2])

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Means, (C, outputs), and variances relative to ``covariance``, (C,)."""
        kernel = np.tensordot(self._shares, self._terms(features), 1)
        squares = (features / self._scale) ** 2
        own = squares.sum(axis=1) / features.shape[1]
        prior = self._shares[0] + self._shares[1] * own + self._shares[2] * own**2
        explained = np.einsum("cn,nm,cm->c", kernel, self._inverse, kernel)
        return kernel @ self._weights, 1 + np.maximum(prior - explained, 0)


@dataclass(frozen=True)
class Predictor:
    """Predicted losses of the merges of one base's pool.

    Subsets are a boolean array (C, M) in the order of ``experts``. Weights are a float array (C, M)
    instead, zero for an expert that is left out. Predictions that are not possible (an electing
    method's merge that is no candidate) are NaN, with an infinite standard deviation.

    Attributes:
        experts: the M experts of the pool.
        domains: evaluation domains; ``counted`` are their shares in the macro loss.
        methods: methods that it predicts, by name.
        checks: by method and domain, and ``macro``.
    """

    experts: tuple[str, ...]
    domains: tuple[str, ...]
    counted: Array
    methods: tuple[str, ...]
    checks: Mapping[str, Mapping[str, Check]] = field(default_factory=dict)
    _models: Mapping[str, "_Prediction"] = field(default_factory=dict, repr=False)

    def candidates(self, method: str) -> Subsets:
        """Subsets that can be predicted, (C, M): all of a pool of ten, or a sample."""
        self._model(method)
        return candidates(len(self.experts))

    def losses(self, method: str, subsets: ArrayLike) -> tuple[Array, Array]:
        """Losses by domain and their standard deviations, (C, domains), in nats per token."""
        mean, factor, covariance = self._predict(method, subsets)
        return mean, np.sqrt(factor[:, None] * covariance.diagonal())

    def macro(
        self, method: str, subsets: ArrayLike, shares: ArrayLike | None = None
    ) -> tuple[Array, Array]:
        """Weighted mean losses and their standard deviations, (C,).

        ``shares`` are the weights of domains; None: those of the macro loss. The standard deviation
        takes account of the errors' covariance between domains.
        """
        weights = self.counted if shares is None else np.asarray(shares, dtype=float)
        mean, factor, covariance = self._predict(method, subsets)
        return mean @ weights, np.sqrt(factor * (weights @ covariance @ weights))

    def _model(self, method: str) -> "_Prediction":
        if method not in self._models:
            raise MergelawError(
                f"predict: no merge by {method!r} is measured; measured are "
                + ", ".join(self.methods)
            )
        return self._models[method]

    def _predict(self, method: str, subsets: ArrayLike) -> tuple[Array, Array, Array]:
        model, weights = self._model(method), np.asarray(subsets, dtype=float)
        if weights.ndim != 2 or weights.shape[1] != len(self.experts):
            raise MergelawError(
                f"predict: merges of shape {weights.shape}; give one row a merge, with a value for "
                f"each of {', '.join(self.experts)}"
            )
        if not np.isfinite(weights).all() or not weights.any(axis=1).all():
            raise MergelawError("predict: a merge without experts, or a weight that is not finite")
        mean, factor = model.predict(weights)
        return mean, factor, model.process.covariance


class _Prediction:
    """The prediction of one method: ``losses``, (n, domains), are those of measured merges."""

    def __init__(self, method: Method, weights: Array, losses: Array):
        self._method = method
        self.process = Process(self._features(weights), losses)

    def _features(self, weights: Array) -> Array:
        return coefficients(self._method, weights)

    def predict(self, weights: Array) -> tuple[Array, Array]:
        return self.process.predict(self._features(weights))


def coefficients(method: Method, weights: Array) -> Array:
    """Coefficients of the experts' values, (C, M), in merges with these weights."""
    made = np.zeros(weights.shape)
    for row, values in zip(made, weights, strict=True):
        members = np.flatnonzero(values)
        rule = method.rule(values[members].tolist())
        shares = np.asarray(rule.weights) * rule.scale
        row[members] = shares / np.sum(rule.weights) if rule.elect else shares
    return made


def candidates(M: int) -> Subsets:
    """Candidate subsets of M experts, (C, M), in the same order every time.

    All of ten experts or fewer. Otherwise singles, pairs, all but one, all, and a random sample
    with every number of experts alike, about 2,000 in all.
    """
    if M <= ALL_SUBSETS:
        sets = {s for k in range(1, M + 1) for s in combinations(range(M), k)}
    else:
        sets = {s for k in (1, 2, M - 1, M) for s in combinations(range(M), k)}
        random = np.random.default_rng(0)
        for k in range(3, M - 1):
            for _ in range(-(-max(CANDIDATES - len(sets), 0) // (M - 1 - k))):
                sets.add(tuple(sorted(random.choice(M, k, replace=False).tolist())))
    made = np.zeros((len(sets), M), dtype=bool)
    for row, members in zip(made, sorted(sets, key=lambda s: (len(s), s)), strict=True):
        row[list(members)] = True
    return made


def predictor(measured: Measured, seed: int | None = None) -> Predictor:
    """A predictor from a base's measured merges (of one training seed; None: the first).

    Raises MergelawError if no merge is measured.
    """
    seeds = sorted({model.seed for model in measured.merges})
    chosen = [m for m in measured.merges if m.seed == (seeds[0] if seed is None else seed)]
    by_method: dict[str, list[Model]] = {}
    for model in chosen:
        if json.loads(model.recipe)["method"] != LEARNED:
            by_method.setdefault(model.method, []).append(model)
    if not by_method:
        raise MergelawError(f"predict: no merge of {measured.base} is measured; run the study")
    experts = tuple(measured.pool)
    models: dict[str, _Prediction] = {}
    checks: dict[str, dict[str, Check]] = {}
    for name, merges in by_method.items():
        weights, losses = _table(merges, experts)
        models[name] = prediction = _Prediction(
            method_of(json.loads(merges[0].recipe)), weights, losses
        )
        sizes = (weights != 0).sum(axis=1)
        outputs = {
            domain: np.eye(len(measured.domains))[i] for i, domain in enumerate(measured.domains)
        }
        outputs["macro"] = measured.counted
        checks[name] = {
            domain: check(losses @ one, prediction.process.residuals @ one, sizes)
            for domain, one in outputs.items()
        }
    return Predictor(experts, measured.domains, measured.counted, tuple(models), checks, models)


def _table(merges: Sequence[Model], experts: Sequence[str]) -> tuple[Array, Array]:
    """Weights, (n, M), and losses, (n, domains), of distinct measured merges."""
    place = {name: i for i, name in enumerate(experts)}
    rows: dict[tuple[float, ...], Array] = {}
    for merge in merges:
        row = np.zeros(len(experts))
        row[[place[name] for name in merge.experts]] = merge.weights
        rows[tuple(row)] = merge.losses
    chosen = list(rows)
    if len(chosen) > FITTED:
        picked = np.random.default_rng(0).choice(len(chosen), FITTED, replace=False)
        chosen = [chosen[i] for i in sorted(picked)]
    return np.array(chosen), np.array([rows[row] for row in chosen])


def check(measured: Array, residuals: Array, sizes: NDArray[np.int64]) -> Check:
    """The check of one output: measured losses, errors of predictions, numbers of experts; (n,)."""
    kept = sizes >= 2
    measured, residuals, sizes = measured[kept], residuals[kept], sizes[kept]
    predicted = measured - residuals
    low = predicted <= np.quantile(predicted, 1 / 3) if len(predicted) else kept[:0]
    correlation, groups = _within(predicted, measured, sizes)
    tail, _ = _within(predicted[low], measured[low], sizes[low])
    spread = _spread(measured, sizes)
    error = _rms(residuals) / spread if spread else math.inf
    error_low = _rms(residuals[low]) / spread if spread else math.inf
    freedom = len(measured) - groups - 3
    passed = False
    if math.isfinite(correlation) and freedom > 0:
        bound = math.tanh(
            math.atanh(min(correlation, 1 - 1e-9)) - stats.norm.ppf(LEVEL) / math.sqrt(freedom)
        )
        passed = bound >= CORRELATION and max(error, error_low) <= ERROR
    return Check(len(measured), correlation, tail, error, "usable" if passed else "not usable")


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2))) if len(values) else math.nan


def _spread(values: Array, sizes: NDArray[np.int64]) -> float:
    """Standard deviation within groups of equal size."""
    total = freedom = 0.0
    for k in np.unique(sizes):
        group = values[sizes == k]
        total += float(((group - group.mean()) ** 2).sum())
        freedom += len(group) - 1
    return math.sqrt(total / freedom) if freedom else 0.0


def _within(predicted: Array, measured: Array, sizes: NDArray[np.int64]) -> tuple[float, int]:
    """Mean rank correlation over sizes with three or more merges, and how many these are."""
    total, weight, groups = 0.0, 0, 0
    for k in np.unique(sizes):
        one, other = predicted[sizes == k], measured[sizes == k]
        if len(one) >= 3 and np.ptp(one) and np.ptp(other):
            total += (len(one) - 1) * float(stats.spearmanr(one, other).statistic)
            weight, groups = weight + len(one) - 1, groups + 1
    return (total / weight if weight else math.nan), groups
