"""The coverage benchmark in small: enough to see a wrong interval, not a third digit."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import interval_coverage as coverage


def test_settings_cross_what_they_are_to_cross():
    made = coverage.settings()
    assert len({setting.row for setting in made}) >= 6
    for first in ("pool", "design", "noise", "misfit", "scatter"):
        for second in ("pool", "design", "noise", "misfit", "scatter"):
            pairs = {(getattr(s, first), getattr(s, second)) for s in made}
            levels = [len({getattr(s, name) for s in made}) for name in (first, second)]
            assert len(pairs) == (levels[0] if first == second else levels[0] * levels[1])


@pytest.mark.parametrize("place", [3, 10])
def test_intervals_hold_about_as_often_as_they_say(place):
    table = coverage.cover((coverage.settings()[place], 40, place))
    assert (table["held"] >= 0.75).all()  # 90% less three standard errors
    assert (table["width"] > 0).all()


def test_simulated_circles_have_the_covariance_that_the_analysis_is_given():
    (setting, *_) = [s for s in coverage.settings() if s.circular and s.pool == 7]
    random = np.random.default_rng(0)
    pairs = coverage.landscape(7, random)
    draws = np.array([coverage.circle(pairs, random) for _ in range(4000)])
    expected = setting.shape * np.trace(np.cov(draws.T)) / np.trace(setting.shape)
    assert np.cov(draws.T) == pytest.approx(expected, abs=0.1 * expected.max())
