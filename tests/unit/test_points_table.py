"""Points of one's own: what `mergelaw fit --points` takes, answers and refuses."""

import json

import numpy as np
import pandas as pd
import pytest

from mergelaw.cli import app as cli
from mergelaw.errors import MergelawError
from mergelaw.laws.covariance import sampling_covariance
from mergelaw.laws.fits import fit_all
from mergelaw.laws.law import MERGING
from mergelaw.laws.points import read_points

TRUTH = {"L_star": 0.4, "B": 0.4, "beta": 0.4, "A0": 0.08, "gamma": 0.03, "b": 0.2}


def grid(sizes=(0.5, 1.5, 7, 72), levels=range(1, 10)) -> pd.DataFrame:
    N, k = (axis.ravel() for axis in np.meshgrid(sizes, list(levels)))
    return pd.DataFrame({"N": N, "k": k, "loss": MERGING.predict(TRUTH, N=N, k=k)})


def saved(table: pd.DataFrame, folder, name="points.csv"):
    path = folder / name
    table.to_csv(path, index=False) if name.endswith("csv") else table.to_parquet(path, index=False)
    return path


@pytest.mark.parametrize("name", ["points.csv", "points.parquet"])
@pytest.mark.parametrize("column", ["loss", "ce"])
def test_three_columns_are_enough(tmp_path, name, column):
    table, warnings = read_points(saved(grid().rename(columns={"loss": column}), tmp_path, name))
    assert len(table) == 36
    assert len(warnings) == 1 and "M is not given" in warnings[0]
    study = fit_all(table, warnings)
    assert len(study.fits) == 1 + 4
    assert study.fits[0].fit.parameters == pytest.approx(TRUTH, rel=1e-6)


def test_blanks_around_names_do_no_harm(tmp_path):
    table, _ = read_points(saved(grid().rename(columns={"k": " k", "loss": "loss "}), tmp_path))
    assert len(table) == 36


def test_names_tell_fits_apart(tmp_path):
    one, other = grid().assign(method="average"), grid().assign(method="ties", M=12)
    table, warnings = read_points(saved(pd.concat([one.assign(M=9), other]), tmp_path))
    assert warnings == []
    study = fit_all(table)
    assert len(study.fits) == 2 * 5
    assert {floor["M"] for fitted in study.fits for floor in fitted.floors} == {9, 12}


def test_counted_parameters_are_taken_as_such(tmp_path):
    counted = grid().assign(N=lambda t: t["N"] * 1e9, M=9)
    table, warnings = read_points(saved(counted, tmp_path))
    assert sorted(set(table["N"])) == [0.5, 1.5, 7, 72]
    assert len(warnings) == 1 and "billions" in warnings[0]


@pytest.mark.parametrize("sizes", [[70, 160, 410], [500, 1500, 7000], [7000]])
def test_sizes_that_may_be_millions_are_warned_of(tmp_path, sizes):
    table, warnings = read_points(saved(grid(sizes).assign(M=9), tmp_path))
    assert sorted(set(table["N"])) == sizes
    assert [warning.code for warning in warnings] == ["unit"]


@pytest.mark.parametrize("sizes", [[70], [0.5, 72], [7, 1040]])
def test_sizes_in_billions_are_not_warned_of(tmp_path, sizes):
    assert read_points(saved(grid(sizes).assign(M=9), tmp_path))[1] == []


def test_what_errors_and_losses_are_taken_for_is_said(tmp_path):
    plain = grid().assign(M=9, se=1e-3)
    table, warnings = read_points(saved(plain, tmp_path))
    assert [warning.code for warning in warnings] == ["se_assumed"] and "exact" in warnings[0]
    rough, warnings = read_points(saved(plain.assign(circles=3), tmp_path))
    assert "exact" not in warnings[0]
    few, exact = (sampling_covariance(points)[0] for points in (rough, table))
    assert few / exact == pytest.approx((2.919986 / 1.644854) ** 2)
    _, warnings = read_points(saved(grid().assign(M=9, loss=30.0 + grid()["k"]), tmp_path))
    assert [warning.code for warning in warnings] == ["unit"] and "39 nats" in warnings[0]


def test_sizes_that_fit_no_unit_are_refused(tmp_path):
    with pytest.raises(MergelawError, match=r"N = 13000 .*give N in billions"):
        read_points(saved(grid([13000, 70000]), tmp_path))


