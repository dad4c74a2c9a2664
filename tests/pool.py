"""A measured pool with a known truth: evaluation rows without models."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from mergelaw.decide import Measured, by_base

EXPERTS = ("dates", "extract", "german", "maths", "sql", "code")
BASE = 0.99  # loss of the base in every domain
METHODS = {"average": 1.0, "ties": 1.6}  # how much of the experts' gains each method keeps

Truth = Callable[[str, tuple[str, ...], str], float]


def good_pool(method: str, experts: tuple[str, ...], domain: str) -> float:
    """Loss of a merge of experts that each gain .30 on their own domain and .02 on the others."""
    gain = sum(0.30 if expert == domain else 0.02 for expert in experts) / len(experts) ** 0.6
    return BASE - METHODS[method] * gain


def bad_pool(method: str, experts: tuple[str, ...], domain: str) -> float:
    """The same, but `code` is overtrained: 2.43 alone, and it harms every merge that it is in."""
    if experts == ("code",):
        return 2.43
    good = tuple(expert for expert in experts if expert != "code")
    return good_pool(method, good, domain) + 0.15 * (len(good) < len(experts))


def rows(
    truth: Truth = bad_pool,
    *,
    experts: Sequence[str] = EXPERTS,
    domains: Sequence[str] = EXPERTS,
    methods: Sequence[str] = tuple(METHODS),
    documents: int = 24,
    noise: float = 0.01,
    held_out: Sequence[str] = (),
    subsets: Sequence[tuple[str, ...]] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Evaluation rows of every subset under every method, as in cells.parquet.

    Documents differ in difficulty, which all models share, and by ``noise`` (nats per token) from
    model to model.
    """
    random = np.random.default_rng(seed)
    tokens = {domain: random.integers(10, 60, documents) for domain in domains}
    hard = {domain: random.normal(0, 0.3, documents) for domain in domains}
    every = [s for k in range(1, len(experts) + 1) for s in combinations(experts, k)]
    table: list[dict[str, Any]] = []

    def add(role: str, method: str, members: tuple[str, ...], losses: Mapping[str, float]) -> None:
        for domain in domains:
            count = tokens[domain]
            bare = hard[domain] - (hard[domain] @ count) / count.sum()
            own = random.normal(0, noise, documents)
            nll = (losses[domain] + bare + own) * count
            table.append(
                {"family": "pool", "base": "tiny", "N": 1e-4, "N_total": 1e-4, "method": method,
                 "recipe": f'{{"method":"{method}"}}', "seed": 0, "role": role, "k": len(members),
                 "replicate": -1, "place": -1, "experts": list(members),
                 "weights": [1.0] * len(members),
                 "merge": f"{role}-{method if members else ''}-{'+'.join(members)}",
                 "domain": domain, "held_out": domain in held_out, "nll": nll.sum(),
                 "tokens": int(count.sum()), "ce": nll.sum() / count.sum(), "finite": True,
                 "bytes": int(count.sum()) * 3, "cell": f"{method}{members}{domain}",
                 "document_nll": nll.tolist(), "document_tokens": count.tolist()}
            )  # fmt: skip

    add("base", methods[0], (), dict.fromkeys(domains, BASE))
    for method in methods:
        for members in every if subsets is None else subsets:
            add("merge", method, members, {d: truth(method, members, d) for d in domains})
    return pd.DataFrame(table)


def measured(table: pd.DataFrame) -> Measured:
    """The measured models of the only base."""
    (one,), _ = by_base(table, lambda models: table[table["merge"].isin(models)])
    return one
