"""Questions about the number of experts: the loss of k, how many reach a target, where to stop."""

import math
from collections.abc import Callable, Mapping

from mergelaw.errors import MergelawError
from mergelaw.laws.result import least_count
from mergelaw.planning.answer import Answer, Estimate, with_interval
from mergelaw.planning.curve import LISTED, Curve

# Nobody merges more experts, so the search ends here.
MOST = 100_000
# A law is about means over subsets, so it excludes no single merge.
SINGLE = "single merges may do better: ask `mergelaw best`"


def loss(curve: Curve, k: float) -> Answer:
    """Loss of k merged experts (nats per token): measured, or else expected by the law.

    Raises:
        MergelawError: k is below 1, or the law cannot be fitted and k is not measured.
    """
    measured = k in curve.losses
    if curve.fails and not measured:
        curve.variables(k)
        return curve.measured_only("loss", f"k = {k:g} is not measured, and ")
    value, ends = estimate = curve.estimate(k)
    answer = f"{curve.name}, k = {k:g}: {'measured' if measured else 'expect'} "
    answer += with_interval(value, ends, curve.level, "nats per token")
    reason = f"the law {curve.state}" if curve.fails else f"{curve.text}; {_floors(curve)}"
    assumption = "the measured subsets stand for all of the pool"
    if measured and not curve.fails:
        law, law_ends = curve.by_law(k)
        answer += f"; the law gives {with_interval(law, law_ends, curve.level)}"
        if law_ends is not None and not law_ends[0] <= value <= law_ends[1]:
            answer += f" and misses it by {abs(law - value):.2g}"
    elif not measured:
        answer += curve.beside
        assumption = curve.assumption(k)
    return curve.answer(
        "loss",
        answer,
        estimate,
        reason,
        assumption,
        warnings=(*curve.beyond_pool(k), *curve.warnings),
        table=[] if measured else curve.forms(k),
    )


def _floors(curve: Curve) -> str:
    pool = curve.estimate(curve.M)[0]
    return (
        f"floor {curve.by_law(math.inf)[0]:.5g}, reachable with this pool of {curve.M}: {pool:.5g}"
    )


def experts(curve: Curve, target: float) -> Answer:
    """Number of experts that reach a target loss (nats per token).

    A measured mean that reaches the target, or misses it, goes before the law.

    Raises:
        MergelawError: the target is below the floor's interval, and no measured mean reaches it.
    """
    losses = curve.losses
    reached = min((k for k, (mean, _) in losses.items() if mean <= target), default=None)
    evidence = "" if reached is None else f"{losses[reached][0]:.5g} is measured at k = {reached}"
    if curve.fails:
        evidence = evidence or f"no measured mean reaches {target:g}"
        return curve.measured_only("experts", f"{evidence}; ", reached)
    floor, ends = curve.by_law(math.inf)
    floor_text = with_interval(floor, ends, curve.level)
    if reached is None and not target > (floor if ends is None else ends[0]):
        raise MergelawError(
            f"target {target:g} is below the floor of {curve.name}, {floor_text}: neither a "
            f"measured mean nor the law reaches it; {SINGLE}, or take a larger base or another "
            "method"
        )
    count, interval = estimate = _count(losses, curve.by_law, target, first=True)
    answer = f"{curve.name}: {target:g} nats per token "
    if math.isinf(count):
        least = "" if interval is None else f"; if so, with k = {interval[0]:g} or more"
        answer += f"may or may not be reached, the floor being {floor_text}{least}"
    elif count <= curve.M:
        answer += f"takes k = {_count_text(estimate, curve.level)} of {curve.M} experts"
        answer += f"; {evidence}" if evidence else ""
    else:
        pool = curve.estimate(curve.M)[0]
        answer += f"takes k = {_count_text(estimate, curve.level)}: more than this pool of "
        answer += f"{curve.M}, whose mean is {pool:.5g}; {SINGLE}"
    return curve.answer(
        "experts",
        answer + ("" if count == reached else curve.beside),
        estimate,
        f"{curve.text}; floor {floor_text}; k = 1 gives {curve.estimate(1)[0]:.5g}",
        curve.assumption(min(count, MOST)),
    )


def stop(curve: Curve, threshold: float) -> Answer:
    """Number of experts after which one more gains less than a threshold (nats per token).

    Raises:
        MergelawError: the threshold is not above 0.
    """
    if not threshold > 0:
        raise MergelawError(f"threshold = {threshold:g}; give a gain above 0, in nats per token")
    if curve.fails:
        return curve.measured_only("stop")
    M, below = curve.M, math.nextafter(threshold, 0)
    count, _ = estimate = _count(curve.gains, curve.gain_by_law, below, first=False)
    text = _count_text(estimate, curve.level)
    if count > M:
        gain = curve.gain(max(M - 1, 1))[0]
        answer = f"use all {M} experts, the last one still gains {gain:.2g} nats; by the law one "
        answer += f"more pays up to k = {text}"
    else:
        next_gain = with_interval(*curve.gain(int(count)), curve.level)
        answer = f"stop at k = {text} of {M} experts; the next one gains {next_gain}, less than "
        answer += f"{threshold:g}"
    first, floor, last = (curve.estimate(1)[0], curve.by_law(math.inf)[0], curve.estimate(M)[0])
    rows = []
    for k in range(1, min(M, LISTED) + 1):
        mean = curve.estimate(k)[0]
        row: dict[str, float | None] = {"k": k, "loss": mean, "next gains": curve.gain(k)[0]}
        for name, end in (("the floor", floor), (f"k = {M}", last)):
            row[f"of the way to {name}"] = (first - mean) / (first - end) if first > end else None
        rows.append(row)
    return curve.answer(
        "stop",
        f"{curve.name}: {answer}{curve.beside}",
        estimate,
        "gains are differences of measured means where these have standard errors, else the law's; "
        + curve.text,
        curve.assumption(min(count, MOST)),
        table=rows,
    )


def _count(
    known: Mapping[int, Estimate], law: Callable[[int], Estimate], limit: float, first: bool
) -> Estimate:
    """Least k at which a falling quantity is at most a limit, and its interval; inf if none is.

    ``known`` values go before the law's. With ``first`` the first of them that is at most the limit
    counts; otherwise all later ones must be at most the limit too.
    """

    def least(side: int | None) -> float:
        def end(estimate: Estimate) -> float:
            value, ends = estimate
            return value if side is None or ends is None else ends[side]

        values = {k: end(estimate) for k, estimate in known.items()}
        reaching = [k for k in values if values[k] <= limit]
        missing = [k for k in values if values[k] > limit]
        if first:
            missing = [k for k in missing if k < min(reaching, default=math.inf)]
        short = max(missing, default=0)
        reached = min((k for k in reaching if k > short), default=math.inf)
        return min(reached, max(least_count(lambda k: end(law(k)) <= limit, MOST), short + 1))

    value = least(None)
    ends = None if law(1)[1] is None else (min(least(0), value), max(least(1), value))
    return value, ends


def _count_text(estimate: Estimate, level: float) -> str:
    """A number of experts with its interval, ``15 (90%: 14 to 16)``."""
    count, ends = estimate
    if ends is None:
        return f"{count:g}"
    low, high = ends
    text = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    text = text if math.isfinite(high) else f"{low:g} or more, perhaps never"
    return f"{count:g} ({100 * level:g}%: {text})"
