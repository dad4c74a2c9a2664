"""Plans: answers that follow from the law, and clear words where the law has none."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import jobs
from mergelaw.artifacts import lineage, store
from mergelaw.cli.app import app
from mergelaw.config import load
from mergelaw.errors import MergelawError
from mergelaw.laws.law import MERGING, MERGING_FIXED_N
from mergelaw.planning import Costs, Curve, budget, experts, loss, measure, rule, stop
from mergelaw.workflow.results import find_laws, measured_costs
from mergelaw.workflow.study import Study
from points import JOINT, SIZES, study


def truth(N, k):
    return float(MERGING.predict(JOINT, N=N, k=k))


def prices(**columns):
    rows = {"N": SIZES, "training": [10 * n for n in SIZES], "merging": 0.1, "evaluation": 0.4}
    return Costs(pd.DataFrame({**rows, "serving": 0.0, **columns}), "hours")


# ---- loss


def test_the_loss_of_a_measured_base_comes_from_its_own_curve():
    points = study()
    answer = loss(Curve(points[points["k"] != 6], 3.0), 6)
    assert answer.value == pytest.approx(truth(3.0, 6), abs=4e-4)
    assert answer.ends[0] <= truth(3.0, 6) <= answer.ends[1]
    assert "L_inf + A / (k + b)" in answer.reason
    assert "reachable with this pool of 9" in answer.reason
    assert not answer.warnings


def test_the_loss_of_another_size_comes_from_the_joint_law():
    answer = loss(Curve(study(), 28.0), 6)
    assert answer.value == pytest.approx(truth(28.0, 6), abs=3e-3)
    assert answer.ends[0] <= truth(28.0, 6) <= answer.ends[1]
    assert "beta" in answer.reason
    assert any("extrapolated" in told for told in answer.warnings)
    assert "without the largest size" in answer.assumption  # the size is what is uncertain


def test_a_measured_loss_goes_before_the_law_and_its_miss_is_said():
    """Measured .03 below the law: what was measured is the answer, wherever it is used."""
    points = study().assign(se=1e-4)
    odd = (points["N"] == 3.0) & (points["k"] == 6)
    points.loc[odd, "ce"] -= 0.03
    curve = Curve(points, 3.0)
    answer = loss(curve, 6)
    measured = float(points.loc[odd, "ce"].iloc[0])
    assert answer.value == measured
    assert answer.ends == pytest.approx((measured - 1.645e-4, measured + 1.645e-4), abs=1e-7)
    assert "measured" in answer.answer and "the law gives" in answer.answer
    assert experts(curve, measured).value == 6
    assert stop(curve, 0.003).table[5]["loss"] == measured
    row = rule(pd.concat([points, study(method="ties")]), 3.0, 6).table[0]
    assert row["best"] == "average" and row["loss"] == measured


def test_a_law_that_misses_a_measured_loss_says_by_how_much():
    points = study(sizes=[3.0], noise=1e-5, M=14).assign(se=1e-6)
    assert "misses" not in loss(Curve(points, 3.0), 6).answer
    points.loc[points["k"] == 6, "ce"] += 3e-3
    assert "and misses it by 0.002" in loss(Curve(points, 3.0), 6).answer


def test_a_size_near_a_measured_one_is_that_one_and_a_count_of_parameters_is_none():
    assert loss(Curve(study(), 3.02), 6).value == loss(Curve(study(), 3.0), 6).value
    with pytest.raises(MergelawError, match="billions of parameters"):
        Curve(study(), 3e9)


def test_k_beyond_the_pool_carries_its_warning():
    answer = loss(Curve(study(), 3.0), 30)
    assert any("more than this pool of 9" in told for told in answer.warnings)
    assert "experts beyond the pool" in answer.assumption


# ---- experts


@settings(max_examples=25)
@given(b=st.floats(0, 2), count=st.integers(2, 9))
def test_the_number_of_experts_is_the_laws_rounded_up(b, count):
    points = study(noise=0, sizes=[3.0], b=b)
    own = {"L_inf": truth(3.0, math.inf), "A": 0.08 * 3.0**-0.1, "b": b}
    between = MERGING_FIXED_N.predict(own, k=np.array([count - 0.5]))[0]
    answer = experts(Curve(points, 3.0), between)
    assert answer.value == count
    assert f"k = {count}" in answer.answer


def test_an_interval_of_experts_holds_the_truth():
    points = study(noise=3e-4)
    target = truth(3.0, 6) + 1e-6
    answer = experts(Curve(points, 3.0, level=0.99), target)
    assert answer.ends[0] <= 6 <= answer.ends[1]
    assert answer.ends[0] < answer.ends[1]


def test_a_target_beyond_the_pool_is_not_reachable_with_it():
    answer = experts(Curve(study(noise=0), 3.0), truth(3.0, 20))
    assert answer.value == pytest.approx(20, abs=1)
    assert "more than this pool of 9" in answer.answer


def test_a_target_below_the_floor_is_refused():
    floor = truth(3.0, math.inf)
    with pytest.raises(MergelawError, match="below the floor of 3B") as refused:
        experts(Curve(study(), 3.0), floor - 0.05)
    assert "\n" not in str(refused.value)


def test_a_target_that_a_measured_mean_reaches_is_reached_whatever_the_floor():
    points = study(sizes=[3.0], noise=1e-4)
    points.loc[points["k"] == 4, "ce"] = truth(3.0, math.inf) - 0.1
    answer = experts(Curve(points, 3.0), truth(3.0, math.inf) - 0.05)
    assert answer.value == 4 and "is measured at k = 4" in answer.answer
    assert "larger base" not in answer.answer


# ---- laws that fail


def rising(**columns):
    """One base whose loss rises with k."""
    points = study(sizes=[3.0], noise=0)
    return points.assign(ce=0.9 + 0.01 * points["k"] + 0.001 * (points["k"] % 2), **columns)


@pytest.mark.parametrize("question", ["loss", "experts", "stop", "measure", "budget"])
def test_a_law_that_fails_gives_no_numbers_only_measured_ones(question):
    curve = Curve(rising(), 3.0)
    assert curve.fails
    ask = {
        "loss": lambda: loss(curve, 12),
        "experts": lambda: experts(curve, 0.5),
        "stop": lambda: stop(curve, 0.002),
        "measure": lambda: measure(curve, 12),
        "budget": lambda: budget(curve, 2, prices()),
    }
    answer = ask[question]()
    assert answer.value is None and answer.ends is None
    assert "the law fails" in answer.answer and "at k = 1" in answer.answer
    assert [row["k"] for row in answer.table] == list(range(1, 10))
    assert "larger base" not in answer.summary() and "floor" not in answer.answer


def test_a_law_that_fails_leaves_measured_losses_to_be_asked():
    curve = Curve(rising(), 3.0)
    assert loss(curve, 3).value == pytest.approx(0.931)
    answer = experts(curve, 0.935)
    assert answer.value == 1 and "is measured at k = 1" in answer.answer
    both = pd.concat([rising(), study(sizes=[3.0], method="ties")])
    assert len(rule(both, 3.0).table) == 9
    with pytest.raises(MergelawError, match="no size has the curves of two methods"):
        rule(both, 3.0, 12)


def test_a_doubtful_law_says_so_beside_the_answer():
    three = Curve(study(sizes=[3.0], k=[1, 2, 4]), 3.0)
    assert three.state == "doubtful"
    assert loss(three, 9).answer.endswith("the law is doubtful")


def test_an_upper_end_that_never_gets_there_is_infinite():
    points = study(noise=2e-3, seed=1)
    curve = Curve(points, 3.0)
    floor, (low, high) = curve.by_law(math.inf)
    assert low < floor < high
    answer = experts(curve, (floor + high) / 2)
    assert math.isinf(answer.ends[1])
    assert json.loads(answer.to_json())["high"] is None
    assert "perhaps never" in answer.answer
    answer = experts(curve, (floor + low) / 2)  # below the floor, but inside its interval
    assert "may or may not be reached" in answer.answer
    assert json.loads(answer.to_json())["value"] is None


# ---- stop


def test_stop_where_one_more_gains_too_little():
    points = study(noise=0)
    gains = [truth(3.0, k) - truth(3.0, k + 1) for k in range(1, 10)]
    answer = stop(Curve(points, 3.0), (gains[3] + gains[4]) / 2)
    assert answer.value == 5
    assert [row["next gains"] for row in answer.table] == pytest.approx(gains, rel=1e-3)
    assert answer.table[-1]["of the way to k = 9"] == pytest.approx(1)
    never = stop(Curve(points, 3.0), 1e-5)
    assert "use all 9 experts" in never.answer and never.value > 9


def test_an_interval_of_a_difference_knows_that_errors_are_shared():
    """L(8) - L(9) is known far better than either loss."""
    curve = Curve(study(noise=5e-4), 3.0)
    value, (low, high) = curve.gain_by_law(8)
    assert low < truth(3.0, 8) - truth(3.0, 9) < high
    assert value == pytest.approx(curve.by_law(8)[0] - curve.by_law(9)[0], abs=1e-8)
    ends = curve.fitted.predict_interval(k=9)
    assert high - low < 0.3 * (ends[1] - ends[0])


def test_gains_are_measured_where_their_errors_are_known():
    points = study(sizes=[3.0], noise=5e-4).assign(se=1e-4)
    curve = Curve(points, 3.0)
    measured = points["ce"].iloc[3] - points["ce"].iloc[4]
    value, (low, high) = curve.gain(4)
    assert value == pytest.approx(measured)
    assert high - low == pytest.approx(2 * 1.645e-4 * math.sqrt(2), rel=1e-3)
    assert curve.gain(9) == curve.gain_by_law(9)


# ---- budget


def test_free_experts_are_bought_first_and_a_cheap_large_base_otherwise():
    points = study()
    dear = prices(training=[1, 1, 1, 1000, 1000])
    more = budget(Curve(points, 3.0, law=MERGING), 4, dear, amount=10)
    assert more.answer.startswith("more experts")
    assert "no larger base is to be had for less than" in more.reason
    cheap = prices(training=[1, 1, 100, 1, 1])
    larger = budget(Curve(points, 3.0, law=MERGING), 4, cheap, amount=10)
    assert larger.answer.startswith("larger base")
    assert larger.value == pytest.approx(truth(3.0, 4) - truth(14.0, 9), abs=1e-3)
    assert larger.ends[0] <= larger.value <= larger.ends[1]


def test_serving_makes_a_larger_base_dear():
    points = study()
    served = prices(serving=[n for n in SIZES])
    cheap = budget(Curve(points, 3.0, law=MERGING), 4, served)
    dear = budget(Curve(points, 3.0, law=MERGING), 4, served, serve=1000)
    assert cheap.answer.startswith("larger base")
    assert dear.answer.startswith("more experts")


def test_experts_that_are_there_cost_no_training():
    points = study()
    costs = prices()
    without = {row["step"]: row for row in budget(Curve(points, 3.0, law=MERGING), 4, costs).table}
    with_ = {
        row["step"]: row for row in budget(Curve(points, 3.0, law=MERGING), 4, costs, have=9).table
    }
    assert with_["more experts"]["cost"] == pytest.approx(0.5)
    assert without["more experts"]["cost"] == pytest.approx(30.5)


def test_a_budget_that_buys_nothing_and_other_bad_questions_are_refused():
    points, costs = study(), prices()
    for arguments, message in (
        ({"amount": 0.1}, "buys no step"),
        ({"amount": -1}, "give an amount of 0 or more"),
        ({"larger": [1.0]}, "no base larger"),
    ):
        with pytest.raises(MergelawError, match=message):
            budget(Curve(points, 3.0, law=MERGING), 4, costs, **arguments)
    with pytest.raises(MergelawError, match="no base larger"):
        budget(Curve(points, 14.0, law=MERGING), 4, costs)
    with pytest.raises(MergelawError, match="3 sizes N of bases"):
        budget(Curve(points[points["N"] <= 1.5], 0.5, law=MERGING), 4, costs)


# ---- rule


def test_the_rule_with_the_lowest_law_wins_and_a_close_race_is_called_one():
    ahead = pd.concat([study(), study(method="ties", L_star=0.38, seed=1)])
    answer = rule(ahead, 3.0, 4)
    assert answer.answer.startswith("3B, k = 4: ties, ahead of average")
    assert answer.ends[0] < 0.02 < answer.ends[1]
    close = pd.concat([study(), study(method="ties", seed=1)])
    assert "not to be told apart" in rule(close, 3.0, 4).answer
    everywhere = rule(ahead)
    assert len(everywhere.table) == len(SIZES) * 9
    assert "ties is best at 45 of 45" in everywhere.answer


# ---- measure


def test_missing_levels_of_k_are_bought_until_the_interval_is_halved():
    points = study(k=[1, 2, 4, 6], noise=5e-4)
    answer = measure(Curve(points, 3.0), 9)
    assert answer.value <= 0.5
    assert answer.table[0]["buy"].startswith("k = ")
    assert [row["share"] for row in answer.table] == sorted(
        (row["share"] for row in answer.table), reverse=True
    )
    # what was promised comes about: with those points measured the interval is about as narrow
    bought = [int(row["buy"].split()[2]) for row in answer.table]
    more = study(k=sorted([1, 2, 4, 6, *bought]), noise=0)
    more = more[(more["N"] == 3.0) & more["k"].isin(bought)]
    after = Curve(pd.concat([points, more], ignore_index=True), 3.0)
    before = Curve(points, 3.0)
    ends = [curve.fitted.predict_interval(k=9) for curve in (before, after)]
    assert ends[1][1] - ends[1][0] < 0.75 * (ends[0][1] - ends[0][0])


def test_the_main_assumption_names_the_heaviest_other_form():
    """Measured where forms differ: a light one that is farther away is not the one to fear."""
    curve = Curve(study(sizes=[3.0], k=[1, 2, 3, 4, 5, 6], noise=5e-4), 3.0)
    first, *others = [row for row in curve.forms(9) if row["form"] != "merging"]
    law = float(curve.law.predict(k=9))
    away = [abs(row["loss"] - law) for row in (first, *others)]
    assert max(away) > away[0]  # the table has a farther, lighter one
    assert f"the form {first['form']} (weight" in curve.assumption(9)
    alone = Curve(study(noise=1e-6), 3.0)
    assert [row["form"] for row in alone.forms(9)] == ["merging"]
    assert alone.assumption(9).endswith("no other form fits nearly as well and differs")


def test_a_size_is_bought_for_a_forecast_beyond_the_ladder():
    answer = measure(Curve(study(), 28.0), 9, prices())
    assert all("a base of N" in row["buy"] or "k = " in row["buy"] for row in answer.table)
    assert any("a base of N" in row["buy"] for row in answer.table)
    assert "hours" in answer.answer
    # the base that is asked about is no answer, nor is a larger one
    sizes = [row["buy"].split("N = ")[1].split()[0] for row in answer.table if "N = " in row["buy"]]
    assert all(float(size) < 28 for size in sizes)


def test_more_circles_are_bought_where_points_have_standard_errors():
    points = study(noise=3e-4, sizes=[3.0], M=9).assign(se=3e-4, replicates=3)
    answer = measure(Curve(points, 3.0), 12)
    assert any("circles again" in row["buy"] for row in answer.table)
    answer = measure(Curve(points, 3.0), 9, share=0.5)
    assert "it is measured" in answer.answer and "4 times as many circles" in answer.answer


def test_circles_narrow_what_all_points_of_a_base_share():
    """One shift of all points: twice the circles halve its variance, whatever the law."""
    points = study(noise=0, sizes=[3.0], M=6).assign(se=1e-3, sampling=[[1e-3]] * 6, freedom=np.inf)
    (row,) = measure(Curve(points, 3.0), 7).table
    assert "circles again" in row["buy"] and row["share"] == pytest.approx(0.5**0.5, rel=0.05)


def test_an_exhausted_pool_has_nothing_to_sell():
    answer = measure(Curve(study(noise=5e-4), 3.0), 12)
    assert "nothing to buy" in answer.answer and "all k of this pool" in answer.answer
    with pytest.raises(MergelawError, match="no interval to narrow"):
        measure(Curve(study(k=[1, 2, 4]), 3.0), 9)


# ---- costs


def test_costs_are_power_laws_between_and_beyond_the_sizes():
    costs = prices()
    assert costs.at(2.0, "training") == pytest.approx(20)
    assert costs.at(56.0, "training") == pytest.approx(560)
    assert costs.at(3.0, "serving") == 0
    one = Costs(
        pd.DataFrame({"N": [2.0], "training": 6.0, "merging": 0, "evaluation": 0, "serving": 0})
    )
    assert one.at(4.0, "training") == pytest.approx(12)


@pytest.mark.parametrize(
    "text, message",
    [
        ("N,training\n3,5\n7,x\n", "row 2 has training = x"),
        ("N,training\n3,-5\n", "row 1 has training = -5"),
        ("N,train\n3,5\n", "not train"),
        ("training\n5\n", "column N"),
        ("N,training\n0,5\n", "above 0"),
    ],
)
def test_a_bad_file_of_costs_is_refused_in_a_line(tmp_path, text, message):
    file = tmp_path / "costs.csv"
    file.write_text(text)
    with pytest.raises(MergelawError, match=message):
        Costs.read(file)
    with pytest.raises(MergelawError, match="No such file"):
        Costs.read(tmp_path / "none.csv")


def test_a_file_of_costs_is_read(tmp_path):
    file = tmp_path / "costs.csv"
    file.write_text("N,training\n3,5\n7,9\n")
    costs = Costs.read(file)
    assert costs.table["N"].tolist() == [3, 7]
    assert costs.at(3, "training") == pytest.approx(5)
    assert costs.at(3, "merging") == 0


def artifact(folder, stage, recipe, inputs, work=lambda folder: None):
    store.make(folder, stage, recipe, inputs, lambda out, state: work(out))
    return folder


def test_costs_come_from_the_lineage_of_the_laws(tmp_path):
    evals, seconds = [], {}
    for base, N in (("small", 1.0), ("large", 4.0)):
        vectors = {}
        for name in ("a", "b"):
            expert = artifact(tmp_path / base / f"{name}@1", "expert", {"training": {}}, {})
            seconds.setdefault(N, []).append(lineage.read(expert)["wall_seconds"])
            vectors[f"task-vector:{name}"] = artifact(
                tmp_path / base / f"v{name}@1", "task_vector", {}, {"expert": expert}
            )
        rows = pd.DataFrame(
            {
                "base": base,
                "N": N,
                "method": "average",
                "role": "merge",
                "merge": ["a", "a", "b", "b"],
                "cell": [f"{base}{i}" for i in range(4)],
                "merge_seconds": 0.5 * N,
                "eval_seconds": 2.0 * N,
                "tokens": 1000,
            }
        )
        evals.append(
            artifact(
                tmp_path / base / "evals@1",
                "evaluate",
                {},
                vectors,
                lambda out, rows=rows: rows.to_parquet(out / "cells.parquet"),
            )
        )
    laws = artifact(tmp_path / "laws@1", "fit", {}, {f"evals:{i}": e for i, e in enumerate(evals)})
    costs = Costs(measured_costs(laws), "seconds")
    assert costs.table["merging"].tolist() == [0.5, 2.0]
    assert costs.table["evaluation"].tolist() == [4.0, 16.0]  # two domains a merge
    assert costs.table["serving"].tolist() == [2000.0, 8000.0]
    assert costs.table["training"].tolist() == pytest.approx([np.mean(seconds[N]) for N in (1, 4)])
    with pytest.raises(MergelawError, match="no lineage"):
        measured_costs(tmp_path)


# ---- all of them


QUESTIONS = {
    "loss": lambda points: loss(Curve(points, 3.0), 6),
    "experts": lambda points: experts(Curve(points, 3.0), truth(3.0, 5)),
    "stop": lambda points: stop(Curve(points, 3.0), 0.003),
    "budget": lambda points: budget(Curve(points, 3.0, law=MERGING), 4, prices()),
    "rule": lambda points: rule(pd.concat([points, points.assign(method="other")]), 3.0),
    "measure": lambda points: measure(Curve(points, 28.0), 9),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_answer_has_reason_and_assumption_and_is_strict_json(question):
    answer = QUESTIONS[question](study())
    told = json.loads(answer.to_json())
    assert told["question"] == question
    assert told["reason"] and told["assumption"] and told["answer"]
    text = answer.summary()
    assert "why: " in text and "main assumption: " in text


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda p: loss(Curve(p, -1), 4), "billions"),
        (lambda p: loss(Curve(p, 3.0), 0), "1 or more"),
        (lambda p: loss(Curve(p, 3.0), math.nan), "1 or more"),
        (lambda p: loss(Curve(p, 3.0, level=2), 4), "probability"),
        (lambda p: experts(Curve(p, 3.0), -0.1), "below the floor"),
        (lambda p: experts(Curve(p, 3.0), math.nan), "below the floor"),
        (lambda p: stop(Curve(p, 3.0), 0), "above 0"),
        (lambda p: measure(Curve(p, 3.0), 4, share=2), "between 0 and 1"),
    ],
)
def test_questions_that_make_no_sense_are_refused_in_a_line(ask, message):
    with pytest.raises(MergelawError, match=message) as refused:
        ask(study(sizes=[3.0]))
    assert "\n" not in str(refused.value)


def test_of_bases_about_as_large_the_named_or_nearest_one_is_meant(tmp_path):
    near = study(sizes=[6.74]).assign(base="llama")
    both = pd.concat([study(sizes=[6.66]).assign(base="other", ce=lambda t: t["ce"] + 0.3), near])
    alone = loss(Curve(near, 6.74), 4)
    for N in (6.74, 6.75):
        assert loss(Curve(both, N), 4).value == alone.value
    same = pd.concat([both, both[both["base"] == "llama"].assign(base="twin", ce=0.9)])
    with pytest.raises(MergelawError, match=r"is the size of llama, twin; name one with --base"):
        loss(Curve(same, 6.74), 4)
    file = tmp_path / "points.csv"
    same[["N", "k", "ce", "M", "base"]].to_csv(file, index=False)
    for base, value in (("llama", alone.value), ("twin", 0.9)):
        told = asked("plan", "loss", str(file), "--base", base, "--k", "4", "--json")
        assert json.loads(told.stdout)["value"] == pytest.approx(value)
        assert json.loads(told.stdout)["answer"].startswith(f"{base}, k = 4")


def test_what_costs_nothing_is_not_made_up():
    costs = Costs(
        pd.DataFrame(
            {"N": [7.0, 14.0], "training": [0.0, 100.0], "merging": 0.0, "evaluation": 0.0}
        )
    )
    assert costs.at(7.0, "training") == 0 and costs.at(14.0, "training") == pytest.approx(100)
    costs = Costs(costs.table.assign(training=[math.nan, 100.0]))  # not known
    assert costs.at(7.0, "training") == pytest.approx(50)


def test_steps_that_cost_nothing_can_be_bought_and_measured():
    free = prices(merging=0.0, evaluation=0.0)
    few = study(k=[1, 2, 4, 8], sizes=[3.0])
    bought = measure(Curve(few, 3.0), 9, free)
    assert bought.table and bought.table[0]["cost"] == 0
    with pytest.raises(MergelawError, match="costs nothing, so no gain per cost"):
        budget(Curve(study(), 3.0, law=MERGING), 4, free, have=8)
    answer = budget(Curve(study(), 3.0, law=MERGING), 4, free, have=8, amount=0)
    assert answer.answer.startswith("more experts, k = 8")
    json.loads(answer.to_json())


def test_a_rule_needs_two_methods_at_one_size():
    apart = pd.concat([study(sizes=[1.5]), study(sizes=[3.0], method="ties")])
    for points in (study(sizes=[3.0]), apart):
        with pytest.raises(MergelawError, match="no size has the curves of two methods"):
            rule(points)


def asked(*words):
    command = [sys.executable, "-c", "from mergelaw.cli.app import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ})


def test_the_command_answers_and_refuses(tmp_path):
    file = tmp_path / "points.csv"
    study()[["N", "k", "ce", "M"]].to_csv(file, index=False)

    done = asked("plan", "loss", str(file), "--N", "3", "--k", "6", "--json")
    assert json.loads(done.stdout)["value"] == pytest.approx(truth(3.0, 6), abs=4e-4)
    done = asked("forecast", str(file), "--N", "3")
    assert done.returncode == 0 and "three-point forecast" in done.stdout
    done = asked("forecast", str(file), "--N", "100")  # not measured: from the sizes that are
    assert done.returncode == 0 and "size forecast" in done.stdout
    assert done.stdout == asked("forecast", str(file), "--N", "100", "--scheme", "size").stdout
    refused = asked("forecast", str(file), "--N", "300", "--scheme", "end-point")
    assert refused.returncode == 1 and "no base of N = 300 is measured" in refused.stderr
    refused = asked("plan", "experts", str(file), "--N", "3", "--target", "0.1")
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr.startswith("mergelaw: error: target 0.1 is below the floor")
    assert refused.stderr.count("\n") == 1


# ---- the study's results


def test_the_rule_shows_what_its_curves_warn_of_and_which_are_missing():
    few = study(method="ties", sizes=[0.1], k=[1, 2])  # too far away for any law
    points = pd.concat([study(), study(method="dare", sizes=[3.0], b=0.0, noise=0), few])
    assert not any("b hit its bound" in text for text in rule(points, 3.0, 4).warnings)  # measured
    answer = rule(points, 3.0, 12)
    assert any(told.startswith("ties at N = 3: not compared: ") for told in answer.warnings)
    bound = [told for told in answer.warnings if "b hit its bound 0" in told]
    assert bound and bound[0].startswith("dare at 3B: ")


def test_what_was_assumed_on_reading_is_in_the_answer(tmp_path):
    file = tmp_path / "points.csv"
    study(sizes=[3.0])[["N", "k", "ce"]].to_csv(file, index=False)
    told = json.loads(asked("plan", "loss", str(file), "--k", "6", "--json").stdout)
    assert any(warning.startswith("M is not given") for warning in told["warnings"])


@pytest.fixture
def demo(tmp_path):
    """The demo's configuration with results of its own, and the study that it is of."""
    text = Path("config/config.yaml").read_text(encoding="utf-8")
    file = tmp_path / "study.yaml"
    file.write_text(f"results: {tmp_path / 'results'}\n{text}", encoding="utf-8")
    return file, Study(load(file))


