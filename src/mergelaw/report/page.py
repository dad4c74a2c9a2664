"""The report: one page that shows what was measured, what was fitted, and what not to believe."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import numpy as np
import pandas as pd
import vl_convert
from markupsafe import Markup

from mergelaw.errors import MergelawError
from mergelaw.laws.diagnostics import LADDER
from mergelaw.laws.fits import WITHIN
from mergelaw.laws.law import LAWS, MERGING, MERGING_FIXED_N, VARIANCE
from mergelaw.laws.noise import WIDE
from mergelaw.laws.points import MACRO

# Vega-Lite of altair.SCHEMA_VERSION ("v6.4.1"), in the form that vl_convert wants it.
VEGALITE = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
# More dots than that at one k say nothing more and make the page heavy.
DOTS = 40
# Viridis without its lightest end, which would not be seen on paper.
SIZE_COLOURS = alt.SchemeParams(name="viridis", extent=[0.0, 0.82])
# Okabe and Ito's colours, told apart with any colour vision.
METHOD_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555"]
INK, QUIET, FAINT = "#333333", "#777777", "#e4e4e4"
LOSS_TITLE = "cross-entropy (nats per token)"
K_TITLE = "experts merged, k"
N_TITLE = "non-embedding parameters, N"
PANEL_HEIGHT = 260
# Intervals of this pool, and of experts like these.
OF = ("", "experts_")
FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"


def write_report(
    laws: Path, rows: pd.DataFrame, output: Path, *, title: str, facts: Mapping[str, Any]
) -> None:
    """Write report.html, self-contained and without scripts, with its figures and tables as files.

    Args:
        laws: the folder that ``mergelaw.laws.fits.write_fits`` wrote.
        rows: the evaluation rows that the fits were made from (units as in ``points``).
        output: the folder for report.html, figures/ (SVG, PNG) and tables/ (CSV); made if needed.
        title: heading of the page.
        facts: what else the page should state, label to value, in this order.

    Raises:
        MergelawError: the folder has no fits.
    """
    study, points = _read(laws)
    fits = pd.DataFrame(study["fits"])
    rows = rows[rows["family"].isin(points["family"])]
    (output / "figures").mkdir(parents=True, exist_ok=True)
    (output / "tables").mkdir(exist_ok=True)

    families = sorted(points["family"].unique())
    chapters = []
    for family in families:
        prefix = f"{family}_" if len(families) > 1 else ""
        own = {
            "fits": fits[fits["family"] == family] if len(fits) else fits,
            "points": points[points["family"] == family],
            "rows": rows[rows["family"] == family],
        }
        figures = [
            {"caption": caption, "svg": _draw(chart, output / "figures" / f"{prefix}{name}")}
            for name, chart, caption in _figures(**own)
        ]
        shared = [pooled for pooled in study["pooled"] if pooled["family"] == family]
        tables = _tables(own["fits"], shared)
        chapters.append({"family": family, "figures": figures, **tables})

    parameters = _parameter_table(fits)
    parameters.to_csv(output / "tables" / "parameters.csv", index=False)
    _floor_table(fits).to_csv(output / "tables" / "floors.csv", index=False)
    # Covariances are in the laws' own table.
    points.drop(columns=[*WIDE], errors="ignore").to_csv(
        output / "tables" / "points.csv", index=False
    )
    pd.DataFrame(
        [
            {
                **{name: fit[name] for name in ("method", "family", "domain", "base", "N")},
                **fit["parameters"],
                "r2": fit["r2"],
            }
            for fit in study["variances"]
        ],
        columns=[*("method", "family", "domain", "base", "N"), *VARIANCE.linear, "r2"],
    ).to_csv(output / "tables" / "variances.csv", index=False)
    refused = pd.DataFrame(
        study["refused"], columns=["method", "family", "domain", "base", "law", "reason"]
    )
    refused.to_csv(output / "tables" / "refused.csv", index=False)

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mergelaw.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        facts={label: str(value) for label, value in facts.items()},
        measured=_measured(rows, points),
        bases=_bases(rows),
        laws=study["laws"],
        chapters=chapters,
        several=len(families) > 1,
        short=_short_ladders(points),
        ladder=LADDER,
        within=" / ".join(f"{nats:g}" for nats in WITHIN),
        refused=_grouped(study["refused"]),
        warnings=study["warnings"],
        missing=study["missing"],
    )
    (output / "report.html").write_text(page, encoding="utf-8")


def _read(laws: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    for name in ("laws.json", "points.parquet"):
        if not (laws / name).is_file():
            raise MergelawError(f"no {name} in {laws}: run `mergelaw fit` first")
    study = json.loads((laws / "laws.json").read_text(encoding="utf-8"))
    return study, pd.read_parquet(laws / "points.parquet")


def size_label(N: float) -> str:
    """Billions of parameters as people write it: 72 B, 1.5 B, 161 k."""
    for unit, factor in (("B", 1.0), ("M", 1e3), ("k", 1e6)):
        if N * factor >= 0.9995:
            return f"{N * factor:.3g} {unit}"
    return f"{N * 1e9:.3g}"


def _base_label(base: str, N: float) -> str:
    return f"{base} ({size_label(N)})"


def _labels(table: pd.DataFrame) -> list[str]:
    """Labels of the table's bases, smallest first."""
    bases = table[["N", "base"]].drop_duplicates().sort_values(["N", "base"])
    return [_base_label(base, N) for N, base in bases.itertuples(index=False)]


