"""Selection of merges to measure: the batch that is expected to improve most on the best one.

Losses of unmeasured merges are predicted, with errors that are alike for merges that share experts.
Merges are added to a batch one by one, each with the largest expected improvement on the best of
what is measured and what the batch has already (greedy batch expected improvement: Ginsbourger et
al. 2010), so a batch spreads over what is uncertain.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mergelaw.decide.measured import LEVEL, Array, Measured, Model, to_json
from mergelaw.decide.objective import Objective
from mergelaw.decide.predict import Predictor, Subsets

DRAWS = 2000  # of the losses of candidates
CONTENDERS = 400  # candidates whose losses are drawn
RANGE = 3.0  # experts by which two merges differ before their errors are nearly independent
KINSHIP = 0.5  # correlation of the errors of two rules for the same experts
SHARE = 0.01  # of the gain over the base: a smaller improvement is not worth a measurement
CHANCE = 0.1  # of an improvement by that much, below which nothing is left to gain
WORTH = 0.02  # of that, the least expected improvement of a proposal
SWAPS = 8  # rounds of adding, removing and exchanging experts
STARTS = 4  # merges of a rule that each round starts from
PRIOR = 4.0  # earlier proposals with errors as predicted that a new error bar begins with
Z = float(stats.norm.ppf((1 + LEVEL) / 2))


@dataclass(frozen=True)
class Proposal:
    """A merge to measure: its predicted objective, its 90% interval, and the reason for it.

    Learned merges are not predicted; their numbers are None. ``usable`` is False if the rule's
    predictions failed their check.
    """

    method: str
    experts: Sequence[str]
    value: float | None
    low: float | None
    high: float | None
    usable: bool = True
    reason: str = ""

    def score(self, value: float) -> float:
        """A measured value's distance from the prediction, in its standard errors."""
        low, high = self.low or 0.0, self.high or 0.0
        return (value - (low + high) / 2) / max(high - low, 1e-12) * 2 * Z


@dataclass(frozen=True)
class Selection:
    """Merges of a base to measure next, or the finding that none is worth it.

    Attributes:
        measured: all models of the base.
        objective: what is minimised.
        proposals: lowest prediction first, those of rules that failed their check last; empty if
            nothing is left to gain.
        best: the best measured merge within the limits, None if none is; ``value`` is its
            objective, or that of the base, which is ``base_value``.
        margin: the smallest improvement worth a measurement (nats per token).
        chance: probability that an unmeasured merge improves by more than the margin.
        candidates: unmeasured merges that were predicted.
        as_good: sentences on simpler choices that are as good, and on what is predicted badly.
        realised: earlier predictions of merges that are measured now, with the measured values.
    """

    measured: Measured
    objective: Objective
    proposals: Sequence[Proposal]
    best: Model | None
    value: float
    base_value: float
    margin: float
    chance: float
    candidates: int
    as_good: Sequence[str]
    realised: Sequence[tuple[Proposal, float]]

    @property
    def sentences(self) -> list[str]:
        """The state of the search in words."""
        name = self.measured.name(self.best) if self.best else ""
        best = f"the best measured is {name}: {self.value:.4f}"
        chance = "less than 1%" if self.chance < 0.01 else f"{100 * self.chance:.0f}%"
        odds = (
            f"chance that one of {self.candidates:,} unmeasured merges is lower by more than "
            f"{self.margin:.4f}: {chance}"
        )
        if not self.best:
            lines = [
                f"No measured merge keeps the limits, and the chance that one of "
                f"{self.candidates:,} unmeasured ones does is {chance}"
                + ("." if self.proposals else "; relax them.")
            ]
        elif not self.candidates:
            lines = [f"Every merge within the limits is measured: {best}."]
        elif self.proposals:
            lines = [f"{best[0].upper()}{best[1:]}; {odds}."]
        else:
            lines = [f"Nothing is left to gain: {best}; {odds}."]
        if self.best and self.value > self.base_value:
            lines.append(f"The base itself is lower: {self.base_value:.4f}.")
        if self.realised:
            errors = np.array([value - (one.value or 0.0) for one, value in self.realised])
            held = sum(abs(one.score(value)) <= Z for one, value in self.realised)
            lines.append(
                f"Of {len(errors)} earlier proposals {held} are within their 90% intervals "
                f"({100 * held / len(errors):.0f}%); measured minus predicted {errors.mean():+.4f} "
                f"in the mean, {np.sqrt((errors**2).mean()):.4f} root mean square."
            )
        trials = sorted({one.method for one in self.proposals if not one.usable})
        if trials:
            names = " and ".join(trials)
            lines.append(
                f"Predictions by {names} failed their check, so these are trials. Where it has not "
                "run yet, `snakemake gradients ...` makes better predictions possible."
            )
        return [*lines, *self.as_good]

    def to_dict(self) -> dict[str, Any]:
        """The selection as JSON values."""
        answer = {
            "base": self.measured.base,
            "sentences": self.sentences,
            "objective": self.objective.text,
            "best": self.best.identity if self.best else None,
            "value": self.value,
            "margin": self.margin,
            "chance": self.chance,
            "candidates": self.candidates,
            "proposals": [vars(one) for one in self.proposals],
            "realised": [vars(one) | {"measured": value} for one, value in self.realised],
        }
        return dict(to_json(answer))


