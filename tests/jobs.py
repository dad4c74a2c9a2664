"""Job files for tests, as the workflow writes them."""

import json
from pathlib import Path
from typing import Any


def write(path: Path, stage: str, output: Path | str, recipe: dict[str, Any], **more: Any) -> Path:
    """A job file at ``path``; ``more``: sources, inputs, rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    job = {"stage": stage, "output": str(output), "recipe": recipe, **more}
    path.write_text(json.dumps(job, default=str))
    return path


def of(artifact: Any, results: Path, output: Path) -> Path:
    """The job of a study's artifact, made into another folder; without its key."""
    from mergelaw.workflow.job import job_file, write_job

    write_job(results, artifact)
    written = json.loads(job_file(results, artifact).read_text())
    recipe = written.pop("recipe")
    return write(
        output.with_suffix(".json"), recipe=recipe, **written | {"key": None, "output": str(output)}
    )


def pretend(results: Path, artifact: Any) -> Path:
    """Make an artifact of a study, and those that it is made from, without a stage's work."""
    from mergelaw.artifacts import store

    inputs = {name: pretend(results, one) for name, one in artifact.named_inputs()}
    output = results / artifact.path

    def work(folder: Path, state: Path) -> None:
        (folder / "data.bin").write_bytes(artifact.path.encode())

    if not output.exists():
        store.make(output, artifact.stage, artifact.recipe, inputs, work, artifact.key)
    return output