# ---- what was measured


def _measured(rows: pd.DataFrame, points: pd.DataFrame) -> dict[str, str]:
    merges = rows[rows["role"] == "merge"]
    distinct = merges.drop_duplicates(["method", "base", "merge"])
    cells = len(merges.drop_duplicates(["method", "base", "merge", "domain"]))
    pool = sorted(set(merges["experts"].explode()))
    levels = sorted(points["k"].unique())
    per_level = points.loc[points["domain"] == MACRO, "subsets"]
    held_out = rows.loc[rows["held_out"].astype(bool), "domain"].nunique()
    domains = sorted(rows["domain"].unique())
    replicates = int(points["replicates"].max())
    sampling = "subsets at each k and base"
    if len(per_level):
        low, high = per_level.min(), per_level.max()
        sampling = f"{low if low == high else f'{low} to {high}'} {sampling}"
    if replicates > 1:
        sampling += f", in {replicates} replicates"
    return {
        "Methods": ", ".join(sorted(points["method"].unique())),
        "Experts in the pool": f"{len(pool)}: {', '.join(pool)}",
        "Experts merged, k": ", ".join(map(str, levels)),
        "Sampling": sampling,
        "Evaluation domains": f"{len(domains)}: {', '.join(domains)}"
        + (f"; {held_out} of them held out" if held_out else ""),
        "Merges measured": f"{len(distinct):,}",
        "Cells (merge and domain)": f"{cells:,}",
    }


def _bases(rows: pd.DataFrame) -> list[dict[str, str]]:
    """One row per base: its size, its own loss, and that of the multitask baseline."""
    records = []
    for _, group in rows.groupby(["N", "base"]):
        record = {
            "base": group["base"].iloc[0],
            "family": group["family"].iloc[0],
            "N": size_label(group["N"].iloc[0]),
            "total": size_label(group["N_total"].iloc[0]),
        }
        for role in ("base", "baseline"):
            loss = _reference(group, role)["ce"]
            record[f"{role}_ce"] = f"{loss.iloc[0]:.4f}" if len(loss) else "–"
        records.append(record)
    return records


def _reference(rows: pd.DataFrame, role: str, domain: str = MACRO) -> pd.DataFrame:
    """Loss of what is no merge (the base, the multitask baseline): columns N, base, ce."""
    chosen = rows[rows["role"] == role]
    if domain != MACRO:
        chosen = chosen[chosen["domain"] == domain]
    # The base is in every method's plan with the same losses, so their mean is its loss.
    return _mean_loss(chosen, ["N", "base"])


