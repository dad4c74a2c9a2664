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
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mergelaw.decide.gradients import PLAIN, STEP, candidates, read
from mergelaw.decide.gradients import Subsets as Subsets
from mergelaw.decide.measured import Array, Measured, Model
from mergelaw.errors import MergelawError
from mergelaw.merging.methods import Method, method_of

FITTED = 600  # measured merges of a method that a fit uses
FEWEST = 5  # measured merges of a method that a fit needs
FLAT = 1e6  # variance of the flat terms, relative to the misfit's
VARIANCES = (0.0, *np.geomspace(1e-2, 1e8, 11))  # candidates for the other terms' variance
TINY = 1e-30  # squares of losses below this are rounding errors
UNEQUAL = 10  # ratio of norms that is warned of
MACRO = "macro"
LEVEL = 0.9  # one-sided confidence of an error's upper end
CORRELATION = 0.95  # a usable prediction's least rank correlation within k
ERROR = 0.25  # its largest RMSE, relative to the spread within k


@dataclass(frozen=True)
class Check:
    """Prediction of measured merges of two or more experts, each left out in turn.

    Attributes:
        merges: number of these merges.
        correlation: rank correlation of predicted and measured losses within k, in units of their
            measured standard deviation at that k; the fall with k does not count.
        tail: the same among the third with the lowest predictions.
        error: RMSE over the standard deviation within k, and its upper end (90% confidence).
        tail_error: RMSE of the lowest third over the same.
    """

    merges: int
    correlation: float = math.nan
    tail: float = math.nan
    error: tuple[float, float] = (math.inf, math.inf)
    tail_error: float = math.inf

    @property
    def verdict(self) -> Literal["usable", "not usable"]:
        """``usable`` if the correlation is at least .95 and both errors are surely at most .25."""
        worst = max(self.error[1], self.tail_error)
        return "usable" if self.correlation >= CORRELATION and worst <= ERROR else "not usable"


class Process:
    """Gaussian process regression of several outputs that share their kernel.

    ``features``, (n, p), are coefficients and, last, the size of a residual. The prior is flat in a
    constant and in the residual; linear and squared terms in all features share a variance, over
    which predictions are averaged by its marginal likelihood. ``residuals``, (n, outputs), are
    those of leaving each point out.
    """

    def __init__(self, features: Array, outputs: Array):
        n, self._features = len(features), features
        squares = (features**2).sum(axis=0) / n
        squares[:-1] = squares[:-1].sum()
        self._scale = np.sqrt(np.where(squares > 0, squares, 1.0))
        flat, bent = self._terms(features)
        self._inverses, scores = [], []
        for variance in VARIANCES:
            kernel = FLAT * flat + variance * bent + np.eye(n)
            self._inverses.append(np.linalg.inv(kernel))
            misfits = np.einsum("nd,nm,md->d", outputs, self._inverses[-1], outputs)
            likelihood = outputs.shape[1] * np.linalg.slogdet(kernel)[1]
            scores.append(likelihood + (n - 2) * np.log(np.maximum(misfits, TINY)).sum())
        chances = np.exp((min(scores) - np.array(scores)) / 2)
        self._chances = chances / chances.sum()
        # So that 1.645 standard deviations are a 90% interval, as Student's t has it.
        wider = (stats.t.ppf(0.95, n - 2) / stats.norm.ppf(0.95)) ** 2
        self._weights = [inverse @ outputs for inverse in self._inverses]
        self._covariances, self.residuals = [], np.zeros(outputs.shape)
        for chance, weights, inverse in zip(
            self._chances, self._weights, self._inverses, strict=True
        ):
            residuals = weights / inverse.diagonal()[:, None]
            self.residuals += chance * residuals
            self._covariances.append(wider * residuals.T @ weights / (n - 2))

    def _terms(self, features: Array) -> tuple[Array, Array]:
        """Kernels of the flat and the other terms between features and the measured ones."""
        one, other = features / self._scale, self._features / self._scale
        product = one @ other.T
        return 1 + np.outer(one[:, -1], other[:, -1]), product + product**2

    def predict(self, features: Array, shares: Array) -> tuple[Array, Array]:
        """Means and standard deviations, (C, sums), of weighted sums; shares: (outputs, sums)."""
        flat, bent = self._terms(features)
        scaled = features / self._scale
        lengths = (scaled**2).sum(axis=1)
        mean = square = np.zeros((len(features), shares.shape[1]))
        for chance, variance, inverse, weights, covariance in zip(
            self._chances, VARIANCES, self._inverses, self._weights, self._covariances, strict=True
        ):
            kernel = FLAT * flat + variance * bent
            prior = FLAT * (1 + scaled[:, -1] ** 2) + variance * (lengths + lengths**2)
            explained = ((kernel @ inverse) * kernel).sum(axis=1)
            factor = 1 + np.maximum(prior - explained, 0)
            spread = np.einsum("ds,de,es->s", shares, covariance, shares)
            part = kernel @ weights @ shares
            mean = mean + chance * part
            square = square + chance * (part**2 + factor[:, None] * spread)
        return mean, np.sqrt(np.maximum(square - mean**2, 0))