@dataclass(frozen=True)
class _Candidates:
    """Candidates (C,): rule, subset (C, M), predicted objective and its error.

    ``within`` is the probability that a candidate keeps the limits on losses.
    """

    methods: NDArray[np.str_]
    subsets: Subsets
    mean: Array
    sd: Array
    within: Array

    def take(self, chosen: Any) -> "_Candidates":
        """Some of the candidates."""
        return _Candidates(*(getattr(self, one.name)[chosen] for one in fields(self)))

    def names(self, place: int, experts: Sequence[str]) -> tuple[str, ...]:
        """The experts of a candidate."""
        return tuple(experts[int(i)] for i in np.flatnonzero(self.subsets[place]))


def select(
    measured: Measured,
    predictor: Predictor,
    objective: Objective,
    batch: int,
    learned: Sequence[str] = (),
    earlier: Sequence[Proposal] = (),
) -> Selection:
    """Merges to measure next.

    Args:
        measured: models of one base.
        predictor: predicts merges of its pool.
        batch: most proposals.
        learned: merge methods of the study whose coefficients are learned.
        earlier: earlier proposals with their predictions of this objective.

    Raises:
        MergelawError: unknown names, or limits that no merge can keep.
    """
    objective.check(measured)
    shares, base = objective.shares(measured), measured.reference
    ceilings, experts = objective.ceilings(measured), predictor.experts
    values = {
        m.identity: float(objective.values(m.losses[None], base.losses, shares)[0])
        for m in (base, *measured.merges)
    }
    within = [
        m
        for m in measured.merges
        if objective.allows(m.method, m.experts) and (m.losses <= ceilings).all()
    ]
    best = min(within, key=lambda m: values[m.identity], default=None)
    value = values[(best or base).identity]
    by_name = {(m.method, frozenset(m.experts)): m for m in measured.merges if m.equal}
    realised = [
        (one, values[merge.identity])
        for one in earlier
        if (merge := by_name.get((one.method, frozenset(one.experts)))) and one.value is not None
    ]
    errors = _errors(measured, predictor, objective, realised, values)
    every = _candidates(measured, predictor, objective, ceilings, errors)
    keys = [(m, frozenset(every.names(i, experts))) for i, m in enumerate(every.methods)]
    new = every.take(np.array([key not in by_name for key in keys], dtype=bool))
    margin = SHARE * max(values[base.identity] - value, 1e-2)
    chosen, chance = _batch(new, value if best else math.inf, margin, batch)
    if chance < CHANCE:
        chosen = []
    proposals = [_proposal(measured, predictor, objective, new, i, value) for i in chosen]
    proposals.sort(key=lambda p: (not p.usable, p.value))
    more = _learned(measured, objective, learned, every, experts)
    proposals = proposals[: max(batch - len(more), 0)] + more
    as_good = _as_good(measured, within, values, every, experts, margin)
    silent = sorted(set(objective.methods or predictor.methods) - {*every.methods, *learned})
    as_good += [f"No merge by {method} is predicted: too few are measured." for method in silent]
    as_good += [f"{warning[0].upper()}{warning[1:]}." for warning in predictor.warnings]
    return Selection(
        measured, objective, proposals[:batch], best, value, values[base.identity],
        margin, chance, len(new.mean), as_good, realised,
    )  # fmt: skip


