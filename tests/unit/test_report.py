"""The report: complete, self-contained, and honest about what is missing."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest

import pool
from mergelaw.decide import best
from mergelaw.errors import MergelawError
from mergelaw.laws.fits import fit_study, write
from mergelaw.laws.law import MERGING
from mergelaw.laws.points import points
from mergelaw.report.figures import draw, figures, heat_map
from mergelaw.report.page import write_report

DOMAINS = [
    "algebra", "analysis", "geometry", "discrete", "number_theory", "code", "chemistry", "physics",
    "biology",
]  # fmt: skip
SIZES = {"w32": 2.7e-5, "w48": 6e-5, "w64": 1.61e-4, "w96": 3.33e-4}
METHODS = {"average": 0.1, "task_arithmetic": 0.4, "ties": 1.8, "dare": 0.2}


def study_rows(
    methods=("average", "ties"), domains=tuple(DOMAINS[:3]), sizes=SIZES, replicates=1, noise=0.002
) -> pd.DataFrame:
    """Rows as the evaluation stage writes them: the law with noise, on rings of nine experts."""
    random = np.random.default_rng(3)
    experts = DOMAINS
    rows = []

    def add(base, method, k, replicate, members, role, loss):
        merge = f"{base}.{method}.{'+'.join(members)}" if role == "merge" else f"{base}.{role}"
        for place, domain in enumerate(domains):
            ce = loss * (0.7 + 0.07 * place) + noise * random.standard_normal()
            rows.append(
                {"base": base, "family": "demo", "N": sizes[base], "N_total": sizes[base] * 1.2,
                 "method": method, "seed": 1, "k": k, "replicate": replicate, "experts": members,
                 "merge": merge, "role": role, "domain": domain, "held_out": False,
                 "nll": ce * 1000, "tokens": 1000, "ce": ce, "bytes": 3000, "finite": True}
            )  # fmt: skip

    for base, size in sizes.items():
        for method in methods:
            law = {"L_star": 0.85, "B": 6e-4, "beta": 0.65, "A0": 0.075, "gamma": 0.05,
                   "b": METHODS[method]}  # fmt: skip
            add(base, method, 0, 0, [], "base", 1.35 * MERGING.predict(law, N=size, k=1))
            for replicate in range(replicates):
                circle = list(random.permutation(experts))
                for k in range(1, 10):
                    for start in range(9):
                        members = sorted(circle[(start + i) % 9] for i in range(k))
                        loss = float(MERGING.predict(law, N=size, k=k))
                        loss *= 1 + 0.02 * (9 - k) / 8 * random.standard_normal()
                        add(base, method, k, replicate, members, "merge", loss)
        law["b"] = 0
        floor = float(MERGING.predict(law, N=size, k=1e9))
        add(base, "multitask", 9, 0, experts, "baseline", floor - 0.03)
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A folder with fits, and a report of them with a missing shard."""
    folder = tmp_path_factory.mktemp("study")
    rows = study_rows()
    write(fit_study(rows), folder / "laws", missing=["w32/average/circle-2"])
    facts = {"mergelaw": "0.1.0", "note": "<b>plain & simple</b>"}
    write_report(folder / "laws", rows, folder / "report", title="A small study", facts=facts)
    return folder / "report"


def test_learned_coefficients_are_a_heat_map_in_the_order_of_depth(report, tmp_path):
    blocks = ["10.mlp", "2.mlp", "2.attention", "embedding", "head"]
    rows = [
        (expert, f"{block}.{tensor}", block, value, norm)
        for expert in ("zoology", "algebra")
        for block in blocks
        for tensor, value, norm in (("a", 0.5, 1.0), ("b", -0.5, 3.0))
    ]
    table = pd.DataFrame(rows, columns=["expert", "tensor", "block", "coefficient", "norm"])
    chart = heat_map({"w32": table})
    (panel,) = chart.to_dict()["concat"]
    assert panel["encoding"]["x"]["sort"] == [
        "embedding", "2.attention", "2.mlp", "10.mlp", "head",
    ]  # fmt: skip
    assert panel["encoding"]["y"]["sort"] == ["zoology", "algebra"]
    svg = draw(chart, tmp_path / "learned")
    assert "10.mlp" in svg and "zoology" in svg
    (values,) = chart.to_dict()["datasets"].values()
    assert values[0]["coefficient"] == pytest.approx((0.5 - 0.5 * 9) / 10)
    assert "Learned coefficients" not in (report / "report.html").read_text()
    write_report(
        report.parent / "laws", study_rows(), tmp_path / "report", title="Learned", facts={},
        coefficients={"w32": table},
    )  # fmt: skip
    assert "Learned coefficients" in (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / "figures" / "learned.svg").exists()


