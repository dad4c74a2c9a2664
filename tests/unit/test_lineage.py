"""Artifacts are whole or absent, and every flipped byte in their history is named."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergelaw.artifacts import lineage, run_lock, store
from mergelaw.artifacts.lineage import LINEAGE, read, tree, used, verify
from mergelaw.artifacts.store import make
from mergelaw.errors import MergelawError


def writes(text="content"):
    def work(folder, state):
        (folder / "data.txt").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "more.bin").write_bytes(text.encode() * 10)
        return {"said": text}

    return work


def unwanted(folder, state):
    raise AssertionError("work is not to run")


@pytest.fixture
def chain(tmp_path):
    """A corpus, a base made of it, an expert made of both."""
    for name, stage, inputs in (
        ("corpus", "corpus", {}),
        ("base", "base", {"corpus": tmp_path / "corpus"}),
        ("expert", "expert", {"base": tmp_path / "base", "corpus": tmp_path / "corpus"}),
    ):
        assert make(tmp_path / name, stage, {"for": name}, inputs, writes(name))
    return tmp_path


def visible(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


# Making


def test_an_artifact_says_what_it_is_and_where_it_came_from(chain):
    found = read(chain / "expert")
    assert (found["stage"], found["artifact"]) == ("expert", "expert")
    assert set(found["files"]) == {"data.txt", "sub/more.bin"}
    assert found["facts"] == {"said": "expert"}
    assert found["recipe"] == {"for": "expert"}
    base = found["inputs"]["base"]
    assert base == {"path": "../base", "digest": read(chain / "base")["digest"], "key": None}
    text = (chain / "expert" / LINEAGE).read_text()
    assert str(chain) not in text
    assert os.uname().nodename not in text


def test_the_digest_is_of_the_files_alone(tmp_path):
    make(tmp_path / "a", "corpus", {"seed": 0}, {}, writes())
    make(tmp_path / "b", "corpus", {"seed": 1}, {}, writes())
    make(tmp_path / "c", "corpus", {"seed": 1}, {}, writes("other"))
    a, b, c = (read(tmp_path / name)["digest"] for name in "abc")
    assert a == b != c


def test_what_is_there_is_not_made_again(chain):
    before = (chain / "base" / LINEAGE).read_bytes()
    inputs = {"corpus": chain / "corpus"}
    assert not make(chain / "base", "base", {"for": "base"}, inputs, unwanted)
    assert (chain / "base" / LINEAGE).read_bytes() == before


@pytest.mark.parametrize("half", [[], ["data.txt"], ["data.txt", "junk/deep.txt"]])
def test_a_half_folder_is_replaced(tmp_path, half):
    for name in ["", *half]:
        path = tmp_path / "artifact@0a1b2c3d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half") if name else path.mkdir()
    assert make(tmp_path / "artifact@0a1b2c3d", "corpus", {}, {}, writes())
    assert lineage.content(tmp_path / "artifact@0a1b2c3d").keys() == {"data.txt", "sub/more.bin"}
    used(tmp_path / "artifact@0a1b2c3d", whole=True)


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    for output in (mine, mine / "thesis.tex"):
        with pytest.raises(MergelawError, match="holds something else; name a new folder"):
            store.make(output, "fit", {}, {}, lambda folder, state: None)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert store.make(tmp_path / "empty", "fit", {}, {}, lambda folder, state: None)


class Odd(BaseException):
    pass


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), KeyboardInterrupt(), Odd(), SystemExit(1), OSError(errno.ENOSPC, "full")],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_leaves_nothing_and_can_be_tried_again(tmp_path, error):
    def fails(folder, state):
        writes()(folder, state)
        raise error

    with pytest.raises(type(error)):
        make(tmp_path / "artifact", "corpus", {}, {}, fails)
    assert visible(tmp_path) == set()
    assert not list(tmp_path.rglob("data.txt"))
    assert make(tmp_path / "artifact", "corpus", {}, {}, writes())
    assert visible(tmp_path) == {"artifact"}


@pytest.mark.parametrize("call", ["sync", "write_json", "content"])
def test_a_full_disk_at_the_end_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lineage if call == "content" else store, call, full)
    with pytest.raises(OSError, match="No space"):
        make(tmp_path / "artifact", "corpus", {}, {}, writes())
    assert visible(tmp_path) == set()


def test_facts_that_are_no_json_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        make(tmp_path / "artifact", "corpus", {}, {}, lambda *_: {"norm": float("nan")})
    assert visible(tmp_path) == set()


# Killed, and together

KILLED = """
import os, sys, pathlib
from mergelaw.artifacts.store import make
def work(folder, state):
    (folder / "half.txt").write_text("half")
    (state / "step").write_text("17")
    os._exit(9)
