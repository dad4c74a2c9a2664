"""Budget: whether to spend on a larger base or on more experts."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from mergelaw.errors import MergelawError
from mergelaw.planning.answer import Answer, with_interval
from mergelaw.planning.costs import Costs
from mergelaw.planning.curve import Curve
from mergelaw.planning.points import SAME_SIZE, check_size

MORE, LARGER = "more experts", "larger base"
Step = dict[str, Any]


def budget(
    curve: Curve,
    k: int,
    costs: Costs,
    *,
    amount: float | None = None,
    have: int = 0,
    serve: float = 0.0,
    larger: Sequence[float] = (),
) -> Answer:
    """The better way to spend a budget: on a larger base or on more experts.

    More experts cost the training of the missing ones and one merge with its evaluation. A larger
    base costs the training of all its experts, a merge, and the higher cost of serving; the base
    itself exists already.

    Args:
        curve: of the present base, with the joint law.
        k: experts merged now.
        costs: by size.
        amount: the budget; None compares gains per unit of cost.
        have: experts trained at this size so far, if more than k.
        serve: million tokens to be served.
        larger: sizes of bases to consider (billions); empty is all measured or priced ones.

    Returns:
        The better step; value is its gain (nats per token), table the best step of each kind.

    Raises:
        MergelawError: there is no larger size, or the amount buys no step.
    """
    for name, number in (("budget", amount), ("serve", serve)):
        if number is not None and not 0 <= number < math.inf:
            raise MergelawError(f"{name} = {number:g}; give an amount of 0 or more")
    steps = list(_steps(curve, k, costs, max(k, have), serve, larger))
    chosen, *others = _best_of_each(steps, amount, costs.unit)
    value, ends = curve.difference(k, chosen["k"], other_N=chosen["N"])
    other, clear = _other(curve, steps, chosen, others, amount)
    answer = f"neither: nothing for this budget lowers the loss of {curve.name}, k = {k}"
    if chosen["gain"] > 0:
        gain = with_interval(value, ends, curve.level)
        cost = f"{chosen['cost']:.4g} {costs.unit}"
        answer = f"{_name(chosen)}: gains {gain} over k = {k} at {curve.name} for {cost}"
        answer += "" if clear else "; the two ways cannot be told apart"
    compared = "per unit of cost" if amount is None else f"for {amount:g} {costs.unit}"
    return Answer(
        "budget",
        answer,
        value,
        ends,
        curve.level,
        f"compared {compared}; {other}",
        "experts on a larger base gain as the joint law says (one training recipe for all sizes); "
        + curve.assumption(k),
        curve.warnings,
        (chosen, *others),
    )


def _steps(
    curve: Curve, k: int, costs: Costs, trained: int, serve: float, larger: Sequence[float]
) -> Iterator[Step]:
    """All steps with cost and gain; the pool may grow by one expert."""
    candidates = {*curve.table["N"].unique(), *costs.table["N"]}
    larger = larger or [size for size in candidates if size > curve.N * (1 + SAME_SIZE)]
    sizes = sorted(map(check_size, larger))
    if not sizes or sizes[0] <= curve.N:
        raise MergelawError(
            f"no base larger than {curve.name} to compare with; give sizes with --larger, in "
            "billions"
        )
    places = [(MORE, curve.N, count) for count in range(k + 1, max(k, curve.M) + 2)]
    places += [(LARGER, size, count) for size in sizes for count in range(1, curve.M + 1)]
    for kind, size, count in places:
        new = max(count - trained, 0) if kind == MORE else count
        dearer = max(costs.at(size, "serving") - costs.at(curve.N, "serving"), 0.0)
        cost = new * costs.at(size, "training") + costs.of_merge(size) + serve * dearer
        gain = curve.loss(k) - curve.loss(count, size)
        step = {"step": kind, "N": size, "k": count, "cost": cost, "gain": gain}
        yield step | {"gain per cost": gain / cost if cost > 0 else None}


def _best_of_each(steps: Sequence[Step], amount: float | None, unit: str) -> list[Step]:
    """The best affordable step of each kind, the better one first."""
    cheapest = min(steps, key=lambda step: step["cost"])
    if amount is None and cheapest["cost"] == 0:
        raise MergelawError(
            f"costs: {_name(cheapest)} costs nothing, so no gain per cost can be compared; give "
            "--budget, or what merging and evaluation cost"
        )
    if amount is not None and cheapest["cost"] > amount:
        raise MergelawError(
            f"a budget of {amount:g} {unit} buys no step; the cheapest is {_name(cheapest)}, for "
            f"{cheapest['cost']:.4g}"
        )
    by, limit = ("gain per cost", math.inf) if amount is None else ("gain", amount)
    best: dict[str, Step] = {}
    for step in sorted(steps, key=lambda step: -step[by]):
        if step["cost"] <= limit:
            best.setdefault(step["step"], step)
    return list(best.values())


def _other(
    curve: Curve, steps: Sequence[Step], chosen: Step, others: Sequence[Step], amount: float | None
) -> tuple[str, bool]:
    """The other kind's best step in words, and whether the chosen step is clearly better."""
    if not others:
        kind = LARGER if chosen["step"] == MORE else MORE
        cheapest = min(step["cost"] for step in steps if step["step"] == kind)
        return f"no {kind} is to be had for less than {cheapest:.4g}", True
    (other,) = others
    text = f"{_name(other)}, gains {other['gain']:.3g} nats for {other['cost']:.4g}"
    if amount is None:
        return text, True
    difference, ends = curve.difference(chosen["k"], other["k"], chosen["N"], other["N"])
    clear = ends is None or ends[1] < 0
    return f"{text}, {-difference:.3g} nats less" if clear else text, clear


def _name(step: Step) -> str:
    return f"{step['step']}, k = {step['k']} at N = {step['N']:.4g}"
