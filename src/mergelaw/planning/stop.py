"""Stop: the number of experts from which on one more gains too little."""

import math

from mergelaw.errors import MergelawError
from mergelaw.planning.answer import Answer, count_with_interval, with_interval
from mergelaw.planning.curve import MOST, Curve, interval_of_count, least_count


def stop(curve: Curve, threshold: float) -> Answer:
    """Number of experts from which on one more gains less than a threshold (nats per token).

    Raises:
        MergelawError: the threshold is not above 0.
    """
    if not threshold > 0:
        raise MergelawError(f"threshold = {threshold:g}; give a gain above 0, in nats per token")

    def gain(k: int) -> float:
        return curve.loss(k) - curve.loss(k + 1)

    def share(k: int, last: float) -> float:
        whole = curve.loss(1) - curve.loss(last)
        return (curve.loss(1) - curve.loss(k)) / whole if whole > 0 else math.nan

    count = least_count(lambda k: gain(k) < threshold) or MOST
    value, ends = curve.difference(count, count + 1)
    count_ends = interval_of_count(lambda k: curve.difference(k, k + 1)[1], threshold)
    text = count_with_interval(count, count_ends, curve.level)
    if count > curve.M:
        answer = (
            f"use all {curve.M} experts, the last one still gains {gain(max(curve.M - 1, 1)):.2g} "
            f"nats; by the law one more pays up to k = {text}"
        )
    else:
        answer = (
            f"stop at k = {text} of {curve.M} experts; the next one gains "
            f"{with_interval(value, ends, curve.level)}, less than {threshold:g}"
        )
    return Answer(
        "stop",
        f"{curve.name}: {answer}",
        count,
        count_ends,
        curve.level,
        f"one more expert gains A / ((k + b)(k + 1 + b)), with {curve.parameters}",
        curve.assumption(count),
        curve.warnings,
        tuple(
            {
                "k": k,
                "loss": curve.loss(k),
                "next gains": gain(k),
                "of the way to the floor": share(k, math.inf),
                f"of the way to k = {curve.M}": share(k, curve.M),
            }
            for k in range(1, curve.M + 1)
        ),
    )
