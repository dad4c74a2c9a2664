"""Thousands of kills, damages and forgeries, counted: python tests/campaign/campaign.py --rounds 1000

A results folder is made without training. Then a run's start, single jobs, gc, copies and writers
of cells are killed at a random change of the file system; files are damaged; lineages, jobs and
cells are forged, with the right checksums. A case passes if nothing is lost and nothing false is
believed: an artifact is whole or absent, a damage is named, a cell is used as it was measured or
not at all. A round has a case of each kind. With `--record FILE` the same command goes on where an
earlier one stopped. Prints a table in Markdown; the exit status is 1 if a case failed. Whole runs:
tests/campaign/runs.py.
"""

import argparse
import base64
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).parents[1] / name) for name in ("", "unit"))

import numpy as np
from test_folder import TINY, forge, study_in

import jobs
from mergelaw.artifacts import files, lineage, run_lock, store
from mergelaw.artifacts.lineage import LINEAGE
from mergelaw.errors import MergelawError
from mergelaw.evaluation import cells
from mergelaw.workflow import folder as folders
from mergelaw.workflow.job import job_file, read_job, write_job
from mergelaw.workflow.study import Study

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.copyfile"}
Count = Callable[[str], None]


def killed(work: Callable[[], Any], moment: int) -> bool:
    """Do work in a fork that is killed at its n-th change of the file system; whether it was."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    left = moment

    def trace(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"
        if event in CHANGES or writes:
            left -= 1
            if left < 0:
                os._exit(9)

    sys.addaudithook(trace)
    try:
        work()
    finally:
        os._exit(0)


class Bench:
    """A finished study, of which every case gets a fresh copy."""

    def __init__(self, root: Path):
        self.root, self.fresh = root, root / "fresh"
        study = study_in(root)
        run_lock.lock_results(study.results).release()
        for artifact in study.targets():
            jobs.pretend(study.results, artifact)
        shutil.copytree(study.results, self.fresh, symlinks=True)
        self.study = study

    def again(self, **changes: Any) -> Study:
        """The study as it was, perhaps with another configuration."""
        shutil.rmtree(self.study.results)
        shutil.copytree(self.fresh, self.study.results, symlinks=True)
        return study_in(self.root, **changes)

    def all_whole(self) -> set[str]:
        """Names of the artifacts that are there; each of them must be whole."""
        found = folders.artifacts_in(self.study.results)
        for path in found:
            lineage.used(path, whole=True)
        return {path.name for path in found}


def kill_gc(bench: Bench, rng: random.Random, count: Count) -> None:
    dropped = rng.choice([name for name in TINY["experts"] if name != "both"])
    experts = {name: value for name, value in TINY["experts"].items() if name != dropped}
    study = bench.again(experts=experts | {"more": {"domains": ["algebra"]}})
    before = bench.all_whole()
    hit = killed(lambda: list(folders.collect_garbage([study], True)), rng.randrange(45))
    kept = {Path(path).name for path in study.known} & before
    assert kept <= bench.all_whole() <= before
    list(folders.collect_garbage([study], True))
    assert bench.all_whole() == kept and not list(bench.study.results.rglob("*.work"))
    count("kill of gc" if hit else "gc ended first")


def kill_job(bench: Bench, rng: random.Random, count: Count) -> None:
    study = bench.again()
    artifact = rng.choice(list(study.by_path.values()))
    place = study.results / artifact.path
    inputs = {name: study.results / one.path for name, one in artifact.named_inputs()}
    before = bench.all_whole()
    if rng.random() < 0.5:
        shutil.rmtree(place)
    else:
        (place / LINEAGE).unlink()  # a half copy

    def work(folder: Path, state: Path) -> None:
        (state / "step").write_text("1")
        for name in "abc":
            (folder / name).write_text(name)
        (state / "step").write_text("2")

    def make() -> bool:
        recipe = artifact.recipe
        return store.make(place, artifact.stage, recipe, inputs, work, artifact.key)

    hit = killed(make, rng.randrange(16))
    assert before - bench.all_whole() <= {place.name}
    make()
    assert bench.all_whole() == before and not list(study.results.rglob("*.work"))
    count("kill of a job" if hit else "job ended first")


def copy(source: Path, target: Path) -> None:
    """As the documentation says: files first, then lineages, nothing over what exists."""
    for lineages in (False, True):
        for path in sorted(source.rglob("*")):
            place = target / path.relative_to(source)
            if (path.name == LINEAGE) is lineages and not path.is_dir() and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                scratch = place.with_name(f".{place.name}.partial")  # as rsync does
                shutil.copy2(path, scratch)
                scratch.rename(place)


def kill_copy(bench: Bench, rng: random.Random, count: Count) -> None:
    target = bench.root / "target"
    shutil.rmtree(target, ignore_errors=True)
    hit = killed(lambda: copy(bench.fresh, target), rng.randrange(150))
    for path in target.rglob("*.partial") if target.exists() else ():
        path.unlink()
    if target.exists():
        for path in folders.artifacts_in(target):
            lineage.used(path, whole=True)
    copy(bench.fresh, target)
    assert folders.verify(target) == (len(bench.study.by_path), [])
    count("kill of a copy" if hit else "copy ended first")


def damage(bench: Bench, rng: random.Random, count: Count) -> None:
    """A file is flipped, cut, lengthened, removed, replaced by a link, or a stranger."""
    study = bench.again()
    artifact = rng.choice(folders.artifacts_in(study.results))
    file = rng.choice([path for path in artifact.rglob("*") if path.is_file()])
    whole, way = (
        file.read_bytes(),
        rng.choice(("flip", "cut", "longer", "gone", "link", "stranger")),
    )
    spot = rng.randrange(len(whole))
    if way == "gone":
        file.unlink()
    elif way == "link":
        file.unlink()
        file.symlink_to(rng.choice([bench.root, bench.root / "nowhere", study.results / "cells"]))
    elif way == "stranger":
        (artifact / rng.choice(("more", ".hidden", "lineage.json~"))).write_bytes(whole)
    else:
        flipped = whole[:spot] + bytes([whole[spot] ^ 1 << rng.randrange(8)]) + whole[spot + 1 :]
        file.write_bytes({"flip": flipped, "cut": whole[:spot], "longer": whole + b"!"}[way])
    found = folders.verify(study.results)[1]
    assert any(str(artifact) in line and "; " in line for line in found), (artifact, way, found)
    try:
        lineage.used(artifact)
        raise AssertionError((artifact, file, way))
    except MergelawError:
        count(f"damaged file named and refused: {way}")


VALUES: list[Any] = [
    None, True, 0, -1, 2**70, 1.5, "", "x", "../../../cells", "/etc/passwd", "a\0b", [], {}, [1],
    {"a": 1}, "0" * 64, "f" * 64, ["../.."], {"path": 3}, {"base": {"path": ".."}},
]  # fmt: skip
FREE = {"git_commit", "versions", "started", "ended", "wall_seconds", "cpu_seconds", "facts",
        "peak_memory", "stamps", "schema"}  # fmt: skip


def forge_lineage(bench: Bench, rng: random.Random, count: Count) -> None:
    """An entry, or one within an entry, gets another value; the checksum is right."""
    study = bench.again()
    artifact = rng.choice(folders.artifacts_in(study.results))
    entry = lineage.read(artifact)
    name = rng.choice(sorted(entry))
    place: Any = entry
    path = [name]
    while isinstance(place[path[-1]], dict) and place[path[-1]] and rng.random() < 0.7:
        place = place[path[-1]]
        path.append(rng.choice(sorted(place)))
    before = place[path[-1]]
    place[path[-1]] = after = rng.choice(VALUES)
    forge(artifact, **entry)
    outside = sorted(bench.root.rglob("*"))
    found = folders.verify(study.results)[1]
    changed = type(before) is not type(after) or before != after
    if changed and name not in FREE:
        assert found, (artifact, path, before, after)
    for use in (lineage.used, lineage.tree, lambda one: lineage.unmixed([one])):
        try:
            use(artifact)
        except MergelawError as error:
            assert "\n" not in str(error)
    list(folders.collect_garbage([study], True))
    assert set(outside) - set(bench.root.rglob("*")) <= {*study.results.rglob("*.work")}
    count("forged lineage named" if found else "lineage with another time or version")


def measured(number: int, rng: random.Random) -> dict[str, Any]:
    nll = np.array([rng.random() * 9 for _ in range(4)], "<f8")
    counts = {"document_tokens": [3, 1, 2, 5], "tokens": 11, "bytes": 40}
    return {
        "cell": f"{number:032x}", "merge": f"{number:016x}", "base_digest": "b" * 64,
        "set": "s" * 64, "document_nll": base64.b64encode(nll.tobytes()).decode(), **counts,
        "long_documents": 0, "dropped_tokens": 0, "parameters": 30, "non_embedding": 20,
        "merge_seconds": 0.1, "eval_seconds": 0.1, "device": "cpu", "threads": 1,
    }  # fmt: skip


EXPECTED = {"document_tokens": [3, 1, 2, 5], "tokens": 11, "bytes": 40, "base_digest": "b" * 64,
            "set": "s" * 64, "long_documents": 0, "dropped_tokens": 0}  # fmt: skip


def cut_store(bench: Bench, rng: random.Random, count: Count) -> None:
    """A writer of cells is killed: its file and index end anywhere, also one without the other."""
    place = bench.root / "store"
    shutil.rmtree(place, ignore_errors=True)
    every = [measured(number, rng) for number in range(6)]
    with cells.Store(place, "shard") as writer:
        writer.append(every[:3])
        sizes = writer.path.stat().st_size, writer.path.with_suffix(cells.INDEX).stat().st_size
        writer.append(every[3:])
    index = writer.path.with_suffix(cells.INDEX)
    os.truncate(writer.path, rng.randint(sizes[0], writer.path.stat().st_size))
    os.truncate(index, rng.randint(0, index.stat().st_size))
    wanted = {cell["cell"]: EXPECTED for cell in every}
    again = cells.Store(place, "again", wanted)
    assert {cell["cell"] for cell in every[:3]} <= again.known.keys()
    assert all(again.known[cell["cell"]] == cell for cell in every if cell["cell"] in again.known)
    with again:
        again.append([cell for cell in every if cell["cell"] not in again.known])
    assert cells.Store(place, wanted=wanted).known == {cell["cell"]: cell for cell in every}
    assert not list(cells.verify(place, []))
    count("kill of a writer of cells")


def forge_cell(bench: Bench, rng: random.Random, count: Count) -> None:
    """An entry of a cell gets another value; the checksum is right."""
    place = bench.root / "store"
    shutil.rmtree(place, ignore_errors=True)
    good, forged = measured(1, rng), measured(2, rng)
    name = rng.choice(sorted(forged))
    forged[name] = rng.choice([*VALUES, [3, 1, 2], [3, 1, 2, 6], 12, "AAAA", float("nan")])
    text = json.dumps(forged, sort_keys=True, separators=(",", ":"))
    place.mkdir()
    lines = [good, measured(3, rng)]
    with cells.Store(place, "shard") as writer:
        writer.append(lines)
    with writer.path.open("a") as file:
        file.write(f"{cells.checksum(text)} {text}\n")
    wanted = {f"{n:032x}": EXPECTED | {"merge": f"{n:016x}"} for n in (1, 2, 3)}
    known = cells.Store(place, wanted=wanted).known
    assert known[good["cell"]] == good
    used = known.get(f"{2:032x}")
    assert used is None or all(used[key] == EXPECTED[key] for key in EXPECTED)
    list(cells.verify(place, []))
    count("forged cell not used" if used is None else f"forged cell used: its {name} is not known")


def start(study: Study) -> None:
    """What a run writes before its first job."""
    run_lock.lock_results(study.results).release()
    for artifact in study.known.values():
        write_job(study.results, artifact)


def kill_start(bench: Bench, rng: random.Random, count: Count) -> None:
    """The start of a run is killed, in a new folder or in one with results."""
    study, before = bench.again(), bench.all_whole()
    if rng.random() < 0.3:
        shutil.rmtree(study.results)
        before = set()
    hit = killed(lambda: start(study), rng.randrange(120))
    start(study)
    for artifact in study.known.values():
        read_job(job_file(study.results, artifact), artifact.stage)
    list(folders.collect_garbage([study], True))
    assert bench.all_whole() == before
    leftover = {p for p in study.results.rglob("*") if folders.SCRATCH_FILE.search(p.name)}
    assert not leftover, leftover
    count("kill of a run's start" if hit else "start ended first")


def damage_job(bench: Bench, rng: random.Random, count: Count) -> None:
    """A job's file is flipped or cut, or an entry of it changed."""
    study = bench.again()
    artifact = rng.choice(list(study.known.values()))
    write_job(study.results, artifact)
    file = job_file(study.results, artifact)
    good, whole = read_job(file, artifact.stage), file.read_bytes()
    spot, way = rng.randrange(len(whole)), rng.choice(("flip", "cut", "entry"))
    flipped = whole[:spot] + bytes([whole[spot] ^ 1 << rng.randrange(8)]) + whole[spot + 1 :]
    entries = json.loads(whole)
    entries[rng.choice(sorted(entries))] = rng.choice(VALUES)
    text = json.dumps(entries).encode()
    file.write_bytes({"flip": flipped, "cut": whole[:spot], "entry": text}[way])
    try:
        job = read_job(file, artifact.stage)
    except MergelawError as error:
        assert "\n" not in str(error)
        count(f"damaged job refused: {way}")
        return
    assert (job.stage, job.key) == (good.stage, good.key) or job.key is None
    assert job.key is None or (job.recipe, job.keys) == (good.recipe, good.keys)
    count(f"damaged job with the right key, recipe and inputs' keys: {way}")


