"""Measured models of a base: losses by domain, and differences over the same documents.

Differences are estimated per document, as ratios of sums, so what the documents have in common
cancels. Their intervals are Student's t. They speak of documents like these, for these models.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Read = Callable[[Sequence[str]], pd.DataFrame]
LEVEL = 0.9  # of all intervals
CHUNK = 1024  # models whose documents are read at a time
ROLES = ("base", "merge", "written", "baseline")
LEARNED = '"method":"learned"'  # in the recipe of a merge
PLAIN = '"method":"average"'  # in the recipe of a merge that is the expert itself if k = 1


@dataclass(frozen=True)
class Difference:
    """An estimated difference of losses in nats per token, its standard error and freedom.

    The error is NaN where a domain has a single document.
    """

    value: float
    error: float
    freedom: float

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the 90% interval."""
        half = float(stats.t.ppf((1 + LEVEL) / 2, self.freedom)) * self.error if self.error else 0.0
        return self.value - half, self.value + half

    @property
    def clear(self) -> bool:
        """True if the interval excludes zero."""
        low, high = self.ends
        return low > 0 or high < 0

    def p_above(self, threshold: float) -> float:
        """One-sided p-value against the hypothesis that the difference is at most a threshold."""
        if self.error == 0:
            return float(self.value <= threshold)
        return float(stats.t.sf((self.value - threshold) / self.error, self.freedom))

    def text(self, sign: str = "+") -> str:
        """The difference with its interval: +0.0021 (90%: +0.0010 to +0.0032)."""
        value, low, high = (f"{number:{sign}.4f}" for number in (self.value, *self.ends))
        if math.isnan(self.error):
            return f"{value} (no interval: a domain has one document)"
        return f"{value} (90%: {low} to {high})"


class Documents:
    """Losses of some models on every evaluation document.

    Attributes:
        rows: the row of each model, by identity.
        nll: nats by domain: (models, documents).
        tokens: scored tokens of the documents by domain: (documents,).
    """

    def __init__(self, table: pd.DataFrame, domains: Sequence[str]):
        table = table.drop_duplicates(["merge", "domain"])
        self.rows = {str(model): row for row, model in enumerate(dict.fromkeys(table["merge"]))}
        self.nll: list[Array] = []
        self.tokens: list[Array] = []
        for domain in domains:
            cells = table[table["domain"] == domain].set_index("merge").loc[list(self.rows)]
            self.nll.append(np.array(cells["document_nll"].tolist(), dtype=float))
            self.tokens.append(np.array(cells["document_tokens"].iloc[0], dtype=float))

    def difference(self, coefficients: Mapping[str, Array]) -> Difference:
        """The sum of coefficients (of models, by domain) times losses, with its standard error."""
        rows = [self.rows[model] for model in coefficients]
        shares = np.array(list(coefficients.values()))  # models, domains
        counted = np.flatnonzero(shares.any(axis=0))
        return estimate(
            [shares[:, domain] @ self.nll[domain][rows] for domain in counted],
            [self.tokens[domain] for domain in counted],
        )


def estimate(nll: Sequence[Array], tokens: Sequence[Array]) -> Difference:
    """A sum of losses over domains, and its standard error over documents.

    Args:
        nll: of each domain, the documents' nats, weighted and summed over models.
        tokens: of each domain, the documents' scored tokens.
    """
    value, variances, freedoms = 0.0, [], []
    for nats, counts in zip(nll, tokens, strict=True):
        loss, size = nats.sum() / counts.sum(), len(counts)
        residuals = (nats - loss * counts) / counts.sum()
        squares = float(residuals @ residuals)
        value += loss
        variances.append(squares * size / (size - 1) if size > 1 else math.nan)
        freedoms.append(size - 1)
    variance = math.fsum(variances)
    if not variance:  # the same model twice
        return Difference(float(value), 0.0, 1.0)
    pairs = zip(variances, freedoms, strict=True)
    freedom = variance**2 / sum(v**2 / max(f, 1) for v, f in pairs)  # Welch and Satterthwaite
    return Difference(float(value), math.sqrt(variance), freedom)


