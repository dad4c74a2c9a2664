"""What a study's cells tell of its points' errors, and what fits make of it."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from circles import design_variance
from mergelaw.errors import MergelawError
from mergelaw.evaluation.design import pattern, rotations
from mergelaw.laws.covariance import errors_of, sampling_covariance
from mergelaw.laws.fit import fit
from mergelaw.laws.fits import fit_all, fit_study, write
from mergelaw.laws.law import INVERSE_FIXED_N, MERGING, MERGING_FIXED_N
from mergelaw.laws.noise import describe
from mergelaw.laws.points import MACRO, points, read_points
from mergelaw.laws.result import DOCUMENTS, EXPERTS, POOL
from mergelaw.laws.summary import pooled_text

POOL_SIZE = 7
TEXTS = 30
NAMES = [f"e{i}" for i in range(POOL_SIZE)]
TRUTH = {"L_star": 0.6, "B": 0.3, "beta": 0.4, "A0": 0.1, "gamma": 0.05, "b": 0.2}


def landscape(random) -> tuple[np.ndarray, np.ndarray]:
    """Effects of single experts, and of pairs that sum to zero for each expert; tau = .02."""
    pairs = random.standard_normal((POOL_SIZE, POOL_SIZE))
    pairs += pairs.T
    np.fill_diagonal(pairs, 0)
    rows = pairs.sum(axis=1)
    own = (rows - rows.sum() / (2 * (POOL_SIZE - 1))) / (POOL_SIZE - 2)
    pairs -= own[:, None] + own
    np.fill_diagonal(pairs, 0)
    scale = math.sqrt(2 * POOL_SIZE * (POOL_SIZE - 3) / (pairs**2).sum())
    alone = random.standard_normal(POOL_SIZE)
    return 0.02 * (alone - alone.mean()), 0.02 * scale * pairs


def study(sizes=(1.0, 4.0, 20.0), circles=3, exhaustive=False, domains=("x", "y"), seed=0):
    """Rows of a study whose losses are the law's, a landscape's and the documents'."""
    random = np.random.default_rng(seed)
    texts = {d: 0.3 * random.standard_normal(TEXTS) for d in domains}
    tokens = {d: random.integers(20, 60, TEXTS) for d in domains}
    for domain in domains:  # these documents are on average what the law says
        texts[domain] -= texts[domain] @ tokens[domain] / tokens[domain].sum()
    rows = []
    for N in sizes:
        alone, pairs = landscape(random)
        placed = [list(random.permutation(POOL_SIZE)) for _ in range(circles)]
        for k in range(1, POOL_SIZE + 1):
            missed = 3e-4 * random.standard_normal()  # what the law misses here
            every = list(itertools.combinations(range(POOL_SIZE), k))
            levels = [(-1, every)]
            if not exhaustive and 1 < k < POOL_SIZE - 1:
                places = pattern("ring", k)
                levels = [(c, rotations(circle, places)) for c, circle in enumerate(placed)]
            for replicate, subsets in levels:
                for members in subsets:
                    at = list(members)
                    loss = float(MERGING.predict(TRUTH, N=N, k=k)) + missed + alone[at].mean()
                    loss += pairs[np.ix_(at, at)].sum() / (2 * k * k)
                    for place, domain in enumerate(domains):
                        nll = tokens[domain] * (loss * (1 + place) + texts[domain])
                        rows.append(
                            {"method": "average", "family": "f", "base": f"b{N:g}", "N": N,
                             "N_total": N, "seed": 1, "k": k, "replicate": replicate,
                             "experts": [NAMES[i] for i in members],
                             "merge": "+".join(NAMES[i] for i in members), "role": "merge",
                             "domain": domain, "held_out": False,
                             "ce": nll.sum() / tokens[domain].sum(), "finite": True,
                             "document_nll": nll, "document_tokens": tokens[domain]}
                        )  # fmt: skip
    return pd.DataFrame(rows)


def described(rows, **options):
    table, _ = points(rows)
    return describe(table, rows, **options)


