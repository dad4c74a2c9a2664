"""The report's opening: the merge to ship, what it rests on, and a verdict on each expert."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mergelaw.decide import Best, Measured, Verdict, best, tables, verdicts
from mergelaw.decide.tables import Table

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
    def ranking(self) -> Table:
        """The lowest merges."""
        table = tables.ranking(self.best, TOP)
        return Table(table.columns[:-1], [row[:-1] for row in table.rows], strong=1)

    @property
    def domains(self) -> Table:
        """Losses of the merge and its references by domain."""
        return tables.domains(self.best)

    @property
    def experts(self) -> Table:
        """Verdicts on the experts."""
        return tables.verdicts(self.verdicts)

    @property
    def donors(self) -> Table:
        """Change of each domain's loss when an expert joins a merge."""
        return tables.donors(self.verdicts)

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
        judged = [
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
        return {"merges": pd.DataFrame(ranking), "experts": pd.DataFrame(judged)}


def decisions(measured: Sequence[Measured], folder: Path) -> list[Decision]:
    """Decisions by base, and their tables merges.csv and experts.csv in the folder."""
    every = [Decision(best(one), verdicts(one)) for one in measured]
    for name in ("merges", "experts") if every else ():
        table = pd.concat([decision.files()[name] for decision in every], ignore_index=True)
        table.to_csv(folder / f"{name}.csv", index=False)
    return every
