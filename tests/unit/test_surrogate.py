"""The surrogate against exactly quadratic landscapes, where everything is known."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import surrogate
from circles import design_variance, finite_pool
from mergelaw.errors import MergelawError
from mergelaw.evaluation.design import pattern, rotations, sample


def landscape(M, seed, curvature=0.05):
    """L_0, g and H of a convex quadratic loss around the base."""
    random = np.random.default_rng(seed)
    half = curvature * random.standard_normal((M, M))
    return 1.5, -0.1 * random.random(M), half @ half.T + curvature * np.eye(M)


def loss(parts, w):
    level, gradient, H = parts
    return level + w @ gradient + ((w @ H) * w).sum(axis=-1) / 2


def subsets(M, sizes):
    chosen = [c for k in sizes for c in combinations(range(M), k)]
    weights = np.zeros((len(chosen), M))
    for row, places in enumerate(chosen):
        weights[row, list(places)] = 1 / len(places)
    return weights


def names(M):
    return [f"e{i}" for i in range(M)]


def rows_of(merges, losses, M, replicate=None, recipe='{"method":"average"}', domain="d"):
    """Evaluation rows of merges (weights that sum to one) with their losses."""
    experts = [[f"e{i}" for i in np.flatnonzero(w)] for w in merges]
    return pd.DataFrame(
        {
            "family": "f",
            "base": "b",
            "seed": 0,
            "role": "merge",
            "recipe": recipe,
            "method": "m",
            "k": [len(e) for e in experts],
            "replicate": -1 if replicate is None else replicate,
            "merge": [".".join(e) for e in experts],
            "experts": experts,
            "weights": [[1.0] * len(e) for e in experts],
            "domain": domain,
            "ce": losses,
            "finite": np.isfinite(losses),
        }
    )


# ---- exactly quadratic


@given(M=st.integers(2, 8), seed=st.integers(0, 1000))
def test_singles_and_pairs_give_Q_and_the_finite_pools_mean(M, seed):
    parts = landscape(M, seed)
    w = subsets(M, (1, 2))
    found = surrogate.fit(w, loss(parts, w), names(M))[""]
    level, gradient, H = parts
    Q = level + (gradient[:, None] + gradient) / 2 + H / 2
    assert pytest.approx(Q, abs=1e-11) == found.Q
    every = subsets(M, range(1, M + 1))
    sizes = (every > 0).sum(axis=1)
    losses = loss(parts, every)
    for k in range(1, M + 1):
        mean = losses[sizes == k].mean()
        ends = losses[sizes == 1].mean(), losses[sizes == M].mean()
        assert finite_pool(k, *ends, M) == pytest.approx(mean, abs=1e-12)
        ends = np.diag(found.Q).mean(), found.Q.mean()
        assert finite_pool(k, *ends, M) == pytest.approx(mean, abs=1e-11)
    assert found.predict(every) == pytest.approx(losses, abs=1e-11)


@pytest.mark.parametrize("M", [8, 9, 12])
def test_one_ring_of_all_k_identifies_Q_and_checks_itself(M):
    parts = landscape(M, M)
    plan = sample(
        names(M),
        design="ring",
        k=None,
        circles=1,
        exhaustive_up_to=M,
        seed=0,
        base="b",
    )
    w = np.array([np.isin(names(M), s.experts) / s.k for s in plan if s.k])
    found = surrogate.fit(w, loss(parts, w), names(M))[""]
    assert found.predict(subsets(M, (3,))) == pytest.approx(loss(parts, subsets(M, (3,))), abs=1e-9)
    assert found.usable and found.check.correlation > 0.999


def test_sparse_levels_leave_coefficients_to_the_shrinkage():
    M = 16
    parts = landscape(M, 1)
    w = np.array(
        [
            np.isin(range(M), places) / k
            for k in (1, 2, 4, 8, 16)
            for places in rotations(range(M), pattern("ring", k, M))
        ]
    )
    found = surrogate.fit(w, loss(parts, w), names(M))[""]
    fitted = found.predict(w)
    assert np.sqrt(np.mean((fitted - loss(parts, w)) ** 2)) < 0.1 * loss(parts, w).std()


@pytest.mark.parametrize("design", ["ring", "difference"])
@pytest.mark.parametrize("M", [7, 9])
def test_the_variance_of_circles_is_tau2_times_the_designs(design, M):
    """Over all placements at M = 7, over many at M = 9, with tau2 from the surrogate's Q."""
    parts = landscape(M, 3)
    w = subsets(M, (1, 2))
    found = surrogate.fit(w, loss(parts, w), names(M))[""]
    sizes = [k for k in range(2, M - 1)]
    patterns = [pattern(design, k, M) for k in sizes]
    random = np.random.default_rng(0)
    draws = 4000
    means = np.empty((draws, len(sizes)))
    for draw in range(draws):
        circle = list(random.permutation(M))
        for column, places in enumerate(patterns):
            chosen = np.zeros((M, M))
            for row, subset in enumerate(rotations(circle, places)):
                chosen[row, list(subset)] = 1 / len(subset)
            means[draw, column] = loss(parts, chosen).mean()
    wanted = design_variance(patterns, M, 1, found.tau2)
    measured = np.cov(means.T)
    scale = np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)))
    assert np.abs(measured - wanted) == pytest.approx(0, abs=0.08 * scale.max())
    assert np.diag(measured) == pytest.approx(np.diag(wanted), rel=0.08)


