"""A study of 10,000 jobs and 1,000 experts, and 100,000 cells: seconds and megabytes.

    python benchmarks/scale.py            # both; --only parse, or --only cells

``parse`` compares `snakemake -n` of a study with that of a Snakefile that has nothing but as many
jobs with the same inputs and outputs, by turns, and prints the ratio of their processor times.
``cells`` makes up 100,000 cells and nearly 5,000 artifacts, then stores the cells, fits the laws,
writes the report, and runs the commands that look at all artifacts. Each is a process of its own;
seconds are of the processor, megabytes its peak. Both run in a temporary folder.
"""

import argparse
import base64
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mergelaw.artifacts.run_lock import lock_results
from mergelaw.demo import DOMAINS

ROOT = Path(__file__).parents[1]
DOCUMENTS, TOKENS = 20, 40  # of an evaluation set
TRAINING = {"steps": 5, "batch_size": 4, "max_tokens": 128, "learning_rate": 1e-3}
SHAPE = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "intermediate_size": 24}  # fmt: skip


def study_of(folder: Path, experts: int, bases: int = 1, domains: int = 2, **sampling: Any) -> Path:
    """A study of four methods, as a file."""
    names = sorted(DOMAINS)[:domains]
    config = {
        "name": "scale",
        "results": str(folder / "results"),
        "corpus": {"train_documents": 20, "eval_documents": 6},
        "training": TRAINING,
        "pretraining": {
            **TRAINING, "domains": names, "architecture": SHAPE, "vocab_size": 300,
        },
        "domains": {name: {"source": {"synthetic": name}} for name in names},
        "bases": {f"base{n}": {"pretraining": {}, "N": 2.0**n} for n in range(bases)},
        "experts": {f"e{n:04d}": {"domains": names[:1]} for n in range(experts)},
        "methods": {name: {} for name in ("average", "task_arithmetic", "ties", "dare_linear")},
        "sampling": sampling,
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


BARE = """
import json, re
SHAPE = json.load(open("shape.json"))
rule all:
    input: SHAPE["targets"]
wildcard_constraints:
    key="[0-9a-f]{8}", base="[^/@]+", method="[^/@]+", name="[^/@]+", split="[^/@]+"
"""
RULE = """
rule {stage}:
    input: lambda wildcards: SHAPE["inputs"]["{pattern}".format(**wildcards)]
    output: "{pattern}/lineage.json"
    shell: "touch {{output}}"
"""
PATTERNS = {
    "corpus": "corpora/{name}/{split}@{key}",
    "overlap": "checks/{name}@{key}",
    "base": "bases/{name}@{key}",
    "expert": "experts/{base}/{name}@{key}",
    "task_vector": "task_vectors/{base}/{name}@{key}",
    "design": "designs/{name}@{key}",
    "evaluate": "evals/{base}/{method}/{name}@{key}",
    "fit": "laws/{name}@{key}",
    "report": "reports/{name}@{key}",
}


def write_bare(folder: Path, file: Path) -> int:
    """A Snakefile with a study's jobs and nothing of ours; returns their number."""
    from mergelaw import config
    from mergelaw.workflow.study import Study

    study = Study(config.load(file))
    shape = {
        "targets": [f"{a.path}/lineage.json" for a in study.targets()],
        "inputs": {
            path: [f"{one.path}/lineage.json" for one in artifact.dependencies()]
            for path, artifact in study.by_path.items()
        },
    }
    (folder / "shape.json").write_text(json.dumps(shape))
    rules = (RULE.format(stage=stage, pattern=pattern) for stage, pattern in PATTERNS.items())
    (folder / "Snakefile").write_text(BARE + "".join(rules))
    return len(study.by_path)


def children(*command: str, folder: Path) -> tuple[float, str]:
    """Processor seconds of a command, and its output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode:
        sys.exit(f"{' '.join(command)}\n{run.stderr[-3000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, run.stdout


def parse(folder: Path, runs: int) -> None:
    """Compare the median processor times of our dry run and of the bare one."""
    file = study_of(folder, 1000, k=[1, 2, 4, 8, 16, 32], merges_per_shard=8)
    jobs, bare = write_bare(folder, file), ("snakemake", "-n", "--quiet", "all")
    ours = (*bare, "--snakefile", str(ROOT / "workflow/Snakefile"), "--configfile", str(file))
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(runs):
        for name, command in (("bare", bare), ("ours", ours)):
            times[name].append(children(*command, folder=folder)[0])
    middle = {name: sorted(seconds)[runs // 2] for name, seconds in times.items()}
    ratio = middle["ours"] / middle["bare"]
    print(f"dry run of {jobs:,} jobs, 1,000 experts: {middle['ours']:.1f} s of processor time")
    print(f"the same jobs in bare Snakemake: {middle['bare']:.1f} s; ratio {ratio:.2f}", flush=True)


def fake(study: Any, artifact: Any, files: dict[str, str], inputs: dict[str, Any]) -> None:
    """The lineage of an artifact whose files are there."""
    from mergelaw.artifacts import keys, lineage
    from mergelaw.artifacts.files import write_json

    folder = study.results / artifact.path
    entry = {
        "schema": lineage.SCHEMA, "stage": artifact.stage, "version": keys.STAGES[artifact.stage],
        "key": artifact.key, "artifact": folder.name, "recipe": artifact.recipe,
        "digest": lineage.content_digest(files), "files": files,
        "stamps": {name: lineage.stamp(folder / name) for name in files},
        "inputs": {
            name: {
                "path": os.path.relpath(study.results / one.path, folder),
                "digest": inputs[one.path], "key": one.key,
            }
            for name, one in artifact.named_inputs()
        },
        "facts": {"cells": 1, "measured": 1}, "versions": lineage.versions(), "git_commit": None,
        "started": "", "ended": "", "wall_seconds": 1.0, "cpu_seconds": 1.0, "peak_memory": 0,
    }  # fmt: skip
    write_json(folder / lineage.LINEAGE, entry | {"checksum": lineage.checksum(entry)})
    inputs[artifact.path] = entry["digest"]


def made_up(study: Any, artifact: Any, rng: Any) -> Iterator[list[dict[str, Any]]]:
    """Cells of a shard, merge by merge, with losses that follow a law, and their place in it."""
    from mergelaw.evaluation import cells

    size = study.config.bases[artifact.base].N
    for row in artifact.rows:
        k, circle, place, experts = row
        floor, tail = 1 + 0.5 * size**-0.4, 0.3 * size**-0.2 / (k + 0.5)
        method = artifact.recipe["method"] if k else None
        sets = {name: name for name in study.config.domains}
        merge, names = cells.identities(artifact.base, experts, method, {}, sets)
        pool = np.mean([hash_of(name) for name in experts]) if k else 0.0
        group = []
        for domain, cell in names.items():
            mean = floor + tail + 0.02 * pool + 0.1 * hash_of(domain)
            nll = mean * TOKENS + rng.normal(0, 0.3, DOCUMENTS)
            group.append({
                "cell": cell, "merge": merge, "base_digest": "b" * 64, "set": "s" * 64,
                "document_nll": base64.b64encode(nll.astype("<f8").tobytes()).decode(),
                "document_tokens": [TOKENS] * DOCUMENTS, "tokens": TOKENS * DOCUMENTS,
                "bytes": 4 * TOKENS * DOCUMENTS, "long_documents": 0, "dropped_tokens": 0,
                "parameters": int(1.2e9 * size), "non_embedding": int(1e9 * size),
                "merge_seconds": 0.1, "eval_seconds": 0.1, "device": "cpu", "threads": 1,
                "k": k, "replicate": circle, "place": place, "experts": list(experts),
                "weights": [1.0] * k, "written": False, "domain": domain, "vector_digests": [],
            })  # fmt: skip
        yield group


PLACE = ("k", "replicate", "place", "experts", "weights", "written", "domain", "vector_digests")


def hash_of(name: str) -> float:
    """A fixed number of a name, -1 to 1."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**31 - 1


def fill(study: Any) -> None:
    """All artifacts of a study up to its evaluations, and the store of its cells."""
    from mergelaw.artifacts.files import file_digest
    from mergelaw.evaluation import cells
    from mergelaw.evaluation.table import TABLE, write_table

    rng, digests, stores = np.random.default_rng(0), {}, {}
    lock_results(study.results).release()
    count, writing = 0, 0.0
    for artifact in study.by_path.values():
        folder = study.results / artifact.path
        if artifact.stage in ("fit", "report", "merge"):
            continue
        folder.mkdir(parents=True)
        name = TABLE if artifact.stage == "evaluate" else "data.bin"
        if artifact.stage == "evaluate":
            groups = list(made_up(study, artifact, rng))
            store = stores.setdefault(artifact.base, cells.Store(Path(artifact.sources["cells"])))
            began = time.process_time()
            for group in groups:
                rows = [{k: v for k, v in row.items() if k not in PLACE} for row in group]
                if rows[0]["cell"] not in store.known:
                    store.append(rows)
                    count += len(rows)
            writing += time.process_time() - began
            every = [row for group in groups for row in group]
            write_table(artifact.recipe, every, store.known, folder)
        else:
            (folder / name).write_text(artifact.path)
        fake(study, artifact, {name: file_digest(folder / name)}, digests)
    for store in stores.values():
        store.close()
    size = sum(p.stat().st_size for p in (study.results / "cells").rglob("*")) / 1e6
    print(f"{len(digests):,} artifacts, {count:,} cells")
    print(f"{'write the store':<34}{writing:8.1f} s {size:8.0f} MB on disk", flush=True)


def one_shard(study: Any) -> None:
    """What a shard's job reads of the store: its own cells."""
    from mergelaw.evaluation import cells

    artifact = list(study.evals.values())[-1]
    rows = [row for group in made_up(study, artifact, np.random.default_rng(1)) for row in group]
    wanted = {row["cell"]: {"tokens": row["tokens"]} for row in rows}
    assert len(cells.Store(Path(artifact.sources["cells"]), wanted=wanted).known) == len(wanted)


def job(stage: str) -> Callable[[Any], None]:
    """The job of the laws or of the report."""

    def run(study: Any) -> None:
        from mergelaw.cli.app import app
        from mergelaw.workflow.job import job_file, write_job

        artifact = study.laws if stage == "fit" else study.report
        write_job(study.results, artifact)
        app(["stage", stage, str(job_file(study.results, artifact))], standalone_mode=False)

    return run


def command(*words: str) -> Callable[[Any], None]:
    """A command of mergelaw, for the study or its results folder."""

    def run(study: Any) -> None:
        from mergelaw.cli.app import app

        file = str(study.results.parent / "study.yaml")
        places = {"STUDY": file, "RESULTS": str(study.results)}
        app([places.get(word, word) for word in words], standalone_mode=False)

    return run


STEPS: dict[str, Callable[[Any], None]] = {
    "read one shard's cells": one_shard,
    "fit": job("fit"),
    "report": job("report"),
    "summary": command("summary", "STUDY"),
    "best": command("best", "STUDY"),
    "status": command("status", "STUDY"),
    "gc": command("gc", "STUDY"),
    "lineage RESULTS --verify": command("lineage", "RESULTS", "--verify"),
}


def cells_and_artifacts(folder: Path) -> None:
    """Print seconds and megabytes of each step."""
    from mergelaw import config
    from mergelaw.workflow.study import Study

    sampling = {"k": [1, 2, 4, 8, 16, 32, 48, 64, 100], "merges_per_shard": 8}
    file = study_of(folder, 100, bases=4, domains=3, **sampling)
    fill(Study(config.load(file)))
    for name in STEPS:
        run = subprocess.run(
            [sys.executable, __file__, "--step", name, "--study", str(file)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if run.returncode:
            sys.exit(f"{name}\n{run.stdout[-1500:]}\n{run.stderr[-3000:]}")
        seconds, memory = json.loads(run.stdout.splitlines()[-1])
        print(f"{name:<34}{seconds:8.1f} s {memory:8.0f} MB of memory", flush=True)


def step(name: str, file: Path) -> None:
    """One step, in this process."""
    from mergelaw import config
    from mergelaw.workflow.study import Study

    STEPS[name](Study(config.load(file)))
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = used.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    print(json.dumps([used.ru_utime + used.ru_stime, peak]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["parse", "cells"])
    parser.add_argument("--runs", type=int, default=3, help="dry runs of each Snakefile")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--study", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.step:
        step(asked.step, asked.study)
        return 0
    with tempfile.TemporaryDirectory() as name:
        if asked.only != "cells":
            parse(Path(name), asked.runs)
    with tempfile.TemporaryDirectory() as name:
        if asked.only != "parse":
            cells_and_artifacts(Path(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