@dataclass(frozen=True)
class Model:
    """A measured model: a merge, the base, or a baseline.

    Attributes:
        identity: of the merge, 16 hexadecimal digits.
        role: base, merge (of the design), written (named in ``merges``) or baseline.
        method, recipe, seed: name of the method, its parameters as JSON, the training seed.
        experts, weights: what is merged.
        losses: nats per token in each domain, in the order of ``Measured.domains``; NaN where not
            finite.
    """

    identity: str
    role: str
    method: str
    recipe: str
    seed: int
    experts: tuple[str, ...]
    weights: tuple[float, ...]
    losses: Array

    @property
    def equal(self) -> bool:
        """True if all weights are equal, or learned."""
        return len(set(self.weights)) <= 1

    @property
    def learned(self) -> bool:
        """True if coefficients were learned for this merge."""
        return LEARNED in self.recipe


@dataclass(frozen=True)
class Measured:
    """All measured models of one base.

    Attributes:
        base: name of the base.
        domains: evaluation domains, and which of them are held out (no expert is trained on them).
        models: by identity, the base first.
        read: reads the evaluation rows of models, with the columns per document.
    """

    base: str
    domains: tuple[str, ...]
    held_out: frozenset[str]
    models: Mapping[str, Model]
    read: Read

    @property
    def reference(self) -> Model:
        """The base itself."""
        return next(iter(self.models.values()))

    @cached_property
    def counted(self) -> Array:
        """Weights of domains in the macro loss: held-in ones alike, or all if all are held out."""
        held_in = np.array([domain not in self.held_out for domain in self.domains], dtype=float)
        counted = held_in if held_in.any() else np.ones(len(held_in))
        return np.asarray(counted / counted.sum())

    def macro(self, model: Model) -> float:
        """Mean loss over the held-in domains."""
        return float(model.losses @ self.counted)

    @cached_property
    def merges(self) -> list[Model]:
        """The models that are merges of the pool and have a finite loss in every domain."""
        models = (m for m in self.models.values() if m.role in ("merge", "written"))
        return [model for model in models if np.isfinite(model.losses).all()]

    @cached_property
    def pool(self) -> list[str]:
        """Experts in any measured merge, whatever its loss."""
        merges = (m for m in self.models.values() if m.role in ("merge", "written"))
        return list(dict.fromkeys(expert for merge in merges for expert in merge.experts))

    @cached_property
    def baselines(self) -> dict[str, Model]:
        """Baselines by name, such as a multitask model."""
        return {m.experts[0]: m for m in self.models.values() if m.role == "baseline"}

    def alone(self, seed: int) -> dict[str, Model]:
        """Single experts by name, preferably plain ones of this training seed.

        An average of one expert is the expert. Where no average is measured, the best rule's merge
        of that expert stands for it.
        """
        single = sorted(
            (merge for merge in self.merges if len(merge.experts) == 1),
            key=lambda m: (PLAIN in m.recipe, m.seed == seed, -self.macro(m)),
        )
        alone = {merge.experts[0]: merge for merge in single}
        return {expert: alone[expert] for expert in self.pool if expert in alone}

    def find(self, experts: frozenset[str], like: Model) -> Model | None:
        """The equally weighted merge of these experts with another's rule and training seed."""
        return self._equal.get((experts, like.recipe, like.seed))

    @cached_property
    def _equal(self) -> dict[tuple[frozenset[str], str, int], Model]:
        return {(frozenset(m.experts), m.recipe, m.seed): m for m in self.merges if m.equal}

    def documents(self, models: Sequence[Model]) -> Documents:
        """Losses of models on every document."""
        return Documents(self.read([model.identity for model in models]), self.domains)

    @property
    def several_seeds(self) -> bool:
        """True if experts were trained with several seeds."""
        return len({model.seed for model in self.models.values()}) > 1

    def name(self, model: Model) -> str:
        """A model in words: ``ties of law, medicine``."""
        experts = model.experts
        if model.role in ("base", "baseline"):
            return "the base" if model.role == "base" else experts[0]
        if not model.equal:
            parts = [f"{w:g} {e}" for e, w in zip(experts, model.weights, strict=True)]
            text = f"{model.method} of {', '.join(parts)}"
        elif len(experts) == 1 and PLAIN in model.recipe:
            text = f"{experts[0]} alone"
        elif len(experts) == len(self.pool) > 2:
            text = f"{model.method} of all {len(experts)} experts"
        else:
            text = f"{model.method} of {', '.join(experts)}"
        return text + (f" (seed {model.seed})" if self.several_seeds else "")


