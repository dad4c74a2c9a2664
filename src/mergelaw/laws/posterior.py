"""Posterior draws of a law's parameters: intervals integrate over what the points leave open.

Given the nonlinear parameters, the misfit and the scatter, the coefficients of a law are Gaussian
(generalised least squares) and their likelihood is known. Importance sampling over those few
(adaptive, with Student-t proposals: Cappe et al. 2008) gives weighted draws; coefficients are drawn
for each, and draws with a coefficient below 0 are dropped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

from mergelaw.laws.covariance import Errors
from mergelaw.laws.law import Array, Law
from mergelaw.laws.projection import columns_of

# Proposals a round, rounds at most, and draws of a fit.
PROPOSALS, ROUNDS, DRAWS = 1024, 6, 4000
# Rounds end with this share of effective draws.
EFFECTIVE = 0.3
# Proposals times points are about this many, if there are many points.
WORK = 600_000
# Effective draws for each dimension, from which the next round's proposal is made.
ENOUGH = 20
# Degrees of freedom of the proposal, so that its tails are wider than the posterior's.
TAIL = 5.0
# Keeps normal equations solvable where columns are nearly the same.
REGULAR, TINY = 1e-12, 1e-300
# If fewer draws than this share have no coefficient below 0, coefficients of 0 stay 0.
RARE = 0.002
# Proposals are evaluated in pieces of so many numbers.
NUMBERS = 3_000_000


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

    Between the values that a law lists for a nonlinear parameter its prior is even: each step of
    the list is as probable as another.
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
        self.boxes = [np.array(box) for box in law.nonlinear.values()]
        self.open = [j for j, box in enumerate(self.boxes) if len(box) > 1]
        self.misfit = misfit
        self.scatter = scatter if len(errors.starts) else 0.0
        self.size = len(self.open) + (misfit is None) + (self.scatter is None)

    def unpack(self, points: Array) -> tuple[Array, Array, Array]:
        """Nonlinear parameters (draws, parameters), misfit and scatter at vectors."""
        theta = np.empty((len(points), len(self.boxes)))
        for j, box in enumerate(self.boxes):
            theta[:, j] = box[0]
        for place, j in enumerate(self.open):
            box = self.boxes[j]
            theta[:, j] = np.interp(points[:, place], np.linspace(0, 1, len(box)), box)
        rest = points[:, len(self.open) :]
        count = len(points)
        misfit = np.exp(rest[:, 0]) if self.misfit is None else np.full(count, self.misfit)
        scatter = np.exp(rest[:, -1]) if self.scatter is None else np.full(count, self.scatter)
        return theta, misfit, scatter

    def pack(self, theta: Array, misfit: float, scatter: float) -> Array:
        """The vector of single values."""
        values = [
            np.interp(theta[j], self.boxes[j], np.linspace(0, 1, len(self.boxes[j])))
            for j in self.open
        ]
        values += [math.log(misfit)] if self.misfit is None else []
        return np.array(values + ([math.log(scatter)] if self.scatter is None else []))

    def widths(self, freedom: float) -> Array:
        """Rough standard deviations of a vector, for the first proposal."""
        widths = [0.2] * len(self.open)
        widths += [1 / math.sqrt(2 * freedom)] if self.misfit is None else []
        bases = len(self.errors.starts)
        widths += [min(1.0, 2 / math.sqrt(2 * bases))] if self.scatter is None else []
        return np.array(widths)

    def spread(self, theta: Array, influence: Array) -> Array:
        """Root of the nonlinear parameters' covariance in the vector, none wider than the box."""
        slopes = []
        for j in self.open:
            box = self.boxes[j]
            step = int(np.clip(np.searchsorted(box, theta[j]) - 1, 0, len(box) - 2))
            slopes.append(1 / ((box[step + 1] - box[step]) * (len(box) - 1)))
        factor = influence[self.open] * np.array(slopes)[:, None]
        lengths = np.linalg.norm(factor, axis=1)
        wanted = np.where(lengths > 0, np.clip(lengths, 1e-6, 0.4), 0.2)
        factor = factor * (wanted / np.where(lengths > 0, lengths, 1))[:, None]
        covariance = factor @ factor.T + np.diag(np.where(lengths > 0, 1e-3, 1) * wanted**2)
        return np.linalg.cholesky(covariance)

    def density(self, points: Array) -> tuple[Array, Array, Array]:
        """Log posterior at vectors, with the coefficients' means and covariance roots there."""
        count, linear = len(points), len(self.law.linear)
        log, means = np.full(count, -np.inf), np.zeros((count, linear))
        roots = np.zeros((count, linear, linear))
        place = len(self.open)
        inside = ((points[:, :place] >= 0) & (points[:, :place] <= 1)).all(axis=1)
        if self.misfit is None:
            inside &= points[:, place] >= math.log(self.errors.least)
        piece = max(NUMBERS // (len(self.loss) * (linear + 1)), 1)
        for rows in np.array_split(np.flatnonzero(inside), -(-int(inside.sum()) // piece) or 1):
            if len(rows):
                log[rows], means[rows], roots[rows] = self._density(points[rows])
        return log, means, roots

    def _density(self, points: Array) -> tuple[Array, Array, Array]:
        theta, misfit, scatter = self.unpack(points)
        columns = columns_of(self.law, self.variables, theta)
        lengths = np.linalg.norm(columns, axis=1, keepdims=True)
        columns = columns / np.where(lengths > 0, lengths, 1)
        plain = np.swapaxes(columns, 1, 2) @ columns
        loss = np.broadcast_to(self.loss[:, None], (*columns.shape[:2], 1))
        grams = self.errors.grams(
            np.concatenate([self.errors.rotate(columns), loss], axis=2), misfit, scatter
        )
        inner, right = grams.products[:, :-1, :-1], grams.products[:, :-1, -1]
        linear = inner.shape[1]
        scale = np.sqrt(np.maximum(np.diagonal(inner, axis1=1, axis2=2), TINY))[:, None]
        inner, right = inner / scale / np.swapaxes(scale, 1, 2), right / scale[:, 0]
        half = np.linalg.cholesky(inner + REGULAR * np.eye(linear))
        solved = np.linalg.solve(half, right[:, :, None])[:, :, 0]
        squares = grams.products[:, -1, -1] - np.sum(solved**2, axis=1)
        diagonal = np.log(np.diagonal(half, axis1=1, axis2=2) * scale[:, 0]).sum(axis=1)
        # A prior as wide as the points' design makes the result independent of the coefficients'
        # units, and of columns that are nearly the same.
        unit = np.linalg.slogdet(plain + REGULAR * np.eye(linear))[1]
        log = -0.5 * (grams.log_det + squares) - diagonal + 0.5 * unit
        if self.scatter is None:
            log = log + self.errors.log_prior(scatter)
        roots = np.linalg.inv(half)  # coefficients = roots' (solved + standard normals)
        roots = roots / (scale * lengths)
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
    misfit: tuple[float | None, float],
    scatter: tuple[float | None, float],
) -> Posterior | None:
    """Draws of a law's parameters given the points; None if no draw has coefficients above 0.

    A coefficient that is 0 at the minimum and hardly ever above it stays 0.

    Args:
        theta, coefficients: the minimum.
        influence: (nonlinear parameters, points), a factor of their covariance, linearised; rows
            of zeros where it is unknown.
        misfit, scatter: the value to keep (None integrates over it), and the likeliest value.
    """
    space = _Space(law, variables, loss, errors, misfit[0], scatter[0])
    linear = len(law.linear)
    random = np.random.default_rng(0)
    if not space.size:
        points, weights = np.empty((1, 0)), np.zeros(1)
        log, means, roots = space.density(points)
        evidence = float(log[0])
    else:
        freedom = max(len(loss) - len(law.parameters), 1)
        least = errors.typical / 10
        start = space.pack(theta, max(misfit[1], errors.least), max(scatter[1], least))
        root = np.diag(space.widths(freedom))
        root[: len(space.open), : len(space.open)] = space.spread(theta, influence)
        points, weights, means, roots, evidence = _sampled(space, start, root, random)
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


def _sampled(
    space: _Space, centre: Array, root: Array, random: np.random.Generator
) -> tuple[Array, Array, Array, Array, float]:
    """Importance sample: vectors, log weights, coefficients' means and roots, and evidence."""
    proposals = int(np.clip(WORK / len(space.loss), PROPOSALS / 8, PROPOSALS))
    floor = 1e-4 * np.diag(root) ** 2
    for _ in range(ROUNDS):
        normal = random.standard_normal((proposals, space.size))
        stretch = np.sqrt(TAIL / random.chisquare(TAIL, proposals))[:, None]
        points = centre + (normal * stretch) @ root.T
        squares = np.sum((normal * stretch) ** 2, axis=1)
        log_proposal = -0.5 * (TAIL + space.size) * np.log1p(squares / TAIL)
        log_proposal += gammaln((TAIL + space.size) / 2) - gammaln(TAIL / 2)
        log_proposal -= 0.5 * space.size * math.log(TAIL * math.pi)
        log_proposal -= np.log(np.abs(np.diag(root))).sum()
        log, means, roots = space.density(points)
        weights = log - log_proposal
        total = logsumexp(weights)
        evidence = float(total - math.log(proposals))
        shares = np.exp(weights - total)
        effective = 1 / float(shares @ shares)
        if effective > EFFECTIVE * proposals:
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
    return points, weights, means, roots, evidence


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
