"""Sampling design: the plan's order, its errors, the patterns, and the variance formula."""

import itertools
import json
import os
import subprocess
import sys
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from circles import design_variance
from mergelaw.evaluation.design import (
    MAX_HOLES,
    Subset,
    exhaustive_levels,
    pair_counts,
    pattern,
    rotations,
    sample,
)

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["algebra", "biology", "chemistry", "code", "geometry", "logic", "physics", "poetry", "law"]


def plan(experts, **changes):
    settings = {
        "design": "ring",
        "k": None,
        "circles": 3,
        "exhaustive_up_to": 0,
        "seed": 0,
        "base": "tiny",
    }
    return sample(experts, **(settings | changes))


def bitmask(subset, experts):
    return sum(1 << experts.index(name) for name in subset.experts)


def test_the_base_comes_first_then_exhaustive_levels_then_circle_by_circle():
    rows = plan(NAMES, exhaustive_up_to=36, circles=2)
    assert rows[0] == Subset(0, -1, -1, ())
    exhaustive = [row for row in rows[1:] if row.replicate == -1]
    assert {row.k for row in exhaustive} == {1, 2, 7, 8, 9}
    masks = [bitmask(row, NAMES) for row in exhaustive]
    assert masks == sorted(set(masks)) and len(masks) == 9 + 36 + 36 + 9 + 1
    circular = rows[1 + len(exhaustive) :]
    assert [(row.replicate, row.k, row.place) for row in circular] == [
        (circle, k, place) for circle in range(2) for k in (3, 4, 5, 6) for place in range(9)
    ]


def test_a_ring_turns_place_by_place_and_is_nested_in_k():
    experts = {(row.k, row.place): set(row.experts) for row in plan(NAMES, circles=1)[1:]}
    for k, place in itertools.product(range(2, 7), range(9)):
        assert experts[k, place] < experts[k + 1, place]
        assert len(experts[k, place] - experts[k, (place + 1) % 9]) == 1


def test_experts_are_listed_in_the_order_of_the_configuration():
    for design in ("exhaustive", "ring", "difference"):
        for row in plan(NAMES, design=design):
            assert row.experts == tuple(name for name in NAMES if name in row.experts)
            assert len(row.experts) == row.k


def test_sizes_that_one_circle_exhausts_are_measured_exhaustively_once():
    circular = plan(NAMES, circles=4)
    assert {row.k for row in circular if row.replicate == -1} == {0, 1, 8, 9}
    assert len(plan(NAMES, design="exhaustive")) == 2**9
    assert exhaustive_levels("ring", range(1, 10), 9, 36) == [1, 2, 7, 8, 9]


def test_the_circle_depends_on_seed_base_and_replicate():
    def circle(rows, replicate=0):
        return [row.experts for row in rows if row.replicate == replicate]

    first = plan(NAMES)
    assert circle(first) != circle(first, 1)
    assert circle(first) != circle(plan(NAMES, seed=1))
    assert circle(first) != circle(plan(NAMES, base="small"))


def test_order_of_the_configuration_moves_nobody_on_the_circle():
    forward = [frozenset(row.experts) for row in plan(NAMES) if row.replicate >= 0]
    backward = [frozenset(row.experts) for row in plan(NAMES[::-1]) if row.replicate >= 0]
    assert forward == backward


def test_levels_of_a_large_pool_can_be_exhaustive():
    pool = [f"e{i}" for i in range(40)]
    assert len(plan(pool, design="exhaustive", k=[1, 2, 40])) == 1 + 40 + comb(40, 2) + 1


def test_the_plan_is_the_same_in_every_process():
    code = (
        "import json; from mergelaw.evaluation.design import sample;"
        "print(json.dumps([s for d in ('difference', 'ring')"
        f" for s in sample({NAMES!r}, design=d, k=None, circles=2, exhaustive_up_to=10,"
        " seed=7, base='tiny')]))"
    )
    plans = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert plans[0] == plans[1]
    # Fixed for good: another order here would orphan everybody's measurements.
    ring = plan(NAMES, k=[4], circles=1, seed=7)
    assert json.loads(plans[0])[0] == [0, -1, -1, []]
    assert ring[1].experts == ("algebra", "chemistry", "code", "geometry")


def test_without_levels_every_number_of_experts_is_merged():
    settings = {"design": "ring", "circles": 1, "exhaustive_up_to": 0, "seed": 0, "base": "b"}
    subsets = sample(list("abcdef"), k=None, **settings)
    assert {subset.k for subset in subsets} == set(range(7))


