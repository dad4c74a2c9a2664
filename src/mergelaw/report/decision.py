"""The report's opening: the merge to ship, what it rests on, and a verdict on each expert."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mergelaw.decide import Best, Measured, Verdict, best, experts
from mergelaw.errors import MergelawError
from mergelaw.report.tables import NONE, Table

TOP = 8  # merges in the table of the best


@dataclass(frozen=True)
class Decision:
    """The best merge of a base and the verdicts on its experts, for the page and as CSV."""

    best: Best
    verdicts: Sequence[Verdict]

    @property
    def base(self) -> str:
        return self.best.measured.base

    @property
    def kept(self) -> str:
        """The share of the experts' gains that the merge keeps, as a sentence."""
        share = self.best.kept(self.best.model)
        if math.isnan(share):
            return ""
        return (
            f"It keeps {100 * share:.0f}% of what the experts gain over the base on their own "
            "domains: the sum of (base − merge) over the sum of (base − best single expert), over "
            f"the {len(self.best.specialists)} domains that an expert improves."
        )

    @property
    def flagged(self) -> list[str]:
        """Sentences on experts to leave out."""
        return [v.sentence for v in self.verdicts if v.flagged]

    @property
    def ranking(self) -> Table:
        """The lowest merges."""
        best, rows = self.best, []
        for place, (model, value) in enumerate(zip(best.ranking, best.values, strict=True), 1):
            behind = best.ahead.get(model.identity)
            rows.append(
                [
                    f"{place}",
                    best.measured.name(model),
                    f"{value:.4f}",
                    behind.text() if behind else "",
                    _percent(best.kept(model)),
                ]
            )
            if place == TOP:
                break
        heads = ["", "merge", best.label, "behind the first", "gains kept"]
        return Table(heads, rows, strong=1)

    @property
    def domains(self) -> Table:
        """Losses of the merge and its references by domain."""
        rows = [
            [
                row["domain"] + (" (held out)" if row["held_out"] else ""),
                row["expert"] or NONE,
                f"{row['base']:.4f}",
                f"{row['alone']:.4f}" if row["expert"] else NONE,
                *(f"{loss:.4f}" for loss in row["baselines"].values()),
                f"{row['merge']:.4f}",
                row["against_base"].text(),
            ]
            for row in self.best.domains()
        ]
        baselines = list(self.best.measured.baselines)
        heads = ["domain", "best expert", "base", "expert alone", *baselines, "merge"]
        return Table([*heads, "merge − base"], rows)

    @property
    def experts(self) -> Table:
        """Verdicts."""
        rows = [
            [
                v.expert,
                v.word,
                *(NONE if x is None else f"{x:.4f}" for x in (v.alone, v.with_it, v.without_it)),
                *(NONE if x is None else x.text() for x in (v.adds, v.left_out)),
            ]
            for v in self.verdicts
        ]
        heads = ["alone", "with it", "without it", "when it joins", "when left out"]
        return Table(["expert", "verdict", *heads], rows)

    @property
    def donors(self) -> Table | None:
        """Change of each domain's loss when an expert joins; None where nothing says so."""
        rows = []
        for verdict in self.verdicts:
            changes = verdict.by_domain
            if changes:
                most = min(changes, key=changes.__getitem__)
                cells = [f"{change:+.4f}" for change in changes.values()]
                rows.append([verdict.expert, most if changes[most] < 0 else NONE, *cells])
        heads = ["expert", "gives most to", *self.best.measured.domains]
        return Table(heads, rows) if rows else None

    def files(self) -> dict[str, pd.DataFrame]:
        """All merges and all verdicts as tables."""
        ranking = [
            {
                "base": self.base,
                "place": place,
                "merge": model.identity,
                "method": model.method,
                "recipe": model.recipe,
                "seed": model.seed,
                "experts": " ".join(model.experts),
                "weights": " ".join(f"{weight:g}" for weight in model.weights),
                "macro": value,
                "kept": self.best.kept(model),
            }
            for place, (model, value) in enumerate(
                zip(self.best.ranking, self.best.values, strict=True), 1
            )
        ]
        verdicts = [
            {
                "base": self.base,
                "expert": v.expert,
                "verdict": v.word,
                "alone": v.alone,
                "with": v.with_it,
                "without": v.without_it,
                "joins": v.adds and v.adds.value,
                "left_out": v.left_out and v.left_out.value,
                **{f"joins_{domain}": change for domain, change in v.by_domain.items()},
            }
            for v in self.verdicts
        ]
        return {"merges": pd.DataFrame(ranking), "experts": pd.DataFrame(verdicts)}


def decisions(measured: Sequence[Measured], folder: Path) -> list[Decision]:
    """Decisions by base, and their tables merges.csv and experts.csv in the folder."""
    every = []
    for one in measured:
        try:
            verdicts = experts(one)
        except MergelawError:  # a pool of one expert
            verdicts = []
        every.append(Decision(best(one), verdicts))
    for name in ("merges", "experts") if every else ():
        table = pd.concat([decision.files()[name] for decision in every], ignore_index=True)
        table.to_csv(folder / f"{name}.csv", index=False)
    return every


def _percent(share: float) -> str:
    return NONE if math.isnan(share) else f"{100 * share:.0f}%"
