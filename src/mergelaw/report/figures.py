"""The report's figures: loss against k, and floor and tail against N.

Each figure is a grid of panels that show one table. The table has a row per mark, a column per
axis, and the column ``kind``: what the mark shows, a key of ``MARKS``.
"""

import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
import vl_convert

from mergelaw.laws.diagnostics import FAILS
from mergelaw.laws.law import MERGING, MERGING_FIXED_N
from mergelaw.laws.points import MACRO
from mergelaw.report.tables import base_label, held_in, mean_loss

# The version of Vega-Lite that altair writes, such as v6.4.1, in vl_convert's form.
VEGALITE = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
STYLE = json.loads((resources.files(__package__) / "templates/figures.json").read_text("utf-8"))
# Width and height of a panel in pixels, by the number of panels in a row.
SIZES = {2: (330, 260), 3: (205, 150)}
# Single subsets per panel and k; more look the same and slow the page.
SUBSETS = 40
# Viridis without its lightest colours, which are faint on paper.
SIZE_COLOURS = alt.SchemeParams(name="viridis", extent=[0.0, 0.82])
# The palette of Okabe and Ito, whose colours differ for every kind of colour vision.
METHOD_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555"]

# Marks in drawing order.
MARKS = {
    "subset": alt.MarkDef("circle", size=9, opacity=0.28),
    "baseline": alt.MarkDef("rule", strokeDash=[5, 4], strokeWidth=1.1),
    "law": alt.MarkDef("line", strokeWidth=1.7, clip=True),
    "mean": alt.MarkDef("circle", size=38, opacity=1),
    "reachable": alt.MarkDef("point", size=46, strokeWidth=1.3, opacity=1),
    "base": alt.MarkDef("point", shape="diamond", size=52, strokeWidth=1.5, opacity=1),
    "far base": alt.MarkDef("point", shape="triangle-up", size=40, filled=True, opacity=1),
    "far loss": alt.MarkDef("text", align="left", dx=8, fontSize=10),
}


def draw(chart: alt.TopLevelMixin, path: Path) -> str:
    """Write a chart as PATH.svg and PATH.png; return the SVG."""
    svg = vl_convert.vegalite_to_svg(chart.to_dict(), vl_version=VEGALITE, config=STYLE)
    path.with_suffix(".svg").write_text(svg, encoding="utf-8")
    path.with_suffix(".png").write_bytes(vl_convert.svg_to_png(svg, scale=2))
    return str(svg)


def figures(
    fits: pd.DataFrame, points: pd.DataFrame, rows: pd.DataFrame
) -> dict[str, alt.TopLevelMixin]:
    """All figures of one family, by name; the page's template has their captions.

    Args:
        fits: the fits in laws.json, a row each.
        points: the fitted means, as in points.parquet.
        rows: the evaluation rows of the points.
    """
    if len(fits):  # a law that fails misses the points beside which it would be drawn
        fits = fits[[verdict["state"] != FAILS for verdict in fits["verdict"]]]
    losses = _losses(fits, points, rows)
    macro = losses[losses["domain"] == MACRO]
    few = losses[losses["kind"].isin(["mean", "law", "baseline"])]
    drawn: dict[str, alt.TopLevelMixin] = {}
    if (points["domain"] == MACRO).any():  # not if a domain has no finite loss
        drawn["methods"] = _against_k(few[few["domain"] == MACRO], "label", "method")
        drawn["curves"] = _curves(macro)
    if len(fits) and (fits["base"].notna() & (fits["domain"] == MACRO)).any():
        drawn["floors"] = _floors(fits[fits["domain"] == MACRO])
    for method in sorted(set(points["method"])):
        table = few[(few["method"] == method) & (few["domain"] != MACRO)].dropna(subset="ce")
        drawn[f"domains_{method}"] = _against_k(table, "domain", "label", columns=3)
    return drawn