def _errors(
    measured: Measured,
    predictor: Predictor,
    objective: Objective,
    realised: Sequence[tuple[Proposal, float]],
    values: Mapping[str, float],
) -> dict[str, tuple[float, float]]:
    """By rule, the factor of its predictions' errors and what is added to them (nats per token)."""
    return {
        method: (
            _inflation([pair for pair in realised if pair[0].method == method]),
            _doubt(predictor, objective, method) * _spread(measured, method, values),
        )
        for method in predictor.methods
    }


def _inflation(realised: Sequence[tuple[Proposal, float]]) -> float:
    """Factor of a rule's errors: root mean square of earlier ones, with ``PRIOR`` of 1; at most 2.

    Predictions have learned from those merges since, so larger factors would count them twice.
    """
    squares = [one.score(value) ** 2 for one, value in realised]
    return min(math.sqrt((sum(squares) + PRIOR) / (len(squares) + PRIOR)), 2.0)


def _usable(predictor: Predictor, objective: Objective, method: str) -> bool:
    """True if the predictions of a rule passed their check in every domain that counts."""
    checks, names = predictor.checks[method], [*objective.weights] or ["macro"]
    return all(checks[n].verdict == "usable" for n in names if objective.weights.get(n, 1.0) > 0)


def _doubt(predictor: Predictor, objective: Objective, method: str) -> float:
    """Share of the spread within k that is added to the errors of a rule without a usable check."""
    if _usable(predictor, objective, method):
        return 0.0
    shares = objective.weights or {"macro": 1.0}
    checks = predictor.checks[method]
    errors = [w * max(checks[n].error[0], checks[n].tail_error) for n, w in shares.items() if w]
    return min(1.0, sum(errors) / sum(shares.values()))


def _spread(measured: Measured, method: str, values: Mapping[str, float]) -> float:
    """Standard deviation of a rule's measured values within numbers of experts.

    It is the error of a prediction that knows only the number.
    """
    groups: dict[int, list[float]] = {}
    for merge in measured.merges:
        if merge.method == method:
            groups.setdefault(len(merge.experts), []).append(values[merge.identity])
    squares = [(v - np.mean(group)) ** 2 for group in groups.values() for v in group]
    freedom = len(squares) - len(groups)
    return math.sqrt(sum(squares) / freedom) if freedom > 0 else float(np.std([*values.values()]))


