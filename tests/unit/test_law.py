"""Points and laws: the paper's tables, the finite pool, and what is refused."""

import copy
import itertools
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mergelaw.errors import MergelawError
from mergelaw.laws.fit import fit
from mergelaw.laws.fits import fit_study, write
from mergelaw.laws.law import (
    EXPONENTIAL,
    INTERFERENCE_FIXED_N,
    INVERSE_FIXED_N,
    LAWS,
    MERGING,
    MERGING_FIXED_N,
    POWER,
    VARIANCE,
    Law,
)
from mergelaw.laws.points import MACRO, points

TABLES = Path(__file__).parents[1] / "data" / "paper_tables"
ROWS = [
    pytest.param(row, id=f"{path.stem.split('_')[1]}-{row['domain']}")
    for path in sorted(TABLES.glob("table[345]_*.csv"))
    for row in pd.read_csv(path).to_dict("records")
]
SIZES = [0.5, 1.5, 3, 7, 14, 32, 72]


def grid(law: Law, parameters, sizes=SIZES, levels=range(1, 10)) -> dict[str, np.ndarray]:
    N, k = (axis.ravel() for axis in np.meshgrid(sizes, list(levels)))
    variables = {name: values for name, values in (("N", N), ("k", k)) if name in law.levels}
    return {"N": N, "k": k, "ce": law.predict(parameters, **variables)}


def evaluation_rows(losses, method="average", base="b", N=1.0, replicate=0) -> pd.DataFrame:
    """Rows of merges: {(members, domain): ce}."""
    return pd.DataFrame(
        [
            {"method": method, "family": "f", "base": base, "N": N, "seed": 0, "k": len(members),
             "replicate": replicate, "experts": list(members), "merge": "+".join(members),
             "role": "merge", "domain": domain, "ce": ce, "finite": math.isfinite(ce)}
            for (members, domain), ce in losses.items()
        ]
    )  # fmt: skip


