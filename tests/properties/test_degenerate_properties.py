"""Tables that no law was made for end in a result or in one clear line."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergelaw.errors import MergelawError
from mergelaw.laws.fit import fit
from mergelaw.laws.law import MERGING, MERGING_FIXED_N

SHAPES = {
    "exact": lambda k: 0.8 + 0.1 / (k + 0.3),
    "constant": lambda k: np.full(len(k), 1.5),
    "increasing": lambda k: 1 + 0.05 * k,
    "falling by steps": lambda k: np.where(k < k.mean(), 1.2, 1.0),
    "linear": lambda k: 2 - 0.05 * k,
    "one point off": lambda k: 0.8 + 0.1 / k + 0.5 * (k == k[-1]),
}


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    levels=st.integers(2, 9),
    sizes=st.lists(st.sampled_from([1e-5, 0.5, 1.5, 3.0, 7.0, 14.0]), min_size=1, unique=True),
    joint=st.booleans(),
    noise=st.sampled_from([0.0, 1e-12, 1e-3]),
    se=st.sampled_from([None, 0.0, 1e-3]),
    scale=st.sampled_from([1e-3, 1.0, 80.0]),
)
def test_a_table_ends_in_a_result_or_one_line(shape, levels, sizes, joint, noise, se, scale):
    if not joint:
        sizes = sizes[:1]
    N, k = (axis.ravel() for axis in np.meshgrid(sorted(sizes), np.arange(1, levels + 1)))
    losses = np.concatenate([SHAPES[shape](k[size == N].astype(float)) for size in sorted(sizes)])
    ce = np.empty(len(k))
    for size, part in zip(sorted(sizes), np.split(losses, len(sizes)), strict=True):
        ce[size == N] = part
    ce = scale * (ce + noise * np.random.default_rng(0).standard_normal(len(k)))
    table = {"N": N, "k": k, "ce": ce} | ({} if se is None else {"se": np.full(len(k), se)})
    try:
        fitted = fit(MERGING if joint else MERGING_FIXED_N, table)
    except MergelawError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
        return
    told = json.loads(json.dumps(fitted.to_dict(), allow_nan=False))
    assert told["verdict"]["state"] in ("holds", "doubtful", "fails") and fitted.summary()
    if shape in ("constant", "increasing") and len(k) > 4 * len(sizes) and not noise:
        assert told["verdict"]["state"] == "fails"
    for low, high in fitted.intervals.values():
        assert low < high
    ends = fitted.predict_interval(k=levels + 1, **({"N": 20.0} if joint else {}))
    assert ends is None or not np.isnan(ends).any()


def test_exact_losses_of_five_sizes_are_fitted():
    sizes, shares = [0.5, 1.5, 3, 7, 14], [0.3, 0.2, 0.15, 0.1, 0.08]
    k = np.arange(1, 10)
    table = {
        "N": np.repeat(sizes, 9),
        "k": np.tile(k, 5),
        "ce": np.concatenate([0.8 + s + 0.2 * (9 / k - 1) / 8 for s in shares]),
    }
    fitted = fit(MERGING, table)
    assert fitted.parameters["b"] == pytest.approx(0, abs=1e-6) and fitted.summary()
    low, high = fitted.predict_interval(N=32, k=9)
    assert low < high
