"""Pooled fits: parameters shared by the evaluation domains of a method, chosen by AICc.

Each domain has its own floor and amplitude; beta, gamma and b are each shared or separate.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from mergelaw.laws import profile
from mergelaw.laws.law import Array
from mergelaw.laws.projection import Problem, State
from mergelaw.laws.result import LEVEL, Result

# Descents end when a step reduces the squares by less than this share.
ENOUGH = 1e-9
# Residuals below this share of the loss are rounding errors.
ROUNDED = 1e-9


def pool_domains(fits: Mapping[str, Result]) -> dict[str, Any] | None:
    """Choose parameters that all domains share; each domain keeps its fit's weights and noise.

    Returns:
        The ``shared`` parameters, their ``parameters`` (values) and 90% ``intervals`` for this
        pool, all parameters of each of the ``domains``, and the ``ways`` to share with their AICc,
        best first; None with too few domains or points.
    """
    if len(fits) < 2 or any(fitted.freedom == 0 for fitted in fits.values()):
        return None
    names = list(next(iter(fits.values())).law.nonlinear)
    points = sum(fitted.n_points for fitted in fits.values())
    linear = len(next(iter(fits.values())).law.linear)
    ways: list[tuple[float, tuple[str, ...], _Together, State]] = []
    for size in range(len(names) + 1):
        for shared in itertools.combinations(names, size):
            problem = _Together(list(fits.values()), shared)
            state = problem.descend(problem.project(problem.start), ENOUGH)
            n_free = len(fits) * linear + len(state.theta)
            if points - n_free - 1 <= 0:
                continue
            deviance = state.squares * problem.size**2
            aicc = deviance + 2 * n_free * points / (points - n_free - 1)
            ways.append((aicc, shared, problem, state))
    if all(shared for _, shared, _, _ in ways):  # too few points for separate fits
        return None
    ways.sort(key=lambda way: way[0])
    best, shared, problem, state = ways[0]
    values = problem.parameters_of_each(state)
    quantile = float(stdtrit(points - len(fits) * linear - len(state.theta), (1 + LEVEL) / 2))
    threshold = (quantile / problem.size) ** 2
    return {
        "shared": list(shared),
        "parameters": {name: values[0][name] for name in shared},
        "intervals": {
            name: list(profile.nonlinear_interval(problem, state, j, threshold))
            for j, name in enumerate(shared)
        },
        "domains": dict(zip(fits, values, strict=True)),
        "ways": [
            {"shared": list(names), "aicc": aicc, "above": aicc - best}
            for aicc, names, _, _ in ways
        ],
    }


@dataclass(frozen=True)
class _States(State):
    """A state of several problems, with the state of each."""

    each: tuple[State, ...]


class _Together(Problem):
    """The problems of several fits as one: shared nonlinear parameters, then those of each fit."""

    def __init__(self, fits: Sequence[Result], shared: tuple[str, ...]) -> None:
        self.law = fits[0].law
        names = list(self.law.nonlinear)
        self.problems = [fitted.solution.problem for fitted in fits]
        self.shared = [names.index(name) for name in shared]
        self.separate = [j for j in range(len(names)) if j not in self.shared]
        # Scale every fit's residuals to their standard deviation.
        scales = []
        for fitted in fits:
            problem, noise = fitted.solution.problem, fitted.solution.noise
            deviation = max(math.sqrt(noise.variance), ROUNDED * problem.size)
            scales.append(problem.size / deviation)
        self.size = float(np.linalg.norm(scales))
        self.scales = np.array(scales) / self.size
        self.loss = np.concatenate(
            [s * p.loss for s, p in zip(self.scales, self.problems, strict=True)]
        )
        each = [fitted.solution.state.theta for fitted in fits]
        first = self.problems[0]
        self.start = self._joined(np.median(each, axis=0), each)
        self.lower = self._joined(first.lower, [first.lower] * len(fits))
        self.upper = self._joined(first.upper, [first.upper] * len(fits))

    def _joined(self, common: Array, each: Sequence[Array]) -> Array:
        return np.concatenate([common[self.shared], *(theta[self.separate] for theta in each)])

    def _split(self, theta: Array) -> list[Array]:
        """The nonlinear parameters of each fit."""
        each = np.empty((len(self.problems), len(self.shared) + len(self.separate)))
        each[:, self.shared] = theta[: len(self.shared)]
        each[:, self.separate] = theta[len(self.shared) :].reshape(len(each), -1)
        return list(each)

    def project(self, theta: Array) -> State:
        """State of all problems at ``theta``."""
        states = [
            problem.project(part)
            for problem, part in zip(self.problems, self._split(theta), strict=True)
        ]
        residuals = np.concatenate(
            [scale * state.residuals for scale, state in zip(self.scales, states, strict=True)]
        )
        return _States(
            theta,
            np.concatenate([state.coefficients for state in states]),
            residuals,
            np.empty((0, 0)),
            float(residuals @ residuals),
            tuple(states),
        )

    def jacobian(self, state: State) -> Array:
        """Derivatives of all fitted losses by the nonlinear parameters."""
        assert isinstance(state, _States)
        slopes = np.zeros((len(self.loss), len(state.theta)))
        row, column = 0, len(self.shared)
        for problem, scale, part in zip(self.problems, self.scales, state.each, strict=True):
            block = scale * problem.jacobian(part)
            rows = slice(row, row + len(block))
            slopes[rows, : len(self.shared)] = block[:, self.shared]
            slopes[rows, column : column + len(self.separate)] = block[:, self.separate]
            row, column = row + len(block), column + len(self.separate)
        return slopes

    def parameters_of_each(self, state: State) -> list[dict[str, float]]:
        """All parameters of each fit, by name."""
        assert isinstance(state, _States)
        pairs = zip(self.problems, state.each, strict=True)
        return [problem.parameters(part) for problem, part in pairs]
