"""Weighted fits and intervals: against statsmodels where laws are linear, by simulation where not."""

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from mergelaw.errors import MergelawError
from mergelaw.laws.fit import fit
from mergelaw.laws.law import INVERSE_FIXED_N, MERGING, MERGING_FIXED_N, VARIANCE

K = np.arange(1, 10)
TRUTH = {"L_inf": 0.8, "A": 0.1, "b": 0.5}


def noisy(seed, sd=1e-3, k=K, truth=TRUTH) -> dict[str, np.ndarray]:
    noise = sd * np.random.default_rng(seed).standard_normal(len(k))
    return {"k": k, "ce": MERGING_FIXED_N.predict(truth, k=k) + noise}


def joint(seed, sd=1e-3) -> dict[str, np.ndarray]:
    truth = {"L_star": 0.4, "B": 0.3, "A0": 0.1, "beta": 0.4, "gamma": 0.1, "b": 0.3}
    N, k = (axis.ravel() for axis in np.meshgrid([0.5, 1.5, 7, 72], K))
    noise = sd * np.random.default_rng(seed).standard_normal(len(N))
    return {"N": N, "k": k, "ce": MERGING.predict(truth, N=N, k=k) + noise}


# ---- linear laws, where textbooks have the answer


def test_a_linear_laws_intervals_are_those_of_ordinary_least_squares():
    table = noisy(0)
    fitted = fit(INVERSE_FIXED_N, table)
    book = sm.OLS(table["ce"], sm.add_constant(1 / K)).fit()
    low, high = book.conf_int(alpha=0.1).T
    for j, name in enumerate(("L_inf", "A")):
        # draws: within 2% of the width
        width = high[j] - low[j]
        assert fitted.interval(name) == pytest.approx((low[j], high[j]), abs=0.02 * width)
    assert fitted.misfit == pytest.approx(math.sqrt(book.scale))
    assert fitted.freedom == 7
    at = book.get_prediction([[1, 1 / 5]]).conf_int(alpha=0.05)[0]
    ends = fitted.predict_interval(level=0.95, k=5)
    assert [float(end) for end in ends] == pytest.approx(at, abs=0.02 * (at[1] - at[0]))


def test_a_covariance_gives_generalised_least_squares():
    random = np.random.default_rng(1)
    half = 1e-3 * (np.eye(9) + 0.5 * random.standard_normal((9, 9)))
    covariance = half @ half.T
    table = noisy(1)
    fitted = fit(INVERSE_FIXED_N, table, covariance=covariance, misfit=0)
    book = sm.GLS(table["ce"], sm.add_constant(1 / K), sigma=covariance).fit(
        cov_type="fixed scale", use_t=False
    )
    assert list(fitted.parameters.values()) == pytest.approx(book.params, rel=1e-9)
    error = book.bse[1]
    value = book.params[1]
    assert fitted.interval("A") == pytest.approx(
        (value - 1.644854 * error, value + 1.644854 * error), abs=0.06 * error
    )


def test_the_order_of_the_rows_is_the_covariances_too():
    random = np.random.default_rng(1)
    half = 1e-3 * (np.eye(9) + 0.5 * random.standard_normal((9, 9)))
    covariance, table = half @ half.T, noisy(1)
    other = random.permutation(9)
    first = fit(MERGING_FIXED_N, table, covariance=covariance)
    second = fit(
        MERGING_FIXED_N,
        {name: values[other] for name, values in table.items()},
        covariance=covariance[np.ix_(other, other)],
    )
    assert second.parameters == pytest.approx(first.parameters, rel=1e-6)
    assert second.residuals == pytest.approx(first.residuals[other], abs=1e-9)


def test_given_the_nonlinear_parameters_the_coefficients_are_statsmodels():
    table = joint(0)
    errors = 1e-3 * (1 + np.random.default_rng(2).random(36))
    fitted = fit(MERGING, {**table, "se": errors}, misfit=0, scatter=0)
    p, N, k = fitted.parameters, table["N"], table["k"]
    columns = np.column_stack([np.ones(36), N ** -p["beta"], N ** -p["gamma"] / (k + p["b"])])
    book = sm.GLS(table["ce"], columns, sigma=errors**2).fit()
    assert [p["L_star"], p["B"], p["A0"]] == pytest.approx(book.params, rel=1e-8)


# ---- noise


