"""Posterior draws of a law's parameters: intervals integrate over what the points leave open.

Given the nonlinear parameters, the misfit and the scatter, the coefficients of a law are Gaussian
(generalised least squares) and their likelihood is known. Importance sampling over those few
(adaptive, with Student-t proposals: Cappe et al. 2008) gives weighted draws; coefficients are drawn
for each, and draws with a coefficient below 0 are dropped.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.special import chdtri, expit, gammaln, log_expit, logit, logsumexp, ndtri

from mergelaw.laws.covariance import Errors, inverse_roots
from mergelaw.laws.law import Array, Law
from mergelaw.laws.projection import columns_of

# Proposals a round, rounds at most, and draws of a fit.
PROPOSALS, ROUNDS, DRAWS = 512, 8, 4000
# Rounds end with this many effective proposals; with many points all these are a quarter.
EFFECTIVE = 400
# Proposals times points are about this many, if there are many points.
WORK = 600_000
# Effective proposals for each dimension, from which the next round's proposal is made.
ENOUGH = 20
# Degrees of freedom of the proposal, so that its tails are wider than the posterior's.
TAIL = 5.0
# If fewer draws than this share have no coefficient below 0, coefficients of 0 stay 0.
RARE = 0.002
# Proposals are evaluated in pieces of so many numbers, which a processor's cache holds.
NUMBERS = 300_000
# The misfit is at least this share of the median sampling error, beside which less cannot be seen,
# and below this many standard deviations of the losses.
LEAST_MISFIT, MOST_MISFIT = 0.1, 10.0
# The logarithm of the scatter is within this distance from that of its typical value.
SCATTERS = 9.0
# The first proposal of misfit and scatter comes from so many grids of so many values.
GRIDS, VALUES = 2, {0: 1, 1: 41, 2: 15}


@dataclass(frozen=True)
class Posterior:
    """Draws of a law's parameters with equal weights.

    Attributes:
        parameters: (draws, parameters), linear ones first.
        misfit, scatter: (draws,), nats per token.
        evidence: logarithm of the marginal likelihood, comparable between laws of the same points.
    """

    parameters: Array
    misfit: Array
    scatter: Array
    evidence: float


class _Space:
    """Nonlinear parameters, log misfit and log scatter as one vector, with their posterior.

    The vector holds logits of the places within bounds. Between the values that a law lists for a
    nonlinear parameter its prior is even: each step of the list is as probable as another.
    """

    def __init__(
        self,
        law: Law,
        variables: Mapping[str, Array],
        loss: Array,
        errors: Errors,
        misfit: float | None,
        scatter: float | None,
    ) -> None:
        self.law, self.variables, self.errors = law, variables, errors
        self.loss = errors.rotate(loss[:, None])[:, 0]
        self.misfit = misfit
        self.scatter = scatter if len(errors.starts) else 0.0
        least = max(LEAST_MISFIT * math.sqrt(np.median(errors.variances)), errors.least)
        most = max(MOST_MISFIT * float(np.std(loss)), 100 * least)
        typical = math.log(errors.typical)
        self.boxes = [np.array(box) for box in law.nonlinear.values()]
        self.nonlinear = len(self.boxes)
        if misfit is None:
            self.boxes.append(np.log([least, most]))
        if self.scatter is None:
            self.boxes.append(np.array([typical - SCATTERS, typical + SCATTERS]))
        self.size = len(self.boxes)

    def unpack(self, points: Array) -> tuple[Array, Array, Array]:
        """Nonlinear parameters (draws, parameters), misfit and scatter at vectors."""
        values = np.column_stack(
            [
                np.interp(place, np.linspace(0, 1, len(box)), box)
                for place, box in zip(expit(points).T, self.boxes, strict=True)
            ]
            or [np.empty((len(points), 0))]
        )
        rest, count = np.exp(values[:, self.nonlinear :]), len(points)
        misfit = rest[:, 0] if self.misfit is None else np.full(count, self.misfit)
        scatter = rest[:, -1] if self.scatter is None else np.full(count, self.scatter)
        return values[:, : self.nonlinear], misfit, scatter

    def start(self, theta: Array, influence: Array) -> tuple[Array, Array]:
        """Centre and root of the covariance of the first proposal.

        Nonlinear parameters are linearised, misfit and scatter searched at ``theta``.
        """
        places, slopes = [], []
        for box, value in zip(self.boxes, theta, strict=False):
            step = int(np.clip(np.searchsorted(box, value) - 1, 0, len(box) - 2))
            places.append(np.interp(value, box, np.linspace(0, 1, len(box))))
            slopes.append(1 / ((box[step + 1] - box[step]) * (len(box) - 1)))
        factor = influence * np.array(slopes)[:, None]
        lengths = np.linalg.norm(factor, axis=1)
        wanted = np.where(lengths > 0, np.clip(lengths, 1e-9, 0.4), 0.2)
        within = np.clip(places, wanted / 2, 1 - wanted / 2)
        logits = within * (1 - within)
        factor = factor * (wanted / np.where(lengths > 0, lengths, 1) / logits)[:, None]
        covariance = np.zeros((self.size, self.size))
        covariance[: self.nonlinear, : self.nonlinear] = factor @ factor.T + np.diag(
            np.where(lengths > 0, 1e-3, 1) * (wanted / logits) ** 2
        )
        others = self.size - self.nonlinear
        centre, reach = np.append(logit(within), np.zeros(others)), np.full(others, 6.0)
        for _ in range(GRIDS if others else 0):
            axes = [np.linspace(-1, 1, VALUES[others])] * others
            grid = np.tile(centre, (VALUES[others] ** others, 1))
            grid[:, self.nonlinear :] += np.array(list(itertools.product(*axes))) * reach
            log = self.density(grid)[0]
            shares = np.exp(log - logsumexp(log))
            centre = shares @ grid
            away = (grid - centre)[:, self.nonlinear :]
            spread = (away * shares[:, None]).T @ away
            spread += np.diag((reach / VALUES[others]) ** 2)
            covariance[self.nonlinear :, self.nonlinear :] = spread
            reach = np.minimum(4 * np.sqrt(np.diag(spread)), reach)
        return centre, np.asarray(np.linalg.cholesky(covariance))

    def density(self, points: Array) -> tuple[Array, Array, Array]:
        """Log posterior at vectors, with the coefficients' means and covariance roots there."""
        pieces = -(-points.shape[0] * len(self.loss) * (len(self.law.linear) + 1) // NUMBERS)
        parts = [self._density(part) for part in np.array_split(points, pieces)]
        log, means, roots = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return log, means, roots

    def _density(self, points: Array) -> tuple[Array, Array, Array]:
        theta, misfit, scatter = self.unpack(points)
        if (theta == theta[0]).all():
            theta = theta[:1]  # one regression under many variances
        columns = columns_of(self.law, self.variables, theta)
        lengths = np.linalg.norm(columns, axis=1, keepdims=True)
        columns = columns / np.where(lengths > 0, lengths, 1)
        plain = np.swapaxes(columns, 1, 2) @ columns
        loss = np.broadcast_to(self.loss[:, None], (*columns.shape[:2], 1))
        grams = self.errors.grams(
            np.concatenate([self.errors.rotate(columns), loss], axis=2), misfit, scatter
        )
        deviance, solved, roots = grams.regression()
        # A prior as wide as the points' design makes the result independent of the coefficients'
        # units, and of columns that are nearly the same.
        unit = inverse_roots(plain)[1]
        # Even within bounds: the logits' density, in units of the logarithm of the misfit
        log = (log_expit(points) + log_expit(-points)).sum(axis=1) + 0.5 * (unit - deviance)
        if self.misfit is None:
            log = log + math.log(np.ptp(self.boxes[self.nonlinear]))
        if self.scatter is None:
            log = log + self.errors.log_prior(scatter)
        roots = roots / lengths
        return log, np.einsum("sij,si->sj", roots, solved), roots


def draw(
    law: Law,
    variables: Mapping[str, Array],
    loss: Array,
    errors: Errors,
    *,
    theta: Array,
    coefficients: Array,
    influence: Array,
    misfit: float | None,
    scatter: float | None,
) -> Posterior | None:
    """Draws of a law's parameters given the points; None if no draw has coefficients above 0.

    A coefficient that is 0 at the minimum and hardly ever above it stays 0.

    Args:
        theta, coefficients: the minimum.
        influence: (nonlinear parameters, points), a factor of their covariance, linearised; rows
            of zeros where it is unknown.
        misfit, scatter: values to keep; None integrates over them.
    """
    space = _Space(law, variables, loss, errors, misfit, scatter)
    linear = len(law.linear)
    random = np.random.default_rng(0)
    if not space.size:
        points, weights = np.empty((1, 0)), np.zeros(1)
        log, means, roots = space.density(points)
        evidence = float(log[0])
    else:
        start = space.start(theta, influence)
        points, weights, means, roots, evidence = _sampled(space, *start)
    posterior = _with_coefficients(space, points, weights, means, roots, evidence, random)
    used = np.flatnonzero(coefficients)
    if (posterior is not None and len(posterior.misfit) > RARE * DRAWS) or len(used) == linear:
        return posterior
    rest = draw(
        _with_terms(law, used),
        variables,
        loss,
        errors,
        theta=theta,
        coefficients=coefficients[used],
        influence=influence,
        misfit=misfit,
        scatter=scatter,
    )
    if rest is None:
        return None
    parameters = np.zeros((len(rest.parameters), len(law.parameters)))
    parameters[:, [*used, *range(linear, len(law.parameters))]] = rest.parameters
    return replace(rest, parameters=parameters)


def _with_terms(law: Law, terms: NDArray[np.intp]) -> Law:
    """The law with these of its linear terms only."""
    return replace(
        law,
        linear=tuple(law.linear[j] for j in terms),
        basis=lambda **named: tuple(law.basis(**named)[j] for j in terms),
    )


def _sampled(space: _Space, centre: Array, root: Array) -> tuple[Array, Array, Array, Array, float]:
    """Importance sample: vectors, log weights, coefficients' means and roots, and evidence.

    The vectors of all rounds count, weighted by the mixture of all proposals (Cornuet et al. 2012).
    """
    proposals = PROPOSALS if PROPOSALS * len(space.loss) < WORK else PROPOSALS // 4
    floor = 1e-4 * np.diag(root) ** 2
    mixture: list[tuple[Array, Array]] = []
    parts: list[tuple[Array, ...]] = []
    for draws in np.split(_standard_t(space.size), ROUNDS * PROPOSALS // proposals)[:ROUNDS]:
        new = centre + draws @ root.T
        mixture.append((centre, root))
        parts.append((new, *space.density(new)))
        points, log, means, roots = (np.concatenate(a) for a in zip(*parts, strict=True))
        weights = log - logsumexp([_log_t(points, *one) for one in mixture], axis=0)
        total = logsumexp(weights)
        shares = np.exp(weights - total)
        if 1 / float(shares @ shares) > EFFECTIVE * proposals / PROPOSALS:
            break
        # Weights are flattened until enough vectors matter.
        for flatter in 0.5 ** np.arange(30):
            shares = np.exp(flatter * (weights - weights.max()))
            shares /= shares.sum()
            if 1 / float(shares @ shares) > ENOUGH * space.size:
                break
        centre = shares @ points
        spread = (points - centre).T @ ((points - centre) * shares[:, None])
        root = np.linalg.cholesky(spread * 1.2 + np.diag(floor))
    return points, weights, means, roots, float(total) - math.log(proposals)


@cache
def _standard_t(size: int) -> Array:
    """Quasi-random draws of a multivariate Student's t, (all rounds' proposals, size).

    They are multiples of powers of the generalised golden ratio, modulo 1 (Roberts 2018).
    """
    ratio = 2.0
    for _ in range(40):
        ratio = (1 + ratio) ** (1 / (size + 2))
    steps = np.arange(ROUNDS * PROPOSALS)[:, None] + 1
    uniform = (0.5 + steps * ratio ** -np.arange(1.0, size + 2)) % 1
    stretch = np.sqrt(TAIL / chdtri(TAIL, uniform[:, :1]))
    draws: Array = ndtri(uniform[:, 1:]) * stretch
    return draws


def _log_t(points: Array, centre: Array, root: Array) -> Array:
    """Log density of a multivariate Student's t with ``TAIL`` degrees of freedom."""
    size = len(centre)
    squares = np.sum(solve_triangular(root, (points - centre).T, lower=True) ** 2, axis=0)
    log = gammaln((TAIL + size) / 2) - gammaln(TAIL / 2) - 0.5 * size * math.log(TAIL * math.pi)
    log -= np.log(np.diag(root)).sum()
    return np.asarray(log - 0.5 * (TAIL + size) * np.log1p(squares / TAIL))


def _with_coefficients(
    space: _Space,
    points: Array,
    weights: Array,
    means: Array,
    roots: Array,
    evidence: float,
    random: np.random.Generator,
) -> Posterior | None:
    """Coefficients of weighted vectors, DRAWS of equal weight, none below 0."""
    law = space.law
    shares = np.exp(weights - weights.max())
    steps = (np.arange(DRAWS) + 0.5) / DRAWS * shares.sum()
    chosen = np.minimum(np.searchsorted(np.cumsum(shares), steps), len(shares) - 1)
    normal = np.repeat(random.standard_normal((DRAWS // 2, len(law.linear))), 2, axis=0)
    normal[1::2] *= -1
    coefficients = means[chosen] + np.einsum("sij,si->sj", roots[chosen], normal)
    signed = np.array([name in law.signed for name in law.linear])
    allowed = ((coefficients >= 0) | signed).all(axis=1)
    if not allowed.any():
        return None
    theta, misfit, scatter = space.unpack(points[chosen[allowed]])
    return Posterior(
        np.hstack([coefficients[allowed], theta]),
        misfit,
        scatter,
        evidence + math.log(allowed.mean()),
    )
