"""Everything says where it came from, damage is named, and what is not needed can be removed."""

import base64
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from studies import READY, TRAINING, Place, ready_config, same_measurements, trained_config

from mergelaw.artifacts import files, lineage


@pytest.fixture(scope="module")
def damaged(trained, tmp_path_factory) -> Place:
    return trained.copy(tmp_path_factory.mktemp("damaged"))


def test_a_report_goes_back_to_its_sources(ready, trained):
    for place, sources in ((ready, "jsonl"), (trained, "synthetic")):
        (report,) = place.artifacts("reports").values()
        verified = place.mergelaw("lineage", str(report / "report.html"), "--verify")
        assert verified.status == 0 and "every file is what was written" in verified.output
        tree = place.mergelaw("lineage", str(report / "report.html"))
        assert tree.status == 0, tree.output
        for kind in ("report v", "fit v", "evaluate v", "task_vector v", "expert v", "base v"):
            assert kind in tree.output
        assert "corpus v" in tree.output
        assert "source:" in tree.output and sources in tree.output


def test_lineages_are_fit_to_be_shared(trained):
    for text in trained.lineages().values():
        entry = json.loads(text)
        assert str(trained.folder) not in json.dumps(entry | {"facts": None})


FILES = {
    "corpora": "documents.parquet", "bases": "model.safetensors", "experts": "model.safetensors",
    "task_vectors": "vector.safetensors", "designs": "design.parquet", "evals": "cells.parquet",
    "laws": "laws.json", "reports": "report.html",
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_flipped_byte_is_named(damaged, kind):
    folder = next(
        path for path in damaged.artifacts(kind).values() if not (path / FILES[kind]).is_symlink()
    )
    file = folder / FILES[kind]
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    try:
        found = damaged.mergelaw("lineage", "results", "--verify")
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
    assert str(vector) in line and "delete the folder" in line


def test_gc_removes_what_no_configuration_refers_to_and_keeps_the_cells(trained, tmp_path):
    place = trained.copy(tmp_path)
    config, cells, before = place.config, place.cells(), place.lineages()
    listed = place.mergelaw("gc", "study.yaml")
    assert listed.status == 0 and listed.output.startswith("0 artifacts and files, 0 bytes")
    experts = {**config["experts"], "code": {"training": {"learning_rate": 2e-3}}}
    place.configure(config | {"experts": experts})
    old = {
        path
        for path in before
        if "/code-s0@" in path or path.split("/")[0] in ("evals", "laws", "reports")
    }
    listed = place.mergelaw("gc", "study.yaml")
    assert len(old) == 8 and "8 artifacts" in listed.output
    assert all(path in listed.output for path in old)
    assert place.lineages() == before
    removed = place.mergelaw("gc", "study.yaml", "--delete")
    assert removed.status == 0, removed.output
    assert before.keys() - place.lineages().keys() == old
    assert place.cells() == cells
    assert place.mergelaw("gc", "study.yaml").output.startswith("0 artifacts")
    # Of what was prepared of experts, what is used stays.
    prepared = place.results / "cells" / "small" / "prepared"
    prepared.mkdir(exist_ok=True)
    for name in ("aa.json", "aa.safetensors", "aa.sha256", "aa.18f0-1c2"):
        (prepared / name).write_text("x")
    place.mergelaw("gc", "study.yaml", "--delete")
    assert {path.suffix for path in prepared.iterdir()} == {".json", ".safetensors", ".sha256"}
    # Two configurations keep what either refers to.
    (tmp_path / "other.yaml").write_text((tmp_path / "study.yaml").read_text())
    place.configure(trained_config(trained.folder) | {"training": TRAINING | {"steps": 6}})
    both = place.mergelaw("gc", "study.yaml", "other.yaml")
    assert both.output.startswith("0 artifacts")


def test_gc_waits_for_no_run(ready, tmp_path):
    from mergelaw.artifacts.run_lock import lock_results

    place = ready.copy(tmp_path)
    with lock_results(place.results):
        refused = place.mergelaw("gc", "study.yaml")
    assert refused.status == 1 and "another run is working on this folder" in refused.output


# Another results folder, copied


def copy_results(source: Path, target: Path) -> None:
    """Copy as the documentation says: files first, then lineages, nothing over what exists."""
    for lineages in (False, True):
        for path in source.rglob("*"):
            place = target / path.relative_to(source)
            if (path.name == "lineage.json") is lineages and not path.is_dir():
                place.parent.mkdir(parents=True, exist_ok=True)
                if not place.exists():
                    shutil.copy2(path, place, follow_symlinks=False)


def test_a_copied_results_folder_is_used_and_verified(trained, tmp_path):
    place = Place(tmp_path, trained.config)
    copy_results(trained.results, place.results)
    assert place.planned() == {}
    verified = place.mergelaw("lineage", "results", "--verify")
    assert verified.status == 0, verified.output
    assert f"verified: {len(place.lineages())} artifacts" in verified.output


def test_after_a_copy_only_what_is_new_is_measured(ready, tmp_path):
    """A larger pool: cells of the smaller one's subsets are taken, the shard's rest is measured."""
    place = Place(tmp_path, ready_config(ready.folder, READY[:5]))
    place.finish()
    grown = Place(tmp_path / "grown", ready_config(ready.folder))
    copy_results(place.results, grown.results)
    assert len(grown.cells()) == 32 * 3
    grown.finish()
    cells = grown.cells()
    assert sorted(cells) == sorted(set(cells)) and len(cells) == 64 * 3
    same_measurements(grown.rows(), ready.rows())


def forge(artifact: Path, **changes) -> None:
    """Change a lineage and its checksum."""
    entry = json.loads((artifact / "lineage.json").read_text())
    del entry["checksum"]
    entry |= changes
    files.write_json(artifact / "lineage.json", entry | {"checksum": lineage.checksum(entry)})


def test_a_copy_that_does_not_fit_is_named(trained, tmp_path):
    place = trained.copy(tmp_path)
    vectors, bases = place.artifacts("task_vectors"), place.artifacts("bases")
    (cut,) = (path for name, path in vectors.items() if "small/code" in name)
    with (cut / "vector.safetensors").open("r+b") as file:
        file.truncate(100)
    (mixed,) = (path for name, path in bases.items() if name.startswith("small"))
    forge(mixed, digest="0" * 64)
    (extra,) = (path for name, path in vectors.items() if "small/algebra" in name)
    (extra / "more.bin").write_bytes(b"x")
    (report,) = place.artifacts("reports").values()
    outside = {"path": os.path.relpath(tmp_path, report), "digest": "0" * 64, "key": None}
    forge(report, inputs={"laws": outside})
    (moved,) = (path for name, path in vectors.items() if "large/code" in name)
    moved.rename(moved.with_name("code-s0@00000000"))
    found = place.mergelaw("lineage", "results", "--verify")
    assert found.status == 1
    named = "\n".join(found.errors())
    for path, words in (
        (cut, "vector.safetensors: is not what was written"),
        (mixed, "its digest does not match"),
        (extra, "more.bin: does not belong"),
        (report, "its input laws"),
        (moved.with_name("code-s0@00000000"), "has the lineage of code-s0@"),
    ):
        name = path.relative_to(tmp_path)
        assert any(str(name) in line and words in line for line in found.errors()), (name, named)


def edit_cells(place: Place, change) -> int:
    """Edit every cell of the store as somebody would who recomputes checksums; how many."""
    from mergelaw.evaluation import cells

    count = 0
    for file in (place.results / "cells").rglob("*.jsonl"):
        lines = []
        for line in file.read_text().splitlines():
            cell = json.loads(line.partition(" ")[2])
            cell = change(cell)
            text = json.dumps(cell, sort_keys=True, separators=(",", ":"))
            lines.append(f"{cells.checksum(text)} {text}\n")
        file.write_text("".join(lines))
        count += len(lines)
    return count


def halved(cell: dict) -> dict:
    nll = np.frombuffer(base64.b64decode(cell["document_nll"]), "<f8") / 2
    return cell | {"document_nll": base64.b64encode(nll.tobytes()).decode()}


def without_origin(cell: dict) -> dict:
    """As an earlier version wrote it."""
    from mergelaw.evaluation.cells import ORIGIN

    return {name: value for name, value in cell.items() if name not in ORIGIN}


def test_edited_losses_are_named_where_tables_have_others_and_when_measured_again(ready, tmp_path):
    place = ready.copy(tmp_path)
    same = place.mergelaw("lineage", "study.yaml", "--measure", "2")
    assert same.status == 0 and "same losses when measured again" in same.output, same.output
    edit_cells(place, halved)
    found = place.mergelaw("lineage", "results", "--verify")
    assert found.status == 1 and all("has another loss in" in line for line in found.errors())
    # Where tables are written from edited cells, only a measurement tells.
    place.forget("evals", "laws", "reports").finish()
    trusted = place.mergelaw("lineage", "results", "--verify")
    assert trusted.status == 0 and "losses are trusted" in trusted.output
    found = place.mergelaw("lineage", "study.yaml", "--measure", "1")
    assert found.status == 1 and "when measured again" in found.output, found.output


def test_cells_of_other_tokens_are_measured_again_and_those_of_earlier_versions_used(
    ready, tmp_path
):
    place = ready.copy(tmp_path).forget("evals", "laws", "reports")
    for file in (place.results / "cells").rglob("*.index"):
        file.unlink()
    count = edit_cells(place, without_origin)
    place.finish()
    assert len(place.cells()) == count  # nothing was measured
    same_measurements(place.rows(), ready.rows())
    place.forget("evals", "laws", "reports")
    edit_cells(place, lambda cell: cell | {"bytes": cell["bytes"] + 1})
    place.finish()
    same_measurements(place.rows(), ready.rows())
    assert len(place.cells()) == 2 * count
