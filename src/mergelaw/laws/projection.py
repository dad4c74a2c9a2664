"""Variable projection: the least-squares solver of every fit (Golub and Pereyra 1973).

At fixed nonlinear parameters the best coefficients of a law solve a non-negative least-squares
problem. The search is over nonlinear parameters only, from the best points of the law's grid.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from mergelaw.laws.law import Array, Law

# The grid is searched with at most this many of the points.
POINTS_OF_GRID = 300
# Columns are well posed if the part of each orthogonal to the others is longer than this.
WELL_POSED = 1e-8
# Descents that are nearer to each other than this have the same end.
NEAR = 0.03
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
        theta: (nonlinear parameters,).
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


def box_of(law: Law) -> tuple[Array, Array]:
    """Lower and upper bounds of the nonlinear parameters."""
    ends = np.array([(box[0], box[-1]) for box in law.nonlinear.values()]).reshape(-1, 2)
    return ends[:, 0], ends[:, 1]


def columns_of(law: Law, variables: Mapping[str, Array], theta: NDArray[Any]) -> NDArray[Any]:
    """Basis functions at one theta or at many: (..., points, coefficients)."""
    points = len(next(iter(variables.values())))
    columns = np.empty((*theta.shape[:-1], points, len(law.linear)), dtype=theta.dtype)
    named = dict(zip(law.nonlinear, theta.T[..., None], strict=True))
    for j, column in enumerate(law.basis(**variables, **named)):
        columns[..., j] = column
    return columns


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
        whiten: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
    ) -> None:
        self.law, self.variables, self.whiten = law, variables, whiten
        if whiten is not None:
            loss = whiten(loss[:, None])[:, 0]
        self.size = float(np.linalg.norm(loss)) or 1.0
        self.loss = loss / self.size
        self.lower, self.upper = box_of(law)
        self.signed = np.array([name in law.signed for name in law.linear])

    def columns(self, theta: NDArray[Any]) -> NDArray[Any]:
        """Whitened basis functions at ``theta``, (..., points, coefficients)."""
        columns = columns_of(self.law, self.variables, theta)
        return columns if self.whiten is None else self.whiten(columns)

    def parameters(self, state: State) -> dict[str, float]:
        """All parameters of the law by name, in the losses' units."""
        values = [*(state.coefficients * self.size), *state.theta]
        return dict(zip(self.law.parameters, map(float, values), strict=True))

    def slopes(self, state: State) -> Array:
        """Derivatives of the fitted losses by the nonlinear parameters, coefficients fixed."""
        steps = state.theta + 1j * STEP * np.eye(len(state.theta))
        slopes: Array = (self.columns(steps).imag @ state.coefficients).T / STEP
        return slopes

    def project(self, theta: Array) -> State:
        """Best coefficients at ``theta``, by non-negative least squares."""
        columns = self.columns(theta)
        lengths = np.linalg.norm(columns, axis=0)
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
        q = np.linalg.qr(unit[:, self.signed]).Q
        rest = unit[:, ~self.signed] - q @ (q.T @ unit[:, ~self.signed])
        used[~self.signed] = nnls(rest, self.loss - q @ (q.T @ self.loss))[0] > ROUNDING
        return used

    def jacobian(self, state: State) -> Array:
        """Derivatives by the nonlinear parameters, coefficients projected out (Kaufman 1975)."""
        slopes = self.slopes(state)
        q = state.orthonormal
        return slopes - q @ (q.T @ slopes)

    def descend(self, state: State, enough: float = 1e-10) -> State:
        """Minimise by Levenberg-Marquardt with bounds as an active set.

        The search ends when a step reduces the squares by less than a share ``enough``.
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
                trial = self.project(np.clip(theta, self.lower, self.upper))
                if trial.squares < state.squares:
                    break
                damping *= 10
                if damping > 1e8:
                    return state
            gain = 1 - trial.squares / state.squares
            state, damping = trial, max(damping / 10, 1e-15)
            if gain < enough:
                return state
        return state

    def minimum(self, near: Array | None = None) -> State:
        """Best state of descents from the grid, or from ``near``, a minimum under other weights."""
        if not self.law.nonlinear:
            return self.project(np.empty(0))
        if near is not None:
            return self.descend(self.project(near))
        if len(self.loss) > POINTS_OF_GRID and self.whiten is None:
            some = np.random.default_rng(0).choice(len(self.loss), POINTS_OF_GRID, replace=False)
            some = np.sort(some)
            part = {name: values[some] for name, values in self.variables.items()}
            near = Problem(self.law, part, self.loss[some] * self.size).minimum().theta
            return self.descend(self.project(near))
        axes = list(self.law.nonlinear.values())
        grid = np.array(list(itertools.product(*axes)))
        squares = self._squares(grid)
        # Besides the local minima of the grid also its best points: a valley may cross it.
        starts = set(np.argsort(squares, kind="stable")[: len(axes) + 1])
        table = np.pad(squares.reshape([len(axis) for axis in axes]), 1, constant_values=np.inf)
        inner = tuple(slice(1, -1) for _ in axes)
        lowest = np.ones(table[inner].shape, dtype=bool)
        for axis in range(len(axes)):
            lowest &= table[inner] < np.roll(table, 1, axis)[inner]
            lowest &= table[inner] <= np.roll(table, -1, axis)[inner]
        starts.update(np.flatnonzero(lowest))
        rough = [self.descend(self.project(grid[start]), 1e-3) for start in sorted(starts)]
        # Starts that end near each other go on together, those far above the best do not.
        rough.sort(key=lambda state: state.squares)
        kept = rough[:1]
        for state in rough[1:]:
            apart = all(np.abs(state.theta - other.theta).max() > NEAR for other in kept)
            if apart and state.squares < 2 * rough[0].squares:
                kept.append(state)
        return min((self.descend(state) for state in kept), key=lambda state: state.squares)

    def _squares(self, grid: Array) -> Array:
        """Approximate residual squares at each theta of a grid, by normal equations."""
        columns, loss = self.columns(grid), self.loss
        lengths = np.linalg.norm(columns, axis=1, keepdims=True)
        unit = columns / np.where(lengths > 0, lengths, 1)
        normal = np.swapaxes(unit, 1, 2) @ unit + RIDGE * np.eye(unit.shape[2])
        right = np.swapaxes(unit, 1, 2) @ loss
        # Coefficients below 0 are dropped, the most negative one first.
        dropped = np.zeros(right.shape, dtype=bool)
        for _ in range(right.shape[1] + 1):
            stiff = normal + np.eye(right.shape[1]) * np.where(dropped, 1 / RIDGE, 0)[:, None]
            solved = np.linalg.solve(stiff, right[:, :, None])[:, :, 0]
            least = np.where(self.signed | dropped, 0.0, solved)
            negative = (least < 0) & (least == least.min(axis=1, keepdims=True))
            if not negative.any():
                break
            dropped |= negative
        squares: Array = float(loss @ loss) - np.einsum(
            "gi,gi->g", solved, 2 * right - np.einsum("gij,gj->gi", normal, solved)
        )
        return squares
