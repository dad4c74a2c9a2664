"""Questions about the number of experts: the loss of k, how many reach a target, where to stop."""

import bisect
import math
from collections.abc import Callable
from functools import cache

from mergelaw.errors import MergelawError
from mergelaw.planning.answer import Answer, Ends, with_interval
from mergelaw.planning.curve import Curve

# Nobody merges more experts, so the search ends here.
MOST = 100_000


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
    count = _least_count(lambda k: curve.loss(k) <= target)
    ends = _interval_of_count(curve.interval, target)
    if count is None:
        answer = f"{target:g} is so near the floor that no pool reaches it"
    else:
        reachable = curve.loss(curve.M)
        answer = f"{target:g} nats per token takes k = "
        answer += _count_text(count, ends, curve.level) + (
            f" of {curve.M} experts"
            if count <= curve.M
            else f": not reachable with this pool of {curve.M}, which reaches {reachable:.5g}"
        )
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


def stop(curve: Curve, threshold: float) -> Answer:
    """Number of experts after which one more gains less than a threshold (nats per token).

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

    count = _least_count(lambda k: gain(k) < threshold) or MOST
    value, ends = curve.difference(count, count + 1)
    count_ends = _interval_of_count(lambda k: curve.difference(k, k + 1)[1], threshold)
    text = _count_text(count, count_ends, curve.level)
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
    rows = (
        {
            "k": k,
            "loss": curve.loss(k),
            "next gains": gain(k),
            "of the way to the floor": share(k, math.inf),
            f"of the way to k = {curve.M}": share(k, curve.M),
        }
        for k in range(1, curve.M + 1)
    )
    reason = f"one more expert gains A / ((k + b)(k + 1 + b)), with {curve.parameters}"
    return Answer(
        "stop",
        f"{curve.name}: {answer}",
        count,
        count_ends,
        curve.level,
        reason,
        curve.assumption(count),
        curve.warnings,
        tuple(rows),
    )


def _least_count(holds: Callable[[int], bool]) -> int | None:
    """Least k >= 1 from which on a condition holds; None above ``MOST``."""
    end = 1
    while not holds(end):
        end *= 2
        if end > MOST:
            return None
    return bisect.bisect_left(range(end), True, lo=end // 2 + 1, key=holds)


def _interval_of_count(interval: Callable[[int], Ends | None], limit: float) -> Ends | None:
    """Ends of the least k at which a quantity that falls with k reaches a limit."""
    ends = cache(interval)
    if ends(1) is None:
        return None
    low = _least_count(lambda k: (ends(k) or (0, 0))[0] <= limit)
    high = _least_count(lambda k: (ends(k) or (0, 0))[1] <= limit)
    return low or math.inf, high or math.inf


def _count_text(count: int, ends: Ends | None, level: float) -> str:
    """A number of experts with its interval, ``15 (90%: 14 to 16)``."""
    if ends is None:
        return f"{count}"
    low, high = ends
    text = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    text = text if math.isfinite(high) else f"{low:g} or more, perhaps never"
    return f"{count} ({100 * level:g}%: {text})"
