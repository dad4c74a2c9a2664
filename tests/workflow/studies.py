"""Studies for tests: real Snakemake runs in temporary folders, over models made on the spot."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from filelock import FileLock

import models
from models import write_jsonl

ROOT = Path(__file__).parents[2]
SNAKEFILE = ROOT / "workflow" / "Snakefile"
SNAKEMAKE = ["snakemake", "--snakefile", str(SNAKEFILE), "--cores", "2"]
PATIENCE = 300  # seconds after which a run hangs

# What is measured; the rest of a row says how long it took, and in which study.
MEASURED = ["nll", "tokens", "ce", "bytes", "finite", "document_nll", "document_tokens", "cell"]

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
}


def environment(**more: str) -> dict[str, str]:
    """As in an activated environment of one's own, without a network."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "COLUMNS": "400", "OMP_NUM_THREADS": "1"} | more


@dataclass
class Ended:
    status: int
    output: str  # stdout and stderr, as on a terminal

    def errors(self) -> list[str]:
        """mergelaw's error lines, each once."""
        found = re.findall(r"^mergelaw: error: (.*)$", self.output, re.MULTILINE)
        return list(dict.fromkeys(found))


class Place:
    """A working directory with a configuration and its results."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.results = folder, folder / "results"
        self.configure(config)

    def configure(self, config: Mapping[str, Any]) -> None:
        self.config = deepcopy(dict(config)) | {"results": str(self.results)}
        text = yaml.safe_dump(self.config, sort_keys=False)
        (self.folder / "study.yaml").write_text(text)

    def copy(self, folder: Path) -> "Place":
        """The same study with the same results, elsewhere."""
        shutil.copytree(self.results, folder / "results", symlinks=True)
        return Place(folder, self.config)

    def forget(self, *kinds: str) -> "Place":
        """Remove what was made of these kinds: the results folder's subfolders."""
        for kind in kinds:
            shutil.rmtree(self.results / kind)
        return self

    # -- running -------------------------------------------------------------------------------

    def start(self, *options: str, cwd: Path | None = None, **more: str) -> subprocess.Popen[str]:
        """Snakemake, in a process group of its own."""
        return subprocess.Popen(
            [*SNAKEMAKE, "--configfile", str(self.folder / "study.yaml"), *options],
            cwd=cwd or self.folder,
            env=environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def snakemake(self, *options: str, cwd: Path | None = None, **more: str) -> Ended:
        run = self.start(*options, cwd=cwd, **more)
        output, _ = run.communicate(timeout=PATIENCE)
        return Ended(run.returncode, output)

    def finish(self, *options: str, cwd: Path | None = None, **more: str) -> Ended:
        """A run that is to succeed."""
        run = self.snakemake(*options, cwd=cwd, **more)
        assert run.status == 0, run.output[-4000:]
        return run

    def planned(self, *options: str, cwd: Path | None = None, **more: str) -> dict[str, int]:
        """Jobs by rule that a dry run announces, without those of every change."""
        output = self.finish("--dry-run", "--quiet", "reason", *options, cwd=cwd, **more).output
        _, _, table = output.partition("Job stats:")
        jobs = re.findall(r"^([a-z_]+) +(\d+)$", table, re.MULTILINE)
        assert jobs or "Nothing to be done" in output, output
        return {rule: int(count) for rule, count in jobs if rule not in ("all", "total")}

    def mergelaw(self, *arguments: str, **more: str) -> Ended:
        return mergelaw(*arguments, cwd=self.folder, **more)

    # -- what is there -------------------------------------------------------------------------

    def artifacts(self, kind: str) -> dict[str, Path]:
        """Artifacts of a kind by path below its folder, without those in the making."""
        root = self.results / kind
        found = (mark.parent for mark in sorted(root.rglob("lineage.json")))
        return {
            path.relative_to(root).as_posix(): path
            for path in found
            if not any(part.startswith(".") for part in path.relative_to(root).parts)
        }

    def lineages(self) -> dict[str, bytes]:
        """Every lineage by path: what was made again has another (it holds times)."""
        return {
            path.relative_to(self.results).as_posix(): (path / "lineage.json").read_bytes()
            for kind in KINDS
            for path in self.artifacts(kind).values()
        }

    def cells(self) -> list[str]:
        """The identity of every cell in the store, as often as it was measured."""
        return [json.loads(line)["cell"] for line in self.cell_lines()]

    def cell_lines(self) -> Iterator[str]:
        for file in sorted((self.results / "cells").rglob("*.jsonl")):
            for line in file.read_text().split("\n")[:-1]:
                yield line.split(" ", 1)[1]

    def rows(self) -> pd.DataFrame:
        """The rows of every evaluation of the present configuration, in its order."""
        from mergelaw.evaluation import TABLE

        paths = [self.results / artifact.path / TABLE for artifact in self.study().evals.values()]
        return pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True)

    def study(self) -> Any:
        from mergelaw import config
        from mergelaw.workflow.study import Study

        return Study(config.load(self.folder / "study.yaml"))

    def laws(self) -> dict[str, Any]:
        return json.loads((self.results / self.study().laws.path / "laws.json").read_text())


