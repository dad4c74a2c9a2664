"""Generalised least squares of a law: the minimum, and the noise that weights the points."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mergelaw.laws.covariance import Noise, Part, restricted, weighing
from mergelaw.laws.law import Array, Law
from mergelaw.laws.projection import ROUNDING, Problem, State

# Scatter over bases can be told from misfit with this many sizes.
SIZES_FOR_SCATTER = 5
# Rounds of estimating the variances and refitting with their weights.
ROUNDS = 2
# Tolerance of the minimum that only gives the first weights.
ROUGHLY = 1e-6
# Added to a covariance so that it has an inverse, relative to its mean variance.
SINGULAR = 1e-10
# Variances of losses below this share of the loss, squared, are rounding errors.
ROUNDED = 1e-12


@dataclass(frozen=True)
class Solution:
    """The minimum of a fit, with points in the solver's order.

    Attributes:
        parts, misfit, scatter: the caller's arguments.
        fixed: parts of the covariance that are not estimated.
        estimated: matrices whose variances were to be estimated (None: the identity).
    """

    problem: Problem
    state: State
    noise: Noise
    parts: tuple[Part, ...]
    misfit: float | None
    scatter: float | None
    fixed: tuple[Part, ...]
    estimated: tuple[Array | None, ...]
    loss: Array

    @cached_property
    def residuals(self) -> Array:
        """Measured minus fitted losses."""
        parameters = self.problem.parameters(self.state)
        return self.loss - self.problem.law.predict(parameters, **self.problem.variables)

    @cached_property
    def tangent(self) -> Array:
        """Derivatives of the whitened losses by all parameters."""
        return self.problem.tangent(self.state)

    @cached_property
    def free(self) -> NDArray[np.bool_]:
        """Mask of the parameters that are neither on a bound nor without effect."""
        return _free(self.problem, self.state)


def solve(
    law: Law,
    variables: Mapping[str, Array],
    loss: Array,
    parts: tuple[Part, ...],
    misfit: float | None,
    scatter: float | None,
) -> Solution:
    """Fit a law to points in the order given; arguments as those of ``fit``, checked."""
    points = len(loss)
    plain = Problem(law, variables, loss)
    enough = points > len(law.parameters)
    base = _same_base(variables)
    fixed = list(parts)
    if misfit:
        fixed.append(Part(misfit**2 * np.eye(points)))
    if scatter and base is not None:
        fixed.append(Part(scatter**2 * base))
    estimated: tuple[Array | None, ...] = (None,) if misfit is None and enough else ()
    sizes = len(np.unique(variables.get("N", np.empty(0))))
    grouped = scatter is None and base is not None and enough and sizes >= SIZES_FOR_SCATTER
    if grouped:
        estimated += (base,)
    even = not parts and not scatter and not grouped
    state = plain.minimum() if even else plain.minimum(enough=ROUGHLY)
    least = ROUNDED * float(np.mean(loss))
    if grouped and not parts and state.squares * plain.size**2 < points * least**2:
        even, estimated = True, estimated[:-1]  # losses without any noise
    if even:  # equal errors do not weight the points
        problem, noise = plain, _even_noise(plain, state, misfit, enough)
    else:
        problem, state, variances, spread = _weighted(plain, state, loss, fixed, estimated, least)
        noise = _noise(problem, state, fixed, estimated, variances, spread, (misfit, scatter))
    return Solution(problem, state, noise, parts, misfit, scatter, tuple(fixed), estimated, loss)


def _weighted(
    plain: Problem,
    state: State,
    loss: Array,
    fixed: Sequence[Part],
    estimated: tuple[Array | None, ...],
    least: float,
) -> tuple[Problem, State, Array, Array]:
    """Weighted minimum, with the estimated variances and their covariance.

    ``plain`` and ``state`` are the unweighted problem and its minimum; ``least`` is a standard
    deviation added to every point, without which exact points would have infinite weights.
    """
    law, points = plain.law, len(loss)
    none = np.zeros((points, points))
    total, whole = sum(weighing(fixed), none), sum(weighing(fixed, whole=True), none)
    # A law can pass through as many exact points as it has parameters and still miss others.
    exact = int(np.sum(np.diag(whole) == 0))
    unknown = any(shape is None for shape in estimated)
    pinned = unknown and exact >= len(law.parameters)
    little = max(least**2, SINGULAR * float(np.trace(total)) / points) * np.eye(points)
    total, whole = total + little, whole + little
    problem = Problem(law, plain.variables, loss, total)
    variances, spread = np.zeros(0), np.zeros((0, 0))
    for _ in range(ROUNDS if estimated else 0):
        near = plain.project(state.theta)
        tangent = plain.tangent(near)[:, _free(plain, near)]
        variances, spread = restricted(
            near.residuals * plain.size, tangent, whole, estimated, pinned
        )
        weights = total
        for shape, variance in zip(estimated, variances, strict=True):
            weights = weights + variance * (np.eye(points) if shape is None else shape)
        problem = Problem(law, plain.variables, loss, weights)
        state = problem.descend(problem.project(state.theta))
    return problem, problem.minimum(state.theta), variances, spread


def _noise(
    problem: Problem,
    state: State,
    fixed: Sequence[Part],
    estimated: tuple[Array | None, ...],
    variances: Array,
    spread: Array,
    assumed: tuple[float | None, float | None],
) -> Noise:
    """Noise model of weighted points; ``assumed`` are misfit and scatter if not estimated."""
    points = len(problem.loss)
    deviations = {
        "misfit" if shape is None else "scatter": math.sqrt(variance)
        for shape, variance in zip(estimated, variances, strict=True)
    }
    above = variances > 0
    shapes = [np.eye(points) if shape is None else shape for shape in estimated]
    return Noise(
        misfit=deviations.get("misfit", assumed[0] or 0.0),
        scatter=deviations.get("scatter", assumed[1] or 0.0),
        variance=1.0,
        freedom=float(points - _free(problem, state).sum()) if above.any() else math.inf,
        parts=tuple(fixed),
        shapes=tuple(shape for shape, positive in zip(shapes, above, strict=True) if positive),
        variances=variances[above],
        uncertainty=spread,
    )


def _even_noise(problem: Problem, state: State, misfit: float | None, enough: bool) -> Noise:
    """Noise model of points with equal weights."""
    if misfit:
        return Noise(misfit, 0.0, misfit**2, math.inf)
    if not enough:
        return Noise(math.nan, 0.0, math.nan, 0)
    freedom = float(len(problem.loss) - _free(problem, state).sum())
    variance = state.squares * problem.size**2 / freedom
    return Noise(math.sqrt(variance), 0.0, variance, freedom)


def _same_base(variables: Mapping[str, Array]) -> Array | None:
    """Matrix with 1 where two points share a base, else 0; None without bases."""
    if not {"N", "k"} <= variables.keys():
        return None
    same: Array = (variables["N"][:, None] == variables["N"]).astype(float)
    return same


def _free(problem: Problem, state: State) -> NDArray[np.bool_]:
    """Mask of the parameters that are neither on a bound nor without effect."""
    idle = np.linalg.norm(problem.jacobian(state), axis=0) <= ROUNDING
    inside = (state.theta > problem.lower) & (state.theta < problem.upper)
    return np.concatenate([problem.signed | (state.coefficients > 0), inside & ~idle])


def solve_again(
    solution: Solution, variables: Mapping[str, Array], loss: Array
) -> dict[str, float]:
    """Parameters of a law refitted to other losses at some points, with the same weights."""
    problem, old = solution.problem, solution.problem.variables
    same = [old[name] == values[:, None] for name, values in variables.items()]
    places = np.argmax(np.all(same, axis=0), axis=1)
    covariance = None
    if problem.whitener is not None:
        covariance = np.linalg.inv(problem.whitener.T @ problem.whitener)
        covariance = covariance[np.ix_(places, places)]
    refit = Problem(problem.law, variables, loss, covariance)
    state = refit.descend(refit.project(solution.state.theta))
    return refit.parameters(state)
