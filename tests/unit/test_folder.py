"""Results folders: what is used is what was asked for, gc halves nothing, forgeries are named."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import jobs
from mergelaw import config
from mergelaw.artifacts import files, keys, lineage, run_lock, store
from mergelaw.artifacts.lineage import LINEAGE
from mergelaw.errors import MergelawError
from mergelaw.workflow import folder as folders
from mergelaw.workflow import results
from mergelaw.workflow.study import Study

TRAINING = {"steps": 5, "batch_size": 4, "max_tokens": 128, "learning_rate": 1e-3}
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TINY = {
    "corpus": {"train_documents": 20, "eval_documents": 6},
    "training": TRAINING,
    "pretraining": {
        **TRAINING,
        "domains": ["algebra", "code"],
        "architecture": ARCHITECTURE,
        "vocab_size": 300,
    },
    "domains": {name: {"source": {"synthetic": name}} for name in ("algebra", "code")},
    "bases": {"small": {"pretraining": {}}},
    "experts": {"algebra": {}, "code": {}, "both": {"domains": ["algebra", "code"]}},
    "methods": {"average": {}},
}


def study_in(folder: Path, **changes) -> Study:
    """A small study whose results folder is ``folder/results``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({"name": "tiny", "results": str(folder / "results"), **TINY, **changes})
    (folder / "study.yaml").write_text(text)
    return Study(config.load(folder / "study.yaml"))


@pytest.fixture
def study(tmp_path) -> Study:
    """A study whose results are all there, made without training."""
    known = study_in(tmp_path)
    run_lock.lock_results(known.results).release()
    for artifact in known.targets():
        jobs.pretend(known.results, artifact)
    return known


def forge(folder: Path, **changes) -> None:
    """Change a lineage and its checksum."""
    entry = json.loads((folder / LINEAGE).read_text())
    del entry["checksum"]
    entry |= changes
    files.write_json(folder / LINEAGE, entry | {"checksum": lineage.checksum(entry)})


def problems(study: Study) -> list[str]:
    return list(folders.verify(study.results)[1])


def collected(study: Study, *others: Study, delete: bool = True) -> set[str]:
    found = folders.collect_garbage([study, *others], delete)
    return {path.relative_to(study.results).as_posix() for path, _ in found}


def whole(study: Study) -> dict[str, list[str]]:
    """Every artifact with its files."""
    found = folders.artifacts_in(study.results)
    return {path.name: sorted(lineage.entries(path)) for path in found}


# Garbage

KILLED = """
import os, sys, pathlib
from mergelaw import config
from mergelaw.workflow import folder
from mergelaw.workflow.study import Study
study, left = Study(config.load(pathlib.Path(sys.argv[1]))), int(sys.argv[2])
def trace(event, arguments):
    global left
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
        left -= 1
        if left < 0:
            os._exit(9)
sys.addaudithook(trace)
list(folder.collect_garbage([study], True))
"""


def test_gc_killed_at_any_moment_leaves_no_half_artifact(study, tmp_path):
    changed = study_in(tmp_path, experts={"algebra": {}, "both": {"domains": ["algebra", "code"]}})
    before, kept = whole(study), {Path(path).name for path in changed.known}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "study.yaml")]
    for moment in (0, 1, 2, 3, 4, 5, 9, 14, 33):
        run = subprocess.run([*command, str(moment)], check=False, capture_output=True)
        assert run.returncode in (0, 9), run.stderr
        now = whole(study)
        assert all(now[name] == before[name] for name in now)
        assert now.keys() >= before.keys() & kept
    assert before.keys() - now.keys()  # some were removed
    collected(changed)
    assert whole(changed).keys() == before.keys() & kept
    assert not list(study.results.rglob("*.work")) and not collected(changed)


def test_gc_stops_at_other_results_folders_and_at_links(study, tmp_path):
    inner = study_in(study.results / "inner")
    run_lock.lock_results(inner.results).release()
    for place in (study.results / "old", inner.results):
        shutil.copytree(study.results / "corpora", place / "corpora")
    run_lock.lock_results(study.results / "old").release()
    (tmp_path / "elsewhere" / "x@0a1b2c3d").mkdir(parents=True)
    (study.results / "linked").symlink_to(tmp_path / "elsewhere")
    (study.results / "bases" / "x@0a1b2c3d").symlink_to(tmp_path / "elsewhere" / "x@0a1b2c3d")
    prepared = study.results / "cells" / "small" / "prepared"
    prepared.mkdir(parents=True)
    (prepared / "folder").mkdir()
    (prepared / "gone.json").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    assert not collected(study)
    assert sorted(tmp_path.rglob("*")) == before


