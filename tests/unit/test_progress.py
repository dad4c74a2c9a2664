"""Progress of a study from its results folder: counts, rate, time left, failures."""

import json
import time
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from mergelaw import config
from mergelaw.artifacts import store
from mergelaw.cli.app import app
from mergelaw.workflow import progress
from mergelaw.workflow.results import summary_text
from mergelaw.workflow.study import Study


@pytest.fixture
def study(tmp_path) -> Study:
    """Two bases of the hub, three experts, one method: 8 subsets of each base."""
    domains = ("algebra", "code", "physics")
    return Study(
        config.parse(
            {
                "name": "some",
                "results": str(tmp_path / "results"),
                "corpus": {"train_documents": 20, "eval_documents": 6},
                "domains": {name: {"source": {"synthetic": name}} for name in domains},
                "bases": {
                    name: {"hub": "ours/none", "revision": "main", "N": 1}
                    for name in ("small", "large")
                },
                "training": {"steps": 5, "max_tokens": 64, "learning_rate": 1e-3},
                "methods": {"average": {}},
            }
        )
    )


def make(study: Study, *stages: str, **facts: object) -> None:
    for artifact in study.by_path.values():
        if artifact.stage in stages:
            folder = study.results / artifact.path
            store.make(folder, artifact.stage, artifact.recipe, {}, lambda f, s: dict(facts))


def cell_file(study: Study, base: str, cells: int, seconds: float) -> Path:
    """A running shard's file in the cell store, begun some seconds ago."""
    artifact = study.evals[base, "average", 0, 0]
    name = artifact.path.rpartition("/")[2]
    start = time.time_ns() - int(seconds * 1e9)
    path = study.results / "cells" / base / f"{name}-{start:x}-99.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("{}\n" * cells)
    return path


def test_nothing_is_made_yet(study):
    now = progress.progress(study)
    assert now.stages["expert"] == {"finished": 0, "running": 0, "jobs": 6}
    assert (now.merges_measured, now.merges_planned) == (0, 14)
    assert now.seconds_left is None and now.failures == {}
    assert "experts 0 of 6" in now.line() and "time left unknown" in now.line()


def test_a_running_shard_counts_by_its_cells(study):
    make(study, "corpus", "overlap", "base", "expert", "task_vector", "design")
    cell_file(study, "small", cells=3 * 4, seconds=60)
    now = progress.progress(study)
    assert now.merges_measured == 4
    assert now.merges_per_minute == pytest.approx(4, rel=0.2)
    assert "merges measured 4 of 14, 4 a minute" in now.text()
    # 16 rows of the design (8 a base, with the base itself) at that rate; fits take no time yet.
    assert now.seconds_left == pytest.approx(16 / 4 * 60, rel=0.25)


def test_time_left_follows_from_finished_jobs_of_the_stage_and_base(study, monkeypatch):
    seconds = {"base": 10.0, "expert": 6.0, "evaluate": 2.0}
    monkeypatch.setattr(
        progress,
        "_unit_seconds",
        lambda s, a: seconds.get(a.stage, 0.0) * (3 if a.base == "large" else 1),
    )
    make(study, "corpus", "overlap", "base", "design")
    for artifact in study.by_path.values():
        if artifact.stage == "expert" and artifact.name == "code":
            store.make(
                study.results / artifact.path, "expert", artifact.recipe, {}, lambda f, s: {}
            )
    assert progress.progress(study).seconds_left is None  # no evaluation is finished
    shard = study.evals["small", "average", 0, 0]
    store.make(study.results / shard.path, "evaluate", shard.recipe, {}, lambda f, s: {})
    # Two experts of each base, eight merges of the large one, at the small one's pace.
    assert progress.progress(study).seconds_left == pytest.approx(2 * 6 + 2 * 18 + 8 * 2)


def test_a_job_that_runs_is_no_failure_and_a_failed_one_is_named(study):
    first, second = [a for a in study.by_path.values() if a.stage == "expert"][:2]
    for artifact in (first, second):
        log = study.results / "logs" / f"{artifact.path}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("mergelaw: x ...\nmergelaw: error: a, b: too long; split it\n")
    output = study.results / first.path
    (output.parent / f".{output.name}.work").mkdir(parents=True)
    with FileLock(output.parent / f".{output.name}.lock"):
        now = progress.progress(study)
    assert now.stages["expert"]["running"] == 1
    assert now.failures == {second.path: "a, b: too long; split it"}
    assert progress.progress(study).stages["expert"]["running"] == 0


def test_status_prints_a_table_or_json(study, tmp_path):
    make(study, *progress.TITLES)
    file = tmp_path / "study.json"
    file.write_text(study.config.model_dump_json(exclude_unset=True))
    table = CliRunner().invoke(app, ["status", str(file)])
    assert table.exit_code == 0 and "all done" in table.output
    old = study.results / "experts" / "small" / "code-s0@00000000"
    old.mkdir()
    (old / "lineage.json").write_text('{"schema": 1}')
    assert (
        "1 artifacts were made by another version"
        in CliRunner().invoke(app, ["status", str(file)]).output
    )
    printed = CliRunner().invoke(app, ["status", str(file), "--json"])
    stages = json.loads(printed.output)["stages"]
    assert stages["evaluate"] == {"finished": 2, "running": 0, "jobs": 2}


def test_a_summary_says_unknown_where_a_fit_has_no_number():
    """Losses that are all equal have no R^2."""
    place = {"law": "law", "base": "small", "method": "average", "domain": "macro"}
    numbers = {"parameters": {"L": 1.25}, "floors": [{"M": 3, "reachable": 1.0}], "rmse": 0.001}
    empty: dict = {"best": {}, "flagged": {}, "warnings": [], "refused": [], "stages": {}}
    values = {
        "laws": {"law": "E = L"},
        "fits": [{**place, **numbers, "r2": None, "verdict": {"state": "fails"}}],
        **empty,
    }
    text = summary_text(values | {"summary": "summary.txt", "report": "report.html"})
    line = (
        "average, small          L = 1.25  L(3) = 1  R^2 = unknown  RMSE = 0.001  the law fails\n"
    )
    assert line in text