def test_it_holds_every_method_base_and_domain(report):
    page = (report / "report.html").read_text()
    for name in ["average", "ties", *SIZES, *DOMAINS[:3]]:
        assert name in page
    assert "A small study" in page
    assert "<h2>Not measured yet</h2>\n<ul>\n<li>w32/average/circle-2</li>" in page
    assert "do not extrapolate" in page


def test_it_needs_nothing_from_elsewhere(report):
    page = (report / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!#|data:)""", page)
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert "<script" not in page


def test_facts_are_text_and_not_markup(report):
    page = (report / "report.html").read_text()
    assert "&lt;b&gt;plain &amp; simple&lt;/b&gt;" in page


def test_figures_and_tables_are_files_too(report):
    drawn = {path.stem for path in (report / "figures").glob("*.svg")}
    assert drawn == {path.stem for path in (report / "figures").glob("*.png")}
    assert drawn == {"methods", "curves", "domains_average", "domains_ties", "floors"}
    tables = {path.stem: pd.read_csv(path) for path in (report / "tables").glob("*.csv")}
    assert set(tables) == {"parameters", "floors", "points", "refused", "variances"}
    assert len(tables["parameters"]) == 2 * 4 * (1 + 4)
    fixed = tables["parameters"].query("law == 'merging_fixed_N'")
    assert (fixed["L_inf_low"] <= fixed["L_inf"]).all()
    assert (fixed["L_inf"] <= fixed["L_inf_high"]).all()


def test_a_base_far_above_its_merges_is_marked_with_its_loss(tmp_path):
    rows = study_rows(methods=("average",), domains=("code",), sizes={"w32": 2.7e-5})
    rows.loc[rows["role"] == "base", "ce"] = 11.7
    write(fit_study(rows), tmp_path / "laws")
    write_report(tmp_path / "laws", rows, tmp_path / "report", title="Far", facts={})
    assert ">11.7</text>" in (tmp_path / "report/figures/curves.svg").read_text()


def test_a_figure_draws_thousands_of_subsets(tmp_path):
    rows = study_rows(methods=tuple(METHODS), domains=("code",), replicates=5)
    rows = pd.concat([rows, rows.assign(method=rows["method"] + "-2")], ignore_index=True)
    charts = figures(pd.DataFrame(), points(rows)[0], rows)
    assert draw(charts["curves"], tmp_path / "curves").count("<path") > 5000


def test_the_floors_table_counts_the_experts_within_each_distance(report):
    floors = pd.read_csv(report / "tables/floors.csv")
    assert len(floors) == 2 * 4 * 4
    macro = floors[floors["domain"] == "macro"]
    assert (macro["asymptotic_low"].fillna(-math.inf) <= macro["asymptotic"]).all()
    assert (macro["asymptotic"] <= macro["reachable"]).all()
    assert (floors["k_within_0.05"] <= floors["k_within_0.01"]).all()


def test_intervals_and_rivals_stand_beside_the_parameters(report):
    page = (report / "report.html").read_text()
    laws = json.loads((report.parent / "laws/laws.json").read_text())
    fit = next(f for f in laws["fits"] if f["domain"] == "macro" and f["base"] is None)
    low, high = fit["intervals"]["L_star"]
    assert f"<small>{low:.3g} to {high:.3g}</small>" in page
    assert "<h3>Rivals</h3>" in page and "<th>exponential</th>" in page
    for rival in fit["rivals"]:
        assert f"<td>{rival['above']:.1f}</td>" in page


def test_a_study_of_one_size_has_a_report_without_joint_law(tmp_path):
    rows = study_rows(methods=("average",), domains=("code",), sizes={"w32": 2.7e-5})
    rows = rows[rows["role"] == "merge"]
    write(fit_study(rows), tmp_path / "laws")
    laws = json.loads((tmp_path / "laws/laws.json").read_text())
    assert {fit["law"] for fit in laws["fits"]} == {"merging_fixed_N"}
    write_report(tmp_path / "laws", rows, tmp_path / "report", title="One size", facts={})
    page = (tmp_path / "report/report.html").read_text()
    assert "needs 3 sizes N of bases" in page


def test_two_families_are_drawn_apart(tmp_path):
    rows = study_rows(methods=("average",), domains=("code",))
    other = rows.assign(family="other", base=rows["base"] + "-o")
    rows = pd.concat([rows, other], ignore_index=True)
    write(fit_study(rows), tmp_path / "laws")
    write_report(tmp_path / "laws", rows, tmp_path / "report", title="Two", facts={})
    drawn = {path.stem for path in (tmp_path / "report/figures").glob("*.svg")}
    assert {"demo_curves", "other_curves"} <= drawn


def test_a_folder_without_laws_is_one_line(tmp_path):
    with pytest.raises(MergelawError, match=r"laws\.json"):
        write_report(tmp_path, study_rows(), tmp_path / "report", title="None", facts={})


def test_a_study_in_which_nothing_could_be_fitted_has_a_report_too(tmp_path):
    rows = study_rows(methods=("average",), sizes={"w32": 2.7e-5, "w48": 6e-5})
    rows = rows[rows["k"] < 3]
    write(fit_study(rows), tmp_path / "laws")
    assert json.loads((tmp_path / "laws" / "laws.json").read_text())["fits"] == []
    write_report(tmp_path / "laws", rows, tmp_path / "report", title="Two levels", facts={})
    page = (tmp_path / "report" / "report.html").read_text()
    assert "What could not be fitted" in page and "<svg" in page


def test_the_report_opens_with_the_merge_to_ship_and_names_the_bad_expert(tmp_path):
    rows = pool.rows()
    write(fit_study(rows), tmp_path / "laws")
    measured = pool.measured(rows)
    write_report(
        tmp_path / "laws", rows, tmp_path / "report", title="Pool", facts={}, measured=[measured]
    )
    page = (tmp_path / "report" / "report.html").read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL))
    assert text.split("Pool")[2].strip().startswith(best(measured).sentence)
    assert "Ship ties of dates, extract, german, maths, sql: " in text
    assert "code: OUTLIER, leave it out of equally weighted merges: alone " in text
    assert page.index("Ship ties") < page.index("OUTLIER") < page.index('class="law"')
    for contradiction in ("cannot reach", "not reachable", "use all"):
        assert contradiction not in text
    merges = pd.read_csv(tmp_path / "report" / "tables" / "merges.csv")
    assert len(merges) == 2 * 63 and merges["macro"].is_monotonic_increasing
    experts = pd.read_csv(tmp_path / "report" / "tables" / "experts.csv")
    assert list(experts.loc[experts["verdict"] == "outlier", "expert"]) == ["code"]


