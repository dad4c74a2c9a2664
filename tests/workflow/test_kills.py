"""kill -9 at any moment: the same command goes on, repeats nothing and ends with the same bits.

MERGELAW_KILLS sets the kills of each test, for a longer campaign; MERGELAW_SEED their moments.
"""

import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from studies import Place, environment, kill, same_measurements, wait_for

import jobs
from mergelaw.artifacts import lineage
from mergelaw.workflow.artifact import Artifact

KILLS = int(os.environ.get("MERGELAW_KILLS", "2"))
SEED = int(os.environ.get("MERGELAW_SEED", "0"))
MOMENTS = 20.0  # seconds: about as long as an undisturbed run takes


def as_undisturbed(place: Place, undisturbed: Place) -> None:
    """Complete, nothing measured twice, the same bits everywhere."""
    cells = place.cells()
    assert len(cells) == len(set(cells))
    assert sorted(cells) == sorted(undisturbed.cells())
    same_measurements(place.rows(), undisturbed.rows())
    for kind in ("bases", "experts", "task_vectors"):
        ours, theirs = place.artifacts(kind), undisturbed.artifacts(kind)
        assert ours.keys() == theirs.keys()
        for name, path in ours.items():
            assert lineage.used(path, whole=True)["files"] == lineage.read(theirs[name])["files"]
    assert place.planned() == {}


@pytest.mark.parametrize("group", [False, True], ids=["snakemake", "group"])
def test_snakemake_killed_at_random_moments(ready, tmp_path, group):
    """Alone, its jobs go on while the next run begins; or with all that it started."""
    place = Place(tmp_path, ready.config)
    rng = random.Random(SEED + group)
    for _ in range(KILLS):
        run = place.start()
        time.sleep(rng.uniform(1, MOMENTS / 2))
        kill(run, group)
    place.finish()
    as_undisturbed(place, ready)


def test_an_evaluation_killed_between_two_merges(ready, tmp_path):
    """Killed when some cells more are in the store, it measures the rest and none of them again."""
    place = ready.copy(tmp_path).forget("evals", "cells", "laws", "reports")
    rng = random.Random(SEED)
    seen, hits = 0, 0
    for number in range(KILLS):
        run = place.start("--until", "evaluate_merges")
        more = rng.randint(1, 3 * 64 // (2 * KILLS))
        wait_for(lambda least=seen + more: stored(place) >= least, run)
        kill(run, group=True)
        cells = place.cells() if stored(place) else []
        assert len(cells) == len(set(cells)) >= seen, f"after kill {number}"
        hits += 0 < len(cells) < 192
        seen = len(cells)
    assert hits, "no kill found an evaluation at work"
    place.finish()
    as_undisturbed(place, ready)


def stored(place: Place) -> int:
    """Whole lines in the cell store."""
    files = (place.results / "cells").rglob("*.jsonl")
    return sum(file.read_bytes().count(b"\n") for file in files)


def command(place: Place, artifact: Artifact, output: Path) -> list[str]:
    """The stage's command for an expert, made into ``output`` and saving at every step."""
    job = jobs.of(artifact, place.results, output)
    return ["mergelaw", "stage", "expert", str(job), "--save-every", "0"]


def test_a_training_killed_at_random_moments_ends_with_the_same_bits(trained, tmp_path):
    place = trained.copy(tmp_path)
    training = place.config["training"] | {"steps": 80}
    place.configure(place.config | {"training": training})
    artifact = place.study().expert("large", "code", 0)
    calm, hunted = tmp_path / "calm" / "code", tmp_path / "hunted" / "code"
    quiet = {"env": environment(), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command(place, artifact, calm)[:-1], "600"], check=True, **quiet)
    state = hunted.parent / ".code.work" / "state"
    rng, reached = random.Random(SEED), 0
    for _ in range(KILLS):
        run = subprocess.Popen(command(place, artifact, hunted), start_new_session=True, **quiet)
        least = min(reached + rng.randint(1, 12), 60)
        wait_for(lambda least=least: saved(state) >= least, run)
        kill(run, group=True)
        assert not hunted.exists()
        reached = saved(state)
    subprocess.run(command(place, artifact, hunted), check=True, **quiet)
    ours, theirs = lineage.used(hunted, whole=True), lineage.used(calm, whole=True)
    assert ours["files"] == theirs["files"]
    for fact in ("losses", "train_loss"):
        assert ours["facts"][fact] == theirs["facts"][fact]
    assert theirs["facts"]["resumed_at_step"] is None
    assert 0 < ours["facts"]["resumed_at_step"] <= reached
    assert not state.parent.exists()


def saved(state: Path) -> int:
    """The last step whose state is whole."""
    marks = state.glob("checkpoint-*/trainer_state.json")
    return max((int(mark.parent.name.split("-")[1]) for mark in marks), default=0)


# Orphans


def test_what_another_process_makes_meanwhile_is_waited_for_and_kept(ready, tmp_path):
    """A job that outlives its killed run goes on; the next run neither repeats nor disturbs it."""
    place = ready.copy(tmp_path).forget("task_vectors", "evals", "laws", "reports")
    run = place.start("--cores", "1", "--until", "make_task_vector")
    works = place.results / "task_vectors" / "tiny"
    wait_for(lambda: list(works.glob(".*.work")), run)
    first = next(works.glob(".*.work")).name.removeprefix(".").removesuffix(".work")
    # As if an orphan finished all the others before their jobs start.
    others = {
        name: path
        for name, path in ready.artifacts("task_vectors").items()
        if not name.endswith(first)
    }
    for name, path in others.items():
        shutil.copytree(path, place.results / "task_vectors" / name)
    output, _ = run.communicate()
    assert run.returncode == 0, output
    for name, path in others.items():
        mine = place.results / "task_vectors" / name / "lineage.json"
        assert mine.read_bytes() == (path / "lineage.json").read_bytes()


def test_an_orphan_and_the_next_run_train_once(trained, tmp_path):
    """Snakemake killed alone in the middle of a training: the job is not done twice."""
    place = trained.copy(tmp_path)
    training = {"learning_rate": 2e-3, "steps": 60}
    experts = place.config["experts"] | {"code": {"training": training}}
    place.configure(place.config | {"experts": experts})
    until = ("--until", "train_expert")
    run = place.start(*until)
    works = place.results / "experts"
    wait_for(lambda: len(list(works.rglob(".code-*.work/artifact"))) == 2, run)
    kill(run, group=False)
    place.finish(*until)
    for base in ("small", "large"):
        log = place.results / "logs" / f"{place.study().experts[base, 'code', 0].path}.log"
        assert log.read_text().endswith("exists already\n")
    marks = [json.loads(text) for path, text in place.lineages().items() if "/code-s0" in path]
    assert all(mark["facts"].get("resumed_at_step") is None for mark in marks)
