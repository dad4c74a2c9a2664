"""Forecasts: exact where the theory is, honest where it is not, refused where nothing can be said."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circles import finite_pool
from mergelaw.errors import MergelawError
from mergelaw.laws.fit import fit_points
from mergelaw.laws.law import MERGING, MERGING_FIXED_N
from mergelaw.planning import choose, forecast, read
from mergelaw.planning.points import base_points, without_errors
from points import JOINT
from points import study as points_of_study


def study(noise=0.0, **options):
    return points_of_study(noise=noise, **options)


def rows(answer):
    return pd.DataFrame(answer.table)


# ---- along k


def test_exact_other_bases_do_not_hide_the_points_own_errors():
    """The scheme is right at both other bases; three points with errors still leave a width."""
    exact = study(sizes=[1.0, 2.0, 3.0])
    noisy = exact.assign(se=0.004, sampling=[[0.004]] * len(exact), freedom=np.inf)
    sure, unsure = (rows(forecast(table, "three-point", base="1B")) for table in (exact, noisy))
    assert (sure["high"] - sure["low"]).max() < 1e-6
    # all points move together: the forecast moves as far, 1.645 standard errors to each side
    assert (unsure["high"] - unsure["low"]).to_numpy() == pytest.approx(2 * 1.645 * 0.004, rel=0.01)


@settings(max_examples=25)
@given(
    M=st.integers(5, 20),
    last=st.floats(0.3, 2),
    gain=st.floats(0.001, 0.5),
)
def test_the_end_points_fix_the_curve_of_a_quadratic_loss(M, last, gain):
    k = np.arange(1, M + 1)
    ce = finite_pool(k, last + gain, last, M)
    table = pd.DataFrame(
        {
            "method": "m",
            "family": "",
            "base": "b",
            "N": 1.0,
            "k": k,
            "domain": "d",
            "ce": ce,
            "M": M,
        }
    )
    found = forecast(table, "end-point", base="b")
    assert found.details["used"] == [1, M]
    assert rows(found)["forecast"].to_numpy() == pytest.approx(ce[1:-1], abs=1e-12)
    # ... and by three points too, for it is the merging law with b = 0
    three = rows(forecast(table, "three-point", base="b"))
    assert three["forecast"].to_numpy() == pytest.approx(ce[three["k"].astype(int) - 1], abs=1e-7)


def test_three_points_go_on_along_the_merging_law():
    found = forecast(study(), base="3B")
    assert rows(found)["forecast"].to_numpy() == pytest.approx(rows(found)["measured"], abs=1e-8)
    score = found.details["score"]
    assert score["error"] < 1e-8 < score["naive error"]
    assert set(rows(found)["k"]) == {3, 5, 6, 7, 8, 9}


def test_intervals_come_from_the_recipes_record_at_other_bases():
    points = study(noise=1e-3)
    found = forecast(points, "end-point", base="14B", k=[4])
    shares = []
    for base in ["0.5B", "1.5B", "3B", "7B"]:
        own = points[points["base"] == base].set_index("k")["ce"]
        gain = own[1] - own[9]
        shares.append((own[4] - finite_pool(4, own[1], own[9], 9)) / gain)
    own = points[points["base"] == "14B"].set_index("k")["ce"]
    reach = 2.131847 * math.sqrt(np.mean(np.square(shares))) * (own[1] - own[9])  # t, 4 degrees
    row = rows(found).iloc[0]
    assert row["high"] - row["forecast"] == pytest.approx(reach, rel=1e-6)
    assert row["forecast"] - row["low"] == pytest.approx(reach, rel=1e-6)
    assert row["held"] == (abs(row["forecast"] - row["measured"]) <= reach)
    assert "0.5B, 1.5B, 3B, 7B" in found.reason


def test_record_intervals_hold_about_as_often_as_they_say():
    """Bases that depart from a quadratic loss at random, each by its own share of the gain."""
    k = np.array([1, 3, 9])
    held = []
    for seed in range(100):
        shares = 0.03 * np.random.default_rng(seed).standard_normal(4)
        points = study(sizes=[0.5, 1.5, 3.0, 7.0], k=k, b=0.0)
        gain = points.groupby("base")["ce"].transform("first") - points.groupby("base")[
            "ce"
        ].transform("last")
        departs = points["base"].map(dict(zip(points["base"].unique(), shares, strict=True)))
        points["ce"] += departs * gain * (points["k"] == 3)
        held += rows(forecast(points, "end-point", base="7B", k=[3]))["held"].tolist()
    assert 0.8 <= np.mean(held) <= 0.98  # 0.9, three standard errors of 100 draws each way


def test_a_given_sigma_makes_profile_intervals():
    alone = study(sizes=[3.0])
    blind = forecast(alone, base="3B")
    assert rows(blind)["low"].isna().all()
    assert "none" in blind.reason and blind.details["score"]["intervals"] == 0
    narrow, wide = (rows(forecast(alone, base="3B", misfit=s)) for s in (1e-4, 1e-3))
    assert (wide["high"] - wide["low"] > narrow["high"] - narrow["low"]).all()
    assert narrow["held"].all()
    # what is forecast is a measurement: its own misfit is in the interval
    assert (narrow["high"] - narrow["low"] > 2 * 1.64 * 1e-4).all()


def test_standard_errors_make_intervals_too():
    alone = study(sizes=[3.0]).assign(se=2e-4)
    found = forecast(alone, base="3B")
    assert "standard errors" in found.reason
    assert rows(found)["held"].all()


def test_beyond_the_pool_there_is_a_warning_and_no_record():
    found = forecast(study(noise=1e-4), base="3B", k=[9, 16])
    assert any("more than this pool of 9" in told for told in found.warnings)
    assert rows(found)["low"].isna().tolist() == [False, True]
    assert any("k = 16" in told and "no interval" in told for told in found.warnings)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base": "9B"}, "no points of base 9B"),
        ({"scheme": "two-point"}, "no scheme two-point"),
        ({"k": [0.5]}, "give numbers of 1 or more"),
        ({"misfit": -1.0}, "misfit is -1"),
        ({"level": 1.5}, "not a probability"),
    ],
)
def test_bad_questions_are_refused_in_a_line(change, message):
    with pytest.raises(MergelawError, match=message) as refused:
        forecast(study(), **{"base": "3B", **change})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("recipe, lost", [("three-point", 4), ("end-point", 9)])
def test_a_recipe_says_which_of_its_points_is_missing(recipe, lost):
    points = study()
    with pytest.raises(MergelawError, match=f"k = {lost} is not measured"):
        forecast(points[points["k"] != lost], recipe, base="3B")


# ---- along N


def test_a_size_is_forecast_from_the_smaller_ones_and_scored():
    found = forecast(study(), "size", base="14B")
    assert found.details["used"] == [0.5, 1.5, 3.0, 7.0]
    assert rows(found)["forecast"].to_numpy() == pytest.approx(rows(found)["measured"], abs=1e-6)
    score = found.details["score"]
    assert score["error"] < 1e-6 < score["naive error"]


@pytest.mark.parametrize("seed", range(4))
def test_an_unmeasured_size_has_an_interval_that_holds_the_truth(seed):
    found = forecast(study(noise=3e-4, seed=seed), "size", N=28, k=[1, 9], level=0.99)
    truth = MERGING.predict(JOINT, N=28, k=np.array([1, 9]))
    assert ((rows(found)["low"] <= truth) & (truth <= rows(found)["high"])).all()
    assert "score" not in found.details


def test_far_beyond_the_ladder_carries_its_warning():
    near = forecast(study(), "size", N=20, k=[4]).warnings
    assert any("extrapolated" in told for told in near)
    for N in (200, 0.04):
        with pytest.raises(MergelawError, match="measure a base in between"):
            forecast(study(), "size", N=N, k=[4])
    assert not any("the measured sizes" in told for told in forecast(study(), "size", N=5).warnings)


def test_sizes_that_cannot_be_are_refused():
    for given_, message in (
        ({}, "several sizes are measured"),
        ({"N": 3.0, "base": "3B"}, "give one of them"),
        ({"N": -1.0}, "billions"),
        ({"N": 28e9}, "billions"),
        ({"base": "0.5B"}, "no smaller base"),
        ({"base": "1.5B"}, "3 sizes N of bases"),
    ):
        with pytest.raises(MergelawError, match=message):
            forecast(study(), "size", **given_)


def test_points_over_some_subsets_without_errors_carry_a_warning():
    points = study().assign(subsets=9)
    assert any("some subsets" in told for told in forecast(points, base="3B").warnings)
    assert not without_errors(points.assign(se=1e-4))
    assert without_errors(points.assign(se=0.0))
    assert not without_errors(points.assign(subsets=126))
    assert not without_errors(study())


def test_a_written_tables_design_weighs_its_points(tmp_path):
    """What the circles of a base share is in the intervals; what its documents do is not."""
    points = study(sizes=[0.5, 3.0], noise=1e-5).sort_values(["base", "k"], ignore_index=True)
    size = len(points)
    shift = np.where(points["base"] == "3B", 1e-3, 0)[:, None]  # one shift of all its points
    points = points.assign(
        se=shift[:, 0],
        documents=list(np.full((size, 2), 0.5)),
        sampling=list(shift),
        freedom=np.inf,
    )
    points.to_parquet(tmp_path / "points.parquet")
    table = choose(read(tmp_path)[0])
    assert sorted(table["se"].unique()) == pytest.approx([0, 1e-3])
    fits = [fit_points(MERGING_FIXED_N, base_points(table, base)) for base in ("0.5B", "3B")]
    widths = [np.ptp(fitted.predict_interval(k=9)) for fitted in fits]
    assert widths[0] < 1e-4
    assert widths[1] == pytest.approx(2 * 1.645e-3, rel=0.05)


def test_a_written_table_says_the_same_under_another_name(tmp_path):
    points = study(noise=1e-4, sizes=[3.0])
    size = len(points)
    sampling, documents = np.diag(np.full(size, 1e-3)), np.full((size, 2), 1e-2)
    written = points.assign(
        se=1e-3,
        subsets=9,
        replicates=3,
        freedom=2.0,
        sampling=list(sampling),
        documents=list(documents),
    )
    folder = tmp_path / "laws"
    folder.mkdir()
    for file in (folder / "points.parquet", tmp_path / "mine.parquet"):
        written.to_parquet(file, index=False)
    told = []
    for source in (folder, tmp_path / "mine.parquet"):
        table, _ = read(source)
        assert table["se"].unique() == pytest.approx([1e-3])
        fitted = fit_points(MERGING_FIXED_N, table)
        told.append(fitted.predict_interval(k=9))
    assert np.array_equal(*told)


def test_pools_too_small_for_a_recipe_are_no_record_of_it():
    lone = study(sizes=[1.5], M=1)
    rest = study(sizes=[3.0, 7.0, 14.0])
    found = forecast(pd.concat([lone, rest]), "end-point", base="3B")
    assert found.table == forecast(rest, "end-point", base="3B").table
    with pytest.raises(MergelawError, match="uses every k of a pool of 2"):
        forecast(study(sizes=[3.0], M=2), "end-point", base="3B")


# ---- reading, choosing, telling


def test_points_are_read_from_a_fitted_folder_or_a_table(tmp_path):
    points = study().sort_values(["base", "k"], ignore_index=True)
    folder = tmp_path / "laws"
    folder.mkdir()
    points.to_parquet(folder / "points.parquet", index=False)
    (folder / "laws.json").write_text("{}")
    for source in (folder, folder / "laws.json"):
        pd.testing.assert_frame_equal(read(source)[0][points.columns], points)
    own = tmp_path / "own.csv"
    points[["N", "k", "ce", "M"]].rename(columns={"ce": "loss"}).to_csv(own, index=False)
    assert len(read(own)[0]) == len(points)
    with pytest.raises(MergelawError, match=r"holds no points\.parquet"):
        read(tmp_path)


def test_one_method_domain_and_family_are_chosen():
    both = pd.concat([study(), study().assign(method="ties")])
    both = pd.concat([both, both.assign(domain="code")])
    own = choose(both, method="ties")
    assert set(own["domain"]) == {"macro"} and set(own["method"]) == {"ties"}
    assert set(choose(both, method="ties", domain="code")["domain"]) == {"code"}
    assert set(choose(both, every="method")["method"]) == {"average", "ties"}
    with pytest.raises(MergelawError, match="average, ties; name one with --method"):
        choose(both)
    with pytest.raises(MergelawError, match="no points of method magic"):
        choose(both, method="magic")


def test_a_forecast_is_json_and_text():
    found = forecast(study(noise=1e-3), base="3B", k=[3, 20])
    told = json.loads(found.to_json())
    assert told["table"][1]["low"] is None and "measured" not in told["table"][1]
    # nothing smaller was measured at k = 9: no naive forecast there, and none is made up
    points = study()
    points = points[(points["N"] == 14.0) | (points["k"] < 9)]
    told = json.loads(forecast(points, "size", base="14B", k=[9]).to_json())
    assert told["details"]["score"]["naive error"] is None
    assert told["table"][0]["naive error"] is None
    assert told["low"] < told["value"] < told["high"]  # one k: the forecast is the answer's value
    text = found.summary()
    assert "three-point forecast, average, macro, 3B" in text
    assert "intervals held" in text and "main assumption" in text
