"""The best measured merge of a base: a ranking for an objective, and what separates the first."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mergelaw.decide.measured import Array, Difference, Documents, Measured, Model, to_json
from mergelaw.decide.objective import Objective
from mergelaw.errors import MergelawError

CONTENDERS = 200  # lowest merges that are compared with the best
FEW = 2  # experts left out by the best merge that its sentence names
RESAMPLES = 1000  # of the documents, for the optimism of the selection


@dataclass(frozen=True)
class Best:
    """The best measured merge of a base.

    Attributes:
        measured: all models of the base.
        objective: what was minimised.
        ranking: merges within the limits, lowest objective first.
        values: their objective in nats per token.
        ahead: by identity, objective of the next merges minus the best's, on the same documents.
        costs: the objective minus the best's if an expert that it leaves out is added, by expert,
            where that merge is measured.
        documents: losses of the base and of the lowest merges on every document.
        optimism: by how much choosing on the documents of the ranking makes the best's value look
            too low (nats per token), from resampled documents.
        wins: share of resamples in which it is best.
    """

    measured: Measured
    objective: Objective
    ranking: Sequence[Model]
    values: Sequence[float]
    ahead: Mapping[str, Difference]
    costs: Mapping[str, Difference]
    documents: Documents
    optimism: float
    wins: float

    @property
    def model(self) -> Model:
        """The best merge."""
        return self.ranking[0]

    @property
    def label(self) -> str:
        """The objective's name in tables."""
        if self.objective.weights:
            return "weighted"
        held_in = self.objective.kind == "macro" and not self.measured.counted.all()
        return "held-in macro" if held_in else self.objective.kind

    @property
    def base_value(self) -> float:
        """Objective of the base; 0 for the worst domain, which is counted from the base."""
        base, shares = self.measured.reference.losses, self.objective.shares(self.measured)
        return float(self.objective.values(base[None], base, shares)[0])

    @property
    def improves(self) -> bool:
        """True if the best merge has a lower objective than the base."""
        return self.values[0] < self.base_value

    @property
    def tied(self) -> list[Model]:
        """Next merges that the documents do not distinguish from the best (90%)."""
        return [m for m in self.ranking[1:CONTENDERS] if not self.ahead[m.identity].clear]

    @property
    def sentence(self) -> str:
        """The decision in one sentence, all of it measured."""
        measured, name, loss = (
            self.measured,
            self.measured.name(self.model),
            f"{self.values[0]:.4f}",
        )
        base = [f"base {self.base_value:.4f}"]
        if self.objective.kind == "worst":
            slope = self.objective.slopes(measured, self.model)[self.model.identity]
            worst = measured.domains[int(slope.argmax())]
            base, loss = [], f"{self.values[0]:+.4f} against the base on {worst}, its worst domain"
        if not self.improves:
            return (
                f"Ship the base: no measured merge improves on it; the lowest is {name}: {loss}"
                + "".join(f" ({note})" for note in base)
            )
        few = len(measured.pool) - len(self.model.experts) <= FEW
        left_out = [
            f"{expert}, which costs {cost.value:.4f}"
            for expert, cost in self.costs.items()
            if few and cost.value > 0 and cost.clear
        ]
        # Free or learned weights may use an expert that equal weights are better without.
        designed = (m for m in self.ranking if m.role == "merge" and not m.learned)
        equal = next(designed, self.model)
        if equal is not self.model:
            value = self.values[self.ranking.index(equal)]
            base.append(f"with equal weights, {measured.name(equal)}: {value:.4f}")
        notes = base + ([f"without {' and '.join(left_out)}"] if left_out else [])
        return f"Ship {name}: {loss}" + (f" ({'; '.join(notes)})" if notes else "")

    @property
    def doubt(self) -> str:
        """Clearness of the choice, and optimism of the selection, in words."""
        count, tied = len(self.ranking), self.tied
        it = "it" if self.improves else "the lowest merge"
        if count == 1:
            return f"{it.capitalize()} is the only measured merge within the limits."
        second = tied[0] if tied else self.ranking[1]
        behind = f"{self.measured.name(second)}, {self.ahead[second.identity].text()}"
        more = "at least " if len(tied) == CONTENDERS - 1 else ""
        clear = (
            f"{more}{len(tied)} of {count - 1} others cannot be distinguished from {it} "
            f"on these documents, first {behind}."
            if tied
            else f"{it.capitalize()} is distinguishable from all others, the next being {behind}."
        )
        better = f"about {self.optimism:.4f}" if self.optimism >= 5e-5 else "less than 0.0001"
        return (
            f"{clear} Chosen as the lowest of {count} on the documents that judge it, it looks "
            f"{better} better than on others like them, and is the lowest in "
            f"{100 * self.wins:.0f}% of resamples."
        )

    @cached_property
    def alone(self) -> dict[str, Model]:
        """The single experts of the best merge's training seed, by name."""
        return self.measured.alone(self.model.seed)

    @cached_property
    def specialists(self) -> dict[str, Model]:
        """The best single expert of each domain that counts, where one improves on the base.

        These are the held-in domains and those of the objective.
        """
        measured, chosen = self.measured, {}
        for place in np.flatnonzero(measured.counted + self.objective.shares(measured)):
            best = min(self.alone.values(), key=lambda m: float(m.losses[place]), default=None)
            if best and best.losses[place] < measured.reference.losses[place]:
                chosen[measured.domains[place]] = best
        return chosen

    def kept(self, model: Model) -> float:
        """Share of the single experts' gains that a model keeps; negative if it loses instead.

        The sum of (base - model) over the sum of (base - best single expert), weighted as in the
        objective, over the domains where a single expert improves on the base. NaN without such
        domains.
        """
        base, gained, possible = self.measured.reference.losses, 0.0, 0.0
        shares = self.objective.shares(self.measured)
        for domain, expert in self.specialists.items():
            place = self.measured.domains.index(domain)
            weight = shares[place] / shares.max()
            gained += weight * (base[place] - model.losses[place])
            possible += weight * (base[place] - expert.losses[place])
        return float(gained / possible) if possible else math.nan

    @property
    def share(self) -> str:
        """The share of the experts' gains that the best merge keeps, as a sentence.

        Empty if no merge improves on the base, or no single expert does.
        """
        share, shares = self.kept(self.model), self.objective.shares(self.measured)
        if math.isnan(share) or not self.improves:
            return ""
        counted = [d for d in self.specialists if shares[self.measured.domains.index(d)] > 0]
        domains = counted[0] if len(counted) == 1 else f"{len(counted)} domains"
        if share < 0:
            return f"It keeps none of what the experts gain on {domains}: the base is better there."
        weighted = "weighted " if self.objective.weights else ""
        return (
            f"It keeps {100 * share:.0f}% of what the experts gain: the {weighted}sum of (base - "
            f"merge) over that of (base - best single expert), over {domains}."
        )

    def domains(self) -> list[dict[str, Any]]:
        """Losses by domain: of the base, the best single expert, the merge, baselines.

        ``against_base`` is the merge's difference from the base on the same documents.
        """
        measured, base, rows = self.measured, self.measured.reference, []
        for place, domain in enumerate(measured.domains):
            one = np.eye(len(measured.domains))[place]
            expert = self.specialists.get(domain)
            rows.append(
                {
                    "domain": domain,
                    "held_out": domain in measured.held_out,
                    "base": float(base.losses[place]),
                    "expert": expert.experts[0] if expert else None,
                    "alone": float(expert.losses[place]) if expert else None,
                    "baselines": {n: float(m.losses[place]) for n, m in measured.baselines.items()},
                    "merge": float(self.model.losses[place]),
                    "against_base": self.documents.difference(
                        {self.model.identity: one, base.identity: -one}
                    ),
                }
            )
        return rows

    def command(self, file: str, several_bases: bool) -> str | None:
        """The shell command that writes the merge; None if the base is better."""
        if not self.improves:
            return None
        model = self.model
        words = ["mergelaw", "merge", file, "--method", model.method]
        words += ["--base", self.measured.base] if several_bases else []
        words += [word for expert in model.experts for word in ("--expert", expert)]
        if not model.equal:
            words += [word for weight in model.weights for word in ("--weight", repr(weight))]
        words += ["--seed", str(model.seed)] if self.measured.several_seeds else []
        return shlex.join([*words, "--output", f"{self.measured.base}-best"])

    def to_dict(self, top: int) -> dict[str, Any]:
        """The ranking and the best merge as JSON values."""
        ranking = [
            {
                "merge": model.identity,
                "name": self.measured.name(model),
                "method": model.method,
                "recipe": json.loads(model.recipe),
                "seed": model.seed,
                "experts": model.experts,
                "weights": model.weights,
                "value": value,
                "kept": self.kept(model),
                "behind": self.ahead.get(model.identity),
            }
            for model, value in list(zip(self.ranking, self.values, strict=True))[:top]
        ]
        answer = {
            "base": self.measured.base,
            "sentence": self.sentence,
            "doubt": self.doubt,
            "objective": self.label,
            "base_value": self.base_value,
            "merges": len(self.ranking),
            "not_distinguishable": [model.identity for model in self.tied],
            "optimism": self.optimism,
            "wins": self.wins,
            "costs_of_adding": dict(self.costs),
            "ranking": ranking,
            "domains": self.domains(),
        }
        return dict(to_json(answer))