@dataclass(frozen=True)
class Predictor:
    """Predicted losses of the merges of one base's pool.

    Subsets are a boolean array (C, M) in the order of ``experts``. Weights are a float array (C, M)
    instead, zero for an expert that is left out. Predictions that are not possible (an electing
    method's merge that is no candidate) are NaN, with an infinite standard deviation.

    Attributes:
        experts: the M experts of the pool.
        domains: evaluation domains; ``counted`` are their shares in the macro loss.
        checks: by method and domain, and ``macro``; a method that nothing of is measured has a
            check of no merges, which is not usable.
        warnings: what makes predictions doubtful, one line each.
    """

    experts: tuple[str, ...]
    domains: tuple[str, ...]
    counted: Array
    checks: Mapping[str, Mapping[str, Check]]
    warnings: Sequence[str]
    _predictions: Mapping[str, "_Prediction"] = field(repr=False)

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that it predicts."""
        return tuple(self._predictions)

    @property
    def candidates(self) -> Subsets:
        """Subsets that can be predicted, (C, M): all of ten experts, or a sample of more."""
        return candidates(len(self.experts))

    def losses(self, method: str, subsets: ArrayLike) -> tuple[Array, Array]:
        """Losses by domain and their standard deviations, (C, domains), in nats per token."""
        return self._predict(method, subsets, np.eye(len(self.domains)))

    def macro(
        self, method: str, subsets: ArrayLike, shares: ArrayLike | None = None
    ) -> tuple[Array, Array]:
        """Weighted mean losses and their standard deviations, (C,).

        ``shares`` are the weights of domains; None: those of the macro loss. The standard deviation
        takes account of the errors' covariance between domains.
        """
        weights = self.counted if shares is None else np.asarray(shares, dtype=float)
        mean, deviations = self._predict(method, subsets, weights[:, None])
        return mean[:, 0], deviations[:, 0]

    def _predict(self, method: str, subsets: ArrayLike, shares: Array) -> tuple[Array, Array]:
        weights = np.asarray(subsets, dtype=float)
        if method not in self._predictions:
            raise MergelawError(
                f"predict: {method!r} cannot be predicted, only {', '.join(self.methods)}; measure "
                "merges by it"
            )
        if weights.ndim != 2 or weights.shape[1] != len(self.experts):
            raise MergelawError(
                f"predict: merges of shape {weights.shape}; give one row a merge, with a value for "
                f"each of {', '.join(self.experts)}"
            )
        if not (np.isfinite(weights).all() and weights.any(axis=1).all()):
            raise MergelawError("predict: a merge has no experts, or a weight that is not finite")
        return self._predictions[method].predict(weights, shares)


class Expansion:
    """Losses near the mean of all experts, to second order, from the artifact of ``gradients``.

    With a merge's difference D from the base, vbar the mean task vector, g the gradient there, h_i
    the change of the gradient towards expert i, and D - vbar = sum_i c_i v_i + e with e orthogonal
    to the task vectors, the loss is

        L + g.(D - vbar) + c'(V'HV)c / 2 + sum_i c_i h_i.e,    V'HV = v_j.h_i, symmetrised.
    """

    def __init__(self, folder: Path, measured: Measured):
        about, self._arrays = read(folder)
        self.experts, self.methods = tuple(about["experts"]), about["methods"]
        lacking = sorted(
            {*measured.pool} - {*self.experts} | {*measured.domains} - {*about["domains"]}
        )
        if lacking:
            raise MergelawError(
                f"{folder}: has no {', '.join(lacking)}, which are measured; run the target "
                "`gradients` of the present configuration"
            )
        order = [about["domains"].index(domain) for domain in measured.domains]
        for name, array in self._arrays.items():
            if name.endswith("/gradients"):
                self._arrays[name] = array[:, order]
        self._losses, self._steps = self._arrays["losses"][:, order], self._arrays["steps"]
        ratios = dict(zip(self.experts, STEP / self._steps, strict=True))
        self.warnings = [
            f"the task vector of {expert} is {ratio:.3g} times as long as the median; predictions "
            "near it are doubtful, so believe the checks only"
            for expert, ratio in ratios.items()
            if not 1 / UNEQUAL < ratio < UNEQUAL
        ]
        self._gram = self._arrays[f"{PLAIN}/vectors"]
        self._inverse = np.linalg.pinv(self._gram, rcond=1e-9, hermitian=True)
        slopes = self._arrays[f"{PLAIN}/gradients"]  # point, domain, expert
        self._mean_slopes = slopes.mean(axis=2)
        self._curvature = (slopes[1:] - slopes[0]) / self._steps[:, None, None]  # v_j.h_i: i, d, j
        subsets = self._arrays["subsets"]
        self._row = {row.tobytes(): i for i, row in enumerate(subsets)}

    def predict(
        self, name: str, method: Method, weights: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Losses, coefficients c, |e|^2 over the mean |v_i|^2, and the losses' second-order part.

        Shapes: (C, domains), (C, M), (C,), (C, domains).
        A merge that is no candidate has NaN.
        """
        columns, block = coefficients(method, weights), f"method {name}"
        in_span = f"{block}/squares" not in self._arrays
        block = PLAIN if in_span else block
        products, vectors, squares = (
            self._arrays[f"{block}/{array}"] for array in ("gradients", "vectors", "squares")
        )
        if squares.ndim == 1:  # candidate merges
            equal = [len(set(row[row != 0])) == 1 for row in weights]
            rows = [
                self._row.get((row != 0).tobytes(), -1) if same else -1
                for row, same in zip(weights, equal, strict=True)
            ]
            slopes, inner, norms = products[:, :, rows], vectors.T[rows], squares[rows]
            missing = np.array(rows) < 0
        else:
            slopes, inner = products @ columns.T, columns @ vectors.T
            norms = np.einsum("cm,mn,cn->c", columns, squares, columns)
            missing = np.zeros(len(weights), dtype=bool)
        mean = self._gram.mean(axis=1)
        apart = norms - 2 * inner.mean(axis=1) + mean.mean()  # |D - vbar|^2
        c = columns - 1 / len(self.experts) if in_span else (inner - mean) @ self._inverse
        rest = np.zeros(len(c)) if in_span else apart - ((inner - mean) * c).sum(axis=1)
        along = slopes - self._mean_slopes[:, :, None]  # products with D - vbar: point, domain, C
        bent = (along[1:] - along[0]) / self._steps[:, None, None]  # h_i.(D - vbar)
        inside = np.einsum("ci,idj,cj->cd", c, self._curvature, c)
        second = np.einsum("ci,idc->cd", c, bent) - inside / 2
        losses = self._losses[0] + along[0].T + second
        losses[missing] = np.nan
        return losses, c, np.maximum(rest, 0) / self._gram.diagonal().mean(), second