def test_the_shape_of_circles_is_that_of_their_pattern():
    table, warnings = described(study(circles=3))
    assert warnings == []
    own = table[(table["base"] == "b1") & (table["domain"] == "x")]
    factor = np.vstack(own["sampling"])
    design = factor @ factor.T
    patterns = [pattern("ring", k) for k in range(1, POOL_SIZE + 1)]
    shape = design_variance(patterns, POOL_SIZE, 1)
    assert np.trace(design) > 0
    assert design / np.trace(design) == pytest.approx(shape / np.trace(shape), abs=1e-12)
    assert set(own["freedom"]) == {2}
    # Bases do not share their circles, so their errors are independent.
    group = table[table["domain"] == "x"].reset_index(drop=True)
    whole = sampling_covariance(group).toarray()
    at, others = (np.flatnonzero((group["base"] == "b1") == here) for here in (True, False))
    assert whole[np.ix_(at, at)].any() and not whole[np.ix_(at, others)].any()
    # Six degrees of freedom in all: wider by the square of t over the normal quantile.
    scales = [
        np.trace(f @ f.T) for _, g in group.groupby("base") for f in [np.vstack(g["sampling"])]
    ]
    wider = (stats.t.ppf(0.95, 6) / stats.norm.ppf(0.95)) ** 2
    assert np.trace(whole[np.ix_(at, at)]) == pytest.approx(wider * np.mean(scales))


def test_one_circle_shows_its_error_by_the_pairs_of_its_experts():
    """The landscape's tau is .02; the law's own misses are no pairs."""
    scales = []
    for seed in range(8):
        table, warnings = described(study(circles=1, sizes=(1.0,), domains=("x",), seed=seed))
        assert warnings == []
        factor = np.vstack(table.query("domain == 'x'")["sampling"])
        patterns = [pattern("ring", k) for k in range(1, POOL_SIZE + 1)]
        unit = design_variance(patterns, POOL_SIZE, 1, tau2=1.0)
        scales.append(np.trace(factor @ factor.T) / np.trace(unit))
    assert np.mean(scales) == pytest.approx(4e-4, rel=0.35)


@pytest.mark.parametrize("bad", [0.3, 0.0])
def test_an_expert_unlike_the_others_is_named_and_the_law_fitted_without_it(bad):
    found = false = 0
    for seed in range(10):
        rows = study(sizes=(1.0,), circles=1, domains=("x", "y"), seed=seed)
        hurt = rows["experts"].map(lambda experts: "e3" in experts)
        rows.loc[hurt, "ce"] += bad / rows.loc[hurt, "k"]
        result = fit_study(rows)
        names = [one["expert"] for one in result.outlying]
        found, false = (
            found + ("e3" in names),
            false + (set(names) > {"e3"} or ("e3" not in names and bool(names))),
        )
        if "e3" in names and bad:
            (one,) = (one for one in result.outlying if one["expert"] == "e3")
            low, high = one["interval"]
            assert low < one["effect"] < high and one["effect"] == pytest.approx(0.3, abs=0.1)
            floors = [one["fits"][0][way]["parameters"]["L_inf"] for way in ("with", "without")]
            assert floors[0] - floors[1] == pytest.approx(0.3 / POOL_SIZE, abs=0.02)
            assert any(w.code == "outlying_expert" and "e3" in w for w in result.warnings)
    assert found == (10 if bad else found) and false <= 2


def test_exhaustive_levels_have_no_sampling_error():
    table, warnings = described(study(exhaustive=True))
    assert warnings == []
    assert not np.vstack(table.query("domain == 'x'")["sampling"]).any()


def test_the_documents_covariance_is_the_bootstraps():
    rows = study(exhaustive=True, sizes=(1.0, 4.0))
    table, _ = described(rows, documents=[rows.iloc[:200], rows.iloc[200:]])
    random = np.random.default_rng(1)
    sums = {
        place: (np.mean(cells["document_nll"].to_list(), axis=0), cells["document_tokens"].iloc[0])
        for place, cells in rows.groupby(["base", "k", "domain"])
    }
    for domain in ("x", MACRO):
        own = table[table["domain"] == domain]
        factor = np.vstack(own["documents"])
        found = factor @ factor.T
        boots = []
        for _ in range(2000):
            drawn = {d: random.integers(0, TEXTS, TEXTS) for d in ("x", "y")}
            boots.append(_resampled(sums, own, domain, drawn))
        expected = np.cov(np.transpose(boots))
        assert np.sqrt(np.diag(found)) == pytest.approx(np.sqrt(np.diag(expected)), rel=0.1)