def test_repeated_rows_are_dropped_and_told(tmp_path):
    table, warnings = read_points(saved(pd.concat([grid(), grid().head(2)]).assign(M=9), tmp_path))
    assert len(table) == 36
    assert warnings == ["2 rows repeat others and were dropped"]


def changed(row, **values) -> pd.DataFrame:
    table = grid().astype({"k": object, "N": object, "loss": object})
    for name, value in values.items():
        table.loc[row, name] = value
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (changed(2, loss=-0.1), r"row 3 has ce = -0\.1"),
        (changed(2, loss=np.nan), "row 3 has ce = nan"),
        (changed(0, N=5e8), "N = 5e.08 beside N = 0.5"),
        (changed(0, N="7B"), "N = 7B: give a number"),
        (changed(1, k=2.5), r"k = 2\.5: give a whole"),
        (changed(1, k=0), "k = 0: give a whole"),
        (grid().assign(methd="ties"), "unknown column methd"),
        (grid().assign(ce=1.0), "loss and ce"),
        (grid().drop(columns="k"), "lacks the column k: it has N, loss"),
        (grid().rename(columns={"k": "K"}), "lacks the column k: it has N, K, loss"),
        (grid().head(0), "no rows"),
        (grid().assign(M=3), "k above M"),
        (grid().assign(se=-1.0), "standard error"),
        (pd.concat([grid(), grid().head(1).assign(loss=2.0)]), "twice, with losses"),
    ],
)
def test_bad_tables_are_one_line(tmp_path, table, message):
    with pytest.raises(MergelawError, match=message) as error:
        read_points(saved(table, tmp_path))
    assert "\n" not in str(error.value)


def test_files_that_are_no_tables_are_one_line(tmp_path):
    with pytest.raises(MergelawError, match="no such file"):
        read_points(tmp_path / "none.csv")
    (tmp_path / "points.xlsx").write_text("a workbook")
    with pytest.raises(MergelawError, match=r"neither \.csv nor"):
        read_points(tmp_path / "points.xlsx")
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(MergelawError, match="cannot be read"):
        read_points(tmp_path / "broken.parquet")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(MergelawError, match="cannot be read"):
        read_points(tmp_path / "empty.csv")


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["mergelaw", "fit", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, 1)