CASES = (
    kill_start, kill_gc, kill_job, kill_copy, cut_store, damage, damage_job, forge_lineage,
    forge_cell,
)  # fmt: skip


def read_record(path: Path | None, seed: int) -> dict[str, Any]:
    """Rounds, seconds and counts of an earlier command with the same record."""
    if path is None or not path.exists():
        return {"seed": seed, "rounds": 0, "seconds": 0.0, "counts": {}, "failed": []}
    record: dict[str, Any] = json.loads(path.read_text())
    if record["seed"] != seed:
        sys.exit(f"{path}: has rounds of seed {record['seed']}; name another file")
    return record


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100, help="rounds in all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of this command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="file of the rounds that are done")
    asked = parser.parse_args()
    record = read_record(asked.record, asked.seed)
    counts, before = Counter[str](record["counts"]), record["seconds"]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, Path(os.devnull).open("w") as quiet:
        bench = Bench(Path(scratch))
        while record["rounds"] < asked.rounds and time.perf_counter() - began < 60 * asked.minutes:
            for case in CASES:
                rng = random.Random(f"{case.__name__} {asked.seed} {record['rounds']}")
                try:
                    with redirect_stderr(quiet):  # messages on damaged cells
                        case(bench, rng, lambda what: counts.update([what]))
                except Exception:
                    where = f"{case.__name__}, seed {asked.seed}, round {record['rounds']}"
                    print(f"{where}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                    record["failed"].append(where)
            record["rounds"] += 1
            record["counts"], record["seconds"] = counts, before + time.perf_counter() - began
            if asked.record:
                files.write_json(asked.record, record)
    print("| what | times |\n|---|---|")
    for what, times in sorted(counts.items()):
        print(f"| {what} | {times} |")
    print(f"| failed | {len(record['failed'])} |\n")
    print(f"seed {asked.seed}, {record['rounds']} rounds, {record['seconds']:.0f} s")
    return bool(record["failed"])


if __name__ == "__main__":
    sys.exit(main())
