"""Proposals of merges to measure: the best ones, within the limits, until nothing is left."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

import pool
from mergelaw.decide import Objective
from mergelaw.decide.pareto import pareto
from mergelaw.decide.predict import predictor
from mergelaw.decide.select import select
from mergelaw.errors import MergelawError

EVERY = [s for k in range(1, 7) for s in combinations(pool.EXPERTS, k)]
FEW = [s for s in EVERY if len(s) in (1, 6)] + EVERY[6::7]


def measured_of(subsets, truth=pool.good_pool, **options):
    table = pool.rows(truth, subsets=subsets, documents=12, **options)
    return pool.measured(table)


def propose(one, objective=None, batch=6, **options):
    return select(one, predictor(one), objective or Objective(), batch, **options)


def uneven(method, experts, domain):
    """A pool where two experts harm, so that the best merge is one of four experts."""
    harm = 0.04 * len({"sql", "code"} & set(experts)) * len(experts) ** -0.6
    return pool.good_pool(method, experts, domain) + harm * pool.METHODS[method] * 3


def test_batches_lead_to_the_best_merge_and_then_say_that_nothing_is_left():
    every = measured_of(EVERY, uneven, noise=0.0)
    best = min(every.merges, key=every.macro)
    subsets, earlier = list(FEW), []
    for _ in range(6):
        one = measured_of(subsets, uneven, noise=0.0)
        answer = propose(one, earlier=earlier)
        if not answer.proposals:
            break
        earlier += answer.proposals
        subsets += [p.experts for p in answer.proposals if p.experts not in subsets]
    assert answer.best.experts == best.experts and answer.best.method == best.method
    assert len(subsets) < 0.8 * len(EVERY)
    assert answer.sentences[0].startswith("Nothing is left to gain: the best measured is ties of")
    assert len(answer.realised) == len(earlier)
    assert f"Of {len(earlier)} earlier proposals" in answer.sentences[1]


def test_proposals_are_new_diverse_and_within_the_limits():
    one = measured_of(FEW)
    limits = Objective(at_most=4, require=("sql",), exclude=("code",), methods=("average",))
    answer = propose(one, limits)
    known = {(m.method, frozenset(m.experts)) for m in one.merges}
    names = [frozenset(p.experts) for p in answer.proposals]
    assert len(set(names)) == len(names) > 2
    for proposal in answer.proposals:
        members = set(proposal.experts)
        assert proposal.method == "average" and "sql" in members and "code" not in members
        assert len(members) <= 4 and ("average", frozenset(members)) not in known
        assert proposal.low < proposal.value < proposal.high
    assert answer.best.method == "average" and "sql" in answer.best.experts


def test_a_limit_on_a_domain_is_kept_by_what_is_proposed():
    one = measured_of(FEW)
    place = one.domains.index("maths")
    singles = min(m.losses[place] for m in one.merges if len(m.experts) == 1)
    answer = propose(one, Objective(expert_limits={"maths": 0.05}))
    for p in answer.proposals:
        kept = pool.good_pool(p.method, p.experts, "maths") <= singles + 0.06
        assert kept or "keeps the limits with a chance of" in p.reason
    answer = propose(one, Objective(limits={"all": -5.0}))
    assert not answer.proposals and answer.best is None
    assert "No measured merge keeps the limits" in answer.sentences[0]


def test_predictions_that_failed_their_check_are_never_silently_first():
    one = measured_of(FEW)
    answer = propose(one)
    usable = [p.usable for p in answer.proposals]
    assert usable == sorted(usable, reverse=True)
    assert all(("trial" in p.reason) != p.usable for p in answer.proposals)


def test_all_candidates_measured_and_learned_merges_of_a_limited_pool():
    one = measured_of(EVERY)
    answer = propose(one)
    assert not answer.proposals and answer.candidates == 0
    assert answer.sentences[0].startswith("Every merge within the limits is measured")
    answer = propose(one, Objective(exclude=("code",)), learned=["learned"])
    (proposal,) = answer.proposals
    assert proposal.experts == pool.EXPERTS[:-1] and proposal.value is None
    answer = propose(one, Objective(at_most=2), learned=["learned"])
    assert len(answer.proposals[0].experts) == 2


def test_a_pool_with_nothing_to_predict_has_no_proposals():
    table = pool.rows(pool.good_pool, methods=("average",), documents=12)
    table["recipe"], table["method"] = '{"method":"learned"}', "learned"
    learned = table[table["k"] == 6].assign(experts=table["experts"])
    one = pool.measured(pd.concat([table[table["k"] == 0], learned, pool.rows(subsets=FEW[:7])]))
    answer = propose(one, Objective(methods=("learned",)))
    assert not answer.proposals and answer.candidates == 0


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (Objective(require=("sql",), exclude=("sql",)), "both name sql"),
        (Objective(require=("sql", "code"), at_most=1), "--at-most allows 1"),
        (Objective(exclude=pool.EXPERTS), "every expert"),
        (Objective(require=("sqll",)), "--require sqll.*did you mean 'sql'"),
        (Objective(methods=("dare",)), "--method dare"),
        (Objective(expert_limits={"sqll": 0.1}), "no domain 'sqll'"),
        (Objective(weights={"held_out": 1}), "no domain 'held_out'"),
    ],
)
def test_contradictions_are_one_line(objective, words):
    with pytest.raises(MergelawError, match=words):
        propose(measured_of(FEW), objective)


def test_identical_experts_are_no_obstacle():
    one = measured_of(FEW, lambda method, experts, domain: 0.9, noise=0.0)
    assert propose(one).chance < 0.5


def test_held_out_domains_have_a_limit_of_their_own():
    table = pool.rows(pool.good_pool, held_out=("code",))
    one = pool.measured(table)
    ceilings = Objective(limits={"held_out": 0.0, "all": 0.5}).ceilings(one)
    place = one.domains.index("code")
    assert ceilings[place] == pytest.approx(one.reference.losses[place])
    assert np.delete(ceilings - one.reference.losses, place) == pytest.approx(0.5)


def test_a_large_pool_is_searched_beyond_the_sample():
    """Twelve good experts of sixteen: the best subset is not among the sampled candidates."""
    experts = tuple(f"e{i:02d}" for i in range(16))

    def truth(method, members, domain):
        good = sum(name < "e12" for name in members)
        return 1.0 - 0.3 * (2 * good / len(members) - 1) + 0.2 / len(members)

    random = np.random.default_rng(0)
    subsets = [(e,) for e in experts] + [experts]
    for k in (2, 4, 8, 12):
        subsets += [
            tuple(sorted(random.choice(experts, k, replace=False).tolist())) for _ in range(20)
        ]
    options = {"experts": experts, "domains": ("a", "b"), "methods": ("average",)}
    one = measured_of(subsets, truth, noise=0.001, **options)
    answer = propose(one, batch=3)
    assert len(set(answer.proposals[0].experts) & set(experts[:12])) >= 11
    assert len(set(answer.proposals[0].experts) & set(experts[12:])) <= 1


def test_a_pareto_front_has_every_merge_that_none_beats_and_no_other():
    one = measured_of(EVERY)
    groups = ["dates", "maths+sql"]
    shares = np.array(
        [[d == "dates" for d in one.domains], [d in ("maths", "sql") for d in one.domains]]
    )
    points = {m.identity: m.losses @ shares.T / [1, 2] for m in one.merges}
    front = pareto(one, Objective(), groups)
    for identity, point in points.items():
        beaten = any((p <= point).all() and (p < point).any() for p in points.values())
        on = [f for f in front if f.model.identity == identity and f.front]
        assert bool(on) != beaten and all(f.losses == pytest.approx(point) for f in on)
    assert {f.kind for f in front} == {"merge", "expert", "base"}
    limited = pareto(one, Objective(at_most=2, methods=("ties",)), groups)
    assert all(len(f.model.experts) <= 2 for f in limited)
    for wrong, words in (["dates"], "two different"), (["dates", "mathss"], "did you mean 'maths'"):
        with pytest.raises(MergelawError, match=words):
            pareto(one, Objective(), wrong)