def test_robust_intervals_are_those_of_hubers_sandwich():
    """With losses that hardly vary logarithms are linear, so statsmodels has the answer."""
    k = np.arange(1, 61)
    noise = 1e-3 * np.random.default_rng(3).standard_normal(60)
    noise[[7, 30]] += 0.02
    table = {"k": k, "ce": 0.8 + 0.01 / k + noise}
    book = sm.RLM(table["ce"], sm.add_constant(1 / k), sm.robust.norms.HuberT()).fit(cov="H1")
    fitted = fit(INVERSE_FIXED_N, table, robust=True)
    assert fitted.parameters["L_inf"] == pytest.approx(book.params[0], abs=2e-5)
    low, high = fitted.interval("L_inf")
    expected = 2 * stats.t.ppf(0.95, 58) * book.bse[0]
    assert high - low == pytest.approx(expected, rel=0.05)


def test_equal_errors_are_no_weights():
    table = noisy(2)
    plain = fit(MERGING_FIXED_N, table)
    same = fit(MERGING_FIXED_N, {**table, "se": np.full(9, 1e-3)})
    assert same.parameters == pytest.approx(plain.parameters, rel=1e-6)


def test_what_the_errors_do_not_explain_is_misfit():
    table = noisy(3, sd=3e-3)
    told = fit(MERGING_FIXED_N, {**table, "se": np.full(9, 1e-4)})
    plain = fit(MERGING_FIXED_N, table)
    assert told.misfit == pytest.approx(plain.misfit, rel=0.02)
    assert told.freedom == pytest.approx(plain.freedom, rel=0.02)
    enough = fit(MERGING_FIXED_N, {**table, "se": np.full(9, 1e-2)})
    assert enough.misfit < 1e-5


def test_points_without_error_do_not_take_all_the_weight():
    """Exhaustive levels have no sampling variance: what they miss is the law's."""
    errors = np.where((K == 1) | (K >= 8), 0.0, 2e-3)
    fitted = fit(MERGING_FIXED_N, {**noisy(4), "se": errors})
    assert fitted.misfit > 0
    assert np.abs(fitted.residuals[K == 9]).max() > 0


def test_exact_points_that_pin_the_law_do_not_make_it_exact():
    """Three exact points and three parameters: only the others can tell what the law misses."""
    errors = np.where((K == 1) | (K >= 8), 0.0, 3e-3)
    held, rounds = 0, 60
    for seed in range(rounds):
        random = np.random.default_rng(seed)
        ce = MERGING_FIXED_N.predict(TRUTH, k=K) + random.standard_normal(9) * np.hypot(
            errors, 3e-4
        )
        fitted = fit(MERGING_FIXED_N, {"k": K, "ce": ce, "se": errors})
        assert fitted.misfit > 0
        low, high = fitted.interval("L_inf")
        held += low <= TRUTH["L_inf"] <= high
    # Nine in ten, and no fewer than chance allows (binomial, one in a thousand).
    assert held >= stats.binom.ppf(1e-3, rounds, 0.9)


def test_three_points_need_an_error_to_have_intervals():
    k = np.array([1, 2, 4])
    table = noisy(5, k=k)
    fitted = fit(MERGING_FIXED_N, table)
    assert fitted.interval("b") is None and fitted.intervals == {}
    assert fitted.predict_interval(k=9) is None
    assert any("no intervals" in warning for warning in fitted.warnings)
    for told in (
        fit(MERGING_FIXED_N, table, misfit=1e-3),
        fit(MERGING_FIXED_N, {**table, "se": np.full(3, 1e-3)}),
    ):
        low, high = told.predict_interval(k=9)
        assert low < told.predict(k=9) < high
        assert told.freedom == math.inf
        assert not any("no intervals" in warning for warning in told.warnings)
    assert any("given standard errors only" in warning for warning in told.warnings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"covariance": np.eye(3)}, "9 by 9"),
        ({"covariance": -np.eye(9)}, "eigenvalues"),
        ({"misfit": -1.0}, "0 or more"),
        ({"misfit": 0.0}, "no uncertainty"),
    ],
)
def test_impossible_noise_is_one_line(options, message):
    with pytest.raises(MergelawError, match=message):
        fit(MERGING_FIXED_N, noisy(0), **options)
    with pytest.raises(MergelawError, match="column se"):
        fit(MERGING_FIXED_N, {**noisy(0), "se": np.full(9, math.nan)})


# ---- intervals


def test_intervals_hold_the_estimate_and_grow_with_the_level():
    for law, table in ((MERGING, joint(4)), (MERGING_FIXED_N, noisy(4))):
        fitted = fit(law, table)
        for name, value in fitted.parameters.items():
            low, high = fitted.interval(name, 0.5)
            lower, higher = fitted.interval(name, 0.95)
            assert lower <= low <= value <= high <= higher
            assert higher > lower