def test_gc_removes_scratch_of_killed_jobs_and_keeps_states_of_unfinished_ones(study):
    base, expert = study.bases["small"], study.experts["small", "code", 0]
    done, open_ = (study.results / a.path for a in (base, expert))
    shutil.rmtree(open_)
    scratch = [place.with_name(f".{place.name}.work") for place in (done, open_)]
    for place in scratch:
        (place / "state").mkdir(parents=True)
        (place / "state" / "step").write_text("3")
    grave = done.with_name(f".{done.name}.18f0-1c2.work")
    grave.mkdir()
    half = done.with_name("small@00000000")
    half.mkdir()
    (half / "model.safetensors").write_text("half a copy")
    torn = study.results / "cache" / "digests.json.18f0a-1c2"
    torn.parent.mkdir(exist_ok=True)
    torn.write_text("{")
    removed = {
        path.relative_to(study.results).as_posix() for path in (scratch[0], grave, half, torn)
    }
    assert collected(study, delete=False) == removed == collected(study)
    assert (scratch[1] / "state" / "step").exists() and done.exists() and not torn.exists()


def test_gc_leaves_what_a_job_works_on(study, tmp_path):
    """A job can outlive its killed run."""
    from filelock import FileLock

    changed = study_in(tmp_path, experts={"algebra": {}, "both": {"domains": ["algebra", "code"]}})
    place = study.results / study.experts["small", "code", 0].path
    with FileLock(place.with_name(f".{place.name}.lock")):
        assert collected(changed) and place.exists()
    collected(changed)
    assert not place.exists()


# Use


def make(study: Study, artifact) -> bool:
    """What the artifact's job does."""
    from mergelaw.workflow.job import job_file, read_job, write_job

    write_job(study.results, artifact)
    job = read_job(job_file(study.results, artifact), artifact.stage)
    return job.make(lambda folder, state: None)


@pytest.mark.parametrize("way", ["gone", "cut", "other", "linked folder", "nested", "hidden"])
def test_an_input_without_its_files_is_refused(study, way):
    """As a killed gc of an earlier version leaves it."""
    folder = study.results / study.corpora["train"]["code"].path
    shutil.rmtree(study.results / study.bases["small"].path)
    file, size = folder / "data.bin", (folder / "data.bin").stat().st_size
    if way == "gone":
        file.unlink()
    elif way == "cut":
        os.truncate(file, size - 1)
    elif way == "other":
        file.write_bytes(bytes(size))
    elif way == "linked folder":
        (folder / "more").symlink_to(study.results)
    else:
        (folder / (".more" if way == "hidden" else "more")).mkdir()
        shutil.copy(folder / LINEAGE, folder / (".more" if way == "hidden" else "more") / LINEAGE)
    with pytest.raises(MergelawError, match=rf"{folder}.*; delete the folder .* and rerun"):
        make(study, study.bases["small"])
    assert any(str(folder) in line for line in problems(study))


def test_files_of_the_recorded_size_and_time_are_read_by_verify_alone(study, monkeypatch):
    read: list[Path] = []
    digest = files.file_digest
    monkeypatch.setattr(lineage, "file_digest", lambda path: read.append(path) or digest(path))
    vector = study.task_vectors["small", "code", 0]
    shutil.rmtree(study.results / vector.path)
    assert make(study, vector) and not read
    file = study.results / study.bases["small"].path / "data.bin"
    status = file.stat()
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [line for line in problems(study) if str(file) in line and "digest differs" in line]
    assert file in read
    # Without the recorded times, as after a plain copy, or of an earlier version, it is read.
    os.utime(file)
    shutil.rmtree(study.results / vector.path)
    with pytest.raises(MergelawError, match=f"{file}: is not what was written"):
        make(study, vector)


def test_an_input_of_another_recipe_at_the_path_is_refused(study):
    """A key collision, a forged recipe, and an expert of another seed."""
    vector, expert = (kind["small", "code", 0] for kind in (study.task_vectors, study.experts))
    shutil.rmtree(study.results / vector.path)
    folder = study.results / expert.path
    good = (folder / LINEAGE).read_bytes()
    forge(folder, recipe=expert.recipe | {"seed": 7})
    with pytest.raises(MergelawError, match="its key does not match its recipe and inputs"):
        make(study, vector)
    collision = expert.key[: keys.KEY_DIGITS] + "0" * 56
    forge(folder, key=collision)
    with pytest.raises(MergelawError, match="holds another artifact"):
        make(study, vector)
    assert any("does not match its recipe" in line for line in problems(study))
    # The artifact itself is not believed either.
    with pytest.raises(MergelawError, match="holds another artifact"):
        make(study, expert)
    (folder / LINEAGE).write_bytes(good)
    assert make(study, vector) and not make(study, expert)


def test_two_trainings_of_an_expert_are_not_mixed_in_one_law(study):
    expert, shard = study.experts["small", "code", 0], next(iter(study.evals.values()))
    shutil.rmtree(study.results / expert.path)
    store.make(
        study.results / expert.path,
        "expert",
        expert.recipe,
        {name: study.results / one.path for name, one in expert.named_inputs()},
        lambda folder, state: (folder / "data.bin").write_text("trained again") and None,
        expert.key,
    )
    for artifact in (study.laws, study.report):
        shutil.rmtree(study.results / artifact.path)
    with pytest.raises(MergelawError, match=r"code-s0@.* is not the one that .*task_vectors"):
        make(study, study.laws)
    assert any("is not the one that" in line for line in problems(study))
    # What was made from the first one goes; the rest fits.
    shutil.rmtree(study.results / study.task_vectors["small", "code", 0].path)
    shutil.rmtree(study.results / shard.path)
    jobs.pretend(study.results, shard)
    assert make(study, study.laws)


