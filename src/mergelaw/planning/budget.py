"""Budget: costs by the size of a base, and whether to spend on a larger base or more experts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mergelaw.errors import MergelawError
from mergelaw.laws.points import TOO_MANY_BILLIONS
from mergelaw.planning.answer import Answer, minus, with_interval
from mergelaw.planning.curve import FARTHEST, Curve
from mergelaw.planning.points import SAME_SIZE, check_size

KINDS = ("training", "merging", "evaluation", "serving")
MORE, LARGER = "more experts", "larger base"
Step = dict[str, Any]


@dataclass(frozen=True)
class Costs:
    """Costs at each size.

    Attributes:
        table: one row per size: N (billions), training (one expert), merging and evaluation (one
            merge), serving (a million tokens), all in the same unit; NaN where unknown.
        unit: its name.
    """

    table: pd.DataFrame
    unit: str = "units"

    @classmethod
    def read(cls, path: Path) -> "Costs":
        """Read a CSV file with the column N and any of the others; missing columns cost 0."""
        try:
            table = pd.read_csv(path)
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise MergelawError(f"{path}: {reason}; give a CSV of costs by N") from None
        unknown = [str(name) for name in table if name not in ("N", *KINDS)]
        if unknown or "N" not in table or table.empty:
            raise MergelawError(
                f"{path}: needs rows with the column N and any of {', '.join(KINDS)}"
                + (f", not {', '.join(unknown)}" if unknown else "")
            )
        costs = table.apply(pd.to_numeric, errors="coerce").astype(float)
        wrong = ~np.isfinite(costs) | (costs < 0)
        wrong["N"] |= ~costs["N"].between(0, TOO_MANY_BILLIONS, inclusive="neither")
        if wrong.any(axis=None):
            row, column = np.argwhere(wrong.to_numpy())[0]
            raise MergelawError(
                f"{path}: row {row + 1} has {table.columns[column]} = {table.iloc[row, column]}; "
                "give N in billions above 0, and costs of 0 or more"
            )
        return cls(costs.reindex(columns=["N", *KINDS], fill_value=0.0))

    def at(self, N: float, kind: str) -> float:
        """Cost of one kind at a size (billions); a power law in N between and beyond the sizes.

        A cost of 0 at this size stays 0. A kind without any cost above 0 is free.
        """
        here = self.table.loc[np.isclose(self.table["N"], N), kind].dropna()
        priced = self.table[self.table[kind] > 0].groupby("N")[kind].mean()
        if priced.empty or (len(here) and not here.any()):
            return 0.0
        sizes, costs = np.log(priced.index.to_numpy(dtype=float)), np.log(priced.to_numpy())
        if len(sizes) == 1:  # proportional to N
            return float(np.exp(costs[0] + math.log(N) - sizes[0]))
        if sizes[0] <= math.log(N) <= sizes[-1]:
            return float(np.exp(np.interp(math.log(N), sizes, costs)))
        slope, start = np.polyfit(sizes, costs, 1)
        return float(np.exp(start + slope * math.log(N)))

    def of_merge(self, N: float) -> float:
        """Cost of one merge with its evaluation at a size (billions)."""
        return self.at(N, "merging") + self.at(N, "evaluation")


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
        curve: of the present base, with the joint law; k: experts merged now.
        amount: the budget; None compares gains per unit of cost.
        have: experts trained at this size so far, if more than k.
        serve: million tokens to be served.
        larger: sizes of bases to consider (billions); empty is all measured or priced ones.

    Returns:
        The better step; value is its gain (nats per token), table the best step of each kind.

    Raises:
        MergelawError: there is no larger size, or the amount buys no step.
    """
    _check_amounts(budget=amount, serve=serve)
    curve.variables(k)
    if curve.fails:
        return curve.measured_only("budget")
    steps = list(_steps(curve, k, costs, max(k, have), serve, larger))
    chosen, *others = _best_of_each(steps, amount, costs.unit)
    after = curve.estimate(chosen["k"], chosen["N"])
    value, ends = minus(curve.estimate(k), after)
    lead = None
    if others:
        (other,) = others
        reason = f"{_name(other)} gains {other['gain']:.3g} nats for {other['cost']:.4g}"
        lead = minus(curve.estimate(other["k"], other["N"]), after)[1]
    else:
        reason = _missing(steps, LARGER if chosen["step"] == MORE else MORE)
    answer = f"neither: nothing for this budget lowers the loss of {curve.name}, k = {k}"
    if chosen["gain"] > 0:
        answer = f"{_name(chosen)}: gains {with_interval(value, ends, curve.level)} over k = {k} "
        answer += f"at {curve.name} for {chosen['cost']:.4g} {costs.unit}"
        if amount is not None and lead is not None and lead[0] < 0:
            answer += "; the two ways cannot be told apart"
    compared = "per unit of cost" if amount is None else f"for {amount:g} {costs.unit}"
    return curve.answer(
        "budget",
        answer + curve.beside,
        (value, ends),
        f"compared {compared}; {reason}",
        "experts on a larger base gain as the joint law says (one training recipe for all sizes); "
        + curve.assumption(k),
        table=(chosen, *others),
    )


def _check_amounts(**amounts: float | None) -> None:
    for name, number in amounts.items():
        if number is not None and not 0 <= number < math.inf:
            raise MergelawError(f"{name} = {number:g}; give an amount of 0 or more")


def _steps(
    curve: Curve, k: int, costs: Costs, trained: int, serve: float, larger: Sequence[float]
) -> Iterator[Step]:
    """All steps with cost and gain; the pool may grow by one expert."""
    farthest = FARTHEST * float(curve.table["N"].max())
    candidates = {*map(float, curve.table["N"].unique()), *map(float, costs.table["N"])}
    default = [size for size in candidates if curve.N * (1 + SAME_SIZE) < size <= farthest]
    sizes = sorted(map(check_size, larger or default))
    if not sizes or sizes[0] <= curve.N:
        raise MergelawError(
            f"no base larger than {curve.name} to compare with; give sizes with --larger, in "
            "billions"
        )
    places = [(MORE, curve.N, count) for count in range(k + 1, max(k, curve.M) + 2)]
    places += [(LARGER, size, count) for size in sizes for count in range(1, curve.M + 1)]
    now = curve.estimate(k)[0]
    for kind, size, count in places:
        new = max(count - trained, 0) if kind == MORE else count
        dearer = max(costs.at(size, "serving") - costs.at(curve.N, "serving"), 0.0)
        cost = new * costs.at(size, "training") + costs.of_merge(size) + serve * dearer
        gain = now - curve.estimate(count, size)[0]
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


def _missing(steps: Sequence[Step], kind: str) -> str:
    cheapest = min(step["cost"] for step in steps if step["step"] == kind)
    return f"no {kind} is to be had for less than {cheapest:.4g}"


def _name(step: Step) -> str:
    return f"{step['step']}, k = {step['k']} at N = {step['N']:.4g}"
