"""Bad input, full disks and second runs: one clear line, a failing exit, nothing half-written."""

import json
import os
import re
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from studies import (
    MADE_FIRST,
    ROOT,
    Place,
    ready_config,
    records,
    same_measurements,
    wait_for,
    write_jsonl,
)

import models
from mergelaw.models.checkpoint import WEIGHTS


def half_written(place: Place) -> list[Path]:
    """Folders that look like artifacts, or like work begun, and are none."""
    return [
        path
        for path in place.results.rglob("*@*")
        if path.is_dir() and not (path / "lineage.json").exists()
    ]


# Said while the workflow is read, before anything starts


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("sampling", {"k": [1, 7]}, "sampling.k: 7 is larger than the pool of 6 experts"),
        ("bases.tiny.path", "nowhere", "nowhere: no such folder; give a local Hugging Face"),
        (
            "domains.sums.source.files",
            ["nowhere.jsonl"],
            "nowhere.jsonl: no such file; correct the path in the domain's source",
        ),
        ("methodz", {}, "unknown key 'methodz'; did you mean 'methods'?"),
    ],
)
def test_a_wrong_configuration_is_one_line(ready, tmp_path, path, value, line):
    place = Place(tmp_path, ready.config)
    config = inner = place.config
    *parents, last = path.split(".")
    for key in parents:
        inner = inner[key]
    inner[last] = value
    place.configure(config)
    run = place.snakemake()
    assert run.status
    assert len(run.errors()) == 1 and line in run.errors()[0]
    assert "Traceback" not in run.output
    assert not place.results.exists() or not half_written(place)


def test_wrong_documents_are_named_with_their_line_before_anything_runs(ready, tmp_path):
    place = Place(tmp_path / "study", ready.config)
    config = place.config
    files = {d: tmp_path / f"{d}.jsonl" for d in ("sums", "tales", "riddles")}
    write_jsonl(files["sums"], [*records("sums", 2), {"prompt": "And now?"}])
    files["tales"].write_text('{"prompt": "a", "response": "b"}\n{"prompt: \n')
    write_jsonl(files["riddles"], records("riddles", 3))
    for domain, file in files.items():
        config["domains"][domain]["source"]["files"] = [str(file)]
    for domain, words in (
        ("sums", "line 3: no response among its columns"),
        ("tales", "line 2, column"),
        ("riddles", "3 distinct documents, but 6 were asked"),
    ):
        place.configure(config)
        run = place.snakemake()
        assert run.status and "Traceback" not in run.output
        (line,) = run.errors()
        assert re.match(rf"{re.escape(str(files[domain]))}[,:] {words}", line)
        assert ("more domains have errors" in line) == (domain != "riddles")
        assert not place.artifacts("corpora") and not half_written(place)
        write_jsonl(files[domain], records(domain))


# Errors of jobs


def test_a_document_trained_on_here_and_evaluated_there_is_refused(ready, tmp_path):
    place = Place(tmp_path / "study", ready.config)
    config = place.config
    shared = write_jsonl(tmp_path / "shared.jsonl", records("sums"))
    config["domains"]["riddles"] |= {"source": {"files": [str(shared)]}, "eval_documents": 12}
    config["experts"] = {"sums": {}}
    place.configure(config)
    run = place.snakemake()
    assert run.status and "Traceback" not in run.output
    (line,) = run.errors()
    assert line.startswith("sums trains on documents that riddles evaluates on:")
    assert not place.artifacts("evals") and not half_written(place)
    assert not place.artifacts("checks")


def test_broken_experts_are_named_and_the_others_are_kept(ready, tmp_path):
    """Another architecture, NaN, a corrupt file; after mending, the same command goes on."""
    base, good = ready.folder / "models" / "base", ready.folder / "models" / "amber"
    other = models.write_checkpoint(tmp_path / "other", "qwen2", dtype="float32")
    poisoned = shutil.copytree(good, tmp_path / "poisoned")
    tensors = models.read_tensors(good)
    next(iter(tensors.values())).view(-1)[3] = torch.nan
    save_file(tensors, poisoned / WEIGHTS, metadata={"format": "pt"})
    corrupt = shutil.copytree(good, tmp_path / "corrupt")
    (corrupt / WEIGHTS).write_bytes((good / WEIGHTS).read_bytes()[:-100])
    config = ready_config(ready.folder, ("amber", "birch", "cedar", "dune"))
    broken = {"birch": other, "cedar": poisoned, "dune": corrupt}
    for name, folder in broken.items():
        config["experts"][name]["checkpoints"]["tiny"]["path"] = str(folder)
    place = Place(tmp_path / "study", config)
    run = place.snakemake()
    assert run.status and "Traceback" not in run.output
    lines = run.errors()
    assert len(lines) == 3
    assert any("qwen2" in line and "must be a fine-tune of its base" in line for line in lines)
    assert any("NaN" in line for line in lines)
    assert any(f"{corrupt / WEIGHTS}: corrupt or half-copied" in line for line in lines)
    done = place.lineages()
    assert {name.split("@")[0] for name in place.artifacts("task_vectors")} == {"tiny/amber"}
    assert not half_written(place)

    place.configure(ready_config(ready.folder, ("amber", "birch", "cedar", "dune")))
    place.finish()
    assert done.items() <= place.lineages().items()
    assert len(place.cells()) == 3 * 16
    assert base.exists()


