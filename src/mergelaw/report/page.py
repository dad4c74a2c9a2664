"""The report: one HTML page, with its figures and tables as files beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from mergelaw.decide import Measured
from mergelaw.errors import MergelawError
from mergelaw.laws.diagnostics import LADDER
from mergelaw.laws.fits import WITHIN
from mergelaw.laws.law import MERGING, MERGING_FIXED_N
from mergelaw.laws.points import MACRO
from mergelaw.laws.summary import refusals
from mergelaw.report import tables
from mergelaw.report.decision import decisions
from mergelaw.report.figures import draw, figures, heat_map


def write_report(
    laws: Path,
    rows: pd.DataFrame,
    output: Path,
    *,
    title: str,
    facts: Mapping[str, Any],
    measured: Sequence[Measured] = (),
    coefficients: Mapping[str, pd.DataFrame] | None = None,
) -> None:
    """Write report.html, which needs no other file and runs no script.

    Args:
        laws: the folder of ``mergelaw.laws.fits.write``.
        rows: the evaluation rows that the laws describe (units as in ``points``).
        output: the folder for report.html, figures/ (SVG and PNG) and tables/ (CSV); created if
            missing.
        title: the page's heading.
        facts: labels and values for the page's last section, in this order.
        measured: models by base, for the page's opening: which merge to ship.
        coefficients: learned coefficients by the title of their panel.

    Raises:
        MergelawError: the folder has no fits.
    """
    for name in ("laws.json", "points.parquet", "parameters.parquet"):
        if not (laws / name).is_file():
            raise MergelawError(f"{laws}: {name} is missing; run `mergelaw fit` first")
    study = json.loads((laws / "laws.json").read_text(encoding="utf-8"))
    points = pd.read_parquet(laws / "points.parquet")
    parameters = pd.read_parquet(laws / "parameters.parquet")
    rows = rows[rows["family"].isin(points["family"])]
    for folder in ("figures", "tables"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for name, table in tables.files(study, points, parameters).items():
        table.to_csv(output / "tables" / f"{name}.csv", index=False)

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mergelaw.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    families = sorted(points["family"].unique())
    page = environment.get_template("report.html.j2").render(
        title=title,
        facts=facts,
        decisions=decisions(measured, output / "tables"),
        learned=coefficients and Markup(draw(heat_map(coefficients), output / "figures/learned")),
        measured=tables.measured(rows, points),
        bases=tables.bases(rows),
        chapters=[_chapter(name, study, points, rows, output / "figures") for name in families],
        short_ladders=tables.short_ladders(points),
        ladder=LADDER,
        within=" / ".join(f"{nats:g}" for nats in WITHIN),
        refused=refusals(study["refused"]),
        **{name: study[name] for name in ("laws", "warnings", "missing")},
    )
    (output / "report.html").write_text(page, encoding="utf-8")


def _chapter(
    family: str, study: Mapping[str, Any], points: pd.DataFrame, rows: pd.DataFrame, folder: Path
) -> dict[str, Any]:
    """The figures and tables of a family; the figures are also written into the folder."""
    prefix = f"{family}_" if len(set(points["family"])) > 1 else ""
    points, rows = (table[table["family"] == family] for table in (points, rows))
    fits = pd.DataFrame([fit for fit in study["fits"] if fit["family"] == family])
    charts = figures(fits, points, rows)
    svgs = {name: Markup(draw(chart, folder / f"{prefix}{name}")) for name, chart in charts.items()}
    chapter: dict[str, Any] = {"family": family, "figures": svgs}
    chapter |= dict.fromkeys(("floors", "joint", "single", "rivals", "shared"))
    if len(fits):
        joint = fits[fits["law"] == MERGING.name]
        single = fits[(fits["law"] == MERGING_FIXED_N.name) & (fits["domain"] == MACRO)]
        chapter |= {
            "floors": tables.floors(single),
            "joint": tables.parameters(joint, MERGING, "domain"),
            "single": tables.parameters(single, MERGING_FIXED_N, "base"),
            "rivals": tables.rivals(fits[fits["domain"] == MACRO]),
            "shared": [tables.shared(p) for p in study["pooled"] if p["family"] == family],
        }
    return chapter
