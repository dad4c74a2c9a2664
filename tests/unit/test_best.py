"""The best measured merge: the right one, with honest differences."""

import json
import math

import numpy as np
import pandas as pd
import pytest

import pool
from mergelaw.cli.decide import best_text
from mergelaw.decide import Objective, best, by_base
from mergelaw.decide.tables import ranking
from mergelaw.errors import MergelawError

GOOD = ("dates", "extract", "german", "maths", "sql")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pool.rows()


def test_the_best_merge_leaves_the_bad_expert_out_and_its_sentence_says_so(table):
    answer = best(pool.measured(table))
    model = answer.model
    assert (model.method, model.experts) == ("ties", GOOD)
    macro = table.groupby("merge")["ce"].mean()
    assert answer.values[0] == pytest.approx(macro[model.identity])
    assert [m.identity for m in answer.ranking] == [
        m for m in macro.sort_values().index if m.startswith("merge")
    ]
    cost = macro["merge-ties-" + "+".join(pool.EXPERTS)] - macro[model.identity]
    assert answer.sentence == (
        f"Ship ties of {', '.join(GOOD)}: {macro[model.identity]:.4f} "
        f"(base {macro['base--']:.4f}; without code, which costs {cost:.4f})"
    )


def test_the_share_kept_is_of_the_gains_of_single_experts(table):
    """`code` loses to the base everywhere, so on its domain the best single expert is another."""
    answer = best(pool.measured(table))
    ce = table.pivot_table(index="merge", columns="domain", values="ce")
    base = ce.loc["base--"]
    alone = ce.loc[[f"merge-average-{expert}" for expert in pool.EXPERTS]].min()
    share = (base - ce.loc[answer.model.identity]).sum() / (base - alone).sum()
    assert answer.kept(answer.model) == pytest.approx(share)
    assert {d: m.experts for d, m in answer.specialists.items() if d != "code"} == {
        d: (d,) for d in GOOD
    }


def test_differences_hold_for_other_documents():
    """The 90% interval of a difference contains the true one in 85 to 95% of 300 draws."""
    subsets = [("dates", "sql"), ("dates", "maths")]
    truth = 0.003

    def loss(method, experts, domain):
        return pool.good_pool(method, experts, domain) + (truth if "maths" in experts else 0)

    held = 0
    for seed in range(300):
        table = pool.rows(
            loss, methods=("average",), subsets=subsets, seed=seed, documents=8, noise=0.02,
            experts=("dates", "sql", "maths"), domains=("dates", "extract"),
        )  # fmt: skip
        answer = best(pool.measured(table))
        (difference,) = answer.ahead.values()
        low, high = difference.ends
        gap = truth if answer.model.experts == subsets[0] else -truth
        held += low <= gap <= high
    assert 0.85 <= held / 300 <= 0.95


def test_optimism_is_what_choosing_the_lowest_of_equals_gains():
    """Merges of equal loss: the lowest looks better than it is by about the reported optimism."""
    gaps, reported = [], []
    for seed in range(20):
        table = pool.rows(
            lambda *_: 0.9, methods=("average",), domains=("dates",), documents=40, noise=0.1,
            seed=seed,
        )  # fmt: skip
        answer = best(pool.measured(table))
        gaps.append(0.9 - answer.values[0])
        reported.append(answer.optimism)
        assert len(answer.tied) > 5 and "cannot be distinguished" in answer.doubt
    assert np.mean(reported) == pytest.approx(np.mean(gaps), rel=0.4)
    assert min(reported) > 0


def test_weights_and_limits_change_the_choice(table):
    measured = pool.measured(table)
    weighted = best(measured, Objective(weights={"maths": 1.0}))
    assert weighted.model.experts == ("maths",)
    assert weighted.values[0] == pytest.approx(weighted.model.losses[pool.EXPERTS.index("maths")])
    limited = best(measured, Objective(weights={"maths": 1.0}, limits={"sql": -0.1}))
    assert "sql" in limited.model.experts
    above = limited.model.losses - measured.reference.losses
    assert above[pool.EXPERTS.index("sql")] <= -0.1
    with pytest.raises(MergelawError, match=r"within the limits; the closest.*relax --not-above"):
        best(measured, Objective(limits={"all": -0.5}))


def test_the_worst_domain_is_counted_from_the_base():
    table = pool.rows(pool.good_pool)
    answer = best(pool.measured(table), Objective(kind="worst"))
    ce = table.pivot_table(index="merge", columns="domain", values="ce")
    worst = (ce - ce.loc["base--"]).max(axis=1).drop("base--")
    assert answer.model.identity == worst.idxmin()
    assert answer.values[0] == pytest.approx(worst.min())
    second = answer.ranking[1].identity
    assert answer.ahead[second].value == pytest.approx(worst[second] - worst.min())