@pytest.mark.parametrize("lost", ["a merge", "single experts", "a method", "a domain", "all"])
def test_losses_that_are_no_numbers_leave_a_report_or_one_line(tmp_path, lost):
    table = pool.rows(experts=pool.EXPERTS[:3], domains=pool.EXPERTS[:3], documents=6)
    merges = table["role"] == "merge"
    gone = {
        "a merge": table["merge"] == table["merge"].iloc[-1],
        "single experts": merges & (table["k"] == 1),
        "a method": merges & (table["method"] == "ties"),
        "a domain": table["domain"] == pool.EXPERTS[0],
        "all": merges,
    }[lost]
    table.loc[gone, ["nll", "ce"]] = math.nan
    table.loc[gone, "finite"] = False
    table = table.assign(bits_per_byte=table["nll"] / table["bytes"], long_documents=0)
    table = table.assign(dropped_tokens=0, N_nominal=math.nan)
    rows = table.drop(columns=["document_nll", "document_tokens"])
    if lost == "all":
        with pytest.raises(MergelawError, match="no merge has a finite loss: check the experts"):
            fit_study(rows, [table])
        return
    (tmp_path / "laws").mkdir()
    write(fit_study(rows, [table]), tmp_path / "laws")
    write_report(tmp_path / "laws", rows, tmp_path, title="lost", facts={})
    assert "not finite" in (tmp_path / "report.html").read_text() or lost == "a domain"


def test_a_law_that_fails_is_not_drawn(report):
    fits = pd.DataFrame(json.loads((report.parent / "laws/laws.json").read_text())["fits"])
    failed = fits["base"].isna() | (fits["base"] == "w32")
    fits["verdict"] = [{"state": "fails" if fails else "holds"} for fails in failed]
    fits.loc[failed, "floors"] = fits.loc[failed, "floors"].map(lambda _: [])
    rows = study_rows()
    charts = figures(fits, points(rows)[0], rows)

    def bases(name, kind, column):
        (values,) = charts[name].to_dict()["datasets"].values()
        return {value[column] for value in values if value["kind"] == kind}

    for name in ("methods", "curves", "domains_ties"):
        assert len(bases(name, "mean", "N")) == 4 and len(bases(name, "law", "N")) == 3
    floors = json.dumps(charts["floors"].to_dict()["datasets"])
    assert '"kind": "law"' not in floors and '"kind": "mean"' in floors
