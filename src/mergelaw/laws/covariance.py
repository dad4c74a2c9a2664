"""Covariance of points: V = known + misfit^2 1 + scatter^2 Z Z', block by block.

``known`` (sampling error) is block-diagonal; misfit is the law's own error at a point; scatter is
its error common to a base's points (Z maps points to bases). Rotated to the eigenvectors of the
known blocks, V is diagonal plus one rank per base: no matrix of points by points is ever made.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import block_diag, csr_array, diags_array, issparse
from scipy.sparse.csgraph import connected_components
from scipy.special import ndtri, stdtrit

from mergelaw.errors import MergelawError
from mergelaw.laws.law import Array

# A base-level scatter of this share of the losses' range over sizes is typical of published ladders
# (the prior of ``log_prior`` is half-Cauchy with this scale).
TYPICAL_SCATTER = 0.01
# Deviations below this share of the mean loss are rounding errors of the losses.
ROUNDED = 1e-7
# Keep normal equations solvable where columns are nearly the same, or 0.
REGULAR, TINY = 1e-12, 1e-300
# The likeliest variances are searched on grids, each ZOOM times finer than the one before: so many
# grids of so many values, by the number of variances.
ZOOM, GRIDS = 2.5, {0: (1, 1), 1: (5, 7), 2: (5, 7)}


@dataclass(frozen=True)
class Grams:
    """Inner products under V^-1, one for each pair of misfit and scatter.

    Attributes:
        products: (draws, columns, columns), of the columns, the loss last.
        log_det: (draws,), logarithm of the determinant of V.
    """

    products: Array
    log_det: Array

    def regression(self) -> tuple[Array, Array, Array]:
        """Generalised least squares: restricted deviances, and the solutions' factors.

        The coefficients are ``roots' (solved + standard normals)``.
        """
        inner, right = self.products[:, :-1, :-1], self.products[:, :-1, -1]
        scale = np.sqrt(np.maximum(np.diagonal(inner, axis1=1, axis2=2), TINY))
        roots, determinant = inverse_roots(inner / scale[:, :, None] / scale[:, None])
        solved = np.einsum("sij,sj->si", roots, right / scale)
        squares = self.products[:, -1, -1] - np.sum(solved**2, axis=1)
        determinant = determinant + 2 * np.log(scale).sum(axis=1)
        return self.log_det + determinant + squares, solved, roots / scale[:, None]


def inverse_roots(matrices: Array) -> tuple[Array, Array]:
    """Inverses of Cholesky roots (any, size, size), and logarithms of the determinants.

    The matrices have ones on the diagonal. For many small ones this is faster than LAPACK.
    """
    rows = np.zeros(matrices.shape)
    log_det = np.zeros(len(matrices))
    for j in range(matrices.shape[1]):
        row = rows[:, j]
        row[:, j] = 1
        for i in range(j):
            row -= np.sum(rows[:, i] * matrices[:, j], axis=1)[:, None] * rows[:, i]
        square = np.maximum(np.sum(row * matrices[:, j], axis=1), REGULAR)
        row /= np.sqrt(square)[:, None]
        log_det += np.log(square)
    return rows, log_det


@dataclass(frozen=True)
class Errors:
    """Errors of points: what is known of their covariance, in rotated coordinates.

    Attributes:
        scale: (points,), factors of losses and columns; a point's misfit is in inverse proportion.
        blocks: places and eigenvectors of each block of several points.
        variances: (points,), variances along the eigenvectors (nats^2).
        starts: first place of each base; empty if no points share a base's scatter.
        ones: (points,), rotated vector of ones.
        least: least misfit (nats per token) that the losses' digits allow.
        typical: typical scatter (nats per token), the scale of its prior.
    """

    scale: Array
    blocks: tuple[tuple[NDArray[np.intp], Array], ...]
    variances: Array
    starts: NDArray[np.intp]
    ones: Array
    least: float
    typical: float

    def rotate(self, columns: Array) -> Array:
        """Rows (..., points, columns) in the coordinates of ``variances``."""
        columns = columns * self.scale[:, None]
        for places, vectors in self.blocks:
            columns[..., places, :] = vectors.T @ columns[..., places, :]
        return columns

    def whiten(self, rotated: Array, misfit: float, scatter: float) -> Array:
        """Rotated rows (..., points, columns) times V^-1/2."""
        scale = 1 / np.sqrt(self.variances + max(misfit, self.least / 100) ** 2)
        white: Array = rotated * scale[:, None]
        if scatter and len(self.starts):
            ones = (self.ones * scale)[:, None]
            sums = np.add.reduceat(ones**2, self.starts)
            shrunk = (1 - 1 / np.sqrt(1 + scatter**2 * sums)) / sums
            shared = shrunk * np.add.reduceat(ones * white, self.starts, axis=-2)
            sizes = np.diff(np.append(self.starts, len(ones)))
            white = white - ones * np.repeat(shared, sizes, axis=-2)
        return white

    def whitener(self, misfit: float, scatter: float) -> Callable[[Array], Array]:
        """Function that multiplies rows (..., points, columns) by V^-1/2."""
        return lambda columns: self.whiten(self.rotate(columns), misfit, scatter)

    def grams(self, rotated: Array, misfit: Array, scatter: Array) -> Grams:
        """Inner products of rotated columns (draws or 1, points, columns) under each V^-1."""
        added = np.maximum(misfit, self.least / 100)[:, None] ** 2
        # Without known errors all points weigh the same, and one sum serves all misfits.
        even = not self.variances.any()
        weights = np.ones((1, len(self.variances))) if even else 1 / (self.variances + added)
        rest = 1 / added if even else np.ones_like(added)
        log_det = -np.log(weights).sum(axis=1) - np.log(rest[:, 0]) * len(self.variances)
        if not len(self.starts):
            return Grams(_inner(rotated, weights) * rest[:, :, None], log_det)
        # Within bases and between them apart: a difference of two large sums would be rounding.
        ones = self.ones * weights
        sums = np.add.reduceat(self.ones * ones, self.starts, axis=1)[:, :, None]
        means = np.add.reduceat(rotated * ones[:, :, None], self.starts, axis=1) / sums
        sizes = np.diff(np.append(self.starts, len(self.ones)))
        within = rotated - self.ones[:, None] * np.repeat(means, sizes, axis=1)
        sums = sums[:, :, 0] * rest
        grown = 1 + scatter[:, None] ** 2 * sums
        products = _inner(within, weights) * rest[:, :, None] + _inner(means, sums / grown)
        log_det = log_det + np.log(grown).sum(axis=1)
        return Grams(products, log_det)

    def log_prior(self, scatter: Array) -> Array:
        """Logarithm of the half-Cauchy prior's density in the logarithm of the scatter."""
        return np.log(scatter) - np.log1p((scatter / self.typical) ** 2)

    def likeliest(
        self,
        residuals: Array,
        tangent: Array | None,
        misfit: float | None,
        scatter: float | None,
    ) -> tuple[float, float, float]:
        """Misfit, scatter and minus twice the log-likelihood where it is greatest.

        With ``tangent`` (points, free parameters) the likelihood is the restricted one (REML,
        Patterson and Thompson 1971) times the prior of the scatter; without, the plain one. Given
        values of misfit and scatter are kept.
        """
        count = len(residuals)
        columns = np.empty((count, 0)) if tangent is None else tangent
        lengths = np.linalg.norm(columns, axis=0)
        # Nearly parallel columns would leave rounding errors in place of the residuals.
        left, values, _ = np.linalg.svd(columns / np.where(lengths > 0, lengths, 1), False)
        columns = left[:, values > values.max(initial=0) * count * np.finfo(float).eps]
        deviation = math.sqrt(float(residuals @ residuals) / max(count - columns.shape[1], 1))
        grouped = scatter is None and len(self.starts) > 0
        rotated = self.rotate(np.column_stack([columns, residuals]))[None]
        scatter = scatter or 0.0
        if not grouped and not self.variances.any() and misfit is None and not scatter:
            misfit = max(deviation, self.least)
        top = math.log(max(deviation * 2, self.least * 10))
        ranges = [(top - 3, 3.5)] * (misfit is None) + [(math.log(self.typical), 6.0)] * grouped
        centre, reach = np.array(ranges).reshape(-1, 2).T
        grids, number = GRIDS[len(reach)]
        steps = np.array(list(itertools.product(np.linspace(-1, 1, number), repeat=len(reach))))
        for _ in range(grids):
            grid = centre + reach * steps
            free = np.exp(grid)
            misfits = free[:, 0] if misfit is None else np.full(len(grid), misfit)
            scatters = free[:, -1] if grouped else np.full(len(grid), scatter)
            values = self.grams(rotated, misfits, scatters).regression()[0]
            if tangent is not None and grouped:
                values = values - 2 * self.log_prior(scatters)
            best = int(np.argmin(values))
            centre, reach = grid[best], reach / ZOOM
        chosen = misfits[best : best + 1], scatters[best : best + 1]
        grams = self.grams(rotated[:, :, -1:], *chosen)
        deviance = float(grams.log_det[0] + grams.products[0, -1, -1])
        return float(chosen[0][0]), float(chosen[1][0]), deviance