def test_no_merge_is_recommended_that_loses_to_the_base():
    answer = best(pool.measured(pool.rows(lambda *_: 1.2)))
    assert answer.sentence.startswith("Ship the base: no measured merge improves on it")
    text = best_text(answer, "study.yaml", 3, False)
    assert answer.command("study.yaml", False) is None and answer.share == ""
    assert "mergelaw merge" not in text and "rule: " not in text and "the lowest merge" in text


def test_held_out_domains_do_not_count(table):
    held_out = best(pool.measured(pool.rows(held_out=["code", "sql"])))
    ce = pool.rows(held_out=["code", "sql"])
    held_in = ce[~ce["held_out"] & (ce["merge"] == held_out.model.identity)]
    assert held_out.values[0] == pytest.approx(held_in["ce"].mean())


def test_unknown_domains_and_bad_weights_are_one_line(table):
    measured = pool.measured(table)
    for objective, words in (
        (Objective(weights={"math": 1.0}), "no domain 'math'; did you mean 'maths'"),
        (Objective(limits={"other": 1.0}), "no domain 'other'"),
        (Objective(weights={"maths": -1.0}), "numbers of 0 or more"),
        (Objective(kind="worst", weights={"maths": 1.0}), "one of the two"),
    ):
        with pytest.raises(MergelawError, match=words):
            best(measured, objective)


def test_a_loss_that_is_not_finite_is_left_out_with_a_warning(table):
    table = table.copy()
    broken = table["merge"] == "merge-ties-" + "+".join(GOOD)
    table.loc[broken & (table["domain"] == "sql"), ["ce", "finite"]] = math.nan, False
    (one,), warnings = by_base(table, lambda models: table[table["merge"].isin(models)])
    assert best(one).model.identity != "merge-ties-" + "+".join(GOOD)
    assert "1 models have a loss that is not finite" in warnings[0]
    table.loc[table["role"] == "base", ["ce", "finite"]] = math.nan, False
    none, warnings = by_base(table, lambda models: table)
    assert none == [] and "the base itself has no finite loss" in warnings[0]


def test_one_document_a_domain_gives_no_interval():
    answer = best(pool.measured(pool.rows(documents=1)))
    assert "no interval" in answer.doubt
    json.dumps(answer.to_dict(3), allow_nan=False)


def test_free_weights_are_named_and_written(table):
    table = table.copy()
    chosen = table["merge"] == "merge-ties-" + "+".join(GOOD)
    weights = [2.0, 1.0, 1.0, 1.0, 0.5]
    table.loc[chosen, "weights"] = pd.Series([weights] * int(chosen.sum()), table.index[chosen])
    answer = best(pool.measured(table))
    assert answer.sentence.startswith("Ship ties of 2 dates, 1 extract, 1 german, 1 maths, 0.5 sql")
    assert "--weight 2.0 --weight 1.0 --weight 1.0 --weight 1.0 --weight 0.5" in (
        answer.command("study.yaml", False)
    )


@pytest.mark.parametrize("role", ["written", "merge"])
def test_where_other_weights_win_the_best_merge_with_equal_weights_is_named_too(table, role):
    learned = table[table["merge"] == "merge-ties-" + "+".join(pool.EXPERTS)].copy()
    learned["merge"], learned["role"], learned["method"] = "learned", role, "learned"
    learned["recipe"] = '{"by":"block","method":"learned"}'
    learned["ce"] -= 0.5
    answer = best(pool.measured(pd.concat([table, learned])))
    second = answer.values[1]
    assert answer.sentence.startswith("Ship learned of all 6 experts: ")
    assert f"with equal weights, ties of {', '.join(GOOD)}: {second:.4f})" in answer.sentence


def test_the_share_kept_follows_the_weights_and_is_never_negative_in_words(table):
    measured = pool.measured(table)
    weights = {"maths": 3.0, "sql": 1.0}
    answer = best(measured, Objective(weights=weights))
    ce = table.pivot_table(index="merge", columns="domain", values="ce")
    alone = ce.loc[[f"merge-average-{expert}" for expert in pool.EXPERTS]].min()
    factors = pd.Series(weights)
    gains = factors @ (ce.loc["base--"] - ce.loc[answer.model.identity])[list(weights)]
    assert answer.kept(answer.model) == pytest.approx(
        gains / (factors @ (ce.loc["base--"] - alone)[list(weights)])
    )
    assert "the weighted sum of" in answer.share and answer.share.endswith("over 2 domains.")
    rows = ranking(best(measured), 200).rows
    assert "none" in [row[4] for row in rows] and not any("-" in row[4] for row in rows)