def heat_map(coefficients: Mapping[str, pd.DataFrame]) -> alt.TopLevelMixin:
    """Learned coefficients by expert and block in the order of depth, a panel for each base.

    ``coefficients`` are tables as in coefficients.parquet, by the panel's title. A block's value is
    the mean over its tensors, weighted by their squared norms.
    """
    panels = []
    for title, table in coefficients.items():
        weighted = table.assign(mass=table["norm"] ** 2)
        weighted["sum"] = weighted["coefficient"] * weighted["mass"]
        cells = weighted.groupby(["expert", "block"], sort=False)[["sum", "mass"]].sum()
        cells = cells[cells["mass"] > 0].reset_index()
        cells["coefficient"] = cells["sum"] / cells["mass"]
        largest = float(cells["coefficient"].abs().max())
        layers = {block: int(block.split(".")[0]) for block in cells["block"] if "." in block}
        ends = {"embedding": -1.0}
        depth = {b: layers.get(b, ends.get(b, math.inf)) for b in cells["block"]}
        colour = alt.Scale(scheme="blueorange", domain=[-largest, largest])
        data = alt.InlineData(values=json.loads(cells.to_json(orient="records")))
        panel = alt.Chart(data, title=title).mark_rect()
        panels.append(
            panel.encode(
                x=alt.X("block:N", title=None, sort=sorted(depth, key=lambda b: (depth[b], b))),
                y=alt.Y("expert:N", title=None, sort=list(dict.fromkeys(cells["expert"]))),
                color=alt.Color("coefficient:Q", title="coefficient", scale=colour),
            )
        )
    figure: alt.TopLevelMixin = alt.ConcatChart(concat=panels, columns=2).resolve_scale(
        color="independent"
    )
    return figure


