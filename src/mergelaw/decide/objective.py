"""Objective of a choice among merges, and the limits that a merge must keep."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mergelaw.decide.measured import Array, Measured, Model
from mergelaw.errors import MergelawError, nearest

EVERY = "all"  # stands for every domain in limits
HELD_OUT = "held_out"  # stands for the domains that no expert is trained on


@dataclass(frozen=True)
class Objective:
    """Objective of the best merge, and limits that it must keep.

    Attributes:
        kind: ``macro``, the (weighted) mean loss over domains; ``worst``, the loss above the
            base in the domain that gains least over it.
        weights: weights of domains, of which only those named count; empty: the held-in domains
            count alike.
        limits: nats per token by which a domain's loss may be above the base's; ``all`` is every
            domain, ``held_out`` those that no expert is trained on.
        expert_limits: the same above the lowest single expert's loss.
        at_most: most experts in the merge.
        require, exclude: experts that it must have, and must not have.
        methods: merge methods that may be used; empty: all.
    """

    kind: Literal["macro", "worst"] = "macro"
    weights: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    expert_limits: Mapping[str, float] = field(default_factory=dict)
    at_most: int | None = None
    require: Sequence[str] = ()
    exclude: Sequence[str] = ()
    methods: Sequence[str] = ()

    @property
    def text(self) -> str:
        """The objective without its limits, as the option's value: macro, worst, maths=2,code=1."""
        return ",".join(f"{d}={w:g}" for d, w in sorted(self.weights.items())) or self.kind

    def shares(self, measured: Measured) -> Array:
        """Weights of all domains, with sum one. Raises MergelawError for an unknown domain."""
        for names, special in (
            (self.weights, ()),
            (self.limits, (EVERY, HELD_OUT)),
            (self.expert_limits, (EVERY, HELD_OUT)),
        ):
            for name in names:
                if name not in (*measured.domains, *special):
                    raise MergelawError(
                        f"objective: no domain {name!r}{nearest(name, measured.domains)}; the "
                        f"study measures {', '.join(measured.domains)}"
                    )
        if not self.weights:
            return measured.counted
        if self.kind == "worst":
            raise MergelawError("--objective worst takes no --weights; give one of the two")
        weights = np.array([self.weights.get(domain, 0.0) for domain in measured.domains])
        if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
            raise MergelawError("objective: weights are numbers of 0 or more, not all 0")
        return np.asarray(weights / weights.sum())

    def values(self, losses: Array, base: Array, shares: Array) -> Array:
        """Objective of losses (..., models, domains), the base's losses being (..., domains)."""
        if self.kind == "worst":
            above = np.where(shares > 0, losses - base[..., None, :], -np.inf)
            return np.asarray(above.max(axis=-1))
        return np.asarray(losses @ shares)

    def slopes(self, measured: Measured, model: Model) -> dict[str, Array]:
        """Coefficients of losses, by model and domain, whose sum is the objective of a model."""
        shares, base = self.shares(measured), measured.reference
        if self.kind == "macro":
            return {model.identity: shares}
        above = np.where(shares > 0, model.losses - base.losses, -np.inf)
        one = np.zeros(len(shares))
        one[above.argmax()] = 1.0
        return {model.identity: one, base.identity: -one}

    def ceilings(self, measured: Measured) -> Array:
        """The highest loss that the limits allow in each domain; infinite without a limit."""
        singles = [merge.losses for merge in measured.merges if len(merge.experts) == 1]
        if self.expert_limits and not singles:
            raise MergelawError(
                f"objective: no single expert of {measured.base} is measured, which --not-above-"
                "expert compares with; measure k = 1, or drop the limit"
            )
        lowest = np.min(singles, axis=0) if singles else np.zeros(len(measured.domains))
        ceilings = np.full(len(measured.domains), math.inf)
        for limits, level in (
            (self.limits, measured.reference.losses),
            (self.expert_limits, lowest),
        ):
            for place, domain in enumerate(measured.domains):
                group = HELD_OUT if domain in measured.held_out else EVERY
                limit = limits.get(domain, limits.get(group, limits.get(EVERY, math.inf)))
                ceilings[place] = min(ceilings[place], level[place] + limit)
        return ceilings

    def check(self, measured: Measured) -> None:
        """Raise MergelawError for unknown experts or methods, and limits that no merge can keep."""
        pool = measured.pool
        methods = list(dict.fromkeys(merge.method for merge in measured.merges))
        for option, names, valid in (
            ("--require", self.require, pool),
            ("--exclude", self.exclude, pool),
            ("--method", self.methods, methods),
        ):
            for name in names:
                if name not in valid:
                    raise MergelawError(
                        f"{option} {name}: nothing of this name is measured on {measured.base}"
                        f"{nearest(name, valid)}; measured are {', '.join(valid)}"
                    )
        both = [name for name in self.require if name in self.exclude]
        if both:
            raise MergelawError(f"--require and --exclude both name {both[0]}; drop one of the two")
        if self.at_most is not None and len(set(self.require)) > self.at_most:
            raise MergelawError(
                f"--require names {len(set(self.require))} experts and --at-most allows "
                f"{self.at_most}; drop one of the two"
            )
        if not set(pool) - set(self.exclude):
            raise MergelawError("--exclude names every expert; leave one")

    def allows(self, method: str, experts: Sequence[str]) -> bool:
        """True if the limits on methods and experts allow a merge."""
        names = set(experts)
        return (
            (not self.methods or method in self.methods)
            and (self.at_most is None or len(names) <= self.at_most)
            and names.issuperset(self.require)
            and names.isdisjoint(self.exclude)
        )
