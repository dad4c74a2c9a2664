"""Jobs cancelled, out of memory or time, and Snakemake interrupted or killed.

Each ends, after the step that the README names, with the full result and nothing measured twice.
"""

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from clones import Clone
from studies import same_measurements, wait_for


@pytest.fixture
def place(finished, tmp_path) -> Clone:
    """All but the evaluations is there."""
    return finished.copy(tmp_path / "study").forget("evals", "cells", "laws", "reports")


def held(place: Clone, run: subprocess.Popen[str]) -> psutil.Process:
    """The evaluation's process, stopped after it has measured some merges."""
    assert wait_for(lambda: place.stored() > 0, run), "the evaluation was not seen at work"
    process = place.process("evaluate")
    process.suspend()
    assert 0 < place.stored() < 64, "the evaluation was over before it could be held"
    return process


def ended(run: subprocess.Popen[str]) -> str:
    output, _ = run.communicate(timeout=600)
    return f"{output}\nstatus {run.returncode}"


def whole(place: Clone, finished: Clone) -> None:
    """The full result, the same bits, nothing measured twice, nothing left to do."""
    cells = place.cells()
    assert len(cells) == len(set(cells))
    assert sorted(cells) == sorted(finished.cells())
    same_measurements(place.rows(), finished.rows())
    kept = {k: v for k, v in finished.lineages().items() if k.split("/")[0] not in MADE_AGAIN}
    assert kept.items() <= place.lineages().items()
    assert place.planned() == {}


MADE_AGAIN = ("evals", "laws", "reports")


def test_a_cancelled_job_is_submitted_again_and_goes_on(place, finished):
    run = place.start()
    process = held(place, run)
    (job,) = place.jobs("evaluate_merges")
    subprocess.run(["scancel", job["id"]], check=True)
    assert "status 0" in ended(run)
    assert not process.is_running()
    first, second = place.jobs("evaluate_merges")
    assert (first["state"], second["state"]) == ("CANCELLED", "COMPLETED")
    assert second["megabytes"] > first["megabytes"] and second["minutes"] > first["minutes"]
    whole(place, finished)


def test_a_job_over_its_memory_gets_more(place, finished):
    place.edit(
        {"# set-resources:": "set-resources:",
         "#   evaluate_merges: {mem_mb": "  evaluate_merges: {mem_mb: 250 + 3750 * (attempt - 1)}"}
    )  # fmt: skip
    place.finish()
    first, second = place.jobs("evaluate_merges")
    log = Path(os.environ["SLURM_CONF"]).with_name("slurmd.log").read_text()
    assert f"[{first['id']}.batch] error: Exceeded job memory limit" in log
    assert (first["megabytes"], second["megabytes"]) == (250, 4000)
    assert second["state"] == "COMPLETED"
    whole(place, finished)


def test_a_job_over_its_time_goes_on_in_the_next(place, finished):
    run = place.start()
    held(place, run)  # as on storage that does not answer
    (job,) = place.jobs("evaluate_merges")
    subprocess.run(["scontrol", "update", f"jobid={job['id']}", "timelimit=1"], check=True)
    assert "status 0" in ended(run)
    first, second = place.jobs("evaluate_merges")
    assert (first["state"], second["state"]) == ("TIMEOUT", "COMPLETED")
    assert second["minutes"] == 2 * job["minutes"]
    whole(place, finished)


def test_an_interrupted_run_cancels_its_jobs_and_the_next_goes_on(place, finished):
    run = place.start()
    held(place, run)
    os.killpg(run.pid, signal.SIGINT)
    assert "status 1" in ended(run)
    wait_for(lambda: place.jobs("evaluate_merges")[0]["state"] == "CANCELLED")
    place.finish()
    assert [job["state"] for job in place.jobs("evaluate_merges")] == ["CANCELLED", "COMPLETED"]
    whole(place, finished)


def test_after_a_killed_run_its_job_goes_on_and_the_next_run_waits_for_it(place, finished):
    run = place.start()
    process = held(place, run)
    os.killpg(run.pid, signal.SIGKILL)
    ended(run)
    again = place.start()
    wait_for(lambda: len(place.jobs("evaluate_merges")) == 2, again)
    process.resume()
    assert "status 0" in ended(again)
    first, second = place.jobs("evaluate_merges")
    assert (first["state"], second["state"]) == ("COMPLETED", "COMPLETED")
    whole(place, finished)
