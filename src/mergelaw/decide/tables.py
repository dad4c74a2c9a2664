"""Tables as text, for a terminal, the report and the model card, and those of decisions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mergelaw.decide.best import Best
from mergelaw.decide.experts import Verdict
from mergelaw.decide.measured import Measured
from mergelaw.decide.pareto import Point
from mergelaw.decide.select import Selection

NONE = "-"


@dataclass(frozen=True)
class Table:
    """A table: headings and rows of cells as text; in the report the first two columns are words.

    The report prints the first ``strong`` rows bold. Its last column has the numbers of notes, from
    1, if any.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: int = 0
    notes: Sequence[str] = ()

    def lines(self) -> list[str]:
        """Lines for a terminal, in columns as wide as their longest cell."""
        table = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]

    def markdown(self) -> list[str]:
        """Lines in Markdown."""
        table = [self.columns, ["---"] * len(self.columns), *self.rows]
        return ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in table]


def ranking(best: Best, top: int) -> Table:
    """The ``top`` lowest merges, with their identities."""
    rows = []
    for place, (model, value) in enumerate(zip(best.ranking[:top], best.values, strict=False), 1):
        kept, behind = best.kept(model), best.ahead.get(model.identity)
        rows.append(
            [
                f"{place}",
                best.measured.name(model),
                f"{value:.4f}",
                behind.text() if behind else "",
                NONE if math.isnan(kept) else "none" if kept < 0 else f"{100 * kept:.0f}%",
                model.identity,
            ]
        )
    return Table(["", "merge", best.label, "behind the first", "gains kept", "id"], rows)


def domains(best: Best) -> Table:
    """Losses of the best merge and its references by domain."""
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
        for row in best.domains()
    ]
    heads = ["domain", "best expert", "base", "expert alone", *best.measured.baselines, "merge"]
    return Table([*heads, "merge - base"], rows)


def proposals(selection: Selection) -> Table:
    """Merges to measure next, with their predictions."""
    rows = []
    for one in selection.proposals:
        numbers = ["not predicted", NONE]
        if one.value is not None:
            numbers = [f"{one.value:.4f}", f"{one.low:.4f} to {one.high:.4f}"]
        rows.append([f"{one.method} of {', '.join(one.experts)}", *numbers, one.reason])
    return Table(["measure next", selection.objective.text, "90%", "why"], rows)


def front(measured: Measured, points: Sequence[Point], groups: Sequence[str]) -> Table:
    """A Pareto front, and models for comparison."""
    rows = [
        [
            "*" if one.front else "",
            one.kind,
            measured.name(one.model),
            *(f"{loss:.4f}" for loss in one.losses),
            one.model.identity,
        ]
        for one in points
    ]
    return Table(["front", "", "model", *groups, "id"], rows)


def verdicts(every: Sequence[Verdict]) -> Table:
    """Verdicts on experts."""
    rows = [
        [
            v.expert,
            v.word,
            *(NONE if x is None else f"{x:.4f}" for x in (v.alone, v.with_it, v.without_it)),
            *(NONE if x is None else x.text() for x in (v.adds, v.left_out)),
        ]
        for v in every
    ]
    heads = ["alone", "with it", "without it", "when it joins", "when left out"]
    return Table(["expert", "verdict", *heads], rows)


def donors(every: Sequence[Verdict]) -> Table:
    """Change of each domain's loss when an expert joins; no rows where no merge shows it."""
    heads, rows = ["expert", "gives most to"], []
    for verdict in every:
        if changes := verdict.by_domain:
            heads = [*heads[:2], *changes]
            most = min(changes, key=changes.__getitem__)
            cells = [f"{change:+.4f}" for change in changes.values()]
            rows.append([verdict.expert, most if changes[most] < 0 else NONE, *cells])
    return Table(heads, rows)
