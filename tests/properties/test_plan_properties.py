"""Whatever table of points a stranger asks about: an answer, or a MergelawError of one line."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from mergelaw.errors import MergelawError
from mergelaw.laws.law import MERGING
from mergelaw.planning import (
    Costs,
    Curve,
    budget,
    choose,
    experts,
    forecast,
    loss,
    measure,
    read,
    rule,
    stop,
)

COSTS = Costs(
    pd.DataFrame({"N": [1.0], "training": 2, "merging": 1, "evaluation": 1, "serving": 1})
)
SHAPES = {
    "falling": lambda N, k: 0.5 + N**-0.4 + 0.1 / k,
    "noisy": lambda N, k: 0.5 + N**-0.4 + 0.1 / k + 0.03 * np.sin(37 * k + 11 * N),
    "constant": lambda N, k: 1.5 + 0 * k,
    "increasing": lambda N, k: 0.5 + 0.1 * k,
    "huge": lambda N, k: 1e300 / k,
    "tiny": lambda N, k: 1e-290 / k,
    "bumpy": lambda N, k: 1.0 + 0.1 * (k % 2),
}
SIZES = [[7.0], [0.5, 7.0], [1e-9, 1.0, 9e3], [0.5, 1.5, 7.0, 14.0], [60.0, 125.0, 350.0]]
LEVELS = [[1], [1, 2], [3, 9], [1, 2, 4], [1, 2, 3, 4, 5, 6], [1, 10, 1000, 1_000_000]]
ODD = ["nan", "inf", "-1", "0", "x", "1e400", "", "1,5"]
tables = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(sorted(SHAPES)),
        "sizes": st.sampled_from(SIZES),
        "levels": st.sampled_from(LEVELS),
        "se": st.sampled_from([None, 0.0, 1e-3, 1e9]),
        "M": st.sampled_from([None, 2, 9, 1_000_000]),
        "method": st.sampled_from([None, "a", "a,b", "ties\n"]),
        "loss": st.sampled_from(["loss", "ce", " loss ", "Loss"]),
        "odd": st.none()
        | st.tuples(st.sampled_from(["N", "k", "loss", "M"]), st.sampled_from(ODD)),
        "rows": st.sampled_from([None, 1, 2]),
    }
)
numbers = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, 3.5, 9.0, 1e6, 1e300, math.nan, math.inf])


def table_of(parts) -> pd.DataFrame:
    N, k = (axis.ravel() for axis in np.meshgrid(parts["sizes"], parts["levels"]))
    table = pd.DataFrame({"N": N, "k": k, "loss": SHAPES[parts["shape"]](N, k.astype(float))})
    for name in ("se", "M", "method"):
        if parts[name] is not None:
            table[name] = parts[name]
    table = table.iloc[: parts["rows"]].astype(object)
    if parts["odd"] and parts["odd"][0] in table:
        table.iloc[-1, list(table).index(parts["odd"][0])] = parts["odd"][1]
    return table.rename(columns={"loss": parts["loss"]})


def ends_well(question) -> None:
    try:
        answer = question()
    except MergelawError as error:
        assert "\n" not in str(error) and str(error)
        return
    assert answer.summary()
    values = json.loads(answer.to_json())
    if values["low"] is not None and values["high"] is not None:
        assert values["low"] <= values["high"]
    # An interval that is infinite or has no width is never given without a word.
    if answer.ends is not None and answer.question in ("loss", "forecast"):
        low, high = answer.ends
        known = "measured" in answer.answer or any("standard error" in w for w in answer.warnings)
        assert low < high or known
        assert math.isfinite(high - low) or "above" in answer.answer or "below" in answer.answer


@settings(max_examples=30, deadline=None)
@given(tables, numbers, numbers)
def test_any_question_to_any_table_ends_in_an_answer_or_a_line(parts, number, size):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "points.csv")
        table_of(parts).to_csv(path, index=False)
        try:
            points = choose(read(path)[0])
        except MergelawError as error:
            assert "\n" not in str(error)
            return
    for N in (size, float(points["N"].iloc[-1])):
        try:
            curve = Curve(points, N)
        except MergelawError as error:
            assert "\n" not in str(error)
            continue
        ends_well(lambda curve=curve: loss(curve, number))
        ends_well(lambda curve=curve: experts(curve, number))
        ends_well(lambda curve=curve: stop(curve, number))
        ends_well(lambda curve=curve: measure(curve, number))
    ends_well(lambda: forecast(points, N=size))
    ends_well(lambda: forecast(points, base=str(points["base"].iloc[0]), k=[number]))
    ends_well(lambda: rule(pd.concat([points, points.assign(method="z")]), k=2))
    ends_well(lambda: budget(Curve(points, N, law=MERGING), 2, COSTS, amount=100))


def test_exact_losses_of_five_sizes_answer_every_question():
    """Exact losses whose floor is no power of N and whose tail is 1/k."""
    k = np.arange(1, 10)
    shares = {0.5: 0.3, 1.5: 0.2, 3.0: 0.15, 7.0: 0.1, 14.0: 0.08}
    points = pd.concat(
        pd.DataFrame({"N": N, "k": k, "ce": 0.8 + share + 0.2 * (9 / k - 1) / 8})
        for N, share in shares.items()
    ).assign(method="a", family="", domain="", M=9, base=lambda t: t["N"].map("{:g}B".format))
    points = choose(points.sort_values(["N", "k"], ignore_index=True))
    curve = Curve(points, 32.0)
    ends_well(lambda: experts(curve, 0.85))
    ends_well(lambda: stop(curve, 0.002))
    ends_well(lambda: measure(curve, 9))
    ends_well(lambda: budget(Curve(points, 3.0, law=MERGING), 2, COSTS, amount=100))
    ends_well(lambda: rule(pd.concat([points, points.assign(method="z")]), 3.0, 9))
    ends_well(lambda: forecast(points, base="3B"))
    for size in (32.0, 3.0):
        answer = loss(Curve(points, size), 12)
        assert answer.ends is not None and answer.ends[0] < answer.value < answer.ends[1]