make(pathlib.Path(sys.argv[1]), "corpus", {}, {}, work)
"""


def test_the_state_outlives_a_kill_and_the_half_artifact_does_not(tmp_path):
    output = tmp_path / "artifact"
    run = subprocess.run([sys.executable, "-c", KILLED, str(output)], check=False)
    assert run.returncode == 9
    assert visible(tmp_path) == set()
    seen = {}

    def goes_on(folder, state):
        seen["state"] = (state / "step").read_text()
        seen["folder"] = list(folder.iterdir())
        return writes()(folder, state)

    assert make(output, "corpus", {}, {}, goes_on)
    assert seen == {"state": "17", "folder": []}
    assert not (tmp_path / ".artifact.work").exists()
    again = {}
    shutil.rmtree(output)
    make(output, "corpus", {}, {}, lambda folder, state: again.update(s=list(state.iterdir())))
    assert again == {"s": []}


def test_a_job_that_was_killed_at_its_very_end_leaves_no_scratch_folder(tmp_path):
    assert make(tmp_path / "artifact", "corpus", {}, {}, writes())
    (tmp_path / ".artifact.work" / "state").mkdir(parents=True)
    assert not make(tmp_path / "artifact", "corpus", {}, {}, unwanted)
    assert not (tmp_path / ".artifact.work").exists()


def test_the_state_outlives_a_failure(tmp_path):
    def fails(folder, state):
        (state / "step").write_text("3")
        raise ValueError

    with pytest.raises(ValueError):
        make(tmp_path / "artifact", "corpus", {}, {}, fails)
    seen = []
    make(
        tmp_path / "artifact", "corpus", {}, {}, lambda f, s: seen.append((s / "step").read_text())
    )
    assert seen == ["3"]


def compete(output, log, barrier, results):
    def work(folder, state):
        with log.open("a") as file:
            file.write("worked\n")
        time.sleep(0.3)
        writes()(folder, state)

    barrier.wait()
    results.put(make(output, "corpus", {}, {}, work))


def test_of_two_processes_one_works_and_one_waits(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (tmp_path / "artifact", tmp_path / "log", barrier, results)
    both = [context.Process(target=compete, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    made = [results.get(timeout=60) for _ in both]
    for process in both:
        process.join()
    assert sorted(made) == [False, True]
    assert (tmp_path / "log").read_text() == "worked\n"
    used(tmp_path / "artifact", whole=True)


# Inputs


def flip(path, place=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def test_a_damaged_input_is_named_before_any_work(chain):
    flip(chain / "base" / "sub" / "more.bin", 7)
    with pytest.raises(MergelawError, match=r"base/sub/more.bin: is not what was written.*delete"):
        make(chain / "new", "expert", {}, {"base": chain / "base"}, unwanted)
    assert not (chain / "new").exists()


def test_inputs_that_are_none_are_named(chain):
    for path, words in ((chain / "nowhere", "no artifact"), (chain, "no artifact")):
        with pytest.raises(MergelawError, match=words):
            make(chain / "new", "expert", {}, {"base": path}, unwanted)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", "\udcff"])
def test_a_damaged_lineage_is_named(chain, text):
    (chain / "base" / LINEAGE).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(MergelawError, match=r"lineage.json: damaged; delete"):
        read(chain / "base")


def test_a_lineage_of_another_version_is_refused(chain):
    path = chain / "base" / LINEAGE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(MergelawError, match="another version"):
        read(chain / "base")


# The tree


def problems(chain) -> list[str]:
    """What is wrong, without what to do about it."""
    wrong = verify([chain / "expert"])[1]
    assert all("; " in line for line in wrong)
    return [line.rpartition("; ")[0] for line in wrong]


def test_a_whole_tree_has_no_problem(chain):
    lines = tree(chain / "expert")
    assert verify([chain / "expert"]) == (3, [])
    assert [line.split(":")[0].strip() for line in lines] == [
        "artifact",
        "base",
        "corpus",
        "corpus",
    ]
    assert lines[-1].endswith("(above)")


@pytest.mark.parametrize("artifact", ["corpus", "base", "expert"])
@pytest.mark.parametrize("file", ["data.txt", "sub/more.bin"])
def test_a_flipped_byte_anywhere_is_named(chain, artifact, file):
    path = chain / artifact / file
    for place in range(path.stat().st_size):
        flip(path, place)
        assert problems(chain) == [f"{path}: is not what was written (digest differs)"]
        flip(path, place)
    assert problems(chain) == []


@pytest.mark.parametrize("artifact", ["corpus", "base", "expert"])
def test_missing_and_foreign_files_are_named(chain, artifact):
    (chain / artifact / "data.txt").unlink()
    (chain / artifact / "foreign").write_text("x")
    assert problems(chain) == [
        f"{chain / artifact / 'data.txt'}: is missing",
        f"{chain / artifact / 'foreign'}: does not belong to the artifact",
    ]


def test_an_input_that_is_gone_or_another_is_named(chain):
    shutil.rmtree(chain / "corpus")
    found = problems(chain)
    assert found
    assert all(f"{chain / 'corpus'}: no artifact" in line for line in found)
    make(chain / "corpus", "corpus", {}, {}, writes("another"))
    found = problems(chain)
    assert found
    assert all("is not the one that" in line for line in found)


def test_a_tree_can_be_moved(chain, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "results"
    shutil.copytree(chain, moved)
    assert tree(moved / "expert") == tree(chain / "expert")
    assert verify([moved / "expert"]) == (3, [])


def test_the_artifact_of_a_path_is_found(chain):
    assert lineage.find(chain / "base" / "sub" / "more.bin") == chain / "base"
    assert lineage.find(chain / "base") == chain / "base"
    with pytest.raises(MergelawError, match="no artifact here or above"):
        lineage.find(chain)


# One run at a time


def test_a_results_folder_has_one_run_at_a_time(tmp_path):
    program = "import sys, pathlib; from mergelaw.artifacts.run_lock import lock_results; lock = lock_results(pathlib.Path(sys.argv[1])); print('mine')"
    command = [sys.executable, "-c", program, str(tmp_path / "results")]
    lock = run_lock.lock_results(tmp_path / "results")
    refused = subprocess.run(command, capture_output=True, text=True).stderr
    assert f"another run is working on this folder (process {os.getpid()} on " in refused
    lock.release()
    assert subprocess.run(command, capture_output=True, text=True).stdout == "mine\n"
    (tmp_path / "results" / ".mergelaw.json").write_text('{"layout": 0}')
    with pytest.raises(MergelawError, match="layout 0"):
        run_lock.lock_results(tmp_path / "results")


def test_a_disk_that_is_full_at_once_leaves_a_folder_that_a_run_can_have(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError) as raised:
            run_lock.lock_results(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.filename == str(tmp_path / ".mergelaw.json")
    assert list(tmp_path.iterdir()) == []
    run_lock.lock_results(tmp_path).release()


def test_a_flipped_bit_anywhere_in_a_lineage_is_found(tmp_path):
    output = tmp_path / "a@1"

    def work(folder, state):
        (folder / "x").write_text("x")

    store.make(output, "corpus", {"a": 1}, {}, work)
    path = output / lineage.LINEAGE
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(bytes(flipped))
        with pytest.raises(MergelawError):
            lineage.used(output, whole=True)


def test_a_folder_without_a_key_is_not_taken_for_that_of_another_recipe_or_input(tmp_path):
    inputs = {}
    for name in ("one", "two"):
        inputs[name] = tmp_path / name

        def work(folder, state, name=name):
            (folder / "x").write_text(name)

        store.make(inputs[name], "base", {}, {}, work)

    def make(stage="merge", recipe="a", base="one"):
        places = {"base": inputs[base]}
        return store.make(tmp_path / "b", stage, {"method": recipe}, places, lambda f, s: None)

    assert make() and not make()
    for other in ({"stage": "fit"}, {"recipe": "b"}, {"base": "two"}):
        with pytest.raises(MergelawError, match="holds another"):
            make(**other)


def test_a_full_disk_is_said_whoever_was_writing(tmp_path, monkeypatch):
    """safetensors and torch have errors of their own for it, one of them without the reason."""

    def make_failing(error: Exception) -> None:
        def work(folder, state):
            raise error

        store.make(tmp_path / "a", "corpus", {}, {}, work)

    with pytest.raises(OSError) as told:
        make_failing(ValueError("while serializing: I/O error: No space left (os error 28)"))
    assert told.value.errno == errno.ENOSPC and str(tmp_path) in told.value.filename
    with pytest.raises(RuntimeError, match="file write failed"):  # the disk is not full
        make_failing(RuntimeError("file write failed"))
    plain = Path.write_bytes

    def full(path, data):
        if "probe" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError) as told:
        make_failing(RuntimeError("file write failed"))
    assert told.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == [".a.lock"]