# ---- not quadratic


def cubic(parts, w, strength):
    return loss(parts, w) + strength * ((w**2).sum(axis=-1) ** 2) * np.sin(
        9 * w @ np.arange(w.shape[-1])
    )


def test_a_loss_that_is_not_quadratic_fails_the_check():
    M = 9
    parts = landscape(M, 0, curvature=0.01)
    w = subsets(M, range(1, M + 1))
    found = surrogate.fit(w, cubic(parts, w, 1.0), names(M))[""]
    assert not found.usable


def test_noise_is_shrunk_away_where_cells_are_many():
    """Pair parts that are noise alone are pulled to their mean: better than least squares."""
    M = 9
    random = np.random.default_rng(0)
    H = 0.2 * np.eye(M)
    parts = (1.5, -0.1 * random.random(M), H)
    w = subsets(M, (1, 2, 3))
    noisy = loss(parts, w) + 0.01 * random.standard_normal(len(w))
    found = surrogate.fit(w, noisy, names(M))[""]
    columns = np.array([np.outer(row, row)[np.triu_indices(M)] for row in w])
    plain = np.linalg.lstsq(columns, noisy, rcond=None)[0]
    every = subsets(M, range(4, M + 1))
    truth = loss(parts, every)
    least = np.array([np.outer(row, row)[np.triu_indices(M)] for row in every]) @ plain
    assert np.mean((found.predict(every) - truth) ** 2) < 0.8 * np.mean((least - truth) ** 2)


def test_singles_and_pairs_alone_cannot_be_checked():
    w = subsets(9, (1, 2))
    found = surrogate.fit(w, loss(landscape(9, 0), w), names(9))[""]
    assert found.check is None and not found.usable


# ---- rows and refusals


def test_rows_give_the_loss_in_relative_weights():
    M = 5
    parts = landscape(M, 4)
    w = subsets(M, (1, 2, 3))
    found = surrogate.fit_rows(rows_of(w, loss(parts, w / 2), M))["d"]
    assert found.predict(np.full(M, 1 / M)) == pytest.approx(
        loss(parts, np.full(M, 0.5 / M)), abs=1e-9
    )


def test_tau2_is_told_where_the_check_passes_only():
    M = 7
    parts = landscape(M, 4)
    w = subsets(M, (1, 2, 3, 4))
    own = rows_of(w, loss(parts, w), M)
    rough = rows_of(w, np.random.default_rng(0).uniform(1, 2, len(w)), M).assign(base="rough")
    few = rows_of(w[-1:], loss(parts, w[-1:]), M).assign(base="few")
    found = surrogate.tau2_of(pd.concat([own, rough, few]))
    assert list(found) == [("m", "f", "b", "d")]
    assert found["m", "f", "b", "d"] == pytest.approx(surrogate.fit_rows(own)["d"].tau2)


def test_several_domains_have_a_macro_surrogate():
    M = 4
    w = subsets(M, (1, 2))
    losses = np.column_stack([loss(landscape(M, seed), w) for seed in (0, 1)])
    found = surrogate.fit(w, losses, names(M), ["a", "b"])
    assert list(found) == ["a", "b", "macro"]
    assert pytest.approx((found["a"].Q + found["b"].Q) / 2) == found["macro"].Q


def test_a_merge_that_is_there_twice_counts_once():
    w = subsets(5, (1, 2, 3))
    y = loss(landscape(5, 0), w)
    once = surrogate.fit(w, y, names(5))[""]
    twice = surrogate.fit(np.vstack([w, w[:7]]), np.append(y, y[:7]), names(5))[""]
    assert pytest.approx(once.Q) == twice.Q


def test_weights_that_do_not_sum_to_one_are_refused():
    w = subsets(5, (1, 2))
    y = loss(landscape(5, 0), w)
    found = surrogate.fit(w, y, names(5))[""]
    with pytest.raises(MergelawError, match=r"sum to 1\.2"):
        found.predict([0.4, 0.4, 0.4, 0, 0])
    with pytest.raises(MergelawError, match="give 5, one per expert"):
        found.predict([0.5, 0.5])
    with pytest.raises(MergelawError, match=r"sum to 0\.5"):
        surrogate.fit(np.vstack([w, 0.5 * w[:1]]), np.append(y, 1.0), names(5))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w, y: (w, y[:-1]), "do not match"),
        (lambda w, y: (w, np.where(np.arange(len(y)) == 3, np.nan, y)), "not finite"),
        (lambda w, y: (w[-1:], y[-1:]), "do not distinguish the 5 experts"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_a_line(change, message):
    w = subsets(5, (1, 2))
    w, y = change(w, loss(landscape(5, 0), w))
    with pytest.raises(MergelawError, match=message) as refused:
        surrogate.fit(w, y, names(5))
    assert "\n" not in str(refused.value)


def test_rows_that_do_not_go_together_are_refused():
    w = subsets(4, (1, 2))
    rows = rows_of(w, loss(landscape(4, 0), w), 4)
    with pytest.raises(MergelawError, match="several values of base"):
        surrogate.fit_rows(pd.concat([rows, rows.assign(base="other")]))
    ties = rows.assign(recipe='{"method":"ties"}')
    with pytest.raises(MergelawError, match="several values of recipe"):
        surrogate.fit_rows(pd.concat([rows, ties]))
