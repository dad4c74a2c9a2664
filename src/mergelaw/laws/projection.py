"""Variable projection: the least-squares solver under every fit (Golub and Pereyra 1973).

For given nonlinear parameters the best coefficients of a law are a non-negative least-squares
problem with one solution, so only the nonlinear parameters are searched, from a grid of starts that
the law brings.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

if TYPE_CHECKING:
    from mergelaw.laws.law import Law

Array = NDArray[np.float64]

# Of the grid of starts, so many are descended from besides the local minima.
BEST_STARTS = 4
# Parameters that differ by less than this share of their boxes lead to one minimum.
SAME = 1e-4
# Columns whose part apart from the others is longer than this are solved for at once.
WELL_POSED = 1e-8
# Keeps normal equations solvable where two columns of the basis are the same.
RIDGE = 1e-12
# Of complex steps, which have no rounding error however small they are.
STEP = 1e-30
# Parts of the loss smaller than this share of it are rounding errors.
ROUNDING = 1e-14


@dataclass(frozen=True)
class State:
    """Where a search is: nonlinear parameters, their best coefficients, and what they leave."""

    theta: Array
    coefficients: Array
    residuals: Array
    orthonormal: Array
    squares: float


class Problem:
    """Least squares in the nonlinear parameters of a law, the linear ones projected out.

    The loss is scaled to unit length, and so are squares and coefficients; ``size`` leads back.
    Columns of the basis are scaled to unit length before they are solved for, so neither the unit
    of N nor its distance from 1 (2.7e-5 billions, say) matters.
    """

    def __init__(
        self,
        law: "Law",
        variables: Mapping[str, Array],
        loss: Array,
        covariance: Array | None = None,
    ) -> None:
        self.law = law
        self.variables = variables
        self.whitener = None
        if covariance is not None:
            # Least squares in W y is generalised least squares in y where W V W' = 1.
            half = np.linalg.cholesky(covariance)
            self.whitener = np.linalg.inv(half)
            loss = self.whitener @ loss
        self.size = float(np.linalg.norm(loss)) or 1.0
        self.loss = loss / self.size
        self.lower = np.array([box[0] for box in law.nonlinear.values()])
        self.upper = np.array([box[-1] for box in law.nonlinear.values()])
        self.signed = np.array([name in law.signed for name in law.linear])
        self.pull: tuple[Callable[[NDArray[Any]], NDArray[Any]], float] | None = None

    def columns(self, theta: NDArray[Any]) -> NDArray[Any]:
        """The basis at ``theta``, points by coefficients."""
        out = self._columns(theta)
        if self.pull is not None:
            vector, weight = self.pull
            out = np.vstack([out, weight * vector(theta)])
        return out

    def _columns(self, theta: NDArray[Any]) -> NDArray[Any]:
        """The same without a pull; also at many: (..., points, coefficients)."""
        points = len(next(iter(self.variables.values())))
        out = np.empty((*theta.shape[:-1], points, len(self.law.linear)), dtype=theta.dtype)
        named = dict(zip(self.law.nonlinear, theta.T[..., None], strict=True))
        for j, column in enumerate(self.law.basis(**self.variables, **named)):
            out[..., j] = column
        return out if self.whitener is None else self.whitener @ out

    def tangent(self, state: State) -> Array:
        """Derivatives of the fitted losses by all parameters, linear ones first, unit loss."""
        return np.column_stack([self.columns(state.theta), self._slopes(state)])

    def _slopes(self, state: State) -> Array:
        """Derivatives of the fitted losses by the nonlinear parameters, coefficients held."""
        steps = state.theta + 1j * STEP * np.eye(len(state.theta))
        out = (self._columns(steps).imag @ state.coefficients).T / STEP
        if self.pull is not None:
            vector, weight = self.pull
            last = [vector(step).imag @ state.coefficients for step in steps]
            out = np.vstack([out, weight * np.array(last) / STEP])
        return out

    def held(self, j: int, value: float) -> "Problem":
        """The problem with a nonlinear parameter kept at a value."""
        held = copy(self)
        held.lower, held.upper = self.lower.copy(), self.upper.copy()
        held.lower[j] = held.upper[j] = value
        return held

    def pulled(
        self, vector: Callable[[NDArray[Any]], NDArray[Any]], value: float, weight: float
    ) -> "Problem":
        """The problem with one more point, that pulls vector(theta) . coefficients to a value.

        Whatever the weight, its solution minimises the squares of the true points among all
        parameters with the same vector(theta) . coefficients.
        """
        pulled = copy(self)
        pulled.pull = (vector, weight)
        pulled.loss = np.append(self.loss, weight * value)
        return pulled

    def project(self, theta: Array) -> State:
        """The best coefficients at ``theta``."""
        columns = self.columns(theta)
        lengths = np.sqrt(np.einsum("ij,ij->j", columns, columns))
        lengths[lengths == 0] = 1  # a term that is 0 at every point gets the coefficient 0
        unit = columns / lengths
        # The plain solution, if nothing in it is below 0; else it has to be found out what is 0.
        used = np.ones(len(self.signed), dtype=bool)
        q, r = np.linalg.qr(unit)
        well_posed = len(r) == len(used) and np.abs(np.diag(r)).min(initial=1) > WELL_POSED
        solved = np.linalg.solve(r, q.T @ self.loss) if well_posed else np.zeros(len(used))
        if not well_posed or not ((solved > ROUNDING) | self.signed).all():
            used = self._used(unit)
            q, r = np.linalg.qr(unit[:, used])
            solved = np.linalg.solve(r, q.T @ self.loss)
        coefficients = np.zeros(len(used))
        coefficients[used] = solved / lengths[used]
        residuals = self.loss - columns @ coefficients
        return State(theta, coefficients, residuals, q, float(residuals @ residuals))

    def _used(self, unit: Array) -> NDArray[np.bool_]:
        """Which coefficients are signed or above 0 at the non-negative least squares."""
        used = self.signed.copy()
        if used.any():
            q = np.linalg.qr(unit[:, self.signed]).Q
            rest = unit[:, ~self.signed] - q @ (q.T @ unit[:, ~self.signed])
            used[~self.signed] = nnls(rest, self.loss - q @ (q.T @ self.loss))[0] > ROUNDING
        else:
            used = nnls(unit, self.loss)[0] > ROUNDING
        return used

    def jacobian(self, state: State) -> Array:
        """Derivatives of the fitted losses by the nonlinear parameters (Kaufman 1975).

        The part that the coefficients take up is projected out, so its product with the residuals
        is the exact gradient.
        """
        out = self._slopes(state)
        q = state.orthonormal
        return out - q @ (q.T @ out)

    def descend(self, state: State, enough: float = 1e-13, found: Sequence[State] = ()) -> State:
        """Levenberg-Marquardt on the residual vector, with parameters on their bounds held there.

        Bounds are an active set: a step that leaves the box is cut at its side, and a parameter
        stays there while the gradient points outwards. It ends with a step that takes less than a
        share ``enough`` off the squares, or near one of the minima that were ``found`` before.
        """
        damping = 1e-3
        rounding = len(self.loss) * np.finfo(float).eps ** 2
        for _ in range(100):
            jacobian = self.jacobian(state)
            ascent = jacobian.T @ state.residuals
            normal = jacobian.T @ jacobian
            diagonal = np.diag(normal)
            outwards = ((state.theta <= self.lower) & (ascent <= 0)) | (
                (state.theta >= self.upper) & (ascent >= 0)
            )
            # A parameter without any effect (its coefficient is 0) has nowhere to go either.
            free = np.flatnonzero(~outwards & (diagonal > 0))
            slope = np.abs(ascent[free]) / np.sqrt(diagonal[free])
            if state.squares <= rounding or not (slope > 1e-14 * math.sqrt(state.squares)).any():
                return state
            while True:
                damped = normal[np.ix_(free, free)] + damping * np.diag(diagonal[free])
                theta = state.theta.copy()
                theta[free] += np.linalg.solve(damped, ascent[free])
                theta = np.clip(theta, self.lower, self.upper)
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
            for other in found:
                if (np.abs(state.theta - other.theta) <= SAME * (self.upper - self.lower)).all():
                    return other
        return state

    def minimum(self, near: Array | None = None, enough: float = 1e-13) -> State:
        """The best state of descents from the law's grid of starts, and from ``near``.

        Started from are the grid points that no neighbour improves on, and, in a grid of more than
        one axis, the best few, for a narrow valley may run across it. With ``near``, a minimum
        under other weights, those few are not needed.
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
        found: list[State] = []
        for theta in chosen if near is None else [near, *chosen]:
            found.append(self.descend(self.project(theta), enough, found))
        return min(found, key=lambda state: state.squares)

    def _squares(self, grid: Array) -> Array:
        """What the best coefficients leave of the loss at each of many parameters, roughly.

        By normal equations, solved for all at once: good enough to choose starts.
        """
        columns = self._columns(grid)
        lengths = np.sqrt(np.einsum("gij,gij->gj", columns, columns))
        unit = columns / np.where(lengths > 0, lengths, 1)[:, None, :]
        normal = np.einsum("gij,gik->gjk", unit, unit)
        right = np.einsum("gij,i->gj", unit, self.loss)
        squares = np.full(len(grid), float(self.loss @ self.loss))
        # Which coefficients are above 0: the best of all choices for which the rest are 0.
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