def by_base(rows: pd.DataFrame, read: Read) -> tuple[list[Measured], list[str]]:
    """Measured models by base, smallest base first, and warnings on bases and merges left out.

    Args:
        rows: evaluation rows, as in cells.parquet.
        read: the rows of models, by their identities, with the columns per document.
    """
    every, warnings = [], []
    order = rows.assign(rank=rows["role"].map(ROLES.index)).sort_values("rank", kind="stable")
    for (_, base), group in order.groupby(["N", "base"], sort=True):
        measured = _measured(str(base), group.drop_duplicates(["merge", "domain"]), read)
        reference = measured.reference
        if reference.role != "base" or not np.isfinite(reference.losses).all():
            warnings.append(f"{base}: the base itself has no finite loss, so nothing is compared")
        elif not measured.merges:
            warnings.append(f"{base}: no merge with finite losses is measured")
        else:
            broken = sum(not np.isfinite(model.losses).all() for model in measured.models.values())
            if broken:
                warnings.append(f"{base}: {broken} models have a loss that is not finite; left out")
            every.append(measured)
    return every, warnings


def _measured(base: str, cells: pd.DataFrame, read: Read) -> Measured:
    """Models of one base, from its distinct cells."""
    domains = tuple(map(str, dict.fromkeys(cells["domain"])))
    held_out = frozenset(map(str, cells.loc[cells["held_out"].astype(bool), "domain"]))
    losses: dict[str, Array] = {}
    models = {}
    for cell in cells.to_dict("records"):
        identity = cell["merge"]
        if identity not in losses:
            losses[identity] = np.full(len(domains), math.nan)
            models[identity] = Model(
                identity,
                cell["role"],
                cell["method"],
                cell["recipe"],
                int(cell["seed"]),
                tuple(cell["experts"]),
                tuple(map(float, cell["weights"])),
                losses[identity],
            )
        if cell["finite"]:
            losses[identity][domains.index(cell["domain"])] = cell["ce"]
    return Measured(base, domains, held_out, models, read)


def contrasts(measured: Measured, wanted: Sequence[Mapping[str, float]]) -> list[Difference]:
    """Sums of coefficients (of models, by identity) times macro losses, with standard errors.

    The documents of ``CHUNK`` models are in memory at a time.
    """
    models = list(dict.fromkeys(model for contrast in wanted for model in contrast))
    counted = np.flatnonzero(measured.counted)
    sums: list[Array] = []  # by domain: contrasts, documents
    tokens: list[Array] = []
    for start in range(0, len(models), CHUNK):
        documents = Documents(measured.read(models[start : start + CHUNK]), measured.domains)
        shares = np.array([[c.get(model, 0.0) for model in documents.rows] for c in wanted])
        parts = [shares @ documents.nll[d] * measured.counted[d] for d in counted]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        tokens = [documents.tokens[d] for d in counted]
    return [estimate([nll[row] for nll in sums], tokens) for row in range(len(wanted))]


def to_json(value: Any) -> Any:
    """Values as strict JSON: numbers that are not finite become null, tuples lists."""
    if isinstance(value, Difference):
        low, high = value.ends
        return to_json({"value": value.value, "low": low, "high": high})
    if isinstance(value, dict):
        return {str(name): to_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(entry) for entry in value]
    if isinstance(value, np.generic):
        return to_json(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
