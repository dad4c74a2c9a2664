"""A change makes again what depends on it and nothing else, counted in jobs and in cells."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from studies import READY, Place, made, ready_config, records, write_jsonl

import mergelaw
from mergelaw.artifacts import keys
from mergelaw.evaluation.cells import CELL_VERSION

FOLLOWS = {"fit_laws": 1, "write_report": 1}


def touch_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, follow_symlinks=False)


# Nothing changed


def test_a_second_run_does_nothing_wherever_it_is_started(ready, tmp_path):
    assert ready.planned() == {}
    assert ready.planned(cwd=tmp_path) == {}
    place = ready.copy(tmp_path / "copy")
    for path in sorted((place.results).rglob("lineage.json"), reverse=True):
        path.touch()  # consumers older than what they are made from
    touch_all(ready.folder / "data")
    touch_all(ready.folder / "models")
    assert place.planned() == {}
    before = place.lineages()
    place.finish(cwd=tmp_path)
    assert place.lineages() == before


def test_moved_files_are_the_same_files(ready, tmp_path):
    for name in ("data", "models"):
        shutil.copytree(ready.folder / name, tmp_path / name, symlinks=True)
    place = ready.copy(tmp_path)
    place.configure(ready_config(tmp_path))
    assert place.planned() == {}


# What a changed configuration asks for, by dry run


def change(config: dict, path: str, value) -> dict:
    *parents, last = path.split(".")
    inner = config
    for key in parents:
        inner = inner.setdefault(key, {})
    inner[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "jobs"),
    [
        (
            "experts.code.training",
            {"learning_rate": 2e-3},
            {"train_expert": 2, "make_task_vector": 2, "evaluate_merges": 2, **FOLLOWS},
        ),
        (
            "bases.large.training",
            {"learning_rate": 2e-3},
            {"train_expert": 3, "make_task_vector": 3, "evaluate_merges": 1, **FOLLOWS},
        ),
        ("evaluation.dtype", "bfloat16", {"evaluate_merges": 2, **FOLLOWS}),
        ("methods.ties", {"density": 0.5}, {"evaluate_merges": 2, **FOLLOWS}),
        (
            "domains.biology",
            {"source": {"synthetic": "biology"}, "held_out": True},
            {"build_corpus": 1, "check_overlap": 1, "evaluate_merges": 2, **FOLLOWS},
        ),
        ("sampling.k", [1, 2], {"sample_design": 2, "evaluate_merges": 2, **FOLLOWS}),
        ("name", "another", {"evaluate_merges": 2, **FOLLOWS}),
        ("merges.pair", {"base": "large", "method": "average", "experts": ["code", "physics"]},
         {"evaluate_merges": 1, "write_merge": 1, "write_report": 1}),
    ],
)  # fmt: skip
def test_a_change_plans_what_follows_from_it(trained, tmp_path, path, value, jobs):
    place = trained.copy(tmp_path)
    place.configure(change(place.config, path, value))
    assert place.planned() == jobs


def test_the_order_of_experts_is_theirs_alone(trained, tmp_path):
    """A pool is an order: another one measures nothing that is known, and trains nothing."""
    place = trained.copy(tmp_path)
    place.configure(place.config | {"experts": dict(reversed(place.config["experts"].items()))})
    assert not place.planned().keys() & {
        "pretrain_base",
        "fetch_base",
        "train_expert",
        "make_task_vector",
    }


# The same, run


def test_a_new_expert_trains_itself_and_measures_its_own_merges(trained, tmp_path):
    place = trained.copy(tmp_path)
    lineages, cells = place.lineages(), place.cells()
    domains = place.config["domains"] | {"biology": {"source": {"synthetic": "biology"}}}
    place.configure(
        place.config
        | {"domains": domains, "experts": place.config["experts"] | {"biology": {}}}
    )  # fmt: skip
    place.finish()
    new = {path: value for path, value in place.lineages().items() if path not in lineages}
    assert lineages.items() <= place.lineages().items()
    assert made(lineages, new) == Counter(
        corpora=2, checks=1, experts=2, task_vectors=2, designs=2, evals=2, laws=1, reports=1
    )
    assert {path.split("/")[2].split("@")[0] for path in new if path.startswith("experts/")} == {
        "biology-s0"
    }
    assert only_new(place, cells, "biology")


def only_new(place: Place, known: list[str], expert: str) -> bool:
    """Each cell was measured once, and the new ones have the new expert or its domain."""
    cells = place.cells()
    assert len(cells) == len(set(cells))
    rows = place.rows()
    with_it = rows["experts"].map(lambda experts: expert in experts) | (rows["domain"] == expert)
    assert set(rows[~with_it]["cell"]) <= set(known)
    return set(rows[with_it]["cell"]) == set(cells) - set(known)


def test_a_changed_expert_is_trained_again_and_changing_back_redoes_nothing(trained, tmp_path):
    place = trained.copy(tmp_path)
    config, lineages, cells = place.config, place.lineages(), place.cells()
    experts = {**config["experts"], "code": {"training": {"learning_rate": 2e-3}}}
    place.configure(config | {"experts": experts})
    place.finish()
    assert lineages.items() <= place.lineages().items()
    again = made(lineages, place.lineages())
    assert again == Counter(experts=2, task_vectors=2, evals=2, laws=1, reports=1)
    rows = place.rows()
    assert all("code" in experts for experts in rows[~rows["cell"].isin(cells)]["experts"])
    assert len(set(place.cells())) == len(place.cells()) > len(cells)
    place.configure(config)
    assert place.planned() == {}


@pytest.mark.parametrize("design", ["exhaustive", "ring"])
def test_a_larger_pool_measures_the_cells_it_has_and_the_smaller_one_had_not(
    ready, tmp_path, design
):
    place = ready.copy(tmp_path).forget("evals", "cells", "laws", "reports")
    sampling = {"design": design, "circles": 1, "exhaustive_up_to": 1}
    place.configure(ready_config(ready.folder, READY[:-1]) | {"sampling": sampling})
    place.finish("--until", "evaluate_merges")
    before = set(place.rows()["cell"])
    assert set(place.cells()) == before
    place.configure(ready_config(ready.folder) | {"sampling": sampling})
    place.finish("--until", "evaluate_merges")
    rows, cells = place.rows(), place.cells()
    assert len(cells) == len(set(cells))
    new = set(cells) - before
    assert new == set(rows["cell"]) - before
    # On a circle only those rotations change that reach over the new expert's place.
    if design == "exhaustive":
        assert all(READY[-1] in e for e in rows[rows["cell"].isin(new)]["experts"])
    assert 0 < len(new) < len(set(rows["cell"]))


def test_a_new_domain_measures_one_column(ready, tmp_path):
    place = ready.copy(tmp_path)
    cells = set(place.cells())
    file = write_jsonl(tmp_path / "proverbs.jsonl", records("proverbs"))
    new = {"proverbs": {"source": {"files": [str(file)]}, "held_out": True}}
    place.configure(place.config | {"domains": place.config["domains"] | new})
    place.finish("--until", "evaluate_merges")
    rows, measured = place.rows(), place.cells()
    assert len(measured) == len(set(measured)) == len(cells) + 64
    assert set(rows[rows["domain"] == "proverbs"]["cell"]) == set(measured) - cells


def test_one_more_evaluation_document_measures_one_column(ready, tmp_path):
    place = ready.copy(tmp_path)
    cells, domains = set(place.cells()), place.config["domains"]
    more = {"sums": {**domains["sums"], "eval_documents": 7}}
    place.configure(place.config | {"domains": domains | more})
    assert place.planned() == {
        "build_corpus": 1, "check_overlap": 1, "evaluate_merges": 1, **FOLLOWS,
    }  # fmt: skip
    place.finish("--until", "evaluate_merges")
    rows, measured = place.rows(), place.cells()
    assert len(measured) == len(set(measured)) == len(cells) + 64
    assert set(rows[rows["domain"] == "sums"]["cell"]) == set(measured) - cells


# A stage's raised version


def raised(stage: str, folder: Path) -> str:
    """PYTHONPATH of a copy of the package in which the stage's version is raised."""
    copy = folder / "raised" / "mergelaw"
    shutil.copytree(Path(mergelaw.__file__).parent, copy)
    now = keys.STAGES[stage]
    edit(copy / "artifacts" / "keys.py", f'"{stage}": {now},', f'"{stage}": {now + 1},')
    return str(copy.parent)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