MADE_FIRST = ("corpora", "checks", "bases", "experts", "task_vectors", "designs")
KINDS = (*MADE_FIRST, "evals", "laws", "reports", "merges")


def mergelaw(*arguments: str, cwd: Path, **more: str) -> Ended:
    run = subprocess.run(
        ["mergelaw", *arguments],
        cwd=cwd,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    return Ended(run.returncode, run.stdout)


def made(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> Counter[str]:
    """How many artifacts of each kind are new or were made again."""
    return Counter(
        path.split("/")[0] for path, lineage in after.items() if before.get(path) != lineage
    )


def same_measurements(left: pd.DataFrame, right: pd.DataFrame) -> None:
    """The measured columns are equal, bit for bit."""
    pd.testing.assert_frame_equal(left[MEASURED], right[MEASURED], check_exact=True)


def wait_for(condition: Callable[[], Any], run: subprocess.Popen[str] | None = None) -> bool:
    """Wait for a condition; whether it came about before ``run`` ended."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come about"
        if run is not None and run.poll() is not None:
            return bool(condition())
        time.sleep(0.002)
    return True


def kill(run: subprocess.Popen[str], group: bool) -> None:
    """kill -9 of a process alone, or with all that it started."""
    if group:
        os.killpg(run.pid, signal.SIGKILL)
    else:
        run.kill()
    run.wait()
    if run.stdout:
        run.stdout.close()


# -- documents ---------------------------------------------------------------------------------


def records(domain: str, count: int = 24) -> list[dict[str, str]]:
    """Short questions and answers that no other domain has."""
    return [
        {"prompt": f"{domain}: what is {i} + {i}?", "response": f"It is {2 * i}, says {domain}."}
        for i in range(count)
    ]


# -- the two studies that tests share ----------------------------------------------------------


def once(factory: Any, name: str, make: Callable[[Path], Place]) -> Place:
    """A study that is run once for all tests and all their workers."""
    root = factory.getbasetemp()
    folder = (root.parent if root.name.startswith("popen-") else root) / name
    with FileLock(f"{folder}.lock"):
        config = folder / "done.yaml"
        if not config.exists():
            place = make(folder)
            config.write_bytes((folder / "study.yaml").read_bytes())
            return place
    return Place(folder, yaml.safe_load(config.read_text()))


READY = ("amber", "birch", "cedar", "dune", "elm", "fern")
TRAINING = {"steps": 5, "batch_size": 4, "max_tokens": 128, "learning_rate": 1e-3}


def make_ready(folder: Path) -> Place:
    """A ready-made base with six ready-made experts, all their 64 subsets on three domains."""
    base = models.write_checkpoint(folder / "models" / "base", dtype="float32", **TINY)
    for seed, name in enumerate(READY):
        models.write_expert(base, folder / "models" / name, 0.05, seed)
    for domain in ("sums", "tales", "riddles"):
        write_jsonl(folder / "data" / f"{domain}.jsonl", records(domain))
    place = Place(folder, ready_config(folder))
    place.finish()
    return place


def ready_config(folder: Path, experts: tuple[str, ...] = READY) -> dict[str, Any]:
    files = {d: [str(folder / "data" / f"{d}.jsonl")] for d in ("sums", "tales", "riddles")}
    ready = {e: {"checkpoints": {"tiny": {"path": str(folder / "models" / e)}}} for e in experts}
    return {
        "name": "ready",
        "corpus": {"eval_documents": 6},
        "domains": {
            "sums": {"source": {"files": files["sums"]}},
            "tales": {"source": {"files": files["tales"]}},
            "riddles": {"source": {"files": files["riddles"]}, "held_out": True},
        },
        "bases": {"tiny": {"path": str(folder / "models" / "base")}},
        "training": TRAINING,
        "experts": ready,
        "methods": {"average": {}},
        "evaluation": {"max_tokens": 128},
    }


def make_trained(folder: Path) -> Place:
    """Two bases, one of them pre-trained, with three experts that are trained."""
    base = {**TINY, "hidden_size": 24, "head_dim": 12}
    models.write_checkpoint(folder / "models" / "large", dtype="float32", **base)
    place = Place(folder, trained_config(folder))
    place.finish()
    return place


def trained_config(folder: Path) -> dict[str, Any]:
    architecture = {"model_type": "llama", "tie_word_embeddings": True, **TINY}
    domains = ("algebra", "code", "physics")
    return {
        "name": "trained",
        "corpus": {"train_documents": 20, "eval_documents": 6},
        "domains": {name: {"source": {"synthetic": name}} for name in domains},
        "pretraining": {
            **TRAINING,
            "domains": list(domains),
            "architecture": architecture,
            "vocab_size": 300,
        },
        "bases": {
            "small": {"pretraining": {}},
            "large": {"path": str(folder / "models" / "large")},
        },
        "training": TRAINING,
        "experts": {name: {} for name in domains},
        "methods": {"average": {}},
        "evaluation": {"max_tokens": 256},
    }