# ---- fits


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("unit", [1.0, 1e-4])
def test_a_noise_free_grid_of_the_papers_parameters_is_recovered(row, unit):
    names = {"L_star": "Lstar", "B": "B", "beta": "beta", "A0": "A0", "gamma": "gamma", "b": "b0"}
    truth = {name: row[column] for name, column in names.items()}
    table = grid(MERGING, truth)
    fitted = fit(MERGING, {**table, "N": table["N"] * unit})
    assert np.abs(fitted.residuals).max() < 1e-12
    assert fitted.r2 == pytest.approx(1)
    for name in ("L_star", "beta", "gamma", "b"):
        assert fitted.parameters[name] == pytest.approx(truth[name], rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("b", [0.0, 0.3, 3.0])
def test_one_base_is_recovered(b):
    truth = {"L_inf": 1.2, "A": 0.1, "b": b}
    fitted = fit(MERGING_FIXED_N, grid(MERGING_FIXED_N, truth, sizes=[2.7e-5]))
    assert fitted.parameters == pytest.approx(truth, rel=1e-9)
    assert np.abs(fitted.residuals).max() < 1e-14


def test_prediction_broadcasts_and_refuses_other_variables():
    truth = {"L_star": 1.0, "B": 0.1, "A0": 0.2, "beta": 0.5, "gamma": 0.1, "b": 0.0}
    fitted = fit(MERGING, grid(MERGING, truth))
    assert fitted.predict(N=[[1.0], [4.0]], k=[1, 2, 3]).shape == (2, 3)
    assert fitted.predict(N=4, k=math.inf) == pytest.approx(1.05)
    with pytest.raises(MergelawError, match="function of N, k"):
        fitted.predict(k=3)


def test_b_below_zero_is_flagged_as_on_its_bound():
    k = np.arange(1, 10)
    fitted = fit(MERGING_FIXED_N, {"k": k, "ce": 1 + 0.1 / (k - 0.05)})
    assert fitted.parameters["b"] == 0
    assert any("b hit its bound 0" in warning for warning in fitted.warnings)


def test_warnings_have_codes_that_survive_copies():
    warnings = fit(MERGING_FIXED_N, {"k": [1, 2, 4], "ce": [1.2, 1.1, 1.06]}).warnings
    warning = {warning.code: warning for warning in warnings}["saturated"]
    assert "as many parameters as points" in warning
    for other in (pickle.loads(pickle.dumps(warning)), copy.deepcopy(warning)):
        assert (other, other.code) == (str(warning), "saturated")
    assert json.loads(json.dumps([warning])) == [warning]


def test_losses_that_do_not_fall_leave_b_without_meaning():
    fitted = fit(MERGING_FIXED_N, {"k": np.arange(1, 10), "ce": np.full(9, 1.5)})
    assert fitted.parameters["A"] == 0
    assert any("b has no effect" in warning for warning in fitted.warnings)
    assert fitted.to_dict()["r2"] is None


def test_a_short_ladder_and_three_points_are_named():
    truth = {"L_star": 1.0, "B": 1e-3, "A0": 0.1, "beta": 0.6, "gamma": 0.1, "b": 0.2}
    fitted = fit(MERGING, grid(MERGING, truth, sizes=[2.7e-5, 6e-5, 3.33e-4], levels=[1, 2, 4]))
    assert any("factor of 12.3" in warning for warning in fitted.warnings)
    assert any("three sizes" in warning for warning in fitted.warnings)
    three = fit(MERGING_FIXED_N, {"k": [1, 2, 4], "ce": [1.2, 1.1, 1.06]})
    assert any("as many parameters as points" in warning for warning in three.warnings)


@pytest.mark.parametrize("last", [1.06, 1.15, 1.0])
def test_as_many_parameters_as_points_compare_no_laws(last):
    """Known errors do not tell the law's own: a misfit of 0 would make AICc differ by 1e14."""
    fitted = fit(MERGING_FIXED_N, {"k": [1, 2, 4], "ce": [1.2, 1.1, last], "se": [1e-9] * 3})
    nothing = "as many parameters as points: nothing tests the law"
    assert fitted.verdict == {"state": "doubtful", "reasons": [nothing]}
    assert all(rival["aicc"] is None for rival in fitted.rivals)
    assert {f.law.name for f in fitted.forms} == {
        "merging_fixed_N", "power_fixed_N", "exponential_fixed_N"
    }  # fmt: skip
    assert "AICc" not in fitted.summary()


def test_noise_on_a_flat_profile_is_named():
    k = np.arange(1, 6)
    ce = 1.5 + 0.01 / k + 0.01 * np.array([1, -1, 1, -1, 1])
    fitted = fit(MERGING_FIXED_N, {"k": k, "ce": ce})
    assert any("determined" in w or "bound" in w or "no effect" in w for w in fitted.warnings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ce": [1.0, math.nan, 0.9, 0.8]}, "not finite"),
        ({"ce": [1.0, -0.1, 0.9, 0.8]}, "above 0"),
        ({"k": [0, 1, 2, 3]}, "above 0"),
        ({"k": [0.5, 1, 2, 3]}, "k >= 1"),
        ({"k": [1, 1, 2, 2]}, "3 numbers of experts k"),
        ({"k": [1, 2, 3], "ce": None}, "column ce"),
        ({"N": [1.0, 1.0, 1.0, 2.0]}, "one value of N"),
    ],
)
def test_bad_tables_are_one_line(change, message):
    table = {"k": [1, 2, 3, 4], "ce": [1.2, 1.1, 1.06, 1.05], **change}
    table = {name: values for name, values in table.items() if values is not None}
    with pytest.raises(MergelawError, match=message) as error:
        fit(MERGING_FIXED_N, table)
    assert "\n" not in str(error.value)


def test_too_few_sizes_or_points_for_the_joint_law():
    truth = {"L_star": 1.0, "B": 0.1, "A0": 0.2, "beta": 0.5, "gamma": 0.1, "b": 0.0}
    with pytest.raises(MergelawError, match="3 sizes N of bases"):
        fit(MERGING, grid(MERGING, truth, sizes=[1, 2]))
    with pytest.raises(MergelawError, match="needs 6 points, one for each parameter, and 5 are"):
        fit(MERGING, {"N": [1, 2, 3, 1, 1], "k": [1, 1, 1, 2, 3], "ce": [1.3, 1.2, 1.1, 1.2, 1.1]})
    with pytest.raises(MergelawError, match="above 0"):
        fit(MERGING, {**grid(MERGING, truth), "N": -grid(MERGING, truth)["N"]})


