"""Loss: what to expect of k merged experts on a base."""

import math

from mergelaw.planning.answer import Answer, with_interval
from mergelaw.planning.curve import Curve


def loss(curve: Curve, k: float) -> Answer:
    """Expected loss of k merged experts (nats per token).

    Raises:
        MergelawError: k is below 1, or the curve's level is no probability.
    """
    value, ends = curve.loss(k), curve.interval(k)
    expected = with_interval(value, ends, curve.level, "nats per token")
    return Answer(
        "loss",
        f"{curve.name}, k = {k:g}: expect {expected}",
        value,
        ends,
        curve.level,
        f"{curve.formula} with {curve.parameters}, R^2 = {curve.fitted.r2:.5f} on "
        f"{curve.fitted.n_points} points; floor {curve.loss(math.inf):.5g}, reachable with this "
        f"pool of {curve.M}: {curve.loss(curve.M):.5g}",
        curve.assumption(k),
        (*curve.beyond_pool(k), *curve.warnings),
    )
