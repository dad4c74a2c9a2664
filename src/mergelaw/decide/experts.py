"""Verdicts on experts: what each one does to the merges that it is in, as measured.

All figures are contrasts of measured losses, for these subsets and documents like these.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mergelaw.decide.measured import Difference, Measured, Model, contrasts, to_json
from mergelaw.errors import MergelawError

FAR = 3.0  # an outlier alone is this many times the spread of the others above the worst of them
LEAST_SPREAD = 0.02  # of the others, as a share of their median loss
ALIKE = 0.95  # cosine of two experts' gains by domain, from which they may replace each other

Contrast = dict[str, float]  # coefficients of models, by identity
Index = dict[frozenset[str], str]  # identities of equally weighted merges of one rule, by experts


@dataclass(frozen=True)
class Verdict:
    """A verdict on one expert of the pool. Losses are macro, in nats per token.

    Attributes:
        expert: its name.
        word: broken, outlier, harms, helps, redundant or unclear.
        alone: its loss, if measured.
        others: the least and the largest loss of the other experts alone.
        with_it, without_it: mean loss of merges of two or more experts with and without it, over
            methods and numbers of experts.
        effect: with_it - without_it.
        left_out: loss of the merge of all experts but this one minus that of all, mean of methods.
        adds: mean change of the loss when it joins a merge, over sizes and methods: its Shapley
            value, exact where all subsets are measured.
        by_domain: the same on each domain, or ``left_out`` with the sign of adding where
            sizes are missing.
        alike: the expert whose gains by domain are most like its own, and the cosine.
    """

    expert: str
    word: str
    alone: float | None
    others: tuple[float, float] | None
    with_it: float | None
    without_it: float | None
    effect: Difference | None
    left_out: Difference | None
    adds: Difference | None
    by_domain: Mapping[str, float]
    alike: tuple[str, float] | None

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        parts = []
        if self.alone is not None:
            parts.append(f"alone {self.alone:.4f}")
            if self.others:
                parts[0] += f" where others have {self.others[0]:.4f} to {self.others[1]:.4f}"
        if self.effect is not None:
            parts.append(
                f"merges of the same size average {self.with_it:.4f} with it, "
                f"{self.without_it:.4f} without"
            )
        if self.adds is not None:
            parts.append(f"joining a merge changes the loss by {self.adds.text()}")
        if self.left_out is not None:
            parts.append(f"leaving it out of the merge of all by {self.left_out.text()}")
        if self.word == "redundant" and self.alike:
            parts.append(f"most like {self.alike[0]} (cosine of gains {self.alike[1]:.2f})")
        return f"{self.expert}: {WORDS[self.word]}" + "".join(parts and [f": {'; '.join(parts)}"])

    @property
    def flagged(self) -> bool:
        """True for an expert that is better left out."""
        return self.word in ("broken", "outlier", "harms")

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return dict(to_json(values | {"sentence": self.sentence}))


WORDS = {
    "broken": "BROKEN, leave it out: no merge with it has a finite loss",
    "outlier": "OUTLIER, leave it out of equally weighted merges",
    "harms": "better left out of the merge of all",
    "helps": "helps",
    "redundant": "redundant",
    "unclear": "no clear effect",
}


def experts(measured: Measured, method: str | None = None) -> list[Verdict]:
    """Verdicts on the experts of a base's pool, in the pool's order.

    Where an expert is an outlier, the verdicts on the others come from the merges without it.

    Args:
        measured: all models of the base.
        method: the merges of one method only; None: the mean over methods.

    Raises:
        MergelawError: an unknown method, or a pool of one expert.
    """
    merges = [
        m for m in measured.merges if m.equal and (m.method == method if method else not m.learned)
    ]
    if not merges:
        methods = ", ".join(sorted({m.method for m in measured.merges}))
        which = f"by {method!r}" if method else "with equal weights"
        raise MergelawError(f"experts: no merges {which}; the study measures {methods}")
    pool = measured.pool
    if len(pool) < 2:
        raise MergelawError(f"experts: {measured.base} has merges of one expert only; add another")
    rules: dict[tuple[str, int], Index] = defaultdict(dict)
    for merge in merges:
        rules[merge.recipe, merge.seed][frozenset(merge.experts)] = merge.identity
    wanted: dict[tuple[str, str], Contrast] = {}
    for expert in pool:
        wanted |= {(expert, name): c for name, c in _contrasts(measured, rules, expert) if c}
    differences = dict(zip(wanted, contrasts(measured, list(wanted.values())), strict=True))
    alone = measured.alone(merges[0].seed)
    alike, finite = _alike(measured, alone), {e for merge in merges for e in merge.experts}
    verdicts: dict[str, Verdict] = {}
    for expert in pool:
        changes = wanted.get((expert, "adds"))
        if changes is None:
            left_out = wanted.get((expert, "left out"), {})
            changes = {model: -share for model, share in left_out.items()}
        losses = {name: measured.macro(model) for name, model in alone.items()}
        loss = losses.pop(expert, None)
        others = (min(losses.values()), max(losses.values())) if losses else None
        effect, left = differences.get((expert, "effect")), differences.get((expert, "left out"))
        far = loss is not None and len(losses) > 1 and _is_far(loss, list(losses.values()))
        like = alike.get(expert)
        verdicts[expert] = Verdict(
            expert,
            _word(far, effect, left, like) if expert in finite else "broken",
            loss,
            others,
            _value(differences.get((expert, "with"))),
            _value(differences.get((expert, "without"))),
            effect,
            left,
            differences.get((expert, "adds")),
            _by_domain(measured, changes),
            like,
        )
    return list((verdicts | _without_outliers(measured, verdicts, method)).values())


def verdicts(measured: Measured) -> list[Verdict]:
    """Verdicts of ``experts``; none for a single expert or without merges of equal weights."""
    try:
        return experts(measured)
    except MergelawError:
        return []


def flagged(measured: Measured) -> list[str]:
    """Sentences on experts that are better left out."""
    return [verdict.sentence for verdict in verdicts(measured) if verdict.flagged]


def _without_outliers(
    measured: Measured, verdicts: Mapping[str, Verdict], method: str | None
) -> dict[str, Verdict]:
    """Verdicts on the others, from the merges without outliers; empty without an outlier."""
    outliers = {n for n, verdict in verdicts.items() if verdict.word in ("outlier", "broken")}
    models = {i: m for i, m in measured.models.items() if not outliers & {*m.experts}}
    rest = replace(measured, models=models)
    if not outliers or len(rest.pool) < 2:
        return {}
    return {verdict.expert: verdict for verdict in experts(rest, method)}


def _value(difference: Difference | None) -> float | None:
    return None if difference is None else difference.value


def _is_far(loss: float, others: Sequence[float]) -> bool:
    """True for a loss far above those of the other experts."""
    spread = max(max(others) - min(others), LEAST_SPREAD * float(np.median(others)))
    return loss - max(others) > FAR * spread


def _word(
    far: bool, effect: Difference | None, left: Difference | None, like: tuple[str, float] | None
) -> str:
    """The verdict as a word."""
    worse = effect is not None and effect.clear and effect.value > 0
    better_without = left is not None and left.clear and left.value < 0
    if far and (worse or better_without or (effect is None and left is None)):
        return "outlier"
    if better_without and (effect is None or effect.value > 0):
        return "harms"
    if left is not None and left.clear and left.value > 0:
        return "helps"
    return "redundant" if left is not None and like and like[1] >= ALIKE else "unclear"


def _contrasts(
    measured: Measured, rules: Mapping[tuple[str, int], Index], expert: str
) -> Iterator[tuple[str, Contrast]]:
    """Contrasts of one expert by name; empty where their merges are not measured."""
    members, rest = [], []
    left_out, adds = [], []
    pool, base = frozenset(measured.pool), measured.reference.identity
    for index in rules.values():
        pairs: dict[int, list[Contrast]] = defaultdict(list)
        levels: dict[int, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for subset, merge in index.items():
            levels[len(subset)][expert not in subset].append(merge)
            before = index.get(subset - {expert}) if len(subset) > 1 else base
            if expert in subset and before:
                pairs[len(subset)].append({merge: 1.0, before: -1.0})
        both = [level for size, level in levels.items() if size > 1 and all(level)]
        members += [_mean({merge: 1.0} for merge in one) for one, _ in both]
        rest += [_mean({merge: 1.0} for merge in other) for _, other in both]
        if pool in index and pool - {expert} in index:
            left_out.append({index[pool - {expert}]: 1.0, index[pool]: -1.0})
        if len(pairs) == len(pool):
            adds.append(_mean(map(_mean, pairs.values())))
    inside, outside = _mean(members), _mean(rest)
    yield "with", inside
    yield "without", outside
    yield "effect", inside | {merge: -share for merge, share in outside.items()}
    yield "left out", _mean(left_out)
    yield "adds", _mean(adds)


def _mean(every: Iterable[Contrast]) -> Contrast:
    """The mean of contrasts; empty of none."""
    every = list(every)
    mean: Contrast = defaultdict(float)
    for contrast in every:
        for model, share in contrast.items():
            mean[model] += share / len(every)
    return dict(mean)


def _by_domain(measured: Measured, contrast: Contrast) -> dict[str, float]:
    """A contrast of losses on each domain."""
    losses = sum((share * measured.models[m].losses for m, share in contrast.items()), 0.0)
    if not contrast:
        return {}
    return dict(zip(measured.domains, np.asarray(losses).tolist(), strict=True))


def _alike(measured: Measured, alone: Mapping[str, Model]) -> dict[str, tuple[str, float]]:
    """For each expert the one whose gains by domain are most like its own, and their cosine."""
    if len(measured.domains) < 3 or len(alone) < 2:
        return {}
    gains = np.array([measured.reference.losses - model.losses for model in alone.values()])
    norms = np.linalg.norm(gains, axis=1, keepdims=True)
    cosines = (gains / np.where(norms > 0, norms, 1)) @ (gains / np.where(norms > 0, norms, 1)).T
    np.fill_diagonal(cosines, -np.inf)
    names = list(alone)
    return {
        name: (names[int(row.argmax())], float(row.max()))
        for name, row in zip(names, cosines, strict=True)
    }