def best(measured: Measured, objective: Objective | None = None) -> Best:
    """The best measured merge of a base, by default by macro loss.

    Raises:
        MergelawError: an unknown domain, or no merge within the limits.
    """
    objective = objective or Objective()
    shares, base = objective.shares(measured), measured.reference
    merges = allowed(measured, objective)
    losses = np.array([merge.losses for merge in merges])
    excess = losses - objective.ceilings(measured)
    within = np.all(excess <= 0, axis=1)
    if not within.any():
        closest = int(excess.max(axis=1).argmin())
        place = int(excess[closest].argmax())
        raise MergelawError(
            f"best: no measured merge of {measured.base} is within the limits; the closest, "
            f"{measured.name(merges[closest])}, is {excess[closest, place]:.4f} above the one on "
            f"{measured.domains[place]}; relax --not-above or --not-above-expert"
        )
    values = objective.values(losses, base.losses, shares)
    order = [i for i in np.argsort(values, kind="stable") if within[i]]  # ties: fewer experts
    ranking = [merges[i] for i in order]
    first, others = ranking[0], ranking[1:CONTENDERS]
    added = {
        expert: merge
        for expert in measured.pool
        if first.equal
        and expert not in first.experts
        and (merge := measured.find(frozenset([*first.experts, expert]), first))
    }
    documents = measured.documents([base, first, *others, *added.values()])

    def behind(model: Model) -> Difference:
        return documents.difference(
            _minus(objective.slopes(measured, model), objective.slopes(measured, first))
        )

    optimism, wins = _selection(measured, objective, documents, [first, *others])
    return Best(
        measured,
        objective,
        ranking,
        [float(values[i]) for i in order],
        {model.identity: behind(model) for model in others},
        {expert: behind(model) for expert, model in added.items()},
        documents,
        optimism,
        wins,
    )


