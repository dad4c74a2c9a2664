"""Experts: how many reach a target loss on a base."""

import math

from mergelaw.errors import MergelawError
from mergelaw.planning.answer import Answer, count_with_interval, with_interval
from mergelaw.planning.curve import MOST, Curve, interval_of_count, least_count


def experts(curve: Curve, target: float) -> Answer:
    """Number of experts that reach a target loss (nats per token).

    Raises:
        MergelawError: the target is at or below the floor.
    """
    floor = curve.loss(math.inf)
    if not target > floor:
        raise MergelawError(
            f"target {target:g} is below the floor of {curve.name}, "
            f"{with_interval(floor, curve.interval(math.inf), curve.level)}: the law expects no "
            "number of experts to reach it; take a larger base or another method"
        )
    count = least_count(lambda k: curve.loss(k) <= target)
    ends = interval_of_count(curve.interval, target)
    if count is None:
        answer = f"{target:g} is so near the floor that no pool reaches it"
    else:
        answer = f"{target:g} nats per token takes k = "
        answer += count_with_interval(count, ends, curve.level)
        if count > curve.M:
            answer += (
                f": not reachable with this pool of {curve.M}, which reaches "
                f"{curve.loss(curve.M):.5g}"
            )
        else:
            answer += f" of {curve.M} experts"
    return Answer(
        "experts",
        f"{curve.name}: {answer}",
        count,
        ends,
        curve.level,
        f"{curve.formula} with {curve.parameters} falls to it at k = A / (target - floor) - b, "
        f"rounded up; floor {floor:.5g}; k = 1 gives {curve.loss(1):.5g}",
        curve.assumption(count or MOST),
        curve.warnings,
    )
