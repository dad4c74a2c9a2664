"""Trade-off between groups of domains: measured merges that no other one beats in all groups."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergelaw.decide.best import allowed
from mergelaw.decide.measured import Array, Measured, Model
from mergelaw.decide.objective import Objective
from mergelaw.errors import MergelawError, nearest


@dataclass(frozen=True)
class Point:
    """A model's mean loss in each group; ``front`` is True if no merge is lower in all groups."""

    model: Model
    kind: str  # merge, expert, base or baseline
    losses: Array
    front: bool


def pareto(measured: Measured, objective: Objective, groups: Sequence[str]) -> list[Point]:
    """The front of the merges within the limits, then experts, baselines and base for comparison.

    ``groups`` are domains, or several joined by ``+``, of which the mean counts. Sorted by the
    first group's loss. Raises MergelawError for unknown domains or fewer than two groups.
    """
    shares = np.array([_shares(measured, group) for group in groups])
    if len(set(groups)) < 2:
        raise MergelawError("--pareto: give two different domains or groups, as in maths,law+code")
    ceilings = objective.ceilings(measured)
    merges = [m for m in allowed(measured, objective) if (m.losses <= ceilings).all()]
    losses = np.array([m.losses @ shares.T for m in merges]).reshape(-1, len(groups))

    def beaten(point: Array) -> bool:
        return bool(((losses <= point).all(axis=1) & (losses < point).any(axis=1)).any())

    points = [
        Point(merge, "expert" if len(merge.experts) == 1 else "merge", point, True)
        for merge, point in zip(merges, losses, strict=True)
        if not beaten(point)
    ]
    on_front = {one.model.identity for one in points}
    others = {"base": [measured.reference], "baseline": list(measured.baselines.values())}
    others["expert"] = list(measured.alone(measured.reference.seed).values())
    for kind, models in others.items():
        for model in models:
            point = model.losses @ shares.T
            if model.identity not in on_front and np.isfinite(point).all():
                points.append(Point(model, kind, point, not beaten(point)))
    return sorted(points, key=lambda one: tuple(one.losses))


def _shares(measured: Measured, group: str) -> Array:
    """Weights of the domains in a group."""
    names = [name.strip() for name in group.split("+")]
    for name in names:
        if name not in measured.domains:
            raise MergelawError(
                f"--pareto: no domain {name!r}{nearest(name, measured.domains)}; the study "
                f"measures {', '.join(measured.domains)}"
            )
    return np.array([(d in names) / len(set(names)) for d in measured.domains])