ALL = {
    "build_corpus": 6, "check_overlap": 1, "pretrain_base": 1, "fetch_base": 1, "train_expert": 6, "make_task_vector": 6,
    "evaluate_merges": 2, **FOLLOWS,
}  # fmt: skip


def without(*rules: str) -> dict[str, int]:
    return {rule: count for rule, count in ALL.items() if rule not in rules}


@pytest.mark.parametrize(
    ("stage", "jobs"),
    [
        ("corpus", without("fetch_base")),
        ("overlap", {"check_overlap": 1}),
        ("base", without("build_corpus", "check_overlap")),
        ("expert", without("build_corpus", "check_overlap", "pretrain_base", "fetch_base")),
        ("task_vector", {"make_task_vector": 6, "evaluate_merges": 2, **FOLLOWS}),
        ("design", {"sample_design": 2}),
        ("evaluate", {"evaluate_merges": 2, **FOLLOWS}),
        ("fit", FOLLOWS),
        ("report", {"write_report": 1}),
    ],
)
def test_a_raised_version_redoes_its_stage_and_what_follows(trained, tmp_path, stage, jobs):
    assert trained.planned(cwd=tmp_path, PYTHONPATH=raised(stage, tmp_path)) == jobs


def test_a_raised_version_of_the_evaluation_writes_tables_from_the_stored_cells(ready, tmp_path):
    place = ready.copy(tmp_path)
    cells, tables = place.cells(), len(place.artifacts("evals"))
    place.finish("--until", "evaluate_merges", PYTHONPATH=raised("evaluate", tmp_path))
    assert len(place.artifacts("evals")) == 2 * tables
    assert place.cells() == cells


def test_a_raised_version_of_cells_measures_everything_again(ready, tmp_path):
    place = ready.copy(tmp_path)
    cells = place.cells()
    path = raised("evaluate", tmp_path)
    source = Path(path, "mergelaw", "evaluation", "cells.py")
    version = f"CELL_VERSION = {CELL_VERSION}"
    edit(source, version, f"{version}0")
    place.finish("--until", "evaluate_merges", PYTHONPATH=path)
    assert len(set(place.cells())) == len(place.cells()) == 2 * len(cells)
    assert place.planned() == {}


def test_a_raised_version_of_the_merge_writes_merges_again(ready, tmp_path):
    place = ready.copy(tmp_path)
    merge = {"base": "tiny", "method": "average", "experts": ["amber", "birch"]}
    place.configure(place.config | {"merges": {"both": merge}})
    assert place.planned() == {"evaluate_merges": 1, "write_merge": 1, "write_report": 1}
    place.finish()
    assert place.planned() == {}
    assert place.planned(PYTHONPATH=raised("merge", tmp_path)) == {"write_merge": 1}