class _Prediction:
    """The prediction of one method: ``losses``, (n, domains), are those of measured merges."""

    def __init__(
        self,
        name: str,
        method: Method,
        weights: Array,
        losses: Array,
        expansion: Expansion | None,
    ):
        self._name, self._method, self._expansion = name, method, expansion
        self.domains, self.process = losses.shape[1], None
        start, features, _ = self._start(weights)
        kept = np.isfinite(start).all(axis=1)
        self.weights, self.losses = weights[kept], losses[kept]
        if len(self.losses) >= FEWEST:
            self.process = Process(features[kept], self.losses - start[kept])

    def _start(self, weights: Array) -> tuple[Array, Array, Array]:
        """Expansion and its second-order part, (C, domains), and the process's features, (C, p)."""
        if self._expansion is None:
            features = coefficients(self._method, weights)
            zero = np.zeros((len(weights), self.domains))
            return zero, np.column_stack([features, np.zeros(len(weights))]), zero
        losses, c, rest, bent = self._expansion.predict(self._name, self._method, weights)
        return losses, np.column_stack([c, rest]), bent

    def predict(self, weights: Array, shares: Array) -> tuple[Array, Array]:
        """Means and standard deviations of weighted sums of losses; shares: (domains, outputs)."""
        start, features, bent = self._start(weights)
        missing = np.asarray(~np.isfinite(start).all(axis=1))
        mean = start @ shares
        if self.process is not None:
            features = np.where(missing[:, None], 0.0, features)
            correction, deviations = self.process.predict(features, shares)
            mean = mean + correction
        else:
            deviations = np.abs(bent) @ shares
            missing |= self._expansion is None
        mean[missing], deviations[missing] = np.nan, np.inf
        return mean, deviations


