"""The coverage benchmark in small: enough to see a wrong interval, not a third digit."""

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import interval_coverage as coverage

CROSSED = {
    "sizes": coverage.LADDERS,
    "truth": coverage.TAILS,
    "noise": ("known", "estimated", "rings"),
    "scatter": (0.0, 0.5, 2.0),
}


def test_settings_cross_every_pair_of_what_they_cross():
    chosen = coverage.settings()
    for first, second in combinations(CROSSED, 2):
        pairs = {(getattr(s, first), getattr(s, second)) for s in chosen}
        assert len(pairs) == len(CROSSED[first]) * len(CROSSED[second])


def test_intervals_hold_about_as_often_as_they_say(tmp_path):
    """The law is true, the noise known, and there is no scatter: the least that must hold."""
    setting = coverage.Setting(5, "1/(k+b)", "known", 0.0, "ties biology")
    table = coverage.simulate(12, [setting], tmp_path)
    assert coverage.simulate(12, [setting], tmp_path).equals(table)  # from its answers
    # A true law may be doubted in 1 of 10 tables: that is more than 4 of 12 once in 200 runs.
    assert (table["answered"] >= 1 - 4 / 12).all()
    assert table["held"].mean() >= 0.79  # 90% less three standard errors of 48 draws
    assert (table["width"] > 0.5 * table["oracle"]).all()


def test_simulated_circles_have_the_covariance_that_the_oracle_is_given():
    setting = coverage.Setting(4, "log k", "rings", 0.0, "ties code")
    random = np.random.default_rng(0)
    pairs = coverage.landscape(random)
    draws = np.array([coverage.circle(pairs, random) for _ in range(4000)])
    expected = setting.circle * np.trace(np.cov(draws.T)) / np.trace(setting.circle)
    assert np.cov(draws.T) == pytest.approx(expected, abs=0.1 * expected.max())


def test_the_oracles_width_is_that_of_the_truths_own_noise():
    widths = {
        scatter: coverage.oracle(coverage.Setting(5, "1/(k+b)", "known", scatter, "ties code"))
        for scatter in (0.0, 2.0)
    }
    assert widths[2.0]["L(2N, 9)"] > 2 * widths[0.0]["L(2N, 9)"]  # an unmeasured base scatters
    assert widths[2.0]["L(N, 16)"] == pytest.approx(widths[0.0]["L(N, 16)"])  # a measured one, not