def test_a_parameter_on_its_bound_has_an_interval_from_there():
    table = {"k": K, "ce": 0.8 + 0.1 / (K - 0.05) + noisy(6, sd=2e-4)["ce"] - noisy(6, sd=0)["ce"]}
    fitted = fit(MERGING_FIXED_N, table)
    assert fitted.parameters["b"] == 0
    low, high = fitted.interval("b")
    assert low == 0 < high < 1
    assert fitted.freedom == 7


def test_losses_that_do_not_fall_leave_b_open():
    noise = 1e-3 * np.random.default_rng(0).standard_normal(9)
    fitted = fit(MERGING_FIXED_N, {"k": K, "ce": np.sort(0.8 + noise)})
    assert fitted.parameters["A"] == 0
    low, high = fitted.interval("b")
    assert low == 0 and high > 10
    assert fitted.verdict["state"] == "fails" and "does not fall" in fitted.verdict["reasons"][0]
    assert {"A", "b"} <= set(fitted.on_bound)


def test_predictions_have_intervals_wherever_the_law_reaches():
    fitted = fit(MERGING, joint(5))
    low, high = fitted.predict_interval(N=[[7.0], [700.0]], k=[1, 9, math.inf])
    centre = fitted.predict(N=[[7.0], [700.0]], k=[1, 9, math.inf])
    assert low.shape == high.shape == (2, 3)
    assert (low < centre).all() and (centre < high).all()
    width = high - low
    assert (width[1, :2] > width[0, :2]).all()  # beyond the ladder
    assert width[0, 2] > width[0, 1]  # beyond the pool
    # The floor at N is the law's own parameter where N is not a variable.
    one = fit(MERGING_FIXED_N, noisy(5))
    ends = one.predict_interval(k=math.inf)
    # The floor of a prediction also allows for the forms that the points do not exclude.
    assert float(ends[0]) < one.interval("L_inf")[0]


def test_a_law_without_nonlinear_parameters_has_intervals_too():
    k, M = (axis.ravel() for axis in np.meshgrid(K, [9, 12]))
    noise = 1e-6 * np.random.default_rng(0).standard_normal(18)
    variance = VARIANCE.predict({"V0": 2e-5, "G": 1e-3, "P": 0.02}, k=k, M=M) + noise
    fitted = fit(VARIANCE, {"k": k, "M": M, "variance": np.maximum(variance, 0)})
    low, high = fitted.interval("G")
    assert low < 1e-3 < high
    assert fitted.predict_interval(k=9, M=9) is not None


def test_a_fit_without_noise_is_certain_but_no_interval_has_no_width():
    fitted = fit(MERGING_FIXED_N, noisy(0, sd=0))
    for name, (low, high) in fitted.intervals.items():
        assert low < high
        assert low == pytest.approx(TRUTH[name], rel=1e-3)
        assert high == pytest.approx(TRUTH[name], rel=1e-3)


def test_unknown_names_and_levels_are_one_line():
    fitted = fit(MERGING_FIXED_N, noisy(0))
    with pytest.raises(MergelawError, match="has no parameter beta"):
        fitted.interval("beta")
    with pytest.raises(MergelawError, match="between 0 and 1"):
        fitted.interval("b", level=90)


def test_intervals_cover():
    """A hundred fits: enough to see a wrong quantile, not a third digit."""
    sets = 100
    hits = {"b": 0, "A": 0, "L_inf": 0, "L(12)": 0}
    for seed in range(sets):
        fitted = fit(MERGING_FIXED_N, noisy(1000 + seed))
        for name in TRUTH:
            low, high = fitted.interval(name)
            hits[name] += low <= TRUTH[name] <= high
        low, high = fitted.predict_interval(k=12)
        hits["L(12)"] += low <= MERGING_FIXED_N.predict(TRUTH, k=12) <= high
    # 90% with a standard error of 3%
    assert all(0.81 <= hit / sets <= 0.99 for hit in hits.values()), hits


@pytest.mark.parametrize("k", [16, math.inf])
def test_beyond_the_pool_a_loss_that_is_none_of_the_forms_is_held(k):
    """Two tails, 1/k and exp(-k/3): every form fits and forecasts too much of a gain."""

    def truth(k):
        return 0.8 + 0.3 * (0.6 / k + 0.4 * np.exp(-k / 3))

    held = 0
    for seed in range(20):
        noise = 1e-3 * np.random.default_rng(seed).standard_normal(9)
        fitted = fit(MERGING_FIXED_N, {"k": K, "ce": truth(K) + noise})
        low, high = fitted.predict_interval(k=k)
        held += low <= truth(k) <= high
    # Nine in ten, and no fewer than chance allows (binomial, one in a hundred).
    assert held >= stats.binom.ppf(1e-2, 20, 0.9)
