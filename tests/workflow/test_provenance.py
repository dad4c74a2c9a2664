"""Everything says where it came from, damage is named, and what is not needed can be removed."""

import json
import os
from collections import Counter

import pytest
from studies import READY, TRAINING, Place, ready_config, same_measurements, trained_config

from mergelaw.artifacts import lineage


@pytest.fixture(scope="module")
def damaged(trained, tmp_path_factory) -> Place:
    return trained.copy(tmp_path_factory.mktemp("damaged"))


def test_a_report_goes_back_to_its_sources(ready, trained):
    for place, sources in ((ready, "jsonl"), (trained, "synthetic")):
        (report,) = place.artifacts("reports").values()
        tree = place.mergelaw("lineage", str(report / "report.html"), "--verify")
        assert tree.status == 0, tree.output
        for kind in ("report v", "fit v", "evaluate v", "task_vector v", "expert v", "base v"):
            assert kind in tree.output
        for kind in ("corpus v", "plan v"):
            assert kind in tree.output
        assert "source:" in tree.output and sources in tree.output
        assert "every file is what was written" in tree.output


def test_lineages_are_fit_to_be_shared(trained):
    for text in trained.lineages().values():
        entry = json.loads(text)
        assert str(trained.folder) not in json.dumps(entry | {"facts": None})


