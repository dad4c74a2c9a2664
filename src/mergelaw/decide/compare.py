"""Comparison of two models by domain: a regression gate, corrected for the number of domains."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
from pydantic import Field

from mergelaw.artifacts.recipe import Model
from mergelaw.decide.measured import Difference, Documents
from mergelaw.errors import MergelawError

ROUNDING = 1e-5  # nats per token by which devices and batches differ


class Guard(Model):
    """Thresholds of a comparison, as in guard.yaml."""

    allow: float = Field(0.0, ge=0, description="nats per token that a domain may get worse")
    domains: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="domains with a threshold of their own"
    )
    alpha: float = Field(
        0.05, gt=0, lt=0.5, description="probability of any false alarm over all domains"
    )


@dataclass(frozen=True)
class Compared:
    """Two models on one domain.

    Attributes:
        before, after: their losses in nats per token.
        difference: after - before, on the same documents.
        allowed: nats by which ``after`` may be above ``before``.
        p: Holm's p-value, over all domains, against "no more than allowed".
        regressed: True if p is below the guard's alpha.
    """

    domain: str
    before: float
    after: float
    difference: Difference
    allowed: float
    p: float
    regressed: bool

    @property
    def word(self) -> str:
        """regression, undecided (the interval reaches above what is allowed) or ok."""
        if self.regressed:
            return "regression"
        return "ok" if self.difference.ends[1] <= self.allowed + ROUNDING else "undecided"


def compare(
    before: pd.DataFrame,
    after: pd.DataFrame,
    domains: Sequence[str],
    guard: Guard,
    held_out: Sequence[str] = (),
) -> tuple[list[Compared], Difference]:
    """Compare two models on every domain.

    Args:
        before, after: a row per domain with document_nll (nats) and document_tokens.
        domains: the domains, in order.
        guard: thresholds.
        held_out: domains that the macro loss leaves out, unless all are.

    Returns:
        A comparison per domain, and the difference of the macro losses.

    Raises:
        MergelawError: documents or tokens differ, or a loss is not finite.
    """
    from statsmodels.stats.multitest import multipletests

    rows = pd.concat([before.assign(merge="before"), after.assign(merge="after")])
    for domain in domains:
        one, other = (t[t["domain"] == domain].iloc[0] for t in (before, after))
        if list(one["document_tokens"]) != list(other["document_tokens"]):
            raise MergelawError(
                f"compare: the models cut the documents of {domain} into other tokens; only models "
                "with the same tokenizer can be compared"
            )
        for name, row in (("first", one), ("second", other)):
            if not np.isfinite(row["document_nll"]).all():
                raise MergelawError(
                    f"compare: the {name} model's loss on {domain} is not finite; check its weights"
                )
    documents, ones = Documents(rows, domains), np.eye(len(domains))
    differences = [documents.difference({"after": one, "before": -one}) for one in ones]
    allowed = [guard.domains.get(domain, guard.allow) for domain in domains]
    ps = np.array([d.p_above(a + ROUNDING) for d, a in zip(differences, allowed, strict=True)])
    # One document gives no error, so no evidence either.
    holm = multipletests(np.nan_to_num(ps, nan=1.0), alpha=guard.alpha, method="holm")
    losses = [
        [documents.difference({name: one}).value for one in ones] for name in ("before", "after")
    ]
    table = [
        Compared(domain, *values)
        for domain, *values in zip(
            domains, *losses, differences, allowed, holm[1].tolist(), holm[0].tolist(), strict=True
        )
    ]
    counted = np.array([domain not in held_out for domain in domains], float)
    counted = counted if counted.any() else np.ones(len(domains))
    mean = counted / counted.sum()
    return table, documents.difference({"after": mean, "before": -mean})


def conclusion(table: Sequence[Compared]) -> str:
    """The comparison in one sentence."""
    worse = [f"{c.domain} {c.difference.text()}" for c in table if c.regressed]
    undecided = [c.domain for c in table if c.word == "undecided"]
    if worse:
        return f"REGRESSION on {len(worse)} of {len(table)} domains: {'; '.join(worse)}"
    doubt = f"; too few documents to exclude one on {', '.join(undecided)}" if undecided else ""
    return f"no regression on {len(table)} domains{doubt}"