# E + A N^-alpha + B D^-beta of Hoffmann et al., arXiv:2203.15556: other variables, other names.
CHINCHILLA = Law(
    name="chinchilla",
    equation="L(N, D) = E + A N^-alpha + B D^-beta",
    levels={"N": 3, "D": 3},
    linear=("E", "A", "B"),
    nonlinear=dict.fromkeys(("alpha", "beta"), (0.0, 0.2, 0.5, 1.0, 2.0)),
    basis=lambda N, D, alpha, beta: (1.0, N**-alpha, D**-beta),
)


def test_chinchillas_law_takes_a_few_lines():
    N, D = (a.ravel() for a in np.meshgrid([7e7, 4e8, 1e9, 1e10], [1e9, 1e10, 1e11, 1e12]))
    truth = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
    fitted = fit(CHINCHILLA, {"N": N, "D": D, "ce": CHINCHILLA.predict(truth, N=N, D=D)})
    assert fitted.parameters == pytest.approx(truth, rel=1e-6)
    with pytest.raises(MergelawError, match="function of N, D"):
        fitted.predict(N=1e9, k=3)


def test_the_published_replication_of_chinchilla_is_reproduced():
    """Robust, on the logarithm of the loss; within the published standard errors."""
    points = pd.read_csv(TABLES.parent / "chinchilla" / "points.csv").rename(columns={"loss": "ce"})
    table = points.sort_values("ce").iloc[:-5]
    fitted = fit(CHINCHILLA, table, robust=True)
    published = {
        "E": (1.8172, 0.03), "A": (482.01, 124.58), "B": (2085.43, 1293.23),
        "alpha": (0.3478, 0.02), "beta": (0.3658, 0.02),
    }  # fmt: skip
    for name, (value, error) in published.items():
        assert abs(fitted.parameters[name] - value) < error
    # One bad row is named, in a fit that is not robust too.
    spoiled = table.assign(ce=np.where(np.arange(len(table)) == 100, 2.0, 1.0) * table["ce"])
    assert fit(CHINCHILLA, spoiled).outliers[0]["loss"] == pytest.approx(2 * table["ce"].iloc[100])


TRUTHS = {
    "L_star": 0.4, "B": 0.2, "A0": 0.1, "L_inf": 0.8, "A": 0.1, "beta": 0.4, "gamma": 0.05, "b": 0.4,
    "a": 0.8, "c": 0.5, "D": 0.05, "q": 2.5, "V0": 1e-6, "G": 0.003, "P": 0.02,
}  # fmt: skip


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_every_law_recovers_itself(law):
    truth = {name: TRUTHS[name] for name in law.parameters}
    if law is VARIANCE:
        k, M = (axis.ravel() for axis in np.meshgrid(range(1, 10), [9, 12]))
        table = {"k": k, "M": M, "variance": law.predict(truth, k=k, M=M)}
    else:
        table = grid(law, truth, levels=range(1, 13))
        if law.fixed:
            table = {name: values[: 12 * 7 : 7] for name, values in table.items()}
            table["N"] = np.ones(12)
    fitted = fit(law, table)
    assert fitted.r2 == pytest.approx(1, abs=1e-12)
    # Two bounded terms in k beside each other leave their shapes all but open.
    if "interference" not in law.name:
        assert fitted.parameters == pytest.approx(truth, rel=1e-5)
    elif not law.fixed:
        assert fitted.predict(N=3, k=math.inf) == pytest.approx(
            law.predict(truth, N=3, k=math.inf), rel=1e-4
        )


def test_interference_turns_the_curve_up_and_the_merging_law_cannot():
    truth = {"L_inf": 0.4, "A": 0.3, "D": 0.4, "b": 0.2, "q": 4.0}
    table = grid(INTERFERENCE_FIXED_N, truth, sizes=[3.0])
    assert np.argmin(table["ce"]) not in (0, 8)
    assert fit(INTERFERENCE_FIXED_N, table).rmse < 1e-6
    assert fit(MERGING_FIXED_N, table).rmse > 1e-3