def _resampled(sums, own, domain, drawn):
    """Points' losses on documents drawn again."""
    chosen = ["x", "y"] if domain == MACRO else [domain]
    return [
        np.mean([
            sums[base, k, d][0][drawn[d]].sum() / sums[base, k, d][1][drawn[d]].sum()
            for d in chosen
        ])
        for base, k in own[["base", "k"]].itertuples(index=False, name=None)
    ]  # fmt: skip


def test_documents_widen_the_intervals_of_their_population_and_weight_nothing():
    rows = study(exhaustive=True, seed=3)
    plain, told = fit_study(rows), fit_study(rows, [rows])
    first, second = (
        next(f.fit for f in study.fits if f.domain == MACRO and f.base == "b4")
        for study in (plain, told)
    )
    assert first.parameters == second.parameters and first.intervals == second.intervals
    assert first.interval("b", population=DOCUMENTS) is None
    width = {
        name: [float(np.diff(second.interval(name, population=p))[0]) for p in (POOL, DOCUMENTS)]
        for name in ("L_inf", "b")
    }
    assert width["L_inf"][1] > 1.5 * width["L_inf"][0]
    assert width["b"][1] < 1.5 * width["b"][0]
    narrow, wide = (
        np.diff(second.predict_interval(population=p, k=7), axis=0)[0] for p in (POOL, DOCUMENTS)
    )
    assert wide > narrow


def test_a_circles_errors_reach_the_fit_with_their_degrees_of_freedom():
    held = 0
    for seed in range(20):
        table, _ = described(study((1.0, 4.0, 20.0, 60.0), domains=("x",), seed=seed))
        fits = fit_all(table.query("domain == 'x'").assign(M=POOL_SIZE)).fits
        (fitted,) = (f.fit for f in fits if f.domain == "x" and f.base is None)
        low, high = fitted.predict_interval(N=20, k=5)
        held += low <= MERGING.predict(TRUTH, N=20, k=5) <= high
    assert held >= 14  # 90% less three standard errors


def test_scatter_over_sizes_is_told_from_misfit():
    random = np.random.default_rng(2)
    sizes = np.array([0.5, 1, 2, 4, 8, 16, 32, 64])
    N, k = (axis.ravel() for axis in np.meshgrid(sizes, np.arange(1, 10), indexing="ij"))
    own = np.repeat(4e-3 * random.standard_normal(8), 9)
    ce = MERGING.predict(TRUTH, N=N, k=k) + own + 3e-4 * random.standard_normal(72)
    fitted = fit(MERGING, {"N": N, "k": k, "ce": ce})
    assert fitted.misfit == pytest.approx(3e-4, rel=0.3)
    assert fitted.scatter == pytest.approx(4e-3, rel=0.6)
    mean = fitted.predict_interval(N=200, k=9)
    new = fitted.predict_interval(N=200, k=9, new=True)
    assert new[0] < mean[0] and mean[1] < new[1]
    # four sizes cannot tell: a prior does, and it is said
    few = N < 8
    rest = fit(MERGING, {"N": N[few], "k": k[few], "ce": ce[few]})
    assert rest.scatter > 0
    assert any(warning.code == "scatter_prior" for warning in rest.warnings)
    low, high = rest.predict_interval(N=20, k=9)
    assert low < MERGING.predict(TRUTH, N=20, k=9) < high


def test_variances_are_those_of_a_balanced_table():
    """Groups of equal size: REML is the analysis of variance."""
    random = np.random.default_rng(0)
    groups, size = 12, 6
    group = np.repeat(np.arange(1.0, groups + 1), size)
    values = np.repeat(2.0 * random.standard_normal(groups), size) + random.standard_normal(72)
    errors = errors_of(100 + values, group, None)
    errors = replace(errors, typical=30.0)  # hardly a prior
    within, between, _ = errors.likeliest(values - values.mean(), np.ones((72, 1)), None, None)
    means = values.reshape(groups, size).mean(axis=1)
    mean_square = size * means.var(ddof=1)
    error = ((values.reshape(groups, size) - means[:, None]) ** 2).sum() / (groups * (size - 1))
    assert within**2 == pytest.approx(error, rel=0.1)
    assert between**2 == pytest.approx((mean_square - error) / size, rel=0.2)


