"""Means, units and factors that can be checked by hand."""

import base64
import math

import numpy as np
import pandas as pd
import pytest

import pool
from mergelaw.evaluation.table import read_rows, write_table
from mergelaw.laws.fits import fit_study
from mergelaw.laws.noise import describe
from mergelaw.laws.points import points
from mergelaw.report.figures import figures
from mergelaw.workflow.cost import Work
from mergelaw.workflow.resources import Hardware, ask


def circles(losses: dict[int, list[float]], documents=None) -> pd.DataFrame:
    """Rows of merges of two experts: losses by circle, on one domain."""
    rows = [
        {"family": "f", "base": "b", "N": 1.0, "method": "average", "role": "merge", "seed": 0,
         "k": 2, "replicate": circle, "experts": ["x", "y"], "merge": f"{circle}.{n}",
         "domain": "d", "ce": loss, "finite": True}
        for circle, several in losses.items() for n, loss in enumerate(several)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_a_point_is_the_mean_over_circles_of_their_means():
    """Neither a median, of circles or of a circle's merges, nor the mean of all merges."""
    table, _ = points(circles({0: [1.0, 3.0], 1: [2.0], 2: [6.0, 6.0, 15.0]}))
    assert table.loc[table["domain"] == "d", "ce"].item() == pytest.approx(13 / 3)


def test_the_error_from_documents_is_that_of_a_sample_of_documents():
    """n / (n - 1), as of any sample: three documents of one token each, losses 1, 2 and 6."""
    rows = circles({0: [3.0]})
    documents = rows.assign(document_nll=[[1.0, 2.0, 6.0]], document_tokens=[[1, 1, 1]])
    table, _ = points(rows)
    table = table[table["domain"] == "d"].assign(M=2)
    (errors,) = describe(table, rows, [documents])[0]["documents"]
    assert np.dot(errors, errors) == pytest.approx(np.var([1, 2, 6], ddof=1) / 3)


def test_bits_per_byte_are_base_two(tmp_path):
    """Documents of 3 and 5 nats on 16 bytes."""
    nll = base64.b64encode(np.array([3.0, 5.0], "<f8").tobytes()).decode()
    cell = {"cell": "c", "document_nll": nll, "document_tokens": [1, 3], "tokens": 4, "bytes": 16,
            "non_embedding": 3_000_000, "parameters": 5_000_000}  # fmt: skip
    entry = {
        "cell": "c",
        "domain": "d",
        "k": 1,
        "experts": ["x"],
        "weights": [1.0],
        "written": False,
    }
    labels = {"method": "average", "N_nominal": None}
    recipe = {"labels": labels, "method": {}, "domains": {"d": False}, "evaluation": {"dtype": "x"}}
    entries = [entry, entry | {"written": True}, entry | {"k": 0, "experts": [], "weights": []}]
    write_table(recipe, entries, {"c": cell}, tmp_path)
    row, *others = read_rows([tmp_path]).to_dict("records")
    assert [one["role"] for one in (row, *others)] == ["merge", "written", "base"]
    assert row["nll"] == 8 and row["ce"] == 2
    assert row["bits_per_byte"] == pytest.approx(8 / math.log(2) / 16)
    assert row["N"] == pytest.approx(0.003) and row["N_total"] == pytest.approx(0.005)


def test_the_axis_of_sizes_counts_parameters():
    """Tables have N in billions; floors and tails are drawn against parameters."""
    small = pool.rows(experts=pool.EXPERTS[:4], domains=pool.EXPERTS[:2], documents=4)
    rows = pd.concat(
        [small, small.assign(base="large", N=5e-4, N_total=5e-4, ce=small["ce"] - 0.1)]
    )
    rows = rows.reset_index(drop=True)
    fitted = fit_study(rows.drop(columns=["document_nll", "document_tokens"]))
    fits = pd.DataFrame(fitted.to_dict()["fits"])
    drawn = figures(fits, fitted.points, rows)["floors"].to_dict()
    sizes = {row["N"] for data in drawn["datasets"].values() for row in data if "N" in row}
    assert {round(size) for size in sizes} >= {100_000, 500_000}
    assert min(sizes) > 99_999 and max(sizes) < 500_001


@pytest.mark.parametrize(
    ("work", "minutes"),
    [
        (Work("nothing"), 15),
        (Work("a terabyte", moved=1e12), 15 + 2 * 1e12 / 1e9 / 60),
        (Work("a terabyte of streams", streamed=1e12, vectors=1e12, counts=(1,), shared=1),
         15 + 2 * 1e12 / 1e9 / 60),
        (Work("an exaflop", flops=1e18, counts=(1,), shared=1), 15 + 2 * 1e18 / 400e12 / 60),
    ],
    ids=lambda value: getattr(value, "what", ""),
)  # fmt: skip
def test_a_job_asks_for_fifteen_minutes_and_twice_its_time(work, minutes):
    """On storage of a gigabyte a second and a GPU of 400 teraflops."""
    hardware = Hardware(
        gpus_per_node=1, gpu_memory_gb=80, node_memory_gb=1000, gigabytes_per_second=1
    )
    assert ask(work, hardware, 1, 1)["runtime"] == math.ceil(minutes)


def test_storage_is_half_a_gigabyte_a_second_unless_the_profile_says_otherwise():
    """Read or written by one job, digests included."""
    hardware = Hardware(gpus_per_node=1, gpu_memory_gb=80, node_memory_gb=1000)
    assert hardware.seconds(Work("a terabyte", moved=1e12), 0) == pytest.approx(2000)
