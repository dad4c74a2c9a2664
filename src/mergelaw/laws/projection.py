"""Variable projection: the least-squares solver of every fit (Golub and Pereyra 1973).

At fixed nonlinear parameters the best coefficients of a law solve a non-negative least-squares
problem. The search is over nonlinear parameters only, from the law's grid of starts.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from mergelaw.laws.law import Array, Law

# Descents start at this many grid points besides the local minima.
BEST_STARTS = 4
# Parameters closer than this share of their bounds' range lead to the same minimum.
SAME = 1e-4
# Columns are well posed if the part of each orthogonal to the others is longer than this.
WELL_POSED = 1e-8
# Keeps normal equations solvable where two columns of the basis are the same.
RIDGE = 1e-12
# Length of complex steps, which have no rounding error.
STEP = 1e-30
# Parts of the loss smaller than this share of it are rounding errors.
ROUNDING = 1e-14


@dataclass(frozen=True)
class State:
    """A point of the search.

    Attributes:
        coefficients: (linear parameters,), in units of the problem's size.
        residuals: (points,), whitened and in units of the problem's size.
        orthonormal: orthonormal basis of the columns in use, (points, columns).
        squares: sum of the squared residuals.
    """

    theta: Array
    coefficients: Array
    residuals: Array
    orthonormal: Array
    squares: float


class Problem:
    """Least squares in a law's nonlinear parameters, with the linear ones projected out.

    The loss is scaled to unit length, and squares and coefficients with it; multiply by ``size`` to
    undo that. Columns of the basis are scaled too, so the unit of N does not matter.
    """

    def __init__(
        self,
        law: Law,
        variables: Mapping[str, Array],
        loss: Array,
        covariance: Array | None = None,
    ) -> None:
        self.law = law
        self.variables = variables
        self.whitener = None
        if covariance is not None:
            # With W V W' = 1, least squares in W y is generalised least squares in y.
            half = np.linalg.cholesky(covariance)
            self.whitener = np.linalg.inv(half)
            loss = self.whitener @ loss
        self.size = float(np.linalg.norm(loss)) or 1.0
        self.loss = loss / self.size
        self.lower = np.array([box[0] for box in law.nonlinear.values()])
        self.upper = np.array([box[-1] for box in law.nonlinear.values()])
        self.signed = np.array([name in law.signed for name in law.linear])
        self.steps = 1j * STEP * np.eye(len(law.nonlinear))
        self.pull: tuple[Callable[[NDArray[Any]], NDArray[Any]], float] | None = None

    def columns(self, theta: NDArray[Any]) -> NDArray[Any]:
        """Basis functions at ``theta``, (points, coefficients)."""
        columns = self._columns(theta)
        if self.pull is not None:
            vector, weight = self.pull
            columns = np.vstack([columns, weight * vector(theta)])
        return columns

    def _columns(self, theta: NDArray[Any]) -> NDArray[Any]:
        """Basis without the pull, at one theta or at many: (..., points, coefficients)."""
        points = len(next(iter(self.variables.values())))
        columns = np.empty((*theta.shape[:-1], points, len(self.law.linear)), dtype=theta.dtype)
        named = dict(zip(self.law.nonlinear, theta.T[..., None], strict=True))
        for j, column in enumerate(self.law.basis(**self.variables, **named)):
            columns[..., j] = column
        return columns if self.whitener is None else self.whitener @ columns

    def parameters(self, state: State) -> dict[str, float]:
        """All parameters of the law by name, in the losses' units."""
        values = [*(state.coefficients * self.size), *state.theta]
        return dict(zip(self.law.parameters, map(float, values), strict=True))

    def tangent(self, state: State) -> Array:
        """Derivatives of the fitted, scaled losses by all parameters, linear ones first."""
        return np.column_stack([self.columns(state.theta), self._slopes(state)])

    def _slopes(self, state: State) -> Array:
        """Derivatives of the fitted losses by the nonlinear parameters, coefficients fixed."""
        steps = state.theta + self.steps
        slopes = (self._columns(steps).imag @ state.coefficients).T / STEP
        if self.pull is not None:
            vector, weight = self.pull
            last = [vector(step).imag @ state.coefficients for step in steps]
            slopes = np.vstack([slopes, weight * np.array(last) / STEP])
        return slopes

    def with_fixed(self, j: int, value: float) -> "Problem":
        """Copy of the problem with nonlinear parameter ``j`` fixed at a value."""
        fixed = copy(self)
        fixed.lower, fixed.upper = self.lower.copy(), self.upper.copy()
        fixed.lower[j] = fixed.upper[j] = value
        return fixed

    def pulled(
        self, vector: Callable[[NDArray[Any]], NDArray[Any]], value: float, weight: float
    ) -> "Problem":
        """Copy of the problem with an extra point that pulls vector(theta) . coefficients to value.

        Its solution is the best among all parameters with the same vector(theta) . coefficients.
        """
        pulled = copy(self)
        pulled.pull = (vector, weight)
        pulled.loss = np.append(self.loss, weight * value)
        return pulled

    def project(self, theta: Array) -> State:
        """Best coefficients at ``theta``, by non-negative least squares."""
        columns = self.columns(theta)
        lengths = np.sqrt(np.einsum("ij,ij->j", columns, columns))
        lengths[lengths == 0] = 1  # terms that are 0 at every point get the coefficient 0
        unit = columns / lengths
        # Use the plain solution unless it is negative somewhere; then only active coefficients.
        q, r = np.linalg.qr(unit)
        well_posed = len(r) == r.shape[1] and np.abs(r.diagonal()).min(initial=1) > WELL_POSED
        coefficients = np.linalg.solve(r, q.T @ self.loss) if well_posed else np.zeros(r.shape[1])
        if not well_posed or not ((coefficients > ROUNDING) | self.signed).all():
            used = self._used(unit)
            q, r = np.linalg.qr(unit[:, used])
            coefficients = np.zeros(len(used))
            coefficients[used] = np.linalg.solve(r, q.T @ self.loss)
        coefficients = coefficients / lengths
        residuals = self.loss - columns @ coefficients
        return State(theta, coefficients, residuals, q, float(residuals @ residuals))

    def _used(self, unit: Array) -> NDArray[np.bool_]:
        """Mask of coefficients that are signed, or above 0 at the non-negative solution."""
        used = self.signed.copy()
        if used.any():
            q = np.linalg.qr(unit[:, self.signed]).Q
            rest = unit[:, ~self.signed] - q @ (q.T @ unit[:, ~self.signed])
            used[~self.signed] = nnls(rest, self.loss - q @ (q.T @ self.loss))[0] > ROUNDING
        else:
            used = nnls(unit, self.loss)[0] > ROUNDING
        return used

    def jacobian(self, state: State) -> Array:
        """Derivatives by the nonlinear parameters, coefficients projected out (Kaufman 1975)."""
        slopes = self._slopes(state)
        q = state.orthonormal
        return slopes - q @ (q.T @ slopes)

    def descend(
        self, state: State, enough: float = 1e-13, known_minima: Sequence[State] = ()
    ) -> State:
        """Minimise by Levenberg-Marquardt with bounds as an active set.

        The search ends when a step reduces the squares by less than a share ``enough``, or when it
        comes close to one of the ``known_minima``.
        """
        damping = 1e-3
        rounding = len(self.loss) * np.finfo(float).eps ** 2
        for _ in range(100):
            jacobian = self.jacobian(state)
            ascent = jacobian.T @ state.residuals
            normal = jacobian.T @ jacobian
            diagonal = normal.diagonal()
            outwards = ((state.theta <= self.lower) & (ascent <= 0)) | (
                (state.theta >= self.upper) & (ascent >= 0)
            )
            # Parameters without effect (their coefficient is 0) do not move either.
            free = np.flatnonzero(~outwards & (diagonal > 0))
            slope = np.abs(ascent[free]) / np.sqrt(diagonal[free])
            if state.squares <= rounding or not (slope > 1e-14 * math.sqrt(state.squares)).any():
                return state
            curvature, scale = normal[free[:, None], free], np.diag(diagonal[free])
            while True:
                theta = state.theta.copy()
                theta[free] += np.linalg.solve(curvature + damping * scale, ascent[free])
                theta = np.minimum(np.maximum(theta, self.lower), self.upper)
                trial = self.project(theta)
                if trial.squares < state.squares:
                    break
                damping *= 10
                if damping > 1e8:
                    return state
            gain = 1 - trial.squares / state.squares
            state, damping = trial, max(damping / 10, 1e-15)
            if gain < enough:
                return state
            for other in known_minima:
                if (np.abs(state.theta - other.theta) <= SAME * (self.upper - self.lower)).all():
                    return other
        return state

    def minimum(self, near: Array | None = None, enough: float = 1e-13) -> State:
        """Best state of descents from the grid's local minima, and from ``near``.

        Without ``near``, a minimum under other weights, descents also start at the best few
        points of the grid, since a narrow valley may cross it.
        """
        if not self.law.nonlinear:
            return self.project(np.empty(0))
        axes = list(self.law.nonlinear.values())
        grid = np.array(list(itertools.product(*axes)))
        squares = self._squares(grid)
        best = BEST_STARTS if len(axes) > 1 and near is None else 1
        starts = set(np.argsort(squares, kind="stable")[:best])
        table = np.pad(squares.reshape([len(axis) for axis in axes]), 1, constant_values=np.inf)
        inner = tuple(slice(1, -1) for _ in axes)
        lowest = np.ones(table[inner].shape, dtype=bool)
        for axis in range(len(axes)):
            lowest &= table[inner] < np.roll(table, 1, axis)[inner]
            lowest &= table[inner] <= np.roll(table, -1, axis)[inner]
        starts.update(np.flatnonzero(lowest))
        chosen = [grid[start] for start in sorted(starts, key=lambda start: squares[start])]
        minima: list[State] = []
        for theta in chosen if near is None else [near, *chosen]:
            minima.append(self.descend(self.project(theta), enough, minima))
        return min(minima, key=lambda state: state.squares)

    def _squares(self, grid: Array) -> Array:
        """Approximate residual squares at each theta of a grid, by normal equations."""
        columns = self._columns(grid)
        lengths = np.sqrt(np.einsum("gij,gij->gj", columns, columns))
        unit = columns / np.where(lengths > 0, lengths, 1)[:, None, :]
        normal = np.einsum("gij,gik->gjk", unit, unit)
        right = np.einsum("gij,i->gj", unit, self.loss)
        squares = np.full(len(grid), float(self.loss @ self.loss))
        # The non-negative solution is the best among all choices of coefficients above 0.
        bounded = np.flatnonzero(~self.signed)
        left = np.ones(len(grid), dtype=bool)
        for size in range(len(bounded), -1, -1):
            for chosen in itertools.combinations(bounded, size):
                used = np.sort([*np.flatnonzero(self.signed), *chosen]).astype(int)
                if not len(used):
                    continue
                part = normal[left][:, used[:, None], used] + RIDGE * np.eye(len(used))
                solved = np.linalg.solve(part, right[left][:, used, None])[:, :, 0]
                allowed = (solved[:, ~self.signed[used]] >= 0).all(axis=1)
                gained = np.einsum("gj,gj->g", solved, right[left][:, used])
                places = np.flatnonzero(left)[allowed]
                trial = float(self.loss @ self.loss) - gained[allowed]
                squares[places] = np.minimum(squares[places], trial)
                if size == len(bounded):
                    left[places] = False
            if not left.any():
                break
        return squares