def test_parsing_a_workflow_does_not_import_numpy():
    code = (
        "import sys; from mergelaw.evaluation.design import sample; sample(list('abcdef'), design='ring',"
        "k=None, circles=3, exhaustive_up_to=0, seed=0, base='b');"
        "assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_small_difference_patterns():
    assert pattern("difference", 1) == (0,)
    assert pattern("difference", 2) == (0, 1)
    assert pattern("difference", 3) == (0, 1, 3)  # a perfect difference set modulo 7
    assert pattern("difference", 4) == (0, 1, 4, 6)  # and modulo 13
    # Larger ones are a search, and part of every study's design.
    assert pattern("difference", 5) == (0, 1, 2, 4, 7)
    assert pattern("difference", 8) == (0, 1, 2, 4, 6, 7, 9, 10)
    assert pattern("difference", 12) == (0, 1, 2, 3, 5, 6, 8, 9, 10, 12, 13, 14)
    assert set(pair_counts((0, 1, 3), 7)) == set(pair_counts((0, 1, 4, 6), 13)) == {1}


@pytest.mark.parametrize("k", range(1, 19))
def test_patterns_have_no_rotational_symmetry_where_they_are_used(k):
    for design, pool in itertools.product(("ring", "difference"), range(k + 2, 41)):
        places = pattern(design, k, pool)
        assert len(places) == k and places[0] == 0 and places[-1] < pool
        assert places[-1] + 1 <= k + MAX_HOLES
        assert len(set(rotations(range(pool), places))) == pool


@pytest.mark.parametrize("pool", range(6, 25))
def test_difference_patterns_never_lose_against_ring_and_gain_in_the_middle(pool):
    def variance(design, k):
        return design_variance([pattern(design, k, pool)], pool, circles=1)[0, 0]

    ratios = {k: variance("difference", k) / variance("ring", k) for k in range(2, pool - 1)}
    assert all(ratio <= 1 + 1e-9 for ratio in ratios.values())
    # Pairs of any one distance balance alike, so k = 2 and k = M - 2 have nothing to gain.
    assert all(ratio < 0.6 for k, ratio in ratios.items() if 3 <= k <= pool - 3)


def test_pair_counts_are_those_of_the_definition():
    for pool in (7, 8, 12):
        for places in ((0, 1, 2), (0, 1, 3), (0, 2, 3, 6)):
            expected = [
                sum((a - b) % pool == d for a in places for b in places) for d in range(1, pool)
            ]
            assert pair_counts(places, pool) == expected


def test_design_variance_is_singular_and_zero_where_it_should_be():
    pool = 9
    patterns = [pattern("ring", k, pool) for k in range(1, pool + 1)]
    variance = design_variance(patterns, pool, circles=2)
    assert np.linalg.matrix_rank(variance) == pool // 2 - 1
    np.testing.assert_allclose(variance[[0, 7, 8]], 0, atol=1e-15)
    np.testing.assert_allclose(design_variance(patterns, pool, 1, tau2=3.0), 6 * variance)


def quadratic(pool, seed):
    """A random exactly quadratic landscape: Hessian H (not definite) and gradient."""
    rng = np.random.default_rng(seed)
    hessian = rng.standard_normal((pool, pool))
    return hessian + hessian.T, rng.standard_normal(pool)


def loss(hessian, gradient, subset):
    members = np.asarray(subset)
    block = hessian[np.ix_(members, members)]
    return gradient[members].mean() + block.mean() / 2


def tau2_of(hessian):
    """tau^2 of design_variance's docstring."""
    pool = len(hessian)
    row = hessian.sum(axis=1) - np.diag(hessian)
    a = (row - row.sum() / (2 * (pool - 1))) / (pool - 2)
    pairs = hessian - a[:, None] - a[None, :]
    np.fill_diagonal(pairs, 0)
    return (pairs**2).sum() / (2 * pool * (pool - 3))


@pytest.mark.parametrize("design", ["ring", "difference"])
@pytest.mark.parametrize("pool", [5, 6, 7])
def test_variance_formula_is_exact_over_all_circles(design, pool):
    hessian, gradient = quadratic(pool, seed=pool)
    patterns = [pattern(design, k, pool) for k in range(1, pool + 1)]
    estimates = np.array(
        [
            [
                np.mean([loss(hessian, gradient, s) for s in rotations((0, *rest), places)])
                for places in patterns
            ]
            for rest in itertools.permutations(range(1, pool))  # a turned circle is the same one
        ]
    )
    expected = design_variance(patterns, pool, circles=1, tau2=tau2_of(hessian))
    np.testing.assert_allclose(np.cov(estimates.T, bias=True), expected, atol=1e-13)
    exact = [
        np.mean([loss(hessian, gradient, s) for s in itertools.combinations(range(pool), k)])
        for k in range(1, pool + 1)
    ]
    np.testing.assert_allclose(estimates.mean(axis=0), exact, atol=1e-13)  # unbiased


@pytest.mark.parametrize("design", ["ring", "difference"])
def test_variance_formula_holds_for_the_circles_that_sample_draws(design):
    pool, circles = 9, 800
    hessian, gradient = quadratic(pool, seed=1)
    rows = [
        row
        for row in plan(NAMES, design=design, k=[3, 4, 5], circles=circles)
        if row.replicate >= 0
    ]
    losses = [loss(hessian, gradient, [NAMES.index(name) for name in row.experts]) for row in rows]
    estimates = np.reshape(losses, (circles, 3, pool)).mean(axis=2)
    expected = design_variance(
        [pattern(design, k, pool) for k in (3, 4, 5)], pool, circles=1, tau2=tau2_of(hessian)
    )
    centred = estimates - estimates.mean(axis=0)
    products = centred[:, :, None] * centred[:, None, :]
    standard_error = products.std(axis=0, ddof=1) / np.sqrt(circles)
    # Six different entries; four standard errors are passed by chance once in 2,600 seeds.
    assert np.all(np.abs(products.mean(axis=0) - expected) < 4 * standard_error)


def test_every_subset_is_equally_frequent_over_all_circles():
    pool = 6
    for design, k in itertools.product(("ring", "difference"), range(1, pool + 1)):
        counts = dict.fromkeys(itertools.combinations(range(pool), k), 0)
        for circle in itertools.permutations(range(pool)):
            for subset in rotations(circle, pattern(design, k, pool)):
                counts[subset] += 1
        assert len(set(counts.values())) == 1


@pytest.mark.parametrize("design", ["ring", "difference"])
def test_subsets_that_sample_draws_are_uniform(design):
    replicates = 1500
    experts, k = NAMES[:7], 3
    rows = plan(experts, design=design, k=[k], circles=replicates)
    # One subset of each circle: the rotations of one circle are not independent.
    subsets = [row.experts for row in rows if row.place == 0]
    assert len(subsets) == replicates
    counts = np.array([subsets.count(s) for s in itertools.combinations(experts, k)])
    expected = replicates / comb(7, k)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 65.2  # 34 degrees of freedom: passed by chance once in 1,000


def exhaustive_table(pool, hessian, gradient):
    """CE rows of every subset and two domains whose mean is the quadratic loss."""
    names = [f"e{i}" for i in range(pool)]
    return pd.DataFrame(
        [
            {
                "base": "tiny",
                "method": "average",
                "k": row.k,
                "experts": list(row.experts),
                "domain": domain,
                "ce": 1
                + shift
                + (loss(hessian, gradient, [int(e[1:]) for e in row.experts]) if row.k else 0),
            }
            for row in plan(names, design="exhaustive")
            for domain, shift in (("near", -0.25), ("far", 0.25))
        ]
    )


def run_benchmark(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks/sampling_variance.py", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def test_the_benchmark_measures_the_ratios_that_theory_gives(tmp_path):
    pool, draws = 7, 1500
    hessian, gradient = quadratic(pool, seed=3)
    folder = tmp_path / "evals" / "tiny"
    folder.mkdir(parents=True)
    exhaustive_table(pool, hessian, gradient).to_parquet(folder / "all.parquet")
    ran = run_benchmark("--table", tmp_path, "--draws", draws)
    assert ran.returncode == 0, ran.stderr
    title, _, *lines = ran.stdout.splitlines()
    assert title.startswith("base tiny, method average: variance of the estimate of E[L|k]")
    assert [int(line.split()[0]) for line in lines] == [2, 3, 4, 5]
    for line in lines:
        k, deviation, ring, difference = (float(word) for word in line.split())
        subsets = itertools.combinations(range(pool), int(k))
        variance = np.var([loss(hessian, gradient, s) for s in subsets]) / pool
        expected = variance / design_variance([range(int(k))], pool, 1, tau2_of(hessian))[0, 0]
        # The log of a variance from n draws has a standard error of sqrt((kurtosis - 1) / n); with
        # a normal's kurtosis 3, sqrt(2 / n), and the log of a ratio of two sqrt(4 / n).
        assert abs(np.log(deviation**2 / variance)) < 4 * (2 / draws) ** 0.5
        assert abs(np.log(ring / expected)) < 4 * (4 / draws) ** 0.5
        if k in (3, 4):  # perfect difference sets at M = 7: no variance but rounding
            assert difference > 1e12
        else:  # pairs of one distance: as good as ring
            assert abs(np.log(difference / expected)) < 4 * (4 / draws) ** 0.5


def test_the_benchmark_refuses_a_table_with_a_hole(tmp_path):
    table = exhaustive_table(6, *quadratic(6, seed=0))
    table = table.drop(index=table.index[table["k"] == 3][0])
    table.to_parquet(tmp_path / "hole.parquet")
    ran = run_benchmark("--table", tmp_path / "*.parquet")
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr == (
        "error: base tiny, method average: not exhaustive, 19 of the 20 subsets of k = 3 have one"
        " CE for each of 2 domains; measure them with design: exhaustive\n"
    )
    assert "no file" in run_benchmark("--table", tmp_path / "none.parquet").stderr