FILES = {
    "corpora": "eval.parquet", "bases": "model.safetensors", "experts": "model.safetensors",
    "task_vectors": "vector.safetensors", "plans": "plan.parquet", "evals": "cells.parquet",
    "laws": "laws.json", "reports": "report.html",
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_flipped_byte_is_named(damaged, kind):
    folder = next(
        path for path in damaged.artifacts(kind).values() if not (path / FILES[kind]).is_symlink()
    )
    file, (report,) = folder / FILES[kind], damaged.artifacts("reports").values()
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    try:
        found = damaged.mergelaw("lineage", str(report), "--verify")
    finally:
        file.write_bytes(whole)
    assert found.status == 1
    (line,) = found.errors()
    assert str(file) in line and "is not what was written" in line
    assert line.count("is not what was written") == 1


def test_a_flipped_byte_in_a_linked_checkpoint_is_named(ready, tmp_path):
    place = ready.copy(tmp_path / "study")
    (base,), (report,) = place.artifacts("bases").values(), place.artifacts("reports").values()
    file, elsewhere = base / "model.safetensors", tmp_path / "model.safetensors"
    assert file.is_symlink()
    whole = file.read_bytes()
    file.unlink()
    file.symlink_to(elsewhere)
    for place_of_flip in (9, len(whole) // 2, len(whole) - 9):
        flipped = bytearray(whole)
        flipped[place_of_flip] ^= 1
        elsewhere.write_bytes(flipped)
        found = place.mergelaw("lineage", str(report), "--verify")
        assert found.status == 1
        (line,) = found.errors()
        assert str(file) in line and "is not what was written" in line
    elsewhere.write_bytes(whole)
    assert place.mergelaw("lineage", str(report), "--verify").status == 0


def test_what_is_damaged_is_refused_as_an_input(damaged, tmp_path):
    place = damaged.copy(tmp_path).forget("evals", "laws", "reports")
    vector = next(iter(place.artifacts("task_vectors").values()))
    with (vector / "vector.safetensors").open("ab") as file:
        file.write(b"!")
    run = place.snakemake()
    assert run.status
    (line,) = run.errors()
    assert str(vector) in line and line.endswith("and run again")


def test_gc_removes_what_no_configuration_refers_to_and_keeps_the_cells(trained, tmp_path):
    place = trained.copy(tmp_path)
    config, cells, before = place.config, place.cells(), place.lineages()
    listed = place.mergelaw("gc", "--config", "study.yaml")
    assert listed.status == 0 and listed.output.startswith("0 artifacts and files, 0 bytes")
    experts = {**config["experts"], "code": {"training": {"learning_rate": 2e-3}}}
    place.configure(config | {"experts": experts})
    old = {
        path
        for path in before
        if "/code-s0@" in path or path.split("/")[0] in ("evals", "laws", "reports")
    }
    listed = place.mergelaw("gc", "--config", "study.yaml")
    assert len(old) == 8 and "8 artifacts" in listed.output
    assert all(path in listed.output for path in old)
    assert place.lineages() == before
    removed = place.mergelaw("gc", "--config", "study.yaml", "--delete")
    assert removed.status == 0, removed.output
    assert before.keys() - place.lineages().keys() == old
    assert place.cells() == cells
    assert place.mergelaw("gc", "--config", "study.yaml").output.startswith("0 artifacts")
    # Of what was prepared of experts, what is used stays.
    prepared = place.results / "cells" / "small" / "prepared"
    prepared.mkdir(exist_ok=True)
    for name in ("aa.json", "aa.safetensors", "aa.sha256", "aa.18f0-1c2"):
        (prepared / name).write_text("x")
    place.mergelaw("gc", "--config", "study.yaml", "--delete")
    assert {path.suffix for path in prepared.iterdir()} == {".json", ".safetensors", ".sha256"}
    # Two configurations keep what either refers to.
    (tmp_path / "other.yaml").write_text((tmp_path / "study.yaml").read_text())
    place.configure(trained_config(trained.folder) | {"training": TRAINING | {"steps": 6}})
    both = place.mergelaw("gc", "--config", "study.yaml", "--config", "other.yaml")
    assert both.output.startswith("0 artifacts")


def test_gc_waits_for_no_run(ready, tmp_path):
    from mergelaw.artifacts.lineage import only_run

    place = ready.copy(tmp_path)
    with only_run(place.results):
        refused = place.mergelaw("gc", "--config", "study.yaml")
    assert refused.status == 1 and "another run is working on this folder" in refused.output


def test_import_takes_what_the_study_needs_and_nothing_is_made_again(trained, tmp_path):
    place = Place(tmp_path, trained.config)
    taken = place.mergelaw("import", str(trained.results), "--config", "study.yaml")
    assert taken.status == 0, taken.output
    # Copies, but for the checkpoint from outside, which is linked anew.
    ours, theirs = place.lineages(), trained.lineages()
    assert ours.keys() == theirs.keys()
    (linked,) = (path for path in ours if ours[path] != theirs[path])
    assert linked.startswith("bases/large@")
    assert sorted(place.cells()) == sorted(trained.cells())
    assert place.planned() == {}
    (report,) = place.artifacts("reports").values()
    assert place.mergelaw("lineage", str(report), "--verify").status == 0
    again = place.mergelaw("import", str(trained.results), "--config", "study.yaml")
    assert again.output.startswith("0 artifacts and 0 cells taken")


def test_after_an_import_only_what_is_new_is_measured(ready, tmp_path):
    """A larger pool: cells of the smaller one's subsets are taken, the shard's rest is measured."""
    place = Place(tmp_path, ready_config(ready.folder, READY[:5]))
    place.finish()
    grown = Place(tmp_path / "grown", ready_config(ready.folder))
    taken = grown.mergelaw("import", str(place.results), "--config", "study.yaml")
    assert taken.status == 0, taken.output
    # The sixth expert's vector, the plan, the shard and what follows it are new.
    assert not grown.artifacts("evals") and len(grown.artifacts("task_vectors")) == 5
    assert len(grown.cells()) == len(place.cells()) == 32 * 3
    grown.finish()
    cells = grown.cells()
    assert sorted(cells) == sorted(set(cells)) and len(cells) == 64 * 3
    same_measurements(grown.rows(), ready.rows())


def test_import_leaves_out_what_is_damaged_and_what_was_made_from_it(trained, tmp_path):
    there = trained.copy(tmp_path / "there")
    (vector,) = (
        path for name, path in there.artifacts("task_vectors").items() if "small/co" in name
    )
    with (vector / "vector.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(bytes([vector.joinpath("vector.safetensors").read_bytes()[-1] ^ 4]))
    # Its link leads nowhere on this machine; the study's own source is linked.
    (link,) = (path for name, path in there.artifacts("bases").items() if "large" in name)
    (link / "model.safetensors").unlink()
    (link / "model.safetensors").symlink_to(tmp_path / "nowhere")
    place = Place(tmp_path / "here", trained.config)
    taken = place.mergelaw("import", str(there.results), "--config", "study.yaml")
    assert taken.status == 1
    (line,) = taken.errors()
    left = ("task_vectors/small/code-s0@", "evals/small/average", "laws/", "reports/")
    assert all(name in line for name in left) and line.startswith("4 left out: ")
    absent = there.lineages().keys() - place.lineages().keys()
    assert Counter(path.split("/")[0] for path in absent) == Counter(
        ("task_vectors", "evals", "laws", "reports")
    )
    place.finish()
    assert sorted(place.cells()) == sorted(trained.cells())
    (report,) = place.artifacts("reports").values()
    assert place.mergelaw("lineage", str(report), "--verify").status == 0


def test_import_takes_nothing_that_was_made_from_something_else(trained, tmp_path):
    place = trained.copy(tmp_path / "here").forget("experts")
    there = trained.copy(tmp_path / "there")
    (base,) = (path for name, path in place.artifacts("bases").items() if "small" in name)
    entry = json.loads((base / "lineage.json").read_text())
    del entry["checksum"]
    lineage.write_json(
        base / "lineage.json",
        (other := entry | {"digest": "0" * 64}) | {"checksum": lineage.checksum(other)},
    )
    taken = place.mergelaw("import", str(there.results), "--config", "study.yaml")
    (line,) = taken.errors()
    assert line.startswith("3 left out: ") and f"is made from another base than {base}" in line
    assert len(place.artifacts("experts")) == 3


def test_import_stays_in_its_folders(trained, tmp_path):
    """A lineage from elsewhere may name any path as its input."""
    there = trained.copy(tmp_path / "there")
    secret = trained.copy(tmp_path / "secret").artifacts("plans").popitem()[1]
    (report,) = there.artifacts("reports").values()
    entry = json.loads((report / "lineage.json").read_text())
    del entry["checksum"]
    outside = {"path": os.path.relpath(secret, report), "digest": lineage.read(secret)["digest"]}
    entry["inputs"]["plan"] = outside
    lineage.write_json(report / "lineage.json", entry | {"checksum": lineage.checksum(entry)})
    place = Place(tmp_path / "here", trained.config)
    taken = place.mergelaw("import", str(there.results), "--config", "study.yaml")
    (line,) = taken.errors()
    assert line.startswith("1 left out: ") and "its input plan lies outside of" in line
    assert not place.artifacts("reports") and len(place.artifacts("laws")) == 1


def test_import_wants_a_results_folder_of_this_version(trained, tmp_path):
    place = Place(tmp_path, trained.config)
    for folder, said in ((tmp_path / "none", "no results folder"), (tmp_path, "no results folder")):
        refused = place.mergelaw("import", str(folder), "--config", "study.yaml")
        assert refused.status == 1 and said in refused.errors()[0]
    (tmp_path / ".mergelaw.json").write_text('{"layout": 99}')
    refused = place.mergelaw("import", str(tmp_path), "--config", "study.yaml")
    assert refused.status == 1 and "laid out by another version" in refused.errors()[0]
    assert not place.results.exists()
