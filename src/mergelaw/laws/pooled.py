"""Partial pooling: domains' exponents and b shrunk towards each other as far as the points say.

Each nonlinear parameter of a domain is its mean over all domains plus a deviation, normal with a
variance between domains that is estimated (random effects, Paule and Mandel 1982). A domain whose
own points determine the parameter keeps it; one whose points do not gets the mean.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import brentq

from mergelaw.errors import MergelawError
from mergelaw.laws.diagnostics import Diagnostics
from mergelaw.laws.law import Array

# Standard deviations below this are rounding errors.
LEAST = 1e-9


def pool_domains(fits: Mapping[str, Diagnostics]) -> dict[str, Any] | None:
    """Pool the joint fits of a method's domains.

    Returns:
        ``parameters``: for each nonlinear parameter the mean over domains, its 90% ``interval``,
        and the standard deviation ``between`` domains; ``domains``: all parameters of each domain,
        shrunk; ``out_of_sample``: root mean squared error (nats per token) of the largest k,
        forecast from the others with domains ``apart``, ``partial``ly pooled and all ``shared``.
        None with fewer than two domains, or too few points to score it.
    """
    drawn = {domain: fitted for domain, fitted in fits.items() if fitted.posterior is not None}
    if len(drawn) < 2:
        return None
    scores = _scores(list(drawn.values()))
    if scores is None:
        return None
    theta, summary = _shrunk(list(drawn.values()))
    return {
        "parameters": summary,
        "domains": {
            domain: _at(fitted, row)
            for (domain, fitted), row in zip(drawn.items(), theta["partial"], strict=True)
        },
        "out_of_sample": scores,
    }


def _shrunk(fits: list[Diagnostics]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Nonlinear parameters (domains, parameters) apart, partially pooled and shared; a summary."""
    law = fits[0].law
    apart = np.array([fitted.solution.state.theta for fitted in fits])
    covariances = [
        np.cov(_drawn(fitted)[:, len(law.linear) :].T).reshape(apart.shape[1], -1)
        + LEAST**2 * np.eye(apart.shape[1])
        for fitted in fits
    ]
    mean, shared, between = (np.empty(apart.shape[1]) for _ in range(3))
    summary = {}
    for j, (name, box) in enumerate(law.nonlinear.items()):
        variances = np.array([covariance[j, j] for covariance in covariances])
        between[j] = _between(apart[:, j], variances)
        mean[j], error = _mean(apart[:, j], variances + between[j])
        shared[j], _ = _mean(apart[:, j], variances)
        reach = 1.645 * error
        summary[name] = {
            "mean": float(mean[j]),
            "interval": [max(float(mean[j]) - reach, box[0]), min(float(mean[j]) + reach, box[-1])],
            "between": math.sqrt(between[j]),
        }
    common = np.diag(between + LEAST**2)
    # Errors of a domain's parameters hang together, so they are shrunk together.
    partial = [
        theta + covariance @ np.linalg.solve(covariance + common, mean - theta)
        for theta, covariance in zip(apart, covariances, strict=True)
    ]
    return {
        "apart": apart,
        "partial": np.array(partial),
        "shared": np.broadcast_to(shared, apart.shape),
    }, summary


def _mean(values: Array, variances: Array) -> tuple[float, float]:
    """Weighted mean and its standard error."""
    weights = 1 / variances
    return float(weights @ values / weights.sum()), float(weights.sum() ** -0.5)


def _between(values: Array, variances: Array) -> float:
    """Variance between domains at which the weighted squares are as many as expected."""

    def excess(between: float) -> float:
        mean, _ = _mean(values, variances + between)
        return float(np.sum((values - mean) ** 2 / (variances + between))) - (len(values) - 1)

    most = float(np.sum((values - values.mean()) ** 2))
    return brentq(excess, 0, most) if excess(0) > 0 > excess(most) else 0.0


def _drawn(fitted: Diagnostics) -> Array:
    assert fitted.posterior is not None
    return fitted.posterior.parameters


def _at(fitted: Diagnostics, theta: Array) -> dict[str, float]:
    """All parameters of a domain at given nonlinear ones."""
    problem = fitted.solution.problem
    return problem.parameters(problem.project(np.clip(theta, problem.lower, problem.upper)))


def _scores(fits: list[Diagnostics]) -> dict[str, float] | None:
    """Errors of the largest k with each way to pool; None with too few points."""
    rests, targets = [], []
    for fitted in fits:
        kept = fitted.variables["k"] < fitted.variables["k"].max()
        try:
            rests.append(fitted.refit(fitted.law, kept))
        except MergelawError:
            return None
        targets.append(
            ({name: values[~kept] for name, values in fitted.variables.items()}, fitted.loss[~kept])
        )
    if any(rest.posterior is None for rest in rests):
        return None
    scores = {}
    for way, theta in _shrunk(rests)[0].items():
        errors = [
            loss - rest.law.predict(_at(rest, row), **variables)
            for rest, row, (variables, loss) in zip(rests, theta, targets, strict=True)
        ]
        scores[way] = math.sqrt(np.mean(np.concatenate(errors) ** 2))
    return scores