def _candidates(
    measured: Measured,
    predictor: Predictor,
    objective: Objective,
    ceilings: Array,
    errors: Mapping[str, tuple[float, float]],
) -> _Candidates:
    """Merges of equal weights within the limits on experts: all, or the best of a large pool's.

    ``errors`` are a factor of each rule's errors, and an error that is added before.
    """
    shares, base = objective.shares(measured), measured.reference.losses
    M, none = len(predictor.experts), np.zeros(0)
    parts = [_Candidates(np.array([], dtype=str), np.zeros((0, M), bool), none, none, none)]
    for method in predictor.methods:
        if objective.methods and method not in objective.methods:
            continue

        def predict(subsets: Subsets, method: str = method) -> _Candidates:
            losses, sds = predictor.losses(method, subsets)
            mean = objective.values(losses, base, shares)
            if objective.kind == "macro":
                mean, sd = predictor.macro(method, subsets, shares)
            else:
                worst = np.where(shares > 0, losses - base, -np.inf).argmax(axis=1)
                sd = np.take_along_axis(sds, worst[:, None], axis=1)[:, 0]
            limited, (factor, more) = np.isfinite(ceilings), errors[method]
            wide = np.maximum(factor * np.hypot(sds[:, limited], more), 1e-12)
            gap = (ceilings - losses)[:, limited] / wide
            within = stats.norm.cdf(gap).prod(axis=1)
            names = np.full(len(subsets), method)
            every = _Candidates(names, subsets, mean, factor * np.hypot(sd, more), within)
            return every.take(np.isfinite(mean) & np.isfinite(sd))

        subsets = predictor.candidates
        whole = len(subsets) == 2 ** min(M, 60) - 1
        subsets = _limited(subsets, predictor.experts, objective)
        part = predict(subsets)
        for _ in range(0 if whole else SWAPS):
            lowest = part.subsets[np.argsort(part.mean)[:STARTS]]
            near = _limited(_neighbours(lowest), predictor.experts, objective)
            seen = {row.tobytes() for row in part.subsets}
            near = near[np.array([row.tobytes() not in seen for row in near], dtype=bool)]
            if not len(near):
                break
            part = _joined([part, predict(near)])
        parts.append(part)
    return _joined(parts)


def _joined(parts: Sequence[_Candidates]) -> _Candidates:
    return _Candidates(
        *(np.concatenate([getattr(p, one.name) for p in parts]) for one in fields(_Candidates))
    )


def _limited(subsets: Subsets, experts: Sequence[str], objective: Objective) -> Subsets:
    """Subsets changed to keep the limits on experts, each once."""
    required = np.isin(experts, objective.require)
    subsets = (subsets & ~np.isin(experts, objective.exclude)) | required
    most = objective.at_most or len(experts)
    random = np.random.default_rng(0)
    for row in subsets:
        row[
            random.permutation(np.flatnonzero(row & ~required))[max(most - required.sum(), 0) :]
        ] = False
    return np.unique(subsets[subsets.any(axis=1)], axis=0)


def _neighbours(subsets: Subsets) -> Subsets:
    """Subsets with one expert more or less, or one exchanged."""
    made = []
    for row in subsets:
        for i in range(len(row)):
            for j in range(i, len(row)):
                if i == j or row[i] != row[j]:
                    new = row.copy()
                    new[[i, j]] = ~new[[i, j]] if i != j else ~new[i]
                    made.append(new)
    return np.array(made, dtype=bool).reshape(-1, subsets.shape[1])


def _batch(
    candidates: _Candidates, start: float, margin: float, batch: int
) -> tuple[list[int], float]:
    """Candidates of the largest expected improvement together, and the chance of one by a margin.

    ``start`` is the lowest measured value, infinite if no measured merge is within the limits.
    """
    if not len(candidates.mean):
        return [], 0.0
    order = np.argsort(candidates.mean - Z * candidates.sd, kind="stable")[:CONTENDERS]
    few = candidates.take(order)
    differ = (few.subsets[:, None] != few.subsets[None]).sum(axis=2)
    kin = np.where(few.methods[:, None] == few.methods, 1.0, KINSHIP)
    root = np.linalg.cholesky(kin * np.exp(-differ / RANGE) + 1e-9 * np.eye(len(order)))
    random = np.random.default_rng(0)
    draws = few.mean + random.standard_normal((DRAWS, len(order))) @ root.T * few.sd
    draws[random.random(draws.shape) > few.within] = np.inf
    if not math.isfinite(start):
        start = float(few.mean.max() + 9 * few.sd.max())
    chance = float((draws.min(axis=1) < start - margin).mean())
    lowest, chosen = np.full(DRAWS, start), list[int]()
    for _ in range(min(batch, len(order))):
        gains = np.maximum(lowest[:, None] - draws, 0).mean(axis=0)
        gains[chosen] = -1
        if gains.max() < WORTH * margin:
            break
        chosen.append(int(gains.argmax()))
        lowest = np.minimum(lowest, draws[:, chosen[-1]])
    return [int(order[i]) for i in chosen], chance


