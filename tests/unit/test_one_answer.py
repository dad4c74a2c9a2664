"""One law, one answer: laws.json, summary, report, forecast and plan give the same numbers."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from mergelaw.laws.fits import fit_all, write
from mergelaw.laws.law import MERGING
from mergelaw.planning import Curve, choose, experts, forecast, loss, read, rule
from mergelaw.report.tables import files
from points import SIZES, study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fitted folder: two methods, points with the errors of three circles and of documents."""
    points = pd.concat([study(), study(method="ties", L_star=0.38, seed=1)], ignore_index=True)
    size = len(SIZES) * 9
    factor = np.random.default_rng(0).standard_normal((len(points), 2)) * 2e-4
    points = points.assign(
        se=np.linalg.norm(factor, axis=1),
        sampling=list(factor),
        documents=list(np.full((2 * size, 1), 1e-2)),
        freedom=2.0,
        subsets=9,
        replicates=3,
        variance=math.nan,
    )
    path = tmp_path_factory.mktemp("laws")
    write(fit_all(points.sort_values(["method", "N", "k"], ignore_index=True)), path)
    return path


@pytest.fixture(scope="module")
def laws(folder):
    return json.loads((folder / "laws.json").read_text())


def at(folder, method="average", **size):
    return Curve(choose(read(folder)[0], method), **size)


def test_a_bases_law_is_the_same_in_laws_json_plan_and_rule(folder, laws):
    (fit,) = [f for f in laws["fits"] if f["method"] == "average" and f["base"] == "3B"]
    curve = at(folder, base="3B")
    assert curve.law.parameters == pytest.approx(fit["parameters"], rel=1e-12)
    (floor,) = fit["floors"]
    asked = loss(curve, math.inf)
    assert asked.value == pytest.approx(floor["asymptotic"], rel=1e-12)
    assert asked.ends == pytest.approx(floor["asymptotic_interval"], rel=1e-12)
    asked = loss(curve, 9)
    assert asked.value == floor["reachable"] and floor["measured"]
    assert asked.ends == pytest.approx(floor["reachable_interval"], rel=1e-12)
    assert rule(choose(read(folder)[0], every="method"), 3.0, 9).table[0]["second"] == "average"
    assert curve.state == fit["verdict"]["state"]
    assert f"{floor['reachable']:.5g}" in asked.reason


def test_the_summary_and_the_report_say_what_laws_json_says(folder, laws):
    text = (folder / "summary.txt").read_text()
    for fit in laws["fits"]:
        for floor in fit["floors"] if fit["base"] else ():
            assert f"{floor['asymptotic']:.5g}" in text and f"{floor['reachable']:.5g}" in text
    frames = [pd.read_parquet(folder / f"{name}.parquet") for name in ("points", "parameters")]
    tables = files(laws, *frames)
    named = {(f["method"], f["base"]): f["floors"][0] for f in laws["fits"] if f["base"]}
    assert len(tables["floors"]) == len(named)
    for row in tables["floors"].to_dict("records"):
        floor = named[row["method"], row["base"]]
        assert (row["asymptotic"], row["reachable"]) == (floor["asymptotic"], floor["reachable"])


def test_the_joint_law_is_the_same_in_laws_json_plan_and_forecast(folder, laws):
    (fit,) = [f for f in laws["fits"] if f["method"] == "average" and f["base"] is None]
    curve = at(folder, N=28.0)
    assert curve.law.parameters == pytest.approx(fit["parameters"], rel=1e-12)
    asked = loss(curve, 9)
    # The mean over all forms: near the merging law's, and the same wherever it is asked.
    merging = float(MERGING.predict(fit["parameters"], N=28.0, k=9))
    assert abs(asked.value - merging) < (asked.ends[1] - asked.ends[0]) / 4
    for floor in fit["floors"]:
        joint = at(folder, base=floor["base"], law=MERGING)
        assert joint.by_law(math.inf)[0] == pytest.approx(floor["asymptotic"], rel=1e-12)
    points = choose(read(folder)[0], "average")
    row = forecast(points, "size", N=28.0, k=[9]).table[0]
    assert (row["forecast"], row["low"], row["high"]) == (asked.value, *asked.ends)
    target = loss(at(folder, base="3B"), 4).value
    assert experts(at(folder, base="3B"), target).value == 4
