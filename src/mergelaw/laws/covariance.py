"""Covariance of the points: known parts plus REML estimates of misfit and scatter.

V = known parts (sampling design, documents) + misfit^2 1 + scatter^2 Z Z': the law's error at each
point, and that common to all points of a base (Z maps points to bases). REML is
restricted maximum likelihood (Patterson and Thompson 1971).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mergelaw.laws.law import Array

# Fisher scoring stops when the log-likelihood grows by less than this.
ENOUGH = 1e-9
# Added to a covariance to keep it regular, relative to the mean square of the values.
TINY = 1e-13
# Maps variances to minus twice the log-likelihood, its gradient and its expected curvature.
Likelihood = Callable[[Array], tuple[float, Array, Array]]


@dataclass(frozen=True)
class Part:
    """A known part of the points' covariance.

    Attributes:
        matrix: (points, points), in nats^2.
        freedom: degrees of freedom with which its scale was estimated; infinite if it is exact.
        weigh: whether the fit weights points by it. Documents' errors shift nearly all points
            together and would pull a weighted curve off the points; they widen intervals instead.
    """

    matrix: Array
    freedom: float = math.inf
    weigh: bool = True

    def select(self, chosen: Any) -> "Part":
        """Part of the covariance for some points, by indices or a mask."""
        return replace(self, matrix=self.matrix[np.ix_(chosen, chosen)])


@dataclass(frozen=True)
class Noise:
    """Noise model of a fit: known covariance plus REML variances, with their uncertainty.

    Attributes:
        misfit, scatter: standard deviations (nats per token), NaN if unknown.
        variance: variance of a whitened point; 1 unless the points were not weighted.
        freedom: of the residuals; infinite if nothing was estimated from them, 0 if unknown.
        shapes, variances: matrices of the estimated parts above 0, and their factors.
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

    def variance_of(self, weights: Array, added: Array | float = 0.0) -> tuple[float, float, float]:
        """Variance of weights . losses and its degrees of freedom (Satterthwaite 1946).

        ``added``, further multiples of the estimated shapes, change the degrees of freedom only.

        Returns:
            The variances from the parts that weight the points and from the others; the freedom.
        """
        slopes = np.array([weights @ shape @ weights for shape in self.shapes])
        weighed, extra, spread = float(slopes @ self.variances), 0.0, 0.0
        for part in self.parts:
            share = float(weights @ part.matrix @ weights)
            spread += 2 * share**2 / part.freedom
            weighed, extra = weighed + share * part.weigh, extra + share * (not part.weigh)
        slopes = slopes + added
        spread += float(slopes @ self.uncertainty @ slopes)
        total = weighed + extra + float(np.sum(added * self.variances))
        return weighed, extra, max(2 * total**2 / spread, 1.0) if spread > 0 else math.inf


def weighing(parts: Sequence[Part], whole: bool = False) -> list[Array]:
    """Matrices by which the points are weighted.

    Parts with few degrees of freedom get a common scale: weights must not follow the chance
    differences of three circles at each base. A part that does not weight the points contributes
    its average independent variance only, unless ``whole``.
    """
    rough = [part for part in parts if math.isfinite(part.freedom)]
    scale = sum(part.freedom * float(np.trace(part.matrix)) for part in rough)
    scale /= sum(part.freedom for part in rough) or 1.0
    matrices = []
    for part in parts:
        matrix = part.matrix
        if not part.weigh and not whole:
            independent = float(np.mean(np.diag(matrix)) - np.mean(matrix))
            matrix = max(independent, 0.0) * np.eye(len(matrix))
        elif part.weigh and math.isfinite(part.freedom) and matrix.any():
            matrix = matrix * (scale / float(np.trace(matrix)))
        matrices.append(matrix)
    return matrices


def circle_part(means: Array, shape: Array) -> Part:
    """Covariance of the mean over circles, scaled by the variance between circles.

    A covariance estimated level by level from three circles has rank two; its weights mislead.

    Args:
        means: (circles, levels), each circle's estimates of E[L|k]; two circles or more.
        shape: (levels, levels), covariance of one circle up to its scale tau^2.
    """
    circles = len(means)
    total = float(np.var(means, axis=0, ddof=1).sum())
    trace = float(np.trace(shape))
    scale = total / trace if trace > 0 else 0.0
    return Part(scale * shape / circles, circles - 1)