def test_the_command_prints_and_keeps(tmp_path, monkeypatch, capsys):
    path = saved(grid(), tmp_path)
    run(monkeypatch, "--points", path, "--output", tmp_path / "laws")
    printed = capsys.readouterr().out
    assert "\nN=7\n" in printed and "M is not given" in printed
    assert (tmp_path / "laws/summary.txt").read_text() == printed
    assert len(json.loads((tmp_path / "laws/laws.json").read_text())["fits"]) == 5
    # What it wrote it reads.
    run(monkeypatch, "--points", tmp_path / "laws/points.parquet")
    assert "\nN=7\n" in capsys.readouterr().out
    # A folder holds one table's fits.
    run(monkeypatch, "--points", saved(grid([1, 2, 3]), tmp_path), "--output", tmp_path / "laws")
    assert "name another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (grid(levels=[2]), "3 numbers of experts k"),
        (grid(sizes=[7], levels=[1, 2]), "3 numbers of experts k, and 2 are measured"),
    ],
)
def test_what_cannot_be_fitted_at_all_is_one_line(tmp_path, monkeypatch, capsys, table, message):
    run(monkeypatch, "--points", saved(table, tmp_path))
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_one_size_is_fitted_and_the_joint_law_is_not(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--points", saved(grid(sizes=[7]), tmp_path))
    printed = capsys.readouterr().out
    assert "L_inf" in printed and "3 sizes N of bases" in printed


def test_an_index_that_parquet_keeps_is_columns_or_nothing(tmp_path):
    plain, _ = read_points(saved(grid().assign(M=9), tmp_path))
    one, other = (grid(sizes).assign(M=9) for sizes in ((0.5, 1.5), (7, 72)))
    pd.concat([one, other]).to_parquet(tmp_path / "repeated.parquet")
    grid().assign(M=9).set_index(["N", "k"]).to_parquet(tmp_path / "named.parquet")
    for name in ("repeated.parquet", "named.parquet"):
        pd.testing.assert_frame_equal(read_points(tmp_path / name)[0], plain)


@pytest.mark.parametrize("kind", ["object", "category"])
def test_names_may_be_missing_in_part(tmp_path, kind):
    given = grid().assign(M=9, base=grid()["N"].map({0.5: "small", 72: "large"}), method="ties")
    given.loc[0, "method"] = None
    given = given.astype({"base": kind, "method": kind})
    table, _ = read_points(saved(given, tmp_path, "points.parquet"))
    assert list(dict.fromkeys(table.sort_values("N")["base"])) == ["small", "N=1.5", "N=7", "large"]
    assert sorted(set(table["method"])) == ["", "ties"]


def test_what_pandas_would_stumble_over_is_one_line(tmp_path):
    (tmp_path / "twice.csv").write_text("N,k,loss, loss\n1,1,.8,.8\n1,2,.7,.7\n")
    with pytest.raises(MergelawError, match="has the column loss twice"):
        read_points(tmp_path / "twice.csv")
    (tmp_path / "huge.csv").write_text("N,k,loss\n1,1,.8\n1,1e30,.6\n")
    with pytest.raises(MergelawError, match=r"row 2 has k = 1e\+30: give a whole number"):
        read_points(tmp_path / "huge.csv")


def test_domains_too_short_for_laws_of_their_own_are_not_pooled(tmp_path):
    """Twelve points for twelve parameters: there is nothing to compare sharing with."""
    places = [(1.0, 1), (1.0, 2), (1.0, 4), (3.0, 1), (3.0, 4), (9.0, 1)]
    N, k = (np.array(axis) for axis in zip(*places, strict=True))
    loss = MERGING.predict(TRUTH, N=N, k=k)
    few = pd.DataFrame({"N": N, "k": k, "loss": loss, "se": 1e-3, "M": 9})
    both = pd.concat([few.assign(domain="a"), few.assign(domain="b", loss=few["loss"] + 0.1)])
    study = fit_all(*read_points(saved(both, tmp_path)))
    assert sum(fitted.base is None for fitted in study.fits) == 2 and not study.pooled


@pytest.mark.parametrize("common", [0.0, 0.9])
def test_a_row_for_each_circle_gives_means_with_their_errors_and_correlation(tmp_path, common):
    random, parts = np.random.default_rng(0), []
    for circle in range(8):
        table = grid().assign(circle=f"c{circle}", M=10)
        shared = table["N"].map(
            dict(zip(sorted(set(table["N"])), random.normal(size=4), strict=True))
        )
        own = random.standard_normal(len(table))
        table["loss"] += 1e-3 * (np.sqrt(common) * shared + np.sqrt(1 - common) * own)
        parts.append(table)
    every = grid(levels=[10]).assign(circle=None, M=10)
    table, warnings = read_points(saved(pd.concat([*parts, every]), tmp_path))
    assert len(table) == 40 and [note.code for note in warnings] == ["se_assumed"]
    whole = sampling_covariance(table).toarray()
    exact = (table["k"] == 10).to_numpy()
    assert not whole[exact].any() and (table["freedom"] == 7).all()
    errors = np.sqrt(np.diag(whole)[~exact])
    assert np.mean(errors) == pytest.approx(1e-3 / np.sqrt(8), rel=0.35)
    one = np.flatnonzero((table["base"] == table["base"].iloc[0]) & ~exact)
    measured = whole[np.ix_(one, one)][0, 1:] / np.diag(whole)[one[0]]
    assert measured.mean() == pytest.approx(common, abs=0.3)
    assert fit_all(table).fits[0].fit.interval("b") is not None


def test_a_row_for_each_subset_gives_errors_without_replacement(tmp_path):
    random = np.random.default_rng(0)
    rows = [
        {"N": 1.0, "k": k, "M": 4, "subset": i, "loss": 0.8 + 0.1 / k + 1e-3 * random.normal()}
        for k, count in ((1, 4), (2, 3), (3, 2), (4, 1))
        for i in range(count)
    ]
    table, warnings = read_points(saved(pd.DataFrame(rows), tmp_path))
    losses = [row["loss"] for row in rows if row["k"] == 2]
    assert table["ce"][1] == pytest.approx(np.mean(losses))
    assert table["se"][1] == pytest.approx(np.std(losses, ddof=1) / np.sqrt(3) * np.sqrt(1 - 3 / 6))
    assert list(table["circles"]) == [4, 3, 2, 2] and table["se"][0] == table["se"][3] == 0
    assert [note.code for note in warnings] == ["se_assumed"]
    with pytest.raises(MergelawError, match="column se beside subset"):
        read_points(saved(pd.DataFrame(rows).assign(se=1e-3), tmp_path))
