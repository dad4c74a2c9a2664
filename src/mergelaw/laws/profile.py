"""Profile-likelihood intervals: values of a quantity at which a refit is not much worse.

The interval holds the values at which the squares of a refit with the quantity fixed exceed the
minimum by at most a threshold.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mergelaw.laws.law import Array
from mergelaw.laws.projection import ROUNDING, STEP, Problem, State

# Tolerance of interval ends, as a share of the threshold's square root.
TOLERANCE = 1e-3
# Descents end when a step reduces the squares by less than this share.
ENOUGH = 1e-7
# Stiffness of a pull relative to the fit; the pull reaches its value within 1/STIFF^2.
STIFF = 30.0

Vector = Callable[[NDArray[np.inexact]], NDArray[np.inexact]]
# Maps a value and a starting state to the value reached, the squares and the state.
Refit = Callable[[float, State], tuple[float, float, State]]


def nonlinear_interval(
    problem: Problem, best: State, j: int, threshold: float
) -> tuple[float, float]:
    """Interval of nonlinear parameter ``j``; ``threshold`` in the problem's scaled squares."""

    def refit(value: float, near: State) -> tuple[float, float, State]:
        fixed = problem.with_fixed(j, value)
        theta = near.theta.copy()
        theta[j] = value
        state = fixed.descend(fixed.project(theta), ENOUGH)
        return value, state.squares, state

    # Standard error while all other parameters are refitted (Frisch, Waugh and Lovell).
    jacobian = problem.jacobian(best)
    lengths = np.linalg.norm(jacobian, axis=0)
    lengths[lengths == 0] = 1
    error = float(np.linalg.norm(np.linalg.pinv(jacobian / lengths)[j])) / lengths[j]
    limits = float(problem.lower[j]), float(problem.upper[j])
    step = min(error * math.sqrt(threshold), limits[1] - limits[0])
    step = step or (limits[1] - limits[0]) / 10
    return _both(best, float(best.theta[j]), step, refit, limits, threshold)


def linear_interval(
    problem: Problem, best: State, vector: Vector, threshold: float
) -> tuple[float, float]:
    """Interval of vector(theta) . coefficients, in units of the problem's size."""
    at_best = np.asarray(vector(best.theta), dtype=float)
    value = float(at_best @ best.coefficients)
    error = _error(problem, best, gradient_of(best, vector))
    error = error or max(abs(value), ROUNDING) / 10
    weight = STIFF / error

    def refit(value: float, near: State) -> tuple[float, float, State]:
        pulled = problem.pulled(vector, value, weight)
        state = pulled.descend(pulled.project(near.theta), ENOUGH)
        squares = float(state.residuals[:-1] @ state.residuals[:-1])
        return float(np.real(vector(state.theta)) @ state.coefficients), squares, state

    bounded = not problem.signed.any() and bool((at_best >= 0).all())
    limits = 0.0 if bounded else -math.inf, math.inf
    return _both(best, value, error * math.sqrt(threshold), refit, limits, threshold)


def gradient_of(best: State, vector: Vector) -> Array:
    """Derivatives of vector(theta) . coefficients by all parameters, linear ones first."""
    slopes = [
        vector(best.theta + 1j * STEP * unit).imag @ best.coefficients / STEP
        for unit in np.eye(len(best.theta))
    ]
    return np.array([*np.asarray(vector(best.theta), dtype=float), *slopes])


def _error(problem: Problem, best: State, gradient: Array) -> float:
    """Standard error under linearisation, per square root of the squares."""
    tangent = problem.tangent(best)
    lengths = np.linalg.norm(tangent, axis=0)
    lengths[lengths == 0] = 1
    return float(np.linalg.norm((gradient / lengths) @ np.linalg.pinv(tangent / lengths)))


def _both(
    best: State,
    value: float,
    step: float,
    refit: Refit,
    limits: tuple[float, float],
    threshold: float,
) -> tuple[float, float]:
    if threshold <= ROUNDING**2:  # no noise, no uncertainty
        return value, value
    low = _end(best, value, -step, refit, limits[0], math.sqrt(threshold))
    high = _end(best, value, step, refit, limits[1], math.sqrt(threshold))
    return low, high


def _end(
    best: State, value: float, step: float, refit: Refit, limit: float, wanted: float
) -> float:
    """Value at which the root of the excess squares, about linear in it, reaches ``wanted``."""

    def evaluate(target: float, near: State) -> tuple[tuple[float, float, float], State]:
        reached, squares, state = refit(target, near)
        return (target, reached, math.sqrt(max(squares - best.squares, 0.0))), state

    inner, near = (value, value, 0.0), best
    for _ in range(30):
        if inner[0] == limit:
            return limit
        target = value + step
        target = max(target, limit) if step < 0 else min(target, limit)
        outer, state = evaluate(target, near)
        if outer[2] >= wanted:
            break
        inner, near = outer, state
        growth = 1.05 * wanted / inner[2] if inner[2] > 0 else 4.0
        step *= min(max(growth, 1.2), 4.0)
    else:
        return math.copysign(math.inf, step)
    side = 0
    for _ in range(30):
        if min(wanted - inner[2], outer[2] - wanted) < TOLERANCE * wanted:
            break
        share = (wanted - inner[2]) / (outer[2] - inner[2])
        # After two steps on the same side the secant is stuck, so bisect.
        share = 0.5 if abs(side) > 1 else share
        middle, state = evaluate(inner[0] + share * (outer[0] - inner[0]), near)
        if middle[2] < wanted:
            inner, near, side = middle, state, max(side, 0) + 1
        else:
            outer, side = middle, min(side, 0) - 1
    share = (wanted - inner[2]) / (outer[2] - inner[2])
    return inner[1] + share * (outer[1] - inner[1])
