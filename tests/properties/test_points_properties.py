"""Whatever is in a table of points: points, or a MergelawError of one line, nothing else."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from mergelaw.errors import MergelawError
from mergelaw.laws.points import OPTIONAL, read_points

names = st.sampled_from(["N", "k", "ce", "loss", *OPTIONAL])
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["1e999", "-0", "nan", "0x10", "1_000", "1,5", "inf"])
)


def outcome(content: bytes | pd.DataFrame, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.to_parquet(path)
        try:
            table, _ = read_points(path)
        except MergelawError as error:
            assert "\n" not in str(error)
            return
        assert len(table)
        assert np.isfinite(table[["N", "k", "ce", "M"]].astype(float)).all(axis=None)
        assert (table["k"] >= 1).all() and (table["k"] <= table["M"]).all()
        assert (table["N"] > 0).all() and (table["ce"] > 0).all()


@settings(max_examples=200)
@given(st.binary(max_size=80), st.sampled_from(["a.csv", "a.parquet"]))
def test_any_bytes(content, name):
    outcome(content, name)


@settings(max_examples=300)
@given(st.lists(names | st.text(max_size=4), max_size=5), st.lists(st.lists(leaves, max_size=5)))
def test_any_text_with_commas(head, rows):
    lines = [",".join(map(str, row)) for row in (head, *rows)]
    outcome("\n".join(lines).encode(errors="replace"), "a.csv")


@settings(max_examples=100)
@given(st.data(), st.sets(names, min_size=1, max_size=6), st.integers(0, 4))
def test_any_values_in_known_columns(data, head, rows):
    columns = {
        name: data.draw(
            st.lists(st.floats() | st.none(), min_size=rows, max_size=rows)
            | st.lists(st.integers(-3, 9), min_size=rows, max_size=rows)
            | st.lists(st.text(max_size=4), min_size=rows, max_size=rows)
            | st.lists(st.lists(st.integers(0, 3), max_size=2), min_size=rows, max_size=rows)
        )
        for name in ("N", "k", "ce", *head)
    }
    outcome(pd.DataFrame(columns), "a.parquet")