def _losses(fits: pd.DataFrame, points: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """All marks at a loss and k: columns kind, method, N, label (of the base), domain, k, ce."""
    place = ["N", "base"]
    counted = held_in(rows)
    merges = mean_loss(counted[counted["role"] == "merge"], ["method", *place, "k", "merge"])
    subsets = merges.groupby(["method", *place, "k"]).head(SUBSETS)
    # The base and the multitask baseline are not merges, so every method's panel shows them.
    others = rows[rows["role"].isin(["base", "baseline"])].rename(columns={"role": "kind"})
    macro = mean_loss(held_in(others), ["kind", *place]).assign(domain=MACRO)
    references = pd.concat([macro, mean_loss(others, ["kind", *place, "domain"])])
    tables = [
        points.assign(kind="mean"),
        subsets.assign(kind="subset", domain=MACRO),
        references.merge(points[["method"]].drop_duplicates(), how="cross").assign(k=0),
    ]
    k = np.linspace(1, points["k"].max(), 60)
    for fit in fits[fits["base"].notna()].to_dict("records") if len(fits) else []:
        curve = {name: fit[name] for name in ("method", *place, "domain")}
        loss = MERGING_FIXED_N.predict(fit["parameters"], k=k)
        tables.append(pd.DataFrame(curve | {"kind": "law", "k": k, "ce": loss}))
    table = pd.concat(tables, ignore_index=True)
    table["label"] = list(map(base_label, table["base"], table["N"]))
    return table[["kind", "method", "N", "label", "domain", "k", "ce"]]


def _curves(table: pd.DataFrame) -> alt.FacetChart:
    """Macro loss against k, a panel per method on one scale."""
    near = table.loc[table["kind"].isin(["mean", "subset", "baseline"]), "ce"]
    margin = 0.06 * (near.max() - near.min()) or 0.01
    low, high = near.min() - margin, near.max() + 1.5 * margin
    # The base may lie so far above its merges that a scale with room for it would flatten them.
    above = (table["kind"] == "base") & (table["ce"] > high)
    far = table[above]
    rank = far.groupby("method")["ce"].rank(ascending=False, method="first")
    edge = high - 0.045 * (high - low) * (rank - 0.5)
    far = far.assign(kind="far base", text=far["ce"].map("{:.3g}".format), ce=edge)
    table = pd.concat([table[~above], far, far.assign(kind="far loss")])
    return _against_k(table, "method", "label", scale=[low, high])


def _against_k(
    table: pd.DataFrame, panel: str, colour: str, columns: int = 2, scale: list[float] | None = None
) -> alt.FacetChart:
    """Loss against k, one panel per value of ``panel``, on one scale if it is given."""
    first = 0 if table["kind"].isin(["base", "far base"]).any() else 1
    last = int(table["k"].max())
    ticks = list(range(first, last + 1, -(-last // 10)))
    x = alt.X(
        "k:Q",
        title="experts merged, k",
        scale=alt.Scale(domain=[first - 0.4, last + 0.4], nice=False),
        axis=alt.Axis(values=ticks, format="d", grid=False),
    )
    losses = alt.Scale(zero=False, nice=False, padding=8)
    losses = alt.Scale(domain=scale, nice=False) if scale else losses
    # A label that juts out of its panel would shift the panel's title.
    y = alt.Y("ce:Q", title=None, scale=losses, axis=alt.Axis(labelFlush=8, labelBound=2))
    panels = _order(table, panel)
    facet = alt.Facet(f"{panel}:N", title="cross-entropy (nats per token)", sort=panels)
    chart = _layers(table, x, y, colour, columns).facet(facet, columns=columns)
    if len(panels) % columns:  # otherwise Vega draws axes below panels that do not exist
        chart = chart.resolve_axis(x="independent")
    return chart if scale else chart.resolve_scale(y="independent")


def _floors(fits: pd.DataFrame) -> alt.TopLevelMixin:
    """Floor and tail against N, on logarithmic axes: fits of single bases and the joint law."""
    titles = {"floor": "floor, L_inf (nats per token)", "tail": "tail, A (nats per token × k)"}
    marks: list[tuple[str, str, str, float, float]] = []
    for fit in fits.to_dict("records"):
        p, method = fit["parameters"], fit["method"]
        if fit["law"] == MERGING.name:
            sizes = [base["N"] for base in fit["floors"]]
            for N in np.geomspace(min(sizes), max(sizes), 60):
                marks.append(("floor", "law", method, N, p["L_star"] + p["B"] * N ** -p["beta"]))
                marks.append(("tail", "law", method, N, p["A0"] * N ** -p["gamma"]))
        else:
            marks.append(("floor", "mean", method, fit["N"], p["L_inf"]))
            marks.append(("floor", "reachable", method, fit["N"], fit["floors"][0]["reachable"]))
            marks.append(("tail", "mean", method, fit["N"], p["A"]))
    table = pd.DataFrame(marks, columns=["quantity", "kind", "method", "N", "value"])
    # A logarithmic axis cannot show a tail of 0; the tables do.
    table = table[table["value"] > 0].assign(N=table["N"] * 1e9)
    charts = []
    for quantity, title in titles.items():
        part = table[table["quantity"] == quantity]
        if (part["kind"] == "mean").any():
            chart = _layers(part, *_logarithmic(part), "method", columns=2)
            charts.append(chart.properties(title=title))
    figure: alt.TopLevelMixin = alt.HConcatChart(hconcat=charts).resolve_scale(color="shared")
    return figure


def _logarithmic(table: pd.DataFrame) -> tuple[alt.X, alt.Y]:
    """Logarithmic axes of N and of a value."""
    # Vega's labels leave gaps on a wide logarithmic axis; on a short one they are good.
    wide = table["value"].max() > 4 * table["value"].min()
    ticks = [m * 10.0**power for power in range(-9, 9) for m in (1, 2, 5)]
    values = alt.Axis(tickCount=6, labelExpr="format(datum.value, '~g')")
    if wide:
        values = alt.Axis(values=ticks, format="~g")
    sizes = alt.Axis(
        values=sorted(set(table.loc[table["kind"] == "mean", "N"])),
        grid=False,
        labelOverlap="greedy",
        # Parameters are counted in B, not in the SI prefix G.
        labelExpr="replace(format(datum.value, '.3~s'), 'G', 'B')",
    )
    x, y = (alt.Scale(type="log", zero=False, nice=False, padding=pixels) for pixels in (20, 12))
    return (
        alt.X("N:Q", title="non-embedding parameters, N", scale=x, axis=sizes),
        alt.Y("value:Q", title=None, scale=y, axis=values),
    )


def _layers(table: pd.DataFrame, x: alt.X, y: alt.Y, colour: str, columns: int) -> alt.LayerChart:
    """One panel: a layer per kind of mark, a colour per value of a column."""
    names = _order(table, colour)
    scale, title = alt.Scale(domain=names, range=METHOD_COLOURS), colour
    if colour == "label":
        scale, title = alt.Scale(domain=names, scheme=SIZE_COLOURS), "base (N)"
    color = alt.Color(f"{colour}:N", title=title, sort=names, scale=scale)
    layers = []
    for kind in [kind for kind in MARKS if kind in set(table["kind"])]:
        layer = alt.Chart(mark=MARKS[kind]).transform_filter(alt.datum.kind == kind)
        layer = layer.encode(y=y, color=color)
        # A rule without x spans the panel.
        layer = layer if kind == "baseline" else layer.encode(x=x)
        layers.append(layer.encode(text="text:N") if kind == "far loss" else layer)
    # Altair refuses data frames of more than 5,000 rows.
    data = alt.InlineData(values=json.loads(table.to_json(orient="records")))
    width, height = SIZES[columns]
    return alt.LayerChart(layer=layers, data=data).properties(width=width, height=height)


def _order(table: pd.DataFrame, column: str) -> list[str]:
    """Values of a column: labels of bases by size, all others by name."""
    by = ["N", column] if column == "label" else [column]
    return list(table.sort_values(by)[column].unique())