def restricted(
    residuals: Array,
    jacobian: Array,
    covariance: Array,
    shapes: Sequence[Array | None],
    above_zero: bool = False,
) -> tuple[Array, Array]:
    """REML estimates of the variances that multiply ``shapes``, and their covariance.

    Args:
        residuals: (points,), of a fit with any weights.
        jacobian: (points, parameters), derivatives of the fitted losses by the free parameters.
        covariance: (points, points), its known part.
        shapes: (points, points) each; None is the identity and comes first.
        above_zero: keep the first variance above 0 by a prior (Chung et al. 2013).
    """
    # No parameter can move these contrasts, so they show the noise alone.
    lengths = np.linalg.norm(jacobian, axis=0)
    left = np.linalg.qr(jacobian / np.where(lengths > 0, lengths, 1), mode="complete").Q
    left = left[:, jacobian.shape[1] :]
    values, reduced = left.T @ residuals, left.T @ covariance @ left
    projected = [None if shape is None else left.T @ shape @ left for shape in shapes]
    variances, _, information = _likeliest(values, reduced, projected)
    if above_zero and variances[0] == 0:
        variances, _, information = _likeliest(values, reduced, projected, above_zero=True)
    above = variances > 0
    inverse: Array = np.linalg.pinv(information[np.ix_(above, above)]).astype(float)
    return variances, 2 * inverse


def deviance(residuals: Array, covariance: Array, shapes: Sequence[Array | None]) -> float:
    """Minus twice the log-likelihood, maximised over the shapes' variances, up to a constant."""
    return _likeliest(residuals, covariance, shapes)[1]


def _likeliest(
    values: Array, covariance: Array, shapes: Sequence[Array | None], above_zero: bool = False
) -> tuple[Array, float, Array]:
    """Variances >= 0 by Fisher scoring, with the deviance and its expected curvature there."""
    scale = float(values @ values) / len(values) or 1.0
    likelihood = _likelihood(values / math.sqrt(scale), covariance / scale, shapes)
    if above_zero:
        likelihood = _off_zero(likelihood)
    variances, value, second = _scored(likelihood, len(shapes))
    return variances * scale, value + len(values) * math.log(scale), second / scale**2


def _off_zero(likelihood: Likelihood) -> Likelihood:
    """Likelihood times the square root of the first variance."""

    def penalised(variances: Array) -> tuple[float, Array, Array]:
        first = max(float(variances[0]), 1e-300)
        value, slope, second = likelihood(variances)
        slope, second = slope.copy(), second.copy()
        slope[0] -= 1 / first
        second[0, 0] += 1 / first**2
        return value - math.log(first), slope, second

    return penalised


def _likelihood(values: Array, covariance: Array, shapes: Sequence[Array | None]) -> Likelihood:
    """Minus twice the log-likelihood as a function of the variances."""
    count = len(values)
    others = [shape for shape in (covariance, *shapes) if shape is not None and shape.any()]
    if len(others) < 2:
        # With one matrix besides identities, the likelihood is a sum along its eigenvectors.
        spectrum, vectors = np.linalg.eigh(others[0] if others else np.zeros((count, count)))
        spectrum = np.maximum(spectrum, 0)
        squares = (vectors.T @ values) ** 2
        fixed = spectrum if covariance.any() else np.zeros(count)
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
        total = covariance + TINY * (1 + np.trace(covariance) / count) * np.eye(count)
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


def _scored(likelihood: Likelihood, count: int) -> tuple[Array, float, Array]:
    """Variances >= 0 at the minimum, the value there and the expected curvature."""
    variances = np.full(count, 0.5)
    value, slope, second = likelihood(variances)
    for _ in range(100):
        free = (variances > 0) | (slope < 0)
        if not free.any():
            break
        step = np.zeros(count)
        step[free] = -np.linalg.solve(second[np.ix_(free, free)], slope[free])
        length = 1.0
        while True:
            trial = np.maximum(variances + length * step, 0)
            result = likelihood(trial)
            if result[0] <= value or length < 1e-6:
                break
            length /= 2
        gain = value - result[0]
        if gain >= 0:
            variances, (value, slope, second) = trial, result
        if gain < ENOUGH:
            break
    return variances, value, second
