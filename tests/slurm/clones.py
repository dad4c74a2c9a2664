"""A checkout of one's own with an edited profile, as a user of a cluster has it."""

import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from cluster import records
from studies import ROOT, TINY, Place, environment, write_jsonl
from studies import records as documents

import models

# What a user of the test cluster edits in the profile, and what makes its tests short.
EDITS = {
    "# slurm_account: my-project": "slurm_account: research",
    "# gpu_partition: gpu": "gpu_partition: gpus",
    "gpus_per_node: 8": "gpus_per_node: 4",
    "node_memory_gb: 2000": "node_memory_gb: 500",
    "pretrain_base: 8": "pretrain_base: 1",
    "train_expert: 8": "train_expert: 1",
    "learn_coefficients: 8": "learn_coefficients: 1",
    "evaluate_merges: 8": "evaluate_merges: 1",
    "status-checks: 20": "status-checks: 2",
    "mem_mb: 8000": "mem_mb: 1500 * attempt",
    "runtime: 60 ": "runtime: 20 * attempt",
}


class Clone(Place):
    """A study in a checkout: Snakemake runs in its root, by the profile `slurm`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        super().__init__(folder, config)
        if (folder / "workflow").exists():
            return
        for name in ("workflow", "rules", "envs", "profiles"):
            shutil.copytree(ROOT / name, folder / name)
        (folder / "slurm").symlink_to((ROOT / "slurm").readlink())
        self.edit(EDITS)

    def edit(self, edits: Mapping[str, str]) -> None:
        """Replace lines' ends in the profile; each must be there once."""
        path = self.folder / "slurm" / "profile.v9+.yaml"
        text = path.read_text()
        for old, new in edits.items():
            assert text.count(old) == 1, old
            text = re.sub(rf"{re.escape(old)}.*", new.replace("\\", r"\\"), text)
        path.write_text(text)

    def copy(self, folder: Path) -> "Clone":
        shutil.copytree(self.results, folder / "results", symlinks=True)
        return Clone(folder, self.config)

    def start(self, *options: str, cwd: Path | None = None, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["snakemake", "--profile", "slurm", "--configfile", "study.yaml", *options],
            cwd=cwd or self.folder,
            env=environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Who runs the tests in the background may have it ignored, and what they start too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def jobs(self, rule: str = "") -> list[dict[str, Any]]:
        return records(self.folder, rule)

    def stored(self) -> int:
        """Whole lines in the cell store."""
        files = (self.results / "cells").rglob("*.jsonl")
        return sum(file.read_bytes().count(b"\n") for file in files)

    def process(self, command: str) -> psutil.Process:
        """The process of a stage that works on these results."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            at_work = command in words[1:4] and any(str(self.results) in word for word in words)
            if at_work and Path(words[0]).name.startswith("python"):
                return process
        raise AssertionError(f"no {command} is at work")


def make_finished(folder: Path) -> Place:
    """Five ready-made experts of a base, whose 32 merges take seconds to evaluate."""
    base = models.write_checkpoint(
        folder / "models" / "base", dtype="float32", **TINY | {"hidden_size": 96}
    )
    names = ("amber", "birch", "cedar", "dune", "elm")
    for seed, name in enumerate(names):
        models.write_expert(base, folder / "models" / name, 0.05, seed)
    for domain in ("sums", "tales"):
        write_jsonl(folder / "data" / f"{domain}.jsonl", documents(domain, 400))
    place = Place(
        folder,
        {
            "name": "finished",
            "corpus": {"eval_documents": 300},
            "domains": {
                d: {"source": {"files": [str(folder / "data" / f"{d}.jsonl")]}}
                for d in ("sums", "tales")
            },
            "bases": {"tiny": {"path": str(base)}},
            "experts": {
                e: {"checkpoints": {"tiny": {"path": str(folder / "models" / e)}}} for e in names
            },
            "methods": {"average": {}},
            "evaluation": {"max_tokens": 128, "batch_tokens": 128},
        },
    )
    place.finish()
    return place
