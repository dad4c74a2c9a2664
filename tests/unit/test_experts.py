"""Verdicts on experts, against a pool whose truth is known."""

from itertools import combinations, permutations

import numpy as np
import pandas as pd
import pytest

import pool
from mergelaw.decide import best, by_base, experts, flagged
from mergelaw.errors import MergelawError

GOOD = pool.EXPERTS[:-1]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pool.rows()


def verdicts(table, **options):
    return {verdict.expert: verdict for verdict in experts(pool.measured(table), **options)}


def test_the_outlier_is_named_with_what_was_measured(table):
    every = verdicts(table)
    assert {name: v.word for name, v in every.items()} == {
        **dict.fromkeys(GOOD, "helps"), "code": "outlier",
    }  # fmt: skip
    macro = table[table["method"] == "average"].groupby("merge")["ce"].mean()
    alone = {e: macro[f"merge-average-{e}"] for e in pool.EXPERTS}
    code = every["code"]
    assert code.alone == pytest.approx(alone["code"])
    assert code.others == pytest.approx((min(alone[e] for e in GOOD), max(alone[e] for e in GOOD)))
    assert code.sentence.startswith(
        f"code: OUTLIER, leave it out of equally weighted merges: alone {alone['code']:.4f} where others have "
    )


def test_with_and_without_compare_merges_of_the_same_size(table):
    code = verdicts(table, method="ties")["code"]
    ties = table[(table["method"] == "ties") & (table["k"] > 1)]
    macro = ties.groupby("merge").agg(ce=("ce", "mean"), k=("k", "first"), e=("experts", "first"))
    inside = macro["e"].map(lambda members: "code" in members)
    sizes = [k for k in range(2, 6)]
    means = [[macro[(macro["k"] == k) & (inside == has)]["ce"].mean() for k in sizes]
             for has in (True, False)]  # fmt: skip
    assert code.with_it == pytest.approx(np.mean(means[0]))
    assert code.without_it == pytest.approx(np.mean(means[1]))
    assert code.effect.value == pytest.approx(np.mean(means[0]) - np.mean(means[1]))
    low, high = code.effect.ends
    assert low < code.effect.value < high and code.effect.clear


def test_what_an_expert_adds_is_its_shapley_value(table):
    """By the definition: over all orders of the pool, the mean change when the expert joins."""
    good = table[table["method"].eq("average") & ~table["experts"].map(lambda e: "code" in e)]
    good = pd.concat([table[table["role"] == "base"], good])
    loss = {frozenset(e): ce for e, ce in
            zip(good["experts"].map(tuple), good.groupby("merge")["ce"].transform("mean"),
                strict=True)}  # fmt: skip
    shapley = dict.fromkeys(GOOD, 0.0)
    for order in permutations(GOOD):
        for place, expert in enumerate(order):
            before = frozenset(order[:place])
            shapley[expert] += (loss[before | {expert}] - loss[before]) / 120
    every = verdicts(good)
    for expert in GOOD:
        assert every[expert].adds.value == pytest.approx(shapley[expert])
        assert np.mean(list(every[expert].by_domain.values())) == pytest.approx(shapley[expert])
    assert sum(shapley.values()) == pytest.approx(loss[frozenset(GOOD)] - loss[frozenset()])


def test_each_expert_gives_most_to_its_own_domain(table):
    for name, verdict in verdicts(table).items():
        if name != "code":
            assert min(verdict.by_domain, key=verdict.by_domain.__getitem__) == name


def test_twins_are_redundant():
    def truth(method, members, domain):
        distinct = tuple({"sql" if e == "twin" else e for e in members})
        return pool.good_pool(method, distinct, domain)

    names = ("dates", "extract", "sql", "twin")
    every = verdicts(pool.rows(truth, experts=names, domains=names[:3], noise=0.02))
    assert every["twin"].word == "redundant" and every["twin"].alike[0] == "sql"
    assert every["dates"].word == "helps"


def test_a_circle_says_what_its_subsets_allow(table):
    ring = [tuple(sorted(pool.EXPERTS[(i + j) % 6] for j in range(k)))
            for k in (2, 5, 6) for i in range(6)]  # fmt: skip
    verdict = verdicts(pool.rows(subsets=list(dict.fromkeys(ring))))["code"]
    assert verdict.alone is None and verdict.adds is None
    assert verdict.effect.value > 0.1 and verdict.word == "harms"
    assert verdict.left_out.value < 0 and set(verdict.by_domain) == set(pool.EXPERTS)


def test_bad_questions_are_one_line(table):
    with pytest.raises(MergelawError, match="no merges by 'tie'; the study measures average, ties"):
        experts(pool.measured(table), "tie")
    single = pool.rows(subsets=[("sql",)])
    with pytest.raises(MergelawError, match="merges of one expert only"):
        experts(pool.measured(single))


def test_many_models_are_read_in_parts(table, monkeypatch):
    whole = verdicts(table)
    monkeypatch.setattr("mergelaw.decide.measured.CHUNK", 7)
    assert len(list(combinations(pool.EXPERTS, 3))) > 7
    for name, verdict in verdicts(table).items():
        assert verdict.adds.value == pytest.approx(whole[name].adds.value)
        assert verdict.adds.error == pytest.approx(whole[name].adds.error)


def test_an_expert_without_any_finite_merge_is_named_and_the_others_are_judged_without_it(table):
    table = table.copy()
    broken = table["experts"].map(lambda members: "code" in members)
    table.loc[broken, "ce"], table.loc[broken, "finite"] = np.nan, False
    (one,), warnings = by_base(table, lambda models: table[table["merge"].isin(models)])
    every = {verdict.expert: verdict for verdict in experts(one)}
    assert every["code"].word == "broken" and every["sql"].word == "helps"
    assert flagged(one) == ["code: BROKEN, leave it out: no merge with it has a finite loss"]
    assert "64 models" in warnings[0] and "all" not in best(one).sentence


def test_training_seeds_are_told_apart(table):
    """A second seed is another merge; its own expert alone is its reference."""
    second = table[table["role"] == "merge"].assign(seed=1)
    second = second.assign(merge=second["merge"] + "-1", ce=second["ce"] - 0.01)
    answer = best(pool.measured(pd.concat([table, second])))
    assert answer.sentence.startswith("Ship ties of dates, extract, german, maths, sql (seed 1): ")
    assert {model.seed for model in answer.alone.values()} == {1}
    assert "--seed 1" in answer.command("study.yaml", True)