def test_a_study_is_asked_by_its_configuration(demo):
    file, known = demo
    with pytest.raises(MergelawError, match=r"not fitted yet; run `snakemake .*study\.yaml`$"):
        find_laws(file)
    old = known.results / "laws" / f"{known.config.name}@00000000"
    old.mkdir(parents=True)
    with pytest.raises(MergelawError, match=r"another configuration or version are in .*@00000000"):
        find_laws(file)
    partial = known.results / "partial" / known.config.name / "laws"
    partial.mkdir(parents=True)
    (partial / "laws.json").write_text('{"missing": ["a", "b"]}')
    found, (warning,) = find_laws(file)
    assert found == partial and f"2 of {len(known.evals)} shards" in warning
    laws = jobs.pretend(known.results, known.laws)
    assert find_laws(file) == (laws, [])
    (laws / "data.bin").write_text("edited")
    with pytest.raises(MergelawError, match=r"data\.bin: is not what was written"):
        find_laws(file)


def test_without_a_name_the_study_of_this_folder_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(app, ["plan", "loss", "--k", "3"]).exception
    assert isinstance(refused, MergelawError) and "config/config.yaml" in str(refused)


@pytest.mark.parametrize("question", ["forecast", *QUESTIONS])
def test_every_question_has_an_example_and_the_shared_options(question):
    words = ["forecast"] if question == "forecast" else ["plan", question]
    told = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"}).output
    assert f"Example: mergelaw {' '.join(words)} " in told
    shared = {"--base", "--N", "--domain", "--family", "--level", "--json"}
    assert all(option in told for option in shared)
    assert ("--method" in told.split("Options", 1)[1]) == (question != "rule")
