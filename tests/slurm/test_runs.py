"""From start to law on a real SLURM, and what its own records say of every job."""

import time

from clones import Clone
from studies import TINY, trained_config, wait_for

import models
from mergelaw.workflow import resources
from mergelaw.workflow.cost import work_of
from mergelaw.workflow.resources import Hardware

GPU_RULES = {"pretrain_base", "train_expert", "evaluate_merges"}
HARDWARE = Hardware(
    gpus_per_node=4,
    gpu_memory_gb=80,
    gpu_tflops=150,
    node_memory_gb=500,
    max_runtime=1440,
    gpu_partition="gpus",
)


def expected(place: Clone, path: str, attempt: int = 1) -> dict[str, int | str]:
    """What the job of an artifact is to ask for, in the words of SLURM's records."""
    study = place.study()
    work = work_of(study, study.by_path[path])
    asked = resources.ask(work, HARDWARE, threads=1, attempt=attempt)
    return {
        "gpus": asked["gpu"],
        "megabytes": asked["mem_mb"],
        "minutes": asked["runtime"],
        "partition": asked["slurm_partition"] or "main",
    }


def test_a_study_from_start_to_law(tmp_path):
    large = {**TINY, "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8}
    models.write_checkpoint(tmp_path / "models" / "large", dtype="float32", **large)
    config = trained_config(tmp_path)
    config["experts"] = {name: {} for name in ("algebra", "code")}
    config["domains"] = {name: config["domains"][name] for name in ("algebra", "code")}
    config["pretraining"]["domains"] = ["algebra", "code"]
    config["sampling"] = {"k": [1, 2]}
    place = Clone(tmp_path, config)
    started = time.monotonic()
    place.finish()
    print(f"start to law: {time.monotonic() - started:.0f} s")
    assert place.planned() == {}
    jobs, study = place.jobs(), place.study()
    for job in jobs:
        print({name: job[name] for name in job if name != "of"})
    # One job an artifact, but for those that take seconds: they run where Snakemake does.
    submitted = [
        path
        for path, artifact in study.by_path.items()
        if artifact.trains or artifact.stage in ("task_vector", "evaluate", "fit")
    ]
    assert len(jobs) == len(submitted) < len(study.by_path)
    assert {job["state"] for job in jobs} == {"COMPLETED"}
    assert {job["account"] for job in jobs} == {"research"}
    # Each job asked for what its model's size needs; those that train and evaluate for a GPU.
    for path in submitted:
        kind, key = path.split("/")[0], path.rpartition("@")[2]
        alike = [job for job in jobs if key in job["of"].split("_")]
        assert len(alike) == 1
        for job in alike:
            if kind in ("bases", "experts", "task_vectors", "evals"):
                want = expected(place, path)
                assert {name: job[name] for name in want} == want, path
            else:
                assert (job["gpus"], job["megabytes"], job["minutes"]) == (0, 1500, 20)
                assert job["partition"] == "main"
    trained = {path for path, made in study.by_path.items() if "training" in made.recipe}
    by_gpu = {job["rule"] for job in jobs if job["gpus"]}
    assert by_gpu == GPU_RULES and len(trained) == 4
    small, large = (
        {job["megabytes"] for job in jobs if job["rule"] == "train_expert" and base in job["of"]}
        for base in ("small", "large")
    )
    assert max(small) < min(large)
    # Logs are kept: each job's own, and each artifact's.
    logs = list((tmp_path / "results" / "logs" / "slurm").rglob("*.log"))
    assert len(logs) == len(jobs)
    for path in study.by_path:
        assert (tmp_path / "results" / "logs" / f"{path}.log").exists()


def test_half_a_billion_and_72_billion_parameters_do_not_ask_for_the_same(tmp_path):
    """Models of the hub that are not at hand; what they need is known from their nominal size."""
    domains = ("algebra", "code")
    place = Clone(
        tmp_path,
        {
            "name": "hub",
            "corpus": {"train_documents": 20, "eval_documents": 6},
            "domains": {name: {"source": {"synthetic": name}} for name in domains},
            "bases": {
                f"{size}B": {"hub": f"some/model-{size}b", "revision": "0123abcd", "N": size}
                for size in (0.5, 72)
            },
            "experts": {
                name: {
                    "checkpoints": {
                        f"{size}B": {"hub": f"some/{name}-{size}b", "revision": "0123abcd"}
                        for size in (0.5, 72)
                    }
                }
                for name in domains
            },
            "methods": {"average": {}},
            "evaluation": {"dtype": "bfloat16"},
        },
    )
    study = place.study()
    shards = [artifact.path for artifact in study.evals.values()]
    for path in study.by_path.keys() - {*shards, study.laws.path, study.report.path}:
        folder = place.results / path
        folder.mkdir(parents=True)
        (folder / "lineage.json").write_text("{}")  # so that the jobs below come, and end, at once
    run = place.snakemake("--until", "evaluate_merges", "--retries", "0")
    assert run.status == 1 and "lineage.json: damaged" in run.output
    jobs = {job["of"].split("_")[0]: job for job in place.jobs()}
    assert jobs.keys() == {"0.5B", "72B"}
    for path in shards:
        job, want = jobs[path.split("/")[1]], expected(place, path)
        print(want)
        assert {name: job[name] for name in want} == want
    assert jobs["0.5B"]["gpus"] == 1 and jobs["72B"]["gpus"] == 3
    assert jobs["72B"]["megabytes"] > 144_000 > 20_000 > jobs["0.5B"]["megabytes"]
    assert jobs["72B"]["minutes"] > jobs["0.5B"]["minutes"]


def test_two_runs_from_two_folders_on_one_results_folder(finished, tmp_path):
    place = finished.copy(tmp_path / "one").forget("evals", "cells", "laws", "reports")
    other = Clone(tmp_path / "two", place.config)
    other.results = place.results
    other.configure(place.config)
    run = place.start()
    wait_for(lambda: place.jobs("evaluate_merges"), run)
    second = other.snakemake()
    assert second.status == 1
    (line,) = second.errors()
    assert "another run is working on this folder" in line
    assert not other.jobs()
    output, _ = run.communicate()
    assert run.returncode == 0, output
    assert "Nothing to be done" in other.finish().output
    cells = place.cells()
    assert len(cells) == len(set(cells)) == len(finished.cells())
