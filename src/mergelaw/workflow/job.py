"""The job of an artifact as one JSON file, which the stage's command reads.

A command line is too short for a thousand inputs, which would also bury a failed job's error
message. The file is next to the job's log.
"""

import json
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from mergelaw.artifacts import store
from mergelaw.artifacts.files import write_json
from mergelaw.artifacts.keys import stage_key
from mergelaw.errors import MergelawError
from mergelaw.workflow.artifact import Artifact, Row


@dataclass(frozen=True)
class Job:
    """A stage's work.

    Attributes:
        stage, key, recipe, sources, rows: as in ``Artifact``.
        output: folder of the artifact to be made.
        inputs: folders of the inputs by role: one, or several by name.
        keys: full keys of the inputs by their names in a lineage.
        threads, save_every: processor threads, and seconds between saved states of a training.
    """

    stage: str
    output: Path
    recipe: dict[str, Any]
    key: str | None = None
    sources: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str | dict[str, str]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    threads: int = 1
    save_every: float = 600

    def one(self, role: str) -> Path:
        """The only input of a role."""
        return Path(str(self.inputs[role]))

    def optional(self, role: str) -> Path | None:
        """The only input of a role; None for a role without inputs."""
        return self.one(role) if role in self.inputs else None

    def all(self, role: str) -> dict[str, Path]:
        """The inputs of a role by name; empty for a role without inputs."""
        value = self.inputs.get(role)
        return {n: Path(path) for n, path in value.items()} if isinstance(value, dict) else {}

    def make(self, work: store.Work) -> bool:
        """Make the artifact with ``artifacts.store.make``."""
        inputs = {}
        for role, value in self.inputs.items():
            if isinstance(value, str):
                inputs[role] = Path(value)
            else:
                inputs |= {f"{role}:{name}": Path(path) for name, path in value.items()}
        digests = self.recipe.get("checkpoint", {}).get("files")  # of a ready-made checkpoint
        return store.make(
            self.output, self.stage, self.recipe, inputs, work, self.key, self.keys, digests
        )


def job_file(results: Path, artifact: Artifact) -> Path:
    """Path of an artifact's job file."""
    return results / "logs" / f"{artifact.path}.json"


def write_job(results: Path, artifact: Artifact) -> None:
    """Write the job of an artifact."""

    def place(one: Artifact) -> str:
        return str(results / one.path)

    inputs = {
        role: place(value)
        if isinstance(value, Artifact)
        else {name: place(one) for name, one in value.items()}
        for role, value in artifact.inputs.items()
    }
    path = job_file(results, artifact)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "stage": artifact.stage,
            "key": artifact.key,
            "output": place(artifact),
            "recipe": artifact.recipe,
            "sources": artifact.sources,
            "inputs": inputs,
            "keys": {name: one.key for name, one in artifact.named_inputs()},
            "rows": list(artifact.rows),
        },
        sort_keys=False,  # documents are trained on in the order of the corpora
    )


def read_job(path: Path, stage: str, threads: int = 1, save_every: float = 600) -> Job:
    """The job in a file. Raises MergelawError if the file holds no job of this stage."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        run = {"output": Path(entry["output"]), "threads": threads, "save_every": save_every}
        job = Job(**entry | run)
        key = stage_key(job.stage, job.recipe, job.keys)
    except OSError as error:
        raise MergelawError(f"{path}: cannot be read ({error.strerror}); rerun snakemake") from None
    except (ValueError, KeyError, TypeError):
        raise MergelawError(f"{path}: is not a job; rerun snakemake, which writes it") from None
    if job.stage != stage:
        raise MergelawError(f"{path}: is a job of stage {job.stage}, not {stage}; give another")
    if job.key not in (None, key):
        raise MergelawError(f"{path}: its key is not that of its recipe; rerun snakemake")
    return job