def coefficients(method: Method, weights: Array) -> Array:
    """Coefficients of the experts' values, (C, M), in merges with these weights."""
    columns = np.zeros(weights.shape)
    for row, values in zip(columns, weights, strict=True):
        members = np.flatnonzero(values)
        rule = method.rule(values[members].tolist())
        shares = np.asarray(rule.weights) * rule.scale
        row[members] = shares / np.sum(rule.weights) if rule.elect else shares
    return columns


def predictor(
    measured: Measured, gradients: Path | None = None, seed: int | None = None
) -> Predictor:
    """A predictor of the merges of a base's pool.

    Args:
        measured: the base's measured models; those of one training seed are used.
        gradients: folder of the artifact of the stage ``gradients``; None: methods are predicted
            from their measured merges alone.
        seed: the training seed; None: the first.

    Raises:
        MergelawError: nothing to predict from, or gradients of another pool or other domains.
    """
    seed = min((model.seed for model in measured.merges), default=0) if seed is None else seed
    by_method: dict[str, list[Model]] = {}
    for merge in measured.merges:
        if merge.seed == seed and not merge.learned:
            by_method.setdefault(merge.method, []).append(merge)
    expansion = None if gradients is None else Expansion(gradients, measured)
    recipes = {name: json.loads(merges[0].recipe) for name, merges in by_method.items()}
    expanded = expansion.methods if expansion else {}
    recipes = {**expanded, **recipes}
    if not recipes:
        raise MergelawError(f"predict: no merge of {measured.base} is measured; run the study")
    experts = expansion.experts if expansion else tuple(measured.pool)
    predictions, checks = {}, {}
    outputs = np.column_stack([np.eye(len(measured.domains)), measured.counted])
    for name, recipe in recipes.items():
        weights, losses = _table(by_method.get(name, []), experts, len(measured.domains))
        near = expansion if expanded.get(name) == recipe else None
        predictions[name] = one = _Prediction(name, method_of(recipe), weights, losses, near)
        sizes = (one.weights != 0).sum(axis=1)
        residuals = np.full(one.losses.shape, np.nan) if not one.process else one.process.residuals
        checks[name] = {
            domain: check(one.losses @ shares, residuals @ shares, sizes)
            for domain, shares in zip([*measured.domains, MACRO], outputs.T, strict=True)
        }
    warnings = expansion.warnings if expansion else ()
    return Predictor(experts, measured.domains, measured.counted, checks, warnings, predictions)


def _table(merges: Sequence[Model], experts: Sequence[str], domains: int) -> tuple[Array, Array]:
    """Weights, (n, M), and losses, (n, domains), of distinct measured merges."""
    place = {name: i for i, name in enumerate(experts)}
    rows: dict[tuple[float, ...], Array] = {}
    for merge in merges:
        row = np.zeros(len(experts))
        row[[place[name] for name in merge.experts]] = merge.weights
        rows[tuple(row)] = merge.losses
    weights = np.array(list(rows)).reshape(-1, len(experts))
    losses = np.array(list(rows.values())).reshape(-1, domains)
    if len(weights) > FITTED:
        chosen = np.sort(np.random.default_rng(0).choice(len(weights), FITTED, replace=False))
        return weights[chosen], losses[chosen]
    return weights, losses


def check(measured: Array, residuals: Array, sizes: NDArray[np.int64]) -> Check:
    """The check of one output: measured losses, errors of predictions, numbers of experts; (n,)."""
    groups = [np.flatnonzero(sizes == k) for k in np.unique(sizes[sizes >= 2])]
    groups = [group for group in groups if len(group) >= 3 and np.ptp(measured[group]) > 0]
    merges = int((sizes >= 2).sum())
    if not groups or not np.isfinite(residuals).all():
        return Check(merges)
    order, predicted = np.concatenate(groups), measured - residuals
    deviations = np.concatenate([np.full(len(g), measured[g].std(ddof=1)) for g in groups])
    one, other = (
        np.concatenate([values[g] - values[g].mean() for g in groups]) / deviations
        for values in (predicted, measured)
    )
    low = predicted[order] <= np.quantile(predicted[order], 1 / 3)
    spread = math.sqrt(np.mean(deviations**2))
    squares, n = (residuals[order] / spread) ** 2, len(order)
    error = math.sqrt(squares.mean())
    upper = error * math.sqrt(n / stats.chi2.ppf(1 - LEVEL, n))
    tail_error = math.sqrt(squares[low].mean())
    tail = _rank_correlation(one[low], other[low])
    return Check(merges, _rank_correlation(one, other), tail, (error, upper), tail_error)


def _rank_correlation(one: Array, other: Array) -> float:
    if len(one) < 3 or not np.ptp(one) or not np.ptp(other):
        return math.nan
    return float(stats.spearmanr(one, other).statistic)