def _inner(rows: Array, weights: Array) -> Array:
    """Inner products of rows (draws or 1, points, columns), weights (draws or 1, points)."""
    products: Array = np.swapaxes(rows * weights[:, :, None], 1, 2) @ rows
    return products


def errors_of(
    loss: Array,
    N: Array | None,
    known: Any,
    scale: Array | None = None,
) -> Errors:
    """Errors of points sorted by N.

    Args:
        loss: (points,), nats per token.
        N: sizes of the points' bases; None if they do not share bases.
        known: (points,) variances, a sparse covariance (points, points), or None.
        scale: (points,), square roots of the points' weights; None: all 1.
    """
    count = len(loss)
    scale = np.ones(count) if scale is None else scale
    blocks: list[tuple[NDArray[np.intp], Array]] = []
    matrix: Any = np.zeros(count) if known is None else known
    if matrix.ndim == 2:
        matrix = csr_array(diags_array(scale) @ matrix @ diags_array(scale))
    else:
        matrix = matrix * scale**2
    spectrum: Array = matrix if matrix.ndim == 1 else matrix.diagonal()
    ones, crossed = scale[:, None].copy(), False
    if matrix.ndim == 2:
        labels = connected_components(matrix)[1]
        order = np.argsort(labels, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
        for places in (group for group in groups if len(group) > 1):
            block = matrix[places][:, places].toarray()
            spectrum[places], vectors = np.linalg.eigh(block)
            blocks.append((places, vectors))
            ones[places] = vectors.T @ ones[places]
            crossed |= N is not None and len(np.unique(N[places])) > 1
    starts = np.empty(0, dtype=np.intp)
    typical = ROUNDED * float(np.mean(loss)) * 10
    # A covariance between bases says itself what their points have in common.
    if N is not None and not crossed:
        starts = np.flatnonzero(np.diff(N, prepend=-1.0))
        means = np.add.reduceat(loss, starts) / np.diff(np.append(starts, count))
        typical = max(TYPICAL_SCATTER * float(np.ptp(means)), typical)
    least = ROUNDED * float(np.mean(loss))
    return Errors(scale, tuple(blocks), np.maximum(spectrum, 0), starts, ones[:, 0], least, typical)


def checked_covariance(covariance: Any, points: int) -> Any:
    """A covariance of points as a sparse matrix. Raises MergelawError if it is none."""
    if issparse(covariance):  # made by fit_points
        return covariance
    matrix = np.asarray(covariance, dtype=float)
    if matrix.shape != (points, points) or not np.isfinite(matrix).all():
        raise MergelawError(
            f"covariance has the shape {matrix.shape} or values that are not finite: give a "
            f"finite matrix of {points} by {points}, in the order of the table's rows"
        )
    least = np.linalg.eigvalsh(matrix)[0]
    if not np.allclose(matrix, matrix.T) or least < -1e-9 * np.abs(matrix).max():
        raise MergelawError("covariance is not symmetric with eigenvalues >= 0: give one that is")
    return csr_array(matrix)


def sampling_covariance(points: pd.DataFrame) -> Any:
    """Covariance of points from sampling: variances (points,), a sparse matrix, or None.

    The one place that says how the points of a method, family and domain are weighted. Bases are
    independent. A scale that few circles estimated is the same for all bases, so that weights do
    not follow chance, and larger by the ratio of the quantiles of t and of the normal law.

    Args:
        points: with ``sampling`` (factors F of a base's covariance F F') and ``freedom``; or with
            ``se``, independent between points, and perhaps ``circles``, the number behind each.
    """
    if "sampling" in points:
        factors = [np.vstack(rows["sampling"].to_list()) for _, rows in points.groupby("base")]
        order = np.concatenate(
            [np.flatnonzero(points["base"] == base) for base, _ in points.groupby("base")]
        )
        freedom = points.groupby("base")["freedom"].first().to_numpy()
        blocks = [factor @ factor.T for factor in factors]
        rough = [j for j, value in enumerate(freedom) if 0 < value < math.inf and blocks[j].any()]
        if rough:
            traces = np.array([np.trace(blocks[j]) for j in rough])
            scale = _widened(float(freedom[rough].sum())) * np.average(
                traces, weights=freedom[rough]
            )
            for j, trace in zip(rough, traces, strict=True):
                blocks[j] = blocks[j] * scale / trace
        whole = csr_array(block_diag(blocks))
        back = np.argsort(order)
        return whole[back][:, back] if whole.nnz else None
    if "se" not in points:
        return None
    variances = points["se"].fillna(0).to_numpy(dtype=float) ** 2
    if "circles" in points:
        variances = variances * [_widened(count - 1) for count in points["circles"]]
    return variances if variances.any() else None


def _widened(freedom: float) -> float:
    """Factor of a variance estimated with so many degrees of freedom, for 90% intervals."""
    return float(stdtrit(max(freedom, 1.0), 0.95) / ndtri(0.95)) ** 2