# Lineages from elsewhere


@pytest.mark.parametrize(
    "path",
    ["../../../cells", "../../../../cells", "../..", "..", ".", "/etc", 3, None, "a\0b", "../../../corpora",
     "../../../linked/small@{key}", "../../../bases/small@00000000", "../../../../small@{key}"],
)  # fmt: skip
def test_an_input_outside_of_the_grammar_is_refused(study, path):
    expert = study.results / study.experts["small", "code", 0].path
    (study.results / "linked").symlink_to(study.results / "bases")
    inputs = lineage.read(expert)["inputs"]
    if isinstance(path, str):
        path = path.format(key=study.bases["small"].key[:8])
    forge(expert, inputs=inputs | {"base": inputs["base"] | {"path": path}})
    found = [line for line in problems(study) if str(expert) in line]
    assert found and all("; delete" in line for line in found)
    if isinstance(path, str) and "\0" not in path:
        with pytest.raises(MergelawError, match=r"is no artifact of|damaged"):
            lineage.tree(expert)


@pytest.mark.parametrize(
    "entry",
    [{"files": 3}, {"files": {"a": 1}}, {"inputs": []}, {"inputs": {"base": 3}}, {"stage": None},
     {"version": "x"}, {"recipe": []}, {"digest": "0"}, {"artifact": 1}, {"key": "0"},
     {"facts": {"sources": 3}}, {"facts": []}, {"versions": 3}, {"wall_seconds": "x"}],
)  # fmt: skip
def test_a_lineage_of_another_form_is_damaged(study, entry):
    folder = study.results / study.bases["small"].path
    forge(folder, **entry)
    for use in (lineage.read, lineage.tree, lineage.used):
        with pytest.raises(MergelawError, match="damaged; delete the folder"):
            use(folder)


def test_what_a_copy_can_get_wrong_is_named(study, tmp_path):
    """Cut, extra, linked, mixed, moved and hidden; in one pass over the folder."""
    root = study.results
    vectors = [root / vector.path for vector in study.task_vectors.values()]
    expected = {}
    cut = root / study.corpora["train"]["code"].path
    (cut / LINEAGE).unlink()
    expected[cut] = "has no lineage.json"
    (vectors[0] / ".hidden").mkdir()
    (vectors[0] / ".hidden" / "more").write_text("x")
    expected[vectors[0] / ".hidden" / "more"] = "does not belong"
    shutil.copytree(vectors[1], vectors[1].with_name("." + vectors[1].name))
    expected[vectors[1].with_name("." + vectors[1].name)] = "has the lineage of"
    (root / "designs").rename(tmp_path / "designs")
    (root / "designs").symlink_to(tmp_path / "designs")
    expected[root / "designs"] = "is a link"
    moved = vectors[2].with_name("both-s0@00000000")
    vectors[2].rename(moved)
    expected[moved] = "has the lineage of"
    found = problems(study)
    for path, words in expected.items():
        assert any(line.startswith(f"{path}: ") and words in line for line in found), (path, found)


def test_nothing_is_published_over_what_has_come_meanwhile(study, tmp_path):
    base = study.bases["small"]
    folder = study.results / base.path
    shutil.move(folder, tmp_path / "theirs")

    def work(made: Path, state: Path) -> None:
        (made / "mine").write_text("x")
        shutil.copytree(tmp_path / "theirs", folder)  # a copy from another results folder

    inputs = {name: study.results / one.path for name, one in base.named_inputs()}
    assert not store.make(folder, "base", base.recipe, inputs, work, base.key)
    assert sorted(lineage.entries(folder)) == ["data.bin"] and not problems(study)
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path / "theirs")
    with pytest.raises(MergelawError, match="is a link"):
        store.make(folder, "base", base.recipe, inputs, work, base.key)
    assert (tmp_path / "theirs" / "data.bin").exists()


def test_a_whole_folder_has_no_problem_wherever_it_lies(study, tmp_path):
    assert folders.verify(study.results) == (len(study.by_path), [])
    moved = shutil.copytree(study.results, tmp_path / "moved")
    assert folders.verify(moved) == (len(study.by_path), [])


def test_without_evaluations_it_is_said_whether_cells_are_kept(study):
    """After gc the study only looks as if nothing had been measured."""
    for artifact in study.evals.values():
        shutil.rmtree(study.results / artifact.path)
    with pytest.raises(
        MergelawError, match=r"no shard of tiny is finished yet.*run the study first"
    ):
        results.measured(study)
    (study.results / "cells" / "small").mkdir(parents=True)
    (study.results / "cells" / "small" / "s0-000-1.jsonl").touch()
    with pytest.raises(MergelawError, match=r"no evaluations of tiny as it is configured now.*gc"):
        results.measured(study)