def test_after_a_failure_what_is_measured_is_fitted_and_reported(trained, tmp_path):
    place = trained.copy(tmp_path)
    config = place.config
    config["bases"]["small"]["training"] = {"max_tokens": 8}
    place.configure(config)
    run = place.snakemake("--profile", str(ROOT / "profiles" / "local"))
    assert run.status and "Traceback" not in run.output
    lines = run.errors()
    assert len(lines) == 3 and all("max_tokens is 8; raise it" in line for line in lines)
    assert "1 of 2 shards are missing: evals/small/average/s0-000" in run.output
    report = place.results / "partial" / "trained" / "report.html"
    assert f"report on the rest: {report}" in run.output and report.exists()
    laws = json.loads((report.parent / "laws" / "laws.json").read_text())
    assert {fit["base"] for fit in laws["fits"]} == {"large"}
    # What a reader of the terminal is not to wade through
    for noise in ("it/s]", "Warning"):
        assert noise not in run.output


# The results folder


def test_a_results_folder_of_another_layout_is_refused(ready, tmp_path):
    place = Place(tmp_path, ready.config)
    place.results.mkdir()
    mark = place.results / ".mergelaw.json"
    mark.write_text(json.dumps({"layout": 0}))
    run = place.snakemake()
    assert run.status and "Traceback" not in run.output
    (line,) = run.errors()
    assert "laid out by another version of mergelaw (layout 0, this one has 1)" in line
    assert {p.name for p in place.results.iterdir()} <= {".mergelaw.json", "cache", "logs"}


def test_a_second_run_on_one_results_folder_says_so_and_ends(ready, tmp_path):
    place = ready.copy(tmp_path / "study").forget("evals", "cells", "laws", "reports")
    first = place.start()
    log = place.results / "logs" / "evals"
    shutil.rmtree(log, ignore_errors=True)
    wait_for(lambda: list((place.results / "evals").rglob(".*.work")), first)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    second = place.snakemake(cwd=elsewhere)
    assert first.poll() is None, "the first run was over too soon to show anything"
    assert second.status and "Traceback" not in second.output
    (line,) = second.errors()
    assert line == (
        f"{place.results}: another run is working on this folder (process {first.pid} on "
        f"{socket.gethostname()}); wait for it, or stop it"
    )
    output, _ = first.communicate()
    assert first.returncode == 0, output
    same_measurements(place.rows(), ready.rows())
    assert len(place.cells()) == len(set(place.cells()))


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(
    ready, tmp_path, small_disk
):
    place = Place(tmp_path, ready.config)
    for kind in MADE_FIRST:
        source = ready.results / kind
        shutil.copytree(source, small_disk / kind, symlinks=True)
    place.results.symlink_to(small_disk)
    (place.results / "cells").mkdir()
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    filler = small_disk / "filler"
    filler.write_bytes(bytes(free - 110_000))
    run = place.snakemake("--until", "evaluate_merges")
    assert run.status and "Traceback" not in run.output
    (line,) = run.errors()
    assert "No space left on device" in line
    kept = place.cells()
    assert 0 < len(kept) < 192 and not place.artifacts("evals")
    filler.unlink()
    place.finish("--until", "evaluate_merges")
    same_measurements(place.rows(), ready.rows())
    assert len(place.cells()) == len(set(place.cells())) == 192
    assert set(kept) < set(place.cells())


def test_a_disk_that_is_full_from_the_start_is_one_line_and_spoils_nothing(
    ready, tmp_path, small_disk
):
    place = Place(tmp_path, ready.config)
    place.results.symlink_to(small_disk)
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    run = place.snakemake("--until", "build_corpus")
    assert run.status and "Traceback" not in run.output and "OSError" not in run.output
    (line,) = run.errors()
    assert re.fullmatch(r"\S+/results/\S+: No space left on device; .+", line)
    filler.unlink()
    place.finish("--until", "build_corpus")
    assert place.artifacts("corpora")
