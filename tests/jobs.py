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
