"""Covariance of the points: what is known of it, and what only the residuals can tell.

    V = known parts (sampling design, documents) + misfit^2 1 + scatter^2 Z Z'

The misfit is what the law misses at each point; the scatter is what it misses of a base as a whole
(Z: which point is of which base). Both are estimated by restricted maximum likelihood (REML;
Patterson and Thompson 1971), and how well is carried into every interval by Satterthwaite's rule.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# A variance whose likelihood grows by less than this has been found.
ENOUGH = 1e-9
# What keeps a covariance from being singular, relative to the mean square of what it describes.
TINY = 1e-13


@dataclass(frozen=True)
class Part:
    """A known part of the points' covariance.

    Attributes:
        matrix: (points, points), in nats^2.
        freedom: degrees of freedom that its scale was estimated with; infinite if it is exact.
        weigh: whether points are weighed by it. Documents' errors are nearly one shift of all
            points: a fit that weighs by them may leave the points, to where other documents would
            put them. They widen intervals instead.
    """

    matrix: Array
    freedom: float = math.inf
    weigh: bool = True

    def of(self, kept: Any) -> "Part":
        """The part of some of the points, by their indices or a mask."""
        return replace(self, matrix=self.matrix[np.ix_(kept, kept)])


@dataclass(frozen=True)
class Noise:
    """The covariance that a fit was weighed with, and how well it is known.

    Attributes:
        misfit, scatter: standard deviations (nats per token), NaN where they are unknown.
        variance: what a whitened point's variance is; 1 unless the points were not weighed.
        freedom: degrees of freedom of the residuals if anything was estimated from them, infinite
            if nothing was, 0 if the noise is unknown.
        parts: the known parts.
        shapes, variances: what was estimated and is above 0: matrices, and what multiplies them.
        uncertainty: covariance of those variances, (shapes, shapes).
    """

    misfit: float
    scatter: float
    variance: float
    freedom: float
    parts: tuple[Part, ...] = ()
    shapes: tuple[Array, ...] = ()
    variances: Array = field(default_factory=lambda: np.empty(0))
    uncertainty: Array = field(default_factory=lambda: np.empty((0, 0)))

    def of(self, weights: Array, added: Array | float = 0.0) -> tuple[float, float, float]:
        """Variance of weights . losses, by what points are weighed by and not, and its freedom.

        The degrees of freedom are Satterthwaite's (1946).

        Args:
            weights: (points,), how an estimate weighs the losses.
            added: how many times each of the estimated variances comes on top; of the freedom only.
        """
        slopes = np.array([weights @ shape @ weights for shape in self.shapes])
        weighed, beside, spread = float(slopes @ self.variances), 0.0, 0.0
        for part in self.parts:
            share = float(weights @ part.matrix @ weights)
            spread += 2 * share**2 / part.freedom
            weighed, beside = weighed + share * part.weigh, beside + share * (not part.weigh)
        slopes = slopes + added
        spread += float(slopes @ self.uncertainty @ slopes)
        total = weighed + beside + float(np.sum(added * self.variances))
        return weighed, beside, max(2 * total**2 / spread, 1.0) if spread > 0 else math.inf


def weighing(parts: Sequence[Part], whole: bool = False) -> list[Array]:
    """What points are weighed by: the parts' matrices, but for two kinds.

    Those with few degrees of freedom get one scale: weights that follow what three circles happened
    to differ by at each base would make every estimate look better than it is. Of those that are
    not to be weighed by, what points do not share on average stays; all of it with ``whole``. How
    uncertain an estimate is, the parts themselves tell.
    """
    rough = [part for part in parts if math.isfinite(part.freedom)]
    scale = sum(part.freedom * float(np.trace(part.matrix)) for part in rough)
    scale /= sum(part.freedom for part in rough) or 1.0
    made = []
    for part in parts:
        matrix = part.matrix
        if not part.weigh and not whole:
            own = float(np.mean(np.diag(matrix)) - np.mean(matrix))
            matrix = max(own, 0.0) * np.eye(len(matrix))
        elif part.weigh and math.isfinite(part.freedom) and matrix.any():
            matrix = matrix * (scale / float(np.trace(matrix)))
        made.append(matrix)
    return made


def of_circles(means: Array, shape: Array) -> Part:
    """Covariance of the mean over circles, its scale from how much the circles differ.

    The shape over levels is known from the subsets' pairs (``sampling.pair_shape``); a covariance
    estimated from three circles level by level would have rank two, and weights that trust it.

    Args:
        means: (circles, levels), each circle's estimates of E[L|k]; two circles or more.
        shape: (levels, levels), one circle's covariance up to its scale, tau^2.
    """
    circles = len(means)
    total = float(np.var(means, axis=0, ddof=1).sum())
    trace = float(np.trace(shape))
    scale = total / trace if trace > 0 else 0.0
    return Part(scale * shape / circles, circles - 1)


def restricted(
    residuals: Array,
    jacobian: Array,
    known: Array,
    shapes: Sequence[Array | None],
    above_zero: bool = False,
) -> tuple[Array, Array]:
    """REML estimates of the variances that multiply ``shapes``, and their covariance.

    Args:
        residuals: (points,) of a fit by any weights.
        jacobian: (points, parameters), derivatives of the fitted losses by what was free.
        known: (points, points), the rest of the covariance.
        shapes: (points, points) each; None is the identity, which comes first.
        above_zero: keep the first variance off 0, by a prior that is as its root (Chung et al.
            2013), where the likelihood alone would say 0.

    Returns:
        Variances, 0 or more; and the inverse of the information on those above 0.
    """
    # Combinations of the points that no parameter can move: their distribution is the noise's.
    lengths = np.linalg.norm(jacobian, axis=0)
    left = np.linalg.qr(jacobian / np.where(lengths > 0, lengths, 1), mode="complete").Q
    left = left[:, jacobian.shape[1] :]
    values, rest = left.T @ residuals, left.T @ known @ left
    seen = [None if shape is None else left.T @ shape @ left for shape in shapes]
    variances, _, information = _likeliest(values, rest, seen)
    if above_zero and variances[0] == 0:
        variances, _, information = _likeliest(values, rest, seen, above_zero=True)
    above = variances > 0
    inverse: Array = np.linalg.pinv(information[np.ix_(above, above)]).astype(float)
    return variances, 2 * inverse


def deviance(residuals: Array, known: Array, shapes: Sequence[Array | None]) -> float:
    """Minus twice the log-likelihood at its best variances of ``shapes``, up to a constant."""
    return _likeliest(residuals, known, shapes)[1]


def _likeliest(
    values: Array, known: Array, shapes: Sequence[Array | None], above_zero: bool = False
) -> tuple[Array, float, Array]:
    """Variances >= 0 that make normal values likeliest, by Fisher's scoring.

    Returns:
        The variances, minus twice the log-likelihood, and its expected second derivatives.
    """
    scale = float(values @ values) / len(values) or 1.0
    at = _likelihood(values / math.sqrt(scale), known / scale, shapes)
    variances, value, second = _scored(_off_zero(at) if above_zero else at, len(shapes))
    return variances * scale, value + len(values) * math.log(scale), second / scale**2


def _off_zero(
    at: Callable[[Array], tuple[float, Array, Array]],
) -> Callable[[Array], tuple[float, Array, Array]]:
    """A likelihood times the square root of the first variance."""

    def penalised(variances: Array) -> tuple[float, Array, Array]:
        first = max(float(variances[0]), 1e-300)
        value, slope, second = at(variances)
        slope, second = slope.copy(), second.copy()
        slope[0] -= 1 / first
        second[0, 0] += 1 / first**2
        return value - math.log(first), slope, second

    return penalised


def _likelihood(
    values: Array, known: Array, shapes: Sequence[Array | None]
) -> Callable[[Array], tuple[float, Array, Array]]:
    """(variances) to minus twice the log-likelihood, its gradient and expected curvature."""
    count = len(values)
    others = [shape for shape in (known, *shapes) if shape is not None and shape.any()]
    if len(others) < 2:
        # Besides identities there is one matrix at most: along its axes the likelihood is a sum.
        spectrum, vectors = np.linalg.eigh(others[0] if others else np.zeros((count, count)))
        spectrum = np.maximum(spectrum, 0)
        squares = (vectors.T @ values) ** 2
        fixed = spectrum if known.any() else np.zeros(count)
        scales = np.array([np.ones(count) if shape is None else spectrum for shape in shapes])
        scales = scales.reshape(len(shapes), count)

        def diagonal(variances: Array) -> tuple[float, Array, Array]:
            total = np.maximum(fixed + variances @ scales, TINY)
            relative = scales / total
            value = float(np.sum(np.log(total) + squares / total))
            return value, relative @ (1 - squares / total), relative @ relative.T

        return diagonal
    full = [np.eye(count) if shape is None else shape for shape in shapes]

    def dense(variances: Array) -> tuple[float, Array, Array]:
        total = known + TINY * (1 + np.trace(known) / count) * np.eye(count)
        for variance, shape in zip(variances, full, strict=True):
            total = total + variance * shape
        root = np.linalg.inv(np.linalg.cholesky(total))
        inverse = root.T @ root
        solved = inverse @ values
        value = -2 * float(np.sum(np.log(np.diag(root)))) + float(values @ solved)
        products = [inverse @ shape for shape in full]
        slope = [np.trace(p) - solved @ s @ solved for p, s in zip(products, full, strict=True)]
        second = [[float(np.sum(p * q.T)) for q in products] for p in products]
        return value, np.array(slope), np.array(second)

    return dense


def _scored(
    at: Callable[[Array], tuple[float, Array, Array]], count: int
) -> tuple[Array, float, Array]:
    variances = np.full(count, 0.5)
    value, slope, second = at(variances)
    for _ in range(100):
        free = (variances > 0) | (slope < 0)
        if not free.any():
            break
        step = np.zeros(count)
        step[free] = -np.linalg.solve(second[np.ix_(free, free)], slope[free])
        length = 1.0
        while True:
            trial = np.maximum(variances + length * step, 0)
            found = at(trial)
            if found[0] <= value or length < 1e-6:
                break
            length /= 2
        gain = value - found[0]
        if gain >= 0:
            variances, (value, slope, second) = trial, found
        if gain < ENOUGH:
            break
    return variances, value, second