def test_the_variance_law_is_exact_for_a_quadratic_loss_without_diagonal():
    """All subsets of a pool: additive effects and pairs; k^2 times the loss is a quadratic form."""
    random = np.random.default_rng(0)
    pool = 8
    slope, pairs = random.standard_normal(pool), random.standard_normal((pool, pool))
    pairs += pairs.T
    # What pairs add up to for each expert would give the additive part a slope in 1/k.
    np.fill_diagonal(pairs, 0)
    rows = pairs.sum(axis=1)
    own = (rows - rows.sum() / (2 * (pool - 1))) / (pool - 2)
    pairs -= own[:, None] + own
    np.fill_diagonal(pairs, 0)
    variance = [
        np.var([
            slope[list(members)].mean() + pairs[np.ix_(members, members)].sum() / (2 * k * k)
            for members in itertools.combinations(range(pool), k)
        ])
        for k in range(1, pool + 1)
    ]  # fmt: skip
    table = {"k": np.arange(1, pool + 1), "M": np.full(pool, pool), "variance": variance}
    table["variance"] = np.maximum(table["variance"], 0)
    fitted = fit(VARIANCE, table)
    assert fitted.parameters["G"] == pytest.approx(np.var(slope))
    assert fitted.parameters["P"] == pytest.approx((pairs**2).sum() / 2 / pool)
    assert fitted.parameters["V0"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(MergelawError, match="above M"):
        fit(VARIANCE, {**table, "M": np.full(pool, pool - 1)})


def test_a_law_of_ones_own_takes_a_few_lines():
    """Also that signed coefficients are found with either sign beside ones that are not."""
    power = Law(
        name="power",
        equation="E[L|k] = L_inf + A k^-a + D log k",
        levels={"k": 4},
        linear=("L_inf", "A", "D"),
        nonlinear={"a": (0.0, 0.5, 1.0, 2.0, 5.0)},
        basis=lambda k, a: (1.0, k**-a, np.log(k)),
        signed=("D",),
    )
    for sign in (-0.01, 0.01):
        truth = {"L_inf": 1.0, "A": 0.2, "D": sign, "a": 1.3}
        fitted = fit(power, grid(power, truth, sizes=[1.0]))
        assert fitted.parameters == pytest.approx(truth, rel=1e-6)


def test_summary_and_dictionary_tell_the_same():
    fitted = fit(MERGING_FIXED_N, {"k": [1, 2, 3, 4], "ce": [1.2, 1.1, 1.07, 1.05]})
    told = json.loads(json.dumps(fitted.to_dict(), allow_nan=False))
    assert told["parameters"] == fitted.parameters
    assert told["n_points"] == 4
    assert "R^2" in fitted.summary() and "RMSE" in fitted.summary()


# ---- points


def test_circles_are_averaged_first_and_macro_is_the_mean_of_domains():
    one = evaluation_rows(
        {("abc", "x"): 1.0, ("abd", "x"): 2.0, ("abc", "y"): 4.0, ("abd", "y"): 4.0}
    )
    other = evaluation_rows({("abc", "x"): 3.0, ("abc", "y"): 5.0}, replicate=1)
    table, warnings = points(pd.concat([one, other]))
    assert warnings == []
    ce = table.set_index("domain")["ce"]
    assert ce.to_dict() == {"x": 2.25, "y": 4.5, MACRO: 3.375}
    assert set(table["subsets"]) == {2} and set(table["replicates"]) == {2}


def test_a_point_with_a_loss_that_is_not_finite_is_dropped_and_named():
    losses = {("a", d): 1.0 for d in "xy"} | {("ab", d): 0.9 for d in "xy"}
    losses["ab", "y"] = math.nan
    table, warnings = points(evaluation_rows(losses))
    assert set(zip(table["k"], table["domain"], strict=True)) == {
        (1, "x"),
        (1, "y"),
        (1, MACRO),
        (2, "x"),
    }
    assert len(warnings) == 2
    assert "average on b, y: no point at k = 2" in warnings[0]
    assert "macro" in warnings[1]


def test_bases_and_baselines_are_no_points():
    rows = evaluation_rows({("a", "x"): 1.0})
    table, _ = points(
        pd.concat([rows, rows.assign(role="base", k=0), rows.assign(role="baseline")])
    )
    assert list(table["k"]) == [1, 1]
    with pytest.raises(MergelawError, match="role 'merge'"):
        points(rows.assign(role="base"))
    with pytest.raises(MergelawError, match="replicate"):
        points(rows.drop(columns="replicate"))


# ---- studies


def ladder_rows(sizes) -> pd.DataFrame:
    parts = []
    for N in sizes:
        ring = {
            (tuple("abcdefghi"[(start + i) % 9] for i in range(k)), domain):
                scale * (1 + N**-0.3 + 0.1 / k)
            for k in range(1, 10) for start in range(9) for domain, scale in (("x", 1), ("y", 0.5))
        }  # fmt: skip
        parts.append(evaluation_rows(ring, base=f"b{N:g}", N=N))
    return pd.concat(parts, ignore_index=True)


def test_a_study_fits_all_there_is_and_says_why_the_rest_is_not():
    study = fit_study(ladder_rows([1.0, 4.0]))
    assert len(study.fits) == 2 * 3
    assert {refusal["law"] for refusal in study.refused} == {"merging"}
    assert "2 are measured (1, 4)" in study.refused[0]["reason"]

    study = fit_study(ladder_rows([1.0, 4.0, 200.0]))
    assert study.refused == ()
    macro = [f for f in study.fits if f.domain == MACRO and f.base is None]
    assert len(macro) == 1
    last = macro[0].floors[-1]
    assert last["M"] == 9
    assert last["asymptotic"] == pytest.approx(0.75 * (1 + 200**-0.3))
    assert last["reachable"] == pytest.approx(0.75 * (1 + 200**-0.3 + 0.1 / 9))


def test_what_is_written_is_strict_json_and_reads_back(tmp_path):
    told = write(fit_study(ladder_rows([1.0, 4.0])), tmp_path / "laws", missing=["b4/average/0"])
    assert told == {"points": 54, "fits": 6, "refused": 3, "missing": 1}

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    laws = json.loads((tmp_path / "laws/laws.json").read_text(), parse_constant=refuse)
    assert laws["missing"] == ["b4/average/0"]
    table = pd.read_parquet(tmp_path / "laws/parameters.parquet")
    assert len(table) == 6
    assert table["L_star"].isna().all() and table["L_inf"].notna().all()
    assert (table["b_low"] <= table["b"]).all() and (table["b"] <= table["b_high"]).all()
    (floor,) = laws["fits"][0]["floors"]
    assert (floor["asymptotic_interval"] is None) == (laws["fits"][0]["domain"] != MACRO)
    assert len(pd.read_parquet(tmp_path / "laws/points.parquet")) == 54
    summary = (tmp_path / "laws/summary.txt").read_text()
    assert "b4/average/0" in summary and "with all experts" in summary


# ---- what a fit reports


def noisy_grid(law, truth, sd=1e-3, seed=0, **options) -> dict[str, np.ndarray]:
    table = grid(law, truth, **options)
    noise = sd * np.random.default_rng(seed).standard_normal(len(table["ce"]))
    return {**table, "ce": table["ce"] + noise}


def test_aicc_is_the_textbooks():
    k = np.arange(1, 10)
    ce = 1 + 0.1 / k + 1e-3 * np.random.default_rng(0).standard_normal(9)
    fitted = fit(INVERSE_FIXED_N, {"k": k, "ce": ce})
    # n log(RSS/n) + 2K + 2K(K+1)/(n-K-1), K = 3: two coefficients and the noise; + n of the density
    expected = 9 * math.log(np.mean(fitted.residuals**2)) + 6 + 2 * 3 * 4 / 5 + 9
    assert fitted.aicc == pytest.approx(expected)
    known = fit(INVERSE_FIXED_N, {"k": k, "ce": ce, "se": np.full(9, 1e-3)}, misfit=0)
    squares = (fitted.residuals**2).sum() / 1e-6
    assert known.aicc == pytest.approx(squares + 9 * math.log(1e-6) + 4)
    assert math.isnan(fit(MERGING_FIXED_N, {"k": k[:4], "ce": ce[:4]}).aicc)


@pytest.mark.parametrize("law", [MERGING, POWER, EXPONENTIAL])
def test_the_law_that_made_the_points_is_found_among_the_rivals(law):
    truth = {name: TRUTHS[name] for name in law.parameters}
    fitted = fit(MERGING, noisy_grid(law, truth, sd=2e-4, sizes=[0.5, 3, 14, 72]))
    assert fitted.rivals[0]["law"] == law.name
    assert fitted.rivals[0]["above"] == 0
    doubted = any(d.code == "better_rival" and law.name in d for d in fitted.doubts)
    assert doubted == (law is not MERGING)


def test_interference_is_a_rival_where_losses_rise():
    truth = {"L_inf": 0.4, "A": 0.3, "D": 0.4, "b": 0.2, "q": 4.0}
    rising = fit(MERGING_FIXED_N, noisy_grid(INTERFERENCE_FIXED_N, truth, 1e-5, sizes=[3.0]))
    assert "interference_fixed_N" in [rival["law"] for rival in rising.rivals]
    falling = fit(MERGING_FIXED_N, grid(MERGING_FIXED_N, TRUTHS, sizes=[3.0]))
    assert "interference_fixed_N" not in [rival["law"] for rival in falling.rivals]


def test_what_is_left_out_is_forecast_from_the_rest():
    fitted = fit(MERGING, grid(MERGING, TRUTHS))
    assert set(fitted.holdout) == {"N", "k"}
    assert fitted.holdout["k"]["value"] == 9 and fitted.holdout["N"]["value"] == 72
    assert fitted.holdout["k"]["error"] < 1e-9 < fitted.holdout["k"]["same"]
    gaps = [MERGING.predict(TRUTHS, N=N, k=9) - MERGING.predict(TRUTHS, N=N, k=8) for N in SIZES]
    assert fitted.holdout["k"]["same"] == pytest.approx(np.sqrt(np.mean(np.square(gaps))))
    assert fit(MERGING, grid(MERGING, TRUTHS, sizes=[1, 4, 9])).holdout.keys() == {"k"}
    three = fit(MERGING_FIXED_N, {"k": [1, 2, 4], "ce": [1.2, 1.1, 1.06]})
    assert three.holdout == {}


def test_a_forecast_worse_than_none_is_doubted():
    k = np.arange(1, 10)
    ce = np.array([1.3, 1.2, 1.15, 1.12, 1.1, 1.09, 1.08, 1.075, 1.09])
    turned = [*(1 + 0.1 / k[:8]), 1.05]
    fitted = fit(MERGING_FIXED_N, {"k": k, "ce": turned})
    assert fitted.holdout["k"]["held"] is False
    assert any(doubt.code == "holdout" for doubt in fitted.doubts)
    assert fit(MERGING_FIXED_N, {"k": k, "ce": ce}).holdout["k"]["same"] == pytest.approx(0.015)


def test_residuals_that_keep_their_sign_are_doubted():
    k = np.arange(1, 21)
    wave = 0.01 * np.sin(k / 20 * 2 * np.pi)
    fitted = fit(MERGING_FIXED_N, {"k": k, "ce": 1 + 0.1 / k + wave})
    assert fitted.runs["found"] < fitted.runs["expected"]
    assert any(doubt.code == "runs" for doubt in fitted.doubts)
    assert fit(MERGING_FIXED_N, {"k": k, "ce": 1 + 0.1 / k}).runs is None
    within = fit(MERGING_FIXED_N, {"k": k, "ce": 1 + 0.1 / k + wave, "se": np.full(20, 0.02)})
    assert within.rmse < 0.02 and within.runs is None
    random = np.random.default_rng(1).choice([-1e-3, 1e-3], 20)
    clean = fit(MERGING_FIXED_N, {"k": k, "ce": 1 + 0.1 / k + random})
    assert not any(doubt.code == "runs" for doubt in clean.doubts)


def test_summary_and_dictionary_tell_what_a_reader_needs():
    fitted = fit(MERGING_FIXED_N, noisy_grid(MERGING_FIXED_N, TRUTHS, sizes=[1.0]))
    text, told = fitted.summary(), json.loads(json.dumps(fitted.to_dict(), allow_nan=False))
    for part in ("90%:", "RMSE", "held out", "same as the last point", "AICc"):
        assert part in text
    assert told["intervals"]["b"] == list(fitted.interval("b"))
    assert told["level"] == 0.9
    assert told["rivals"][0]["above"] == 0
    assert told["left_out"]["k"]["value"] == 9
    assert told["freedom"] == 6
    assert told["warnings"] == list(fitted.warnings) and told["doubts"] == list(fitted.doubts)
    assert all(sentence in text for sentence in (*fitted.warnings, *fitted.doubts))
    few = fit(MERGING_FIXED_N, {"k": [1, 2, 4, 6, 9], "ce": [0.816, 0.774, 0.752, 0.744, 0.739]})
    assert "AICc" not in few.summary()  # of the law itself it is undefined