# ---- experts like these


def test_the_jackknife_of_a_mean_is_the_textbooks():
    """One expert alone at k = 1: leaving one out is leaving out a value of a sample."""
    rows = study(sizes=(1.0,), exhaustive=True, domains=("x",))
    fitted = next(f.fit for f in fit_study(rows).fits if f.domain == "x")
    assert len(fitted.jackknife) == POOL_SIZE
    low, high = fitted.interval("L_inf", population=EXPERTS)
    assert low < fitted.parameters["L_inf"] < high
    inverse = fit(
        INVERSE_FIXED_N,
        (table := described(rows)[0].query("domain == 'x'").drop(columns="se")),
        jackknife=[
            table[table["without"].notna()].assign(ce=ce)
            for ce in np.transpose(table["without"].dropna().to_list())
        ],
    )
    values = [other["L_inf"] for other in inverse.jackknife]
    error = math.sqrt((POOL_SIZE - 1) * np.var(values))
    # The jackknife's error widens the interval for this pool.
    pool, ends = inverse.interval("A"), inverse.interval("A", population=EXPERTS)
    value = inverse.parameters["A"]
    amplitudes = [other["A"] for other in inverse.jackknife]
    reach = 1.943180 * math.sqrt((POOL_SIZE - 1) * np.var(amplitudes))
    assert ends[1] - value == pytest.approx(math.hypot(pool[1] - value, reach))
    centre = float(inverse.predict(k=math.inf))
    own = float(inverse.predict_interval(k=math.inf)[1]) - centre
    wider = float(inverse.predict_interval(population=EXPERTS, k=math.inf)[1]) - centre
    assert wider == pytest.approx(math.hypot(own, 1.943180 * error), rel=1e-6)


@pytest.mark.parametrize("exhaustive", [True, False])
def test_a_law_over_all_sizes_is_about_the_experts_that_all_bases_have(exhaustive):
    rows, common = study(exhaustive=exhaustive), NAMES[:-2]
    shared = rows[[not {*NAMES[-2:]} & {*experts} for experts in rows["experts"]]]
    rows = rows[(rows["base"] != "b4") | rows.index.isin(shared.index)]
    fits = fit_study(rows, [rows], common)
    alone = fit_study(shared, [shared])
    joint = [f.fit.parameters for f in fits.fits if f.base is None]
    assert joint == [f.fit.parameters for f in alone.fits if f.base is None]
    own = {f.base: f.fit.parameters for f in fits.fits if f.domain == MACRO and f.base}
    whole = fit_study(rows, [rows])
    assert own == {f.base: f.fit.parameters for f in whole.fits if f.domain == MACRO and f.base}
    assert joint != [f.fit.parameters for f in whole.fits if f.base is None]
    assert any(w.code == "common_experts" and "e4" in w for w in fits.warnings)
    nothing = fit_study(rows, [rows], [])
    assert all(fit.base for fit in nothing.fits)


def test_without_all_subsets_nothing_is_said_of_other_experts():
    fitted = next(f.fit for f in fit_study(study()).fits if f.domain == "x" and f.base is None)
    assert fitted.jackknife == () and fitted.interval("b", population=EXPERTS) is None
    assert fitted.conf_int(population=EXPERTS).isna().all(axis=None)
    with pytest.raises(MergelawError, match=f"give '{POOL}'"):
        fitted.interval("b", population="everybody")


# ---- results


def test_a_result_tells_its_parameters_intervals_and_predictions():
    fitted = next(f.fit for f in fit_study(study()).fits if f.domain == "x" and f.base is None)
    assert list(fitted.params.index) == list(MERGING.parameters)
    table = fitted.conf_int()
    assert list(table.columns) == ["low", "high"]
    assert tuple(table.loc["b"]) == fitted.interval("b")
    told = fitted.prediction(N=[1.0, 4.0], k=3)
    assert list(told.columns) == ["N", "k", "ce", "low", "high"]
    assert (told["low"] < told["ce"]).all() and (told["ce"] < told["high"]).all()


