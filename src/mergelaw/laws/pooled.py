"""Pooled fits: what the evaluation domains of a method share, chosen by AICc.

Each domain keeps its own floor and amplitude; beta, gamma and b are shared by all domains or their
own, whichever of the eight ways describes the points best for the parameters it spends.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from mergelaw.laws import profile
from mergelaw.laws.fit import LEVEL, Fit
from mergelaw.laws.projection import Array, Problem, State

# A descent's last step takes less than this share off the squares.
ENOUGH = 1e-9
# Residuals below this share of the loss are rounding errors.
ROUNDED = 1e-9


@dataclass(frozen=True)
class Pooled:
    """The joint law of several domains.

    Attributes:
        method, family: of what.
        shared: the parameters with one value for all domains; may be none.
        parameters: their values; intervals: 90% profile-likelihood intervals, of this pool.
        domains: all parameters of each domain.
        ways: every way to share with its AICc and that above the best, best first.
    """

    method: str
    family: str
    shared: tuple[str, ...]
    parameters: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    domains: dict[str, dict[str, float]]
    ways: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """As values that strict JSON can hold."""
        return {
            "method": self.method,
            "family": self.family,
            "shared": list(self.shared),
            "parameters": self.parameters,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "domains": self.domains,
            "ways": list(self.ways),
        }

    def summary(self) -> str:
        """One line: what is shared, its values, and by how much that is better than nothing."""
        none = next(way["above"] for way in self.ways if not way["shared"])
        if not self.shared:
            return "the domains share neither beta, gamma nor b (AICc)"
        told = ", ".join(
            f"{name} = {value:.4g} ({self.intervals[name][0]:.4g} to {self.intervals[name][1]:.4g})"
            for name, value in self.parameters.items()
        )
        return f"{len(self.domains)} domains share {told}; AICc {none:.1f} lower than with none"


def pool_domains(method: str, family: str, fits: Mapping[str, Fit]) -> Pooled | None:
    """Choose what domains share; None with fewer than two domains or where no error is known.

    Every domain is weighed as its own fit was: by its covariance, with its own noise.

    Args:
        fits: of the same law, by domain.
    """
    if len(fits) < 2 or any(fitted.freedom == 0 for fitted in fits.values()):
        return None
    names = list(next(iter(fits.values())).law.nonlinear)
    points = sum(fitted.n_points for fitted in fits.values())
    linear = len(next(iter(fits.values())).law.linear)
    found: list[tuple[float, tuple[str, ...], _Together, State]] = []
    for size in range(len(names) + 1):
        for shared in itertools.combinations(names, size):
            problem = _Together(list(fits.values()), shared)
            state = problem.descend(problem.project(problem.start), ENOUGH)
            spent = len(fits) * linear + len(state.theta)
            if points - spent - 1 <= 0:
                continue
            deviance = state.squares * problem.size**2
            aicc = deviance + 2 * spent * points / (points - spent - 1)
            found.append((aicc, shared, problem, state))
    if all(way[1] for way in found):  # too few points for every domain's own: nothing to compare
        return None
    found.sort(key=lambda way: way[0])
    _, shared, problem, state = found[0]
    values = problem.parameters(state)
    quantile = float(stdtrit(points - len(fits) * linear - len(state.theta), (1 + LEVEL) / 2))
    threshold = (quantile / problem.size) ** 2
    return Pooled(
        method=method,
        family=family,
        shared=shared,
        parameters={name: values[0][name] for name in shared},
        intervals={
            name: profile.of_nonlinear(problem, state, j, threshold)
            for j, name in enumerate(shared)
        },
        domains=dict(zip(fits, values, strict=True)),
        ways=tuple(
            {"shared": list(names), "aicc": aicc, "above": aicc - found[0][0]}
            for aicc, names, _, _ in found
        ),
    )


@dataclass(frozen=True)
class _States(State):
    """A state of several problems, and each one's own."""

    each: tuple[State, ...]


class _Together(Problem):
    """The problems of several fits as one, with some nonlinear parameters in common.

    Nonlinear parameters are the shared ones, then each fit's own.
    """

    def __init__(self, fits: Sequence[Fit], shared: tuple[str, ...]) -> None:
        self.law = fits[0].law
        names = list(self.law.nonlinear)
        self.problems = [fitted._solution.problem for fitted in fits]
        self.shared = [names.index(name) for name in shared]
        self.own = [j for j in range(len(names)) if j not in self.shared]
        # Every fit's residuals in units of their standard deviation.
        scales = []
        for fitted in fits:
            problem, noise = fitted._solution.problem, fitted._solution.noise
            deviation = max(math.sqrt(noise.variance), ROUNDED * problem.size)
            scales.append(problem.size / deviation)
        self.size = float(np.linalg.norm(scales))
        self.scales = np.array(scales) / self.size
        self.loss = np.concatenate(
            [s * p.loss for s, p in zip(self.scales, self.problems, strict=True)]
        )
        each = [fitted._solution.state.theta for fitted in fits]
        first = self.problems[0]
        self.start = self._joined(np.median(each, axis=0), each)
        self.lower = self._joined(first.lower, [first.lower] * len(fits))
        self.upper = self._joined(first.upper, [first.upper] * len(fits))

    def _joined(self, common: Array, each: Sequence[Array]) -> Array:
        return np.concatenate([common[self.shared], *(theta[self.own] for theta in each)])

    def _split(self, theta: Array) -> list[Array]:
        """The nonlinear parameters of each fit."""
        made = []
        for i in range(len(self.problems)):
            own = np.empty(len(self.shared) + len(self.own))
            own[self.shared] = theta[: len(self.shared)]
            start = len(self.shared) + i * len(self.own)
            own[self.own] = theta[start : start + len(self.own)]
            made.append(own)
        return made

    def project(self, theta: Array) -> State:
        states = [
            problem.project(own)
            for problem, own in zip(self.problems, self._split(theta), strict=True)
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
        assert isinstance(state, _States)
        out = np.zeros((len(self.loss), len(state.theta)))
        row, column = 0, len(self.shared)
        for problem, scale, own in zip(self.problems, self.scales, state.each, strict=True):
            block = scale * problem.jacobian(own)
            rows = slice(row, row + len(block))
            out[rows, : len(self.shared)] = block[:, self.shared]
            out[rows, column : column + len(self.own)] = block[:, self.own]
            row, column = row + len(block), column + len(self.own)
        return out

    def parameters(self, state: State) -> list[dict[str, float]]:
        """All parameters of each fit."""
        assert isinstance(state, _States)
        return [
            dict(
                zip(
                    self.law.parameters,
                    map(float, [*(own.coefficients * problem.size), *own.theta]),
                    strict=True,
                )
            )
            for problem, own in zip(self.problems, state.each, strict=True)
        ]