def allowed(measured: Measured, objective: Objective) -> list[Model]:
    """Measured merges that the limits on experts and methods allow, those of few experts first.

    Raises MergelawError if there are none, or if the limits contradict each other.
    """
    objective.check(measured)
    merges = [m for m in measured.merges if objective.allows(m.method, m.experts)]
    if not merges:
        raise MergelawError(
            f"best: no measured merge of {measured.base} keeps the limits on experts and methods; "
            "relax them, or let `mergelaw select` propose merges that do"
        )
    return sorted(merges, key=lambda m: (len(m.experts), m.identity))


def _minus(one: Mapping[str, Array], other: Mapping[str, Array]) -> dict[str, Array]:
    """The difference of two sets of coefficients by model."""
    zero = np.zeros_like(next(iter(one.values())))
    return {m: one.get(m, zero) - other.get(m, zero) for m in {**one, **other}}


def _selection(
    measured: Measured, objective: Objective, documents: Documents, models: Sequence[Model]
) -> tuple[float, float]:
    """Optimism of taking the lowest of these models, and how often the first one is lowest.

    The optimism is the bootstrap's (Efron and Tibshirani 1993, section 17.6): the mean, over
    resampled documents, of the chosen model's value on all documents minus that on the resample.
    The first model's own mean, which is 0 but for the draws, is subtracted.
    """
    random, shares = np.random.default_rng(0), objective.shares(measured)
    rows = [documents.rows[model.identity] for model in [*models, measured.reference]]
    drawn = []
    for nll, tokens in zip(documents.nll, documents.tokens, strict=True):
        counts = random.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), RESAMPLES)
        drawn.append(counts @ nll[rows].T / (counts @ tokens)[:, None])
    losses = np.stack(drawn, axis=-1)  # resamples, models, domains
    values = objective.values(losses[:, :-1], losses[:, -1], shares)
    every = np.array([model.losses for model in models])
    whole = objective.values(every, measured.reference.losses, shares)
    chosen = values.argmin(axis=1)
    ahead = values[:, 0] - values[np.arange(RESAMPLES), chosen]
    return float((whole[chosen] - whole[0] + ahead).mean()), float((chosen == 0).mean())