def test_experts_needed_are_counted_from_the_floor():
    truth = {"L_inf": 1.0, "A": 0.1, "b": 0.25}
    k = np.arange(1, 10)
    fitted = fit(MERGING_FIXED_N, {"k": k, "ce": MERGING_FIXED_N.predict(truth, k=k)})
    for nats in (0.06, 0.02, 0.003):
        assert fitted.k_within(nats) == math.ceil(0.1 / nats - 0.25)
    with pytest.raises(MergelawError, match="above 0"):
        fitted.k_within(0)


def test_few_levels_say_which_to_add():
    fitted = fit(MERGING_FIXED_N, {"k": [1, 2, 4], "ce": [1.2, 1.08, 1.03]})
    assert any("b hit its bound 0: k in {1, 2, 4}" in w for w in fitted.warnings)
    assert any("add k = 6 or more" in w for w in fitted.warnings)


def test_domains_share_what_they_have_in_common():
    random = np.random.default_rng(1)
    N, k = (axis.ravel() for axis in np.meshgrid([0.5, 1.5, 7, 32], np.arange(1, 10)))
    tables = []
    for place in range(4):
        own = {**TRUTH, "A0": 0.05 + 0.03 * place, "beta": 0.2 + 0.2 * place}
        ce = MERGING.predict(own, N=N, k=k) + 2e-4 * random.standard_normal(36)
        tables.append(pd.DataFrame({"N": N, "k": k, "ce": ce, "domain": f"d{place}"}))
    table = pd.concat(tables, ignore_index=True).assign(
        method="average", family="f", M=9, base=lambda t: t["N"].map("b{:g}".format)
    )
    (found,) = fit_all(table).pooled
    for name in ("gamma", "b"):  # the same in all domains
        low, high = found["parameters"][name]["interval"]
        assert low < TRUTH[name] < high
        assert found["parameters"][name]["between"] < 0.02
    assert found["parameters"]["beta"]["between"] == pytest.approx(0.26, rel=0.3)
    scores = found["out_of_sample"]
    assert scores["partial"] < 1.3 * scores["apart"] and scores["partial"] < 0.1 * scores["shared"]
    assert "4 domains" in pooled_text(found)
    assert len({values["beta"] for values in found["domains"].values()}) == 4


def test_what_is_written_is_fitted_again_as_it_was(tmp_path):
    rows = study()
    write(fit_study(rows, [rows]), tmp_path)
    told = json.loads((tmp_path / "laws.json").read_text())
    assert told["intervals"]["intervals"] == POOL
    assert told["intervals"]["experts_intervals"] == EXPERTS
    assert told["variances"] and told["pooled"]
    table, warnings = read_points(tmp_path / "points.parquet")
    again = fit_all(table)
    assert warnings == []
    for before, after in zip(told["fits"], again.fits, strict=True):
        assert after.fit.parameters == pytest.approx(before["parameters"])
        assert after.fit.misfit == pytest.approx(before["misfit"])
    pd.read_parquet(tmp_path / "points.parquet").query("k < 6").to_parquet(tmp_path / "few.parquet")
    few, warnings = read_points(tmp_path / "few.parquet")
    assert warnings == [] and fit_all(few).fits


def test_domains_without_experts_have_a_macro_of_their_own():
    rows = study(domains=("x", "y", "news"), sizes=(1.0,))
    rows["held_out"] = rows["domain"] == "news"
    table, _ = described(rows, documents=[rows])
    losses = table.pivot_table(index="k", columns="domain", values="ce")
    assert list(losses["macro"]) == pytest.approx(list(losses[["x", "y"]].mean(axis=1)))
    assert list(losses["macro_held_out"]) == pytest.approx(list(losses["news"]))
    assert table["documents"].notna().all()
    # Without any trained domain the macro counts all.
    assert set(described(rows.assign(held_out=True))[0]["domain"]) == {"x", "y", "news", "macro"}