def _proposal(
    measured: Measured,
    predictor: Predictor,
    objective: Objective,
    candidates: _Candidates,
    place: int,
    value: float,
) -> Proposal:
    """A candidate as a proposal; ``value`` is the lowest measured one."""
    method, mean = str(candidates.methods[place]), float(candidates.mean[place])
    half, usable = Z * float(candidates.sd[place]), _usable(predictor, objective, method)
    odds = float(stats.norm.cdf((value - mean) / max(half / Z, 1e-12)) * candidates.within[place])
    reason = f"lower than the best with a chance of {100 * odds:.0f}%"
    if mean == candidates.mean.min():
        reason = "the lowest prediction"
    if candidates.within[place] < 1 - CHANCE:
        reason += f"; keeps the limits with a chance of {100 * candidates.within[place]:.0f}%"
    if not usable:
        reason += "; a trial"
    experts = candidates.names(place, predictor.experts)
    return Proposal(method, experts, mean, mean - half, mean + half, usable, reason)


def _learned(
    measured: Measured,
    objective: Objective,
    learned: Sequence[str],
    every: _Candidates,
    experts: Sequence[str],
) -> list[Proposal]:
    """Learned merges that are not measured yet: of all experts that the limits allow.

    If the limits allow fewer, these are the experts of the lowest prediction of that number.
    """
    pool = [name for name in experts if name not in objective.exclude]
    most = objective.at_most or len(pool)
    members = tuple(pool)
    if most < len(pool) and len(every.mean):
        sizes = every.subsets.sum(axis=1)
        place = int(np.where(sizes == min(most, sizes.max()), every.mean, np.inf).argmin())
        members = every.names(place, experts)
    known = {(m.method, frozenset(m.experts)) for m in measured.merges}
    return [
        Proposal(method, members, None, None, None, True, "learned weights are not predicted")
        for method in learned
        if objective.allows(method, members) and (method, frozenset(members)) not in known
    ]


def _as_good(
    measured: Measured,
    within: Sequence[Model],
    values: Mapping[str, float],
    every: _Candidates,
    experts: Sequence[str],
    margin: float,
) -> list[str]:
    """Sentences on simpler choices that are as good as the lowest prediction or measurement."""
    lines: list[str] = []
    if not len(every.mean):
        return lines
    lowest = int(every.mean.argmin())
    learned = [m for m in within if m.learned]
    for merge in sorted(learned, key=lambda m: values[m.identity])[:1]:
        others = [values[m.identity] for m in within if m.equal and m not in learned]
        equal = min(others, default=math.inf)
        if values[merge.identity] <= min(float(every.mean[lowest]), equal) + margin:
            lines.append(
                f"{measured.name(merge)} is as good as any merge of equal weights, or better: "
                f"{values[merge.identity]:.4f} against {equal:.4f} measured and "
                f"{every.mean[lowest]:.4f} predicted."
            )
    rule = every.take(every.methods == every.methods[lowest])
    found = {row.tobytes(): i for i, row in enumerate(rule.subsets)}
    row, place = np.zeros(len(experts), dtype=bool), None
    while True:
        more = [row | one for one in np.eye(len(experts), dtype=bool)[~row]]
        places = [found[one.tobytes()] for one in more if one.tobytes() in found]
        step = min(places, key=lambda i: rule.mean[i], default=None)
        if step is None or (place is not None and rule.mean[step] >= rule.mean[place]):
            break
        place, row = step, rule.subsets[step]
    best = min([values[m.identity] for m in within], default=math.inf)
    if place is not None and rule.mean[place] <= min(float(rule.mean.min()), best) + margin:
        names = ", ".join(rule.names(place, experts))
        lines.append(
            f"Adding one expert at a time, as predicted, ends as well as any choice of experts: "
            f"{rule.methods[place]} of {names}."
        )
    return lines