def _mean_loss(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean loss of groups of rows, without the groups in which a loss is not finite."""
    groups = rows.groupby(by).agg(ce=("ce", "mean"), finite=("finite", "all"))
    return groups[groups["finite"].astype(bool)].drop(columns="finite").reset_index()


def _short_ladders(points: pd.DataFrame) -> list[dict[str, str]]:
    """Families whose sizes span less than the factor that exponents can be read over."""
    short = []
    for family, sizes in points.groupby("family")["N"]:
        if 1 < sizes.max() / sizes.min() < LADDER:
            ratio = f"{sizes.max() / sizes.min():.3g}"
            short.append({"family": str(family), "ratio": ratio})
    return short


# ---- figures


def _figures(
    fits: pd.DataFrame, points: pd.DataFrame, rows: pd.DataFrame
) -> list[tuple[str, alt.TopLevelMixin, str]]:
    """Name, chart and caption of a family's figures."""
    methods = sorted(points["method"].unique())
    figures: list[tuple[str, alt.TopLevelMixin, str]] = [
        ("curves", _curves(fits, points, rows, methods), _CAPTION_CURVES)
    ]
    if len(fits) and (fits["base"].notna() & (fits["domain"] == MACRO)).any():
        figures.append(("floors", _floors(fits, methods), _CAPTION_FLOORS))
    for method in methods:
        chart = _domains(fits, points, rows, method)
        figures.append((f"domains_{method}", chart, f"{method}, by domain. {_CAPTION_DOMAINS}"))
    return figures


_CAPTION_CURVES = (
    "Macro-averaged loss against the number of experts merged. Large dots are means over subsets, "
    "small faint ones single subsets, lines the law fitted to each base; a steeper line means that "
    "the next expert is worth more. The diamond at k = 0 is the base itself (a triangle at the "
    "upper edge, with its loss written beside it, if it lies above the panel), a dashed line its "
    "multitask baseline, where there is one."
)
_CAPTION_DOMAINS = (
    "Means over subsets and the law fitted to each base, one panel per evaluation domain; each "
    "panel has its own scale, so compare shapes across panels and levels within one. Dashed lines "
    "are the multitask baselines, where there are any."
)
_CAPTION_FLOORS = (
    "Floor and tail of the macro law against the base's size, both axes logarithmic. Dots are fits "
    "base by base, lines the joint law of all sizes, rings the reachable floor: the loss of the "
    "merge of the whole pool. Dots on their line mean that the joint law holds; a tail that does "
    "not fall with N means that merging gains as much on a large base as on a small one."
)


def _curves(
    fits: pd.DataFrame, points: pd.DataFrame, rows: pd.DataFrame, methods: list[str]
) -> alt.ConcatChart:
    macro = points[points["domain"] == MACRO]
    dots = _dots(rows)
    baseline = _reference(rows, "baseline")
    window = _window(pd.concat([macro["ce"], dots["ce"], baseline["ce"]]))
    panels = [
        _panel(
            macro[macro["method"] == method],
            _of(fits, method, MACRO),
            baseline,
            window,
            _labels(points),
            base=_reference(rows, "base"),
            dots=dots[dots["method"] == method],
        ).properties(title=method, width=330, height=PANEL_HEIGHT)
        for method in methods
    ]
    return _side_by_side(panels, columns=2)


def _domains(
    fits: pd.DataFrame, points: pd.DataFrame, rows: pd.DataFrame, method: str
) -> alt.ConcatChart:
    panels = []
    for domain in sorted(set(points["domain"]) - {MACRO}):
        own = points[(points["domain"] == domain) & (points["method"] == method)]
        baseline = _reference(rows, "baseline", domain)
        window = _window(pd.concat([own["ce"], baseline["ce"]]))
        chart = _panel(own, _of(fits, method, domain), baseline, window, _labels(points))
        panels.append(chart.properties(title=domain, width=200, height=150))
    return _side_by_side(panels, columns=3)


def _side_by_side(panels: list[alt.LayerChart], columns: int) -> alt.ConcatChart:
    """Panels in rows, with axis titles at the outer edges only."""
    for place, panel in enumerate(panels):
        for layer in panel.layer:
            if place % columns:
                layer.encoding.y.title = None
            if place + columns < len(panels):
                layer.encoding.x.title = None
    return alt.concat(*panels, columns=columns).resolve_scale(color="shared")


def _of(fits: pd.DataFrame, method: str, domain: str) -> pd.DataFrame:
    """Base-by-base fits of a method and domain."""
    if not len(fits):
        return fits
    return fits[(fits["method"] == method) & (fits["domain"] == domain) & fits["base"].notna()]


def _window(loss: pd.Series) -> tuple[float, float]:
    """The range of an axis around losses; room above for the base's mark."""
    low, high = float(loss.min()), float(loss.max())
    margin = 0.06 * (high - low) or 0.01
    return low - margin, high + 1.5 * margin


def _dots(rows: pd.DataFrame) -> pd.DataFrame:
    """Macro loss of single merges, thinned to evenly spaced ranks where there are many."""
    place = ["method", "N", "base", "k"]
    table = _mean_loss(rows[rows["role"] == "merge"], [*place, "merge"])
    table = table.sort_values([*place, "ce"])
    rank = table.groupby(place).cumcount()
    count = table.groupby(place)["ce"].transform("size")
    # A dot is kept where its rank enters another of DOTS - 1 equal steps; the extremes always are.
    steps = [(r * (DOTS - 1)) // (count - 1).clip(lower=1) for r in (rank, rank - 1)]
    return table[(count <= DOTS) | (steps[0] != steps[1])]


def _panel(
    points: pd.DataFrame,
    fits: pd.DataFrame,
    baseline: pd.DataFrame,
    window: tuple[float, float],
    labels: list[str],
    *,
    base: pd.DataFrame | None = None,
    dots: pd.DataFrame | None = None,
) -> alt.LayerChart:
    """Loss against k: means, curves and baselines; bases and single merges if given."""
    last = int(points["k"].max()) if len(points) else 1
    first = 1 if base is None else 0
    ticks = list(range(first, last + 1, max(1, -(-last // 10))))
    x = alt.X(
        "k:Q",
        title=K_TITLE,
        scale=alt.Scale(domain=[first - 0.4, last + 0.4], nice=False),
        axis=alt.Axis(values=ticks, format="d", grid=False),
    )
    y = alt.Y("ce:Q", title=LOSS_TITLE, scale=alt.Scale(domain=window, zero=False, nice=False))
    colour = alt.Color(
        "label:N",
        title="base (N)",
        sort=labels,
        scale=alt.Scale(domain=labels, scheme=SIZE_COLOURS),
    )

    def layer(table: pd.DataFrame) -> alt.Chart:
        named = table.assign(label=_labelled(table))
        columns = [c for c in ("k", "ce", "label", "text") if c in named]
        return alt.Chart(named[columns]).encode(x=x, y=y, color=colour)

    marks = []
    if dots is not None:
        marks.append(layer(dots).mark_circle(size=9, opacity=0.28))
    if len(baseline):
        ends = pd.concat([baseline.assign(k=first - 0.4), baseline.assign(k=last + 0.4)])
        marks.append(layer(ends).mark_line(strokeDash=[5, 4], strokeWidth=1.1))
    if len(fits):
        marks.append(layer(_curve_table(fits, last)).mark_line(strokeWidth=1.7, clip=True))
    marks.append(layer(points).mark_circle(size=38, opacity=1))
    if base is not None:
        base = base.assign(k=0, text=base["ce"].map("{:.3g}".format))
        above = base["ce"] > window[1]
        inside = layer(base[~above])
        marks.append(inside.mark_point(shape="diamond", size=52, strokeWidth=1.5, opacity=1))
        outside = layer(base[above].assign(ce=_stacked(base.loc[above, "ce"], window)))
        marks.append(outside.mark_point(shape="triangle-up", size=40, filled=True, opacity=1))
        marks.append(outside.mark_text(align="left", dx=8, fontSize=10).encode(text="text:N"))
    return alt.LayerChart(layer=marks)


def _labelled(table: pd.DataFrame) -> list[str]:
    return [_base_label(base, N) for base, N in zip(table["base"], table["N"], strict=True)]


def _stacked(losses: pd.Series, window: tuple[float, float]) -> pd.Series:
    """Places at the upper edge for marks whose loss is above it, the largest loss on top."""
    line = 12 / PANEL_HEIGHT * (window[1] - window[0])
    return window[1] - line * (losses.rank(ascending=False, method="first") - 0.5)


def _curve_table(fits: pd.DataFrame, last: int) -> pd.DataFrame:
    k = np.linspace(1, last, 60)
    curves = [
        pd.DataFrame(
            {
                "base": fit["base"],
                "N": fit["N"],
                "k": k,
                "ce": MERGING_FIXED_N.predict(fit["parameters"], k=k),
            }
        )
        for _, fit in fits.iterrows()
    ]
    return pd.concat(curves, ignore_index=True)


def _floors(fits: pd.DataFrame, methods: list[str]) -> alt.HConcatChart:
    macro = fits[fits["domain"] == MACRO]
    single = macro[macro["base"].notna()]
    joint = macro[macro["law"] == MERGING.name]
    marks = pd.DataFrame(
        {
            "method": single["method"],
            "N": single["N"] * 1e9,
            "floor": [p["L_inf"] for p in single["parameters"]],
            "reachable": [floors[0]["reachable"] for floors in single["floors"]],
            "tail": [p["A"] for p in single["parameters"]],
        }
    )
    lines = []
    for _, fit in joint.iterrows():
        sizes = [floor["N"] for floor in fit["floors"]]
        N = np.geomspace(min(sizes), max(sizes), 60)
        p = fit["parameters"]
        lines.append(
            pd.DataFrame(
                {
                    "method": fit["method"],
                    "N": N * 1e9,
                    "floor": p["L_star"] + p["B"] * N ** -p["beta"],
                    "tail": p["A0"] * N ** -p["gamma"],
                }
            )
        )
    curves = pd.concat(lines) if lines else marks.iloc[:0]
    panels = []
    for column, title, rings in (
        ("floor", "floor, L_inf (nats per token)", "reachable"),
        ("tail", "tail, A (nats per token × experts)", None),
    ):
        # A logarithmic axis has no place for a tail of 0; the table has it.
        shown = marks[marks[column] > 0]
        if len(shown):
            curve = curves[curves[column] > 0]
            panels.append(_against_N(shown, curve, methods, column, title, rings))
    return alt.hconcat(*panels).resolve_scale(color="shared")


def _against_N(
    marks: pd.DataFrame,
    curves: pd.DataFrame,
    methods: list[str],
    column: str,
    title: str,
    rings: str | None,
) -> alt.LayerChart:
    """A column against N, both logarithmic: fits base by base and the joint law's curves."""
    sizes = sorted(set(marks["N"]))
    # Vega keeps labels of ladders that are close together from covering each other.
    x = alt.X(
        "N:Q",
        title=N_TITLE,
        scale=alt.Scale(type="log", nice=False, padding=14),
        axis=alt.Axis(
            values=sizes, grid=False, labelOverlap="greedy", labelExpr=_size_expression(sizes)
        ),
    )
    scale = alt.Scale(type="log", zero=False, nice=False, padding=12)
    shown = pd.concat([marks[column], curves[column], marks[rings or column]])
    ticks = _log_ticks(shown.min(), shown.max())

    def encoded(table: pd.DataFrame, field: str) -> alt.Chart:
        axis = alt.Axis(values=ticks, format="~g")
        y = alt.Y(f"{field}:Q", title=title, scale=scale, axis=axis)
        colour = alt.Color(
            "method:N", sort=methods, scale=alt.Scale(domain=methods, range=METHOD_COLOURS)
        )
        return alt.Chart(table[["method", "N", field]]).encode(x=x, y=y, color=colour)

    layers = [
        encoded(curves, column).mark_line(strokeWidth=1.6),
        encoded(marks, column).mark_circle(size=46, opacity=1),
    ]
    if rings:
        layers.append(encoded(marks, rings).mark_point(size=46, strokeWidth=1.3))
    return alt.LayerChart(layer=layers).properties(width=300, height=PANEL_HEIGHT)


def _log_ticks(low: float, high: float) -> list[float]:
    """Round values between two losses: 1, 2, 5 times powers of ten, or even steps over a short way.

    Vega's own ticks on a logarithmic axis leave parts of a range below a factor of ten without any.
    """
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    ticks = np.outer(powers, [1, 2, 5]).ravel()
    if high / low < 10:
        rough = max(high - low, 0.01 * high) / 5
        power = 10.0 ** np.floor(np.log10(rough))
        step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor - rough / power))
        ticks = step * np.arange(np.floor(low / step), np.ceil(high / step) + 1)
    margin = (high / low) ** 0.05
    inside = ticks[(ticks >= low / margin) & (ticks <= high * margin)]
    return [float(f"{tick:.6g}") for tick in inside]


def _size_expression(sizes: list[float]) -> str:
    """A Vega expression that labels an axis of parameter counts with size labels."""
    cases = "".join(
        f"abs(datum.value / {size!r} - 1) < 1e-6 ? '{size_label(size / 1e9)}' : " for size in sizes
    )
    return f"{cases}''"


def _draw(chart: alt.TopLevelMixin, path: Path) -> Markup:
    """Write a chart as SVG and PNG; return the SVG for the page."""
    chart = (
        chart.configure(background="white", font=FONT, padding=6, aria=False)
        .configure_view(stroke=None)
        .configure_axis(
            domainColor=QUIET,
            tickColor=QUIET,
            gridColor=FAINT,
            labelColor=INK,
            titleColor=INK,
            titleFontWeight="normal",
            labelFontSize=11,
            titleFontSize=11.5,
            tickSize=4,
        )
        .configure_title(anchor="start", fontSize=13, fontWeight=600, color=INK, offset=8)
        .configure_legend(
            orient="bottom",
            direction="horizontal",
            columns=4,
            labelColor=INK,
            titleColor=INK,
            titleFontWeight="normal",
            labelFontSize=11,
            titleFontSize=11.5,
            symbolSize=70,
            symbolOpacity=1,
            symbolType="circle",
            labelLimit=260,
        )
        .configure_concat(spacing=22)
    )
    svg = vl_convert.vegalite_to_svg(chart.to_dict(), vl_version=VEGALITE)
    path.with_suffix(".svg").write_text(svg, encoding="utf-8")
    path.with_suffix(".png").write_bytes(vl_convert.svg_to_png(svg, scale=2))
    return Markup(svg)


# ---- tables


def _tables(fits: pd.DataFrame, pooled: list[dict[str, Any]]) -> dict[str, Any]:
    """A family's tables as the template wants them: macro first, warnings as numbered notes."""
    if not len(fits):
        return {"joint": None, "fixed": None, "floors": [], "rivals": None, "pooled": []}
    return {
        "pooled": [_shared(found) for found in pooled],
        "joint": _table(fits[fits["law"] == MERGING.name], MERGING.parameters, "domain"),
        "fixed": _table(
            fits[(fits["law"] == MERGING_FIXED_N.name) & (fits["domain"] == MACRO)],
            MERGING_FIXED_N.parameters,
            "base",
        ),
        "floors": [
            {
                **floor,
                "asymptotic_90": _ends(floor["asymptotic_interval"], ".4f"),
                "reachable_90": _ends(floor["reachable_interval"], ".4f"),
                "within": " / ".join(_needed(step) for step in floor["k_within"]),
            }
            for floor in _floor_table(fits[fits["domain"] == MACRO]).to_dict("records")
        ],
        "rivals": _rival_table(fits),
    }


def _table(fits: pd.DataFrame, parameters: tuple[str, ...], of: str) -> dict[str, Any] | None:
    if not len(fits):
        return None
    notes: dict[str, int] = {}
    ordered = fits.assign(later=fits["domain"] != MACRO)
    records = []
    for _, fit in ordered.sort_values(["later", "method", "domain", "N"]).iterrows():
        # What speaks against each domain's fit is in tables/parameters.csv: too much for a page.
        doubts = fit["doubts"] if fit["domain"] == MACRO and fit["law"] == MERGING.name else []
        told = [*fit["warnings"], *doubts]
        for sentence in told:
            notes.setdefault(sentence, len(notes) + 1)
        records.append(
            {
                "method": fit["method"],
                "of": fit[of] if of == "domain" else _base_label(fit["base"], fit["N"]),
                "macro": fit["domain"] == MACRO,
                "values": [f"{fit['parameters'][name]:.4g}" for name in parameters],
                "intervals": [_ends(fit["intervals"].get(name)) for name in parameters],
                "experts": [_ends(fit["experts_intervals"].get(name)) for name in parameters],
                "r2": "–" if pd.isna(fit["r2"]) else f"{fit['r2']:.5f}",
                "rmse": f"{fit['rmse']:.2g}",
                "n_points": fit["n_points"],
                "notes": [notes[sentence] for sentence in told],
            }
        )
    return {"parameters": parameters, "of": of, "records": records, "notes": list(notes)}


def _shared(pooled: dict[str, Any]) -> dict[str, Any]:
    """What the domains of a method share, as people read it."""
    none = next(way["above"] for way in pooled["ways"] if not way["shared"])
    return {
        "method": pooled["method"],
        "domains": len(pooled["domains"]),
        "values": [
            {"name": name, "value": f"{value:.4g}", "ends": _ends(pooled["intervals"][name])}
            for name, value in pooled["parameters"].items()
        ],
        "gain": f"{none:.1f}",
    }


def _needed(step: dict[str, Any]) -> str:
    """A number of experts; in brackets if the pool has not so many."""
    if step["k"] is None:
        return "none"
    return f"{step['k']}" if step["reachable"] else f"({step['k']})"


def _ends(ends: list[float | None] | None, digits: str = ".3g") -> str:
    """An interval as people read it; an open end is infinite."""
    if not isinstance(ends, list):
        return ""
    low, high = ("∞" if end is None else format(end, digits) for end in ends)
    return f"{low} to {high}"


def _rival_table(fits: pd.DataFrame) -> dict[str, Any] | None:
    """AICc above the best law of each macro fit, and what was missed when the last was left out.

    The joint fits, where there are any: they have the points to tell laws apart.
    """
    macro = fits[fits["domain"] == MACRO]
    if (macro["law"] == MERGING.name).any():
        macro = macro[macro["law"] == MERGING.name]
    compared = [rivals for rivals in macro["rivals"] if rivals[0]["above"] is not None]
    if not compared:
        return None
    names = sorted({rival["law"] for rivals in compared for rival in rivals}, key=list(LAWS).index)
    records = []
    for _, fit in macro.sort_values(["method", "N"]).iterrows():
        above = {rival["law"]: rival["above"] for rival in fit["rivals"]}
        records.append(
            {
                "method": fit["method"],
                "of": "all" if pd.isna(fit["base"]) else _base_label(fit["base"], fit["N"]),
                "above": [
                    "–" if above.get(name) is None else f"{above[name]:.1f}" for name in names
                ],
                "left_out": [_missed(fit["left_out"].get(name)) for name in ("k", "N")],
            }
        )
    return {"laws": [name.removesuffix("_fixed_N") for name in names], "records": records}


def _missed(forecast: dict[str, float | None] | None) -> str:
    if not forecast:
        return "–"
    same = "" if forecast["same"] is None else f" ({forecast['same']:.2g})"
    return f"{forecast['error']:.2g}{same}"


def _parameter_table(fits: pd.DataFrame) -> pd.DataFrame:
    """All fits, a column per parameter, for the CSV file."""
    names = [*MERGING.parameters, *MERGING_FIXED_N.parameters[:-1]]
    place = ["method", "family", "domain", "law", "base", "N"]
    quality = ["r2", "rmse", "aicc", "n_points", "warnings", "doubts"]
    bounds = [f"{name}_{of}{end}" for name in names for of in OF for end in ("low", "high")]
    if not len(fits):
        return pd.DataFrame(columns=[*place, *names, *bounds, *quality])
    values = pd.DataFrame(
        [
            fit["parameters"]
            | {
                f"{name}_{of}{end}": value
                for of in OF
                for name, ends in fit[f"{of}intervals"].items()
                for end, value in zip(("low", "high"), ends, strict=True)
            }
            for _, fit in fits.iterrows()
        ],
        index=fits.index,
    ).reindex(columns=[*names, *bounds])
    sentences = {name: fits[name].map("; ".join) for name in ("warnings", "doubts")}
    table = pd.concat([fits[place], values, fits[quality].assign(**sentences)], axis=1)
    macro_first = (table["domain"] != MACRO).rename("later")
    order = pd.concat([table[["law", "method", "domain", "N"]], macro_first], axis=1)
    return table.loc[order.sort_values(["law", "later", "method", "domain", "N"]).index]


def _floor_table(fits: pd.DataFrame) -> pd.DataFrame:
    """Asymptotic and reachable floors of the base-by-base fits (nats per token)."""
    columns = [
        *("method", "family", "domain", "base", "N", "M", "asymptotic", "reachable"),
        *("asymptotic_interval", "reachable_interval", "k_within"),
    ]
    records = []
    if len(fits):
        for _, fit in fits[fits["base"].notna()].iterrows():
            place = {"method": fit["method"], "family": fit["family"], "domain": fit["domain"]}
            records.append({**place, **fit["floors"][0]})
    table = pd.DataFrame(records, columns=columns)
    return table.sort_values(["domain", "method", "N", "base"], ignore_index=True)


def _grouped(refused: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Refused fits with one line per method, base and reason, their domains joined."""
    if not refused:
        return []
    place = ["method", "base", "reason"]
    table = pd.DataFrame(refused).fillna({"base": "all sizes"})
    return [
        {
            **{key: str(group[key].iloc[0]) for key in place},
            "domains": ", ".join(group["domain"]),
        }
        for _, group in table.groupby(place)
    ]
