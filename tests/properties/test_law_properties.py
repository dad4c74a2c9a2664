"""What holds for every table: order, scale, the finite pool, and recovery."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergelaw.laws.fit import fit
from mergelaw.laws.law import MERGING, MERGING_FIXED_N
from mergelaw.laws.points import MACRO, points

parameters = st.fixed_dictionaries(
    {
        "L_star": st.floats(0.1, 1.5),
        "B": st.floats(0.05, 1.0),
        "A0": st.floats(0.02, 0.4),
        "beta": st.floats(0.1, 1.5),
        "gamma": st.floats(0.0, 0.5),
        "b": st.floats(0.0, 3.0),
    }
)
GRID = [axis.ravel() for axis in np.meshgrid([0.5, 1.5, 3, 7, 14, 32, 72], np.arange(1, 10))]


def noisy_table(truth, seed, noise=1e-3) -> pd.DataFrame:
    N, k = GRID
    ce = MERGING.predict(truth, N=N, k=k)
    return pd.DataFrame(
        {"N": N, "k": k, "ce": ce + noise * np.random.default_rng(seed).standard_normal(len(N))}
    )


@settings(max_examples=25, deadline=None)
@given(truth=parameters)
def test_noise_free_losses_are_predicted_exactly(truth):
    assert np.abs(fit(MERGING, noisy_table(truth, 0, noise=0)).residuals).max() < 1e-10


@settings(max_examples=15, deadline=None)
@given(truth=parameters, seed=st.integers(0, 1000))
def test_the_order_of_the_rows_changes_nothing(truth, seed):
    table = noisy_table(truth, seed)
    shuffled = table.sample(frac=1, random_state=seed)
    first, second = fit(MERGING, table), fit(MERGING, shuffled)
    assert first.parameters == second.parameters
    assert np.array_equal(second.residuals, first.residuals[shuffled.index])


@settings(max_examples=15, deadline=None)
@given(truth=parameters, seed=st.integers(0, 1000), scale=st.floats(0.1, 10))
def test_losses_in_another_unit_scale_the_coefficients(truth, seed, scale):
    table = noisy_table(truth, seed)
    first, second = fit(MERGING, table), fit(MERGING, table.assign(ce=table["ce"] * scale))
    assert second.rmse == pytest.approx(scale * first.rmse, rel=1e-6)
    N, k = GRID
    assert second.predict(N=N, k=k) == pytest.approx(scale * first.predict(N=N, k=k), rel=1e-5)


@settings(max_examples=15, deadline=None)
@given(truth=parameters, seed=st.integers(0, 1000))
def test_a_fit_is_no_worse_than_the_truth(truth, seed):
    table = noisy_table(truth, seed)
    error = table["ce"] - MERGING.predict(truth, N=table["N"], k=table["k"])
    assert fit(MERGING, table).rmse <= np.sqrt((error**2).mean())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), experts=st.integers(4, 7))
def test_all_subsets_of_an_exactly_quadratic_landscape_have_b_of_zero(seed, experts):
    """E[L|k] = L_M + (L_1 - L_M) (M/k - 1) / (M - 1), whatever the curvature."""
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((experts, 5))
    factor = random.standard_normal((5, 5))
    slope = random.standard_normal(5)
    rows = [
        {"method": "average", "family": "f", "base": "b", "N": 1.0, "seed": 0, "replicate": 0,
         "k": k, "domain": "x", "role": "merge", "merge": str(members), "finite": True,
         "ce": 50 + slope @ mean + 0.5 * np.sum((factor @ mean) ** 2)}
        for k in range(1, experts + 1)
        for members in itertools.combinations(range(experts), k)
        for mean in [vectors[list(members)].mean(axis=0)]
    ]  # fmt: skip
    table, _ = points(pd.DataFrame(rows))
    table = table[table["domain"] == "x"]
    fitted = fit(MERGING_FIXED_N, table)
    assert fitted.parameters["b"] == pytest.approx(0, abs=1e-8)
    assert fitted.r2 == pytest.approx(1, abs=1e-10)
    first, last = table["ce"].iloc[0], table["ce"].iloc[-1]
    k = table["k"].to_numpy()
    exact = last + (first - last) * (experts / k - 1) / (experts - 1)
    assert table["ce"].to_numpy() == pytest.approx(exact, abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), domains=st.integers(1, 5))
def test_macro_is_the_mean_of_the_domains_whatever_the_order_of_the_rows(seed, domains):
    random = np.random.default_rng(seed)
    rows = pd.DataFrame(
        [
            {"method": "average", "family": "f", "base": "b", "N": 1.0, "seed": 0, "k": k,
             "replicate": replicate, "merge": f"{k}-{start}", "role": "merge", "finite": True,
             "domain": f"d{domain}", "ce": 1 + random.random()}
            for k in (1, 2) for replicate in (0, 1) for start in range(3)
            for domain in range(domains)
        ]
    )  # fmt: skip
    table, _ = points(rows)
    macro = table[table["domain"] == MACRO].set_index("k")["ce"]
    mean = table[table["domain"] != MACRO].groupby("k")["ce"].mean()
    assert macro.to_dict() == pytest.approx(mean.to_dict())
    pd.testing.assert_frame_equal(points(rows.sample(frac=1, random_state=seed))[0], table)
