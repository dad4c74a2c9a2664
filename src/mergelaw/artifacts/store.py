"""Making artifacts: folders that appear whole or not at all.

An artifact is made under a lock in a hidden folder beside its final one, and then renamed. A kill
at any moment leaves nothing or the whole artifact.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mergelaw.artifacts import keys, lineage
from mergelaw.artifacts.files import disk_error, sync, write_json
from mergelaw.artifacts.lineage import LINEAGE
from mergelaw.errors import MergelawError

Work = Callable[[Path, Path], dict[str, Any] | None]


def make(
    output: Path,
    stage: str,
    recipe: Mapping[str, Any],
    inputs: Mapping[str, Path],
    work: Work,
    key: str | None = None,
    wanted: Mapping[str, str] | None = None,
    digests: Mapping[str, str] | None = None,
) -> bool:
    """Make the artifact ``output`` unless it exists; return whether this call made it.

    ``work(folder, state)`` writes the files and returns the lineage's ``facts``; ``state`` is kept
    after a kill. ``stage``, ``recipe``, ``inputs`` (by name) and the full ``key`` are recorded;
    ``wanted`` has the keys of the inputs, ``digests`` the SHA-256 of files that ``work`` makes sure
    of. A second process waits. Raises MergelawError for unfit inputs or another ``output``.
    """
    from filelock import FileLock

    output = Path(os.path.normpath(output))
    _check_vacant(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = output.parent / f".{output.name}.work"
    with FileLock(output.parent / f".{output.name}.lock"):
        if (output / LINEAGE).exists():
            if key is None:
                _check_same(output, stage, recipe, inputs)
            else:
                lineage.used(output, key)
            shutil.rmtree(scratch, ignore_errors=True)  # of a job that was killed at its very end
            return False
        folder, state = scratch / "artifact", scratch / "state"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        state.mkdir(exist_ok=True)
        try:
            entry = _run(output, folder, state, inputs, work, wanted or {}, digests or {})
            entry |= {
                "schema": lineage.SCHEMA,
                "stage": stage,
                "version": keys.STAGES[stage],
                "key": key,
                "artifact": output.name,
                "recipe": dict(recipe),
            }
            write_json(folder / LINEAGE, entry | {"checksum": lineage.checksum(entry)})
            is_new = _publish(folder, output)
        except BaseException as error:
            cause = None
            if isinstance(error, Exception) and not isinstance(error, (MergelawError, OSError)):
                cause = disk_error(state, error)
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # not empty: a training resumes from it
                state.rmdir()
                scratch.rmdir()
            if cause:
                raise cause from error
            raise
        shutil.rmtree(scratch, ignore_errors=True)
    return is_new


def _check_same(
    output: Path, stage: str, recipe: Mapping[str, Any], inputs: Mapping[str, Path]
) -> None:
    """Refuse an artifact without a key that was made by another recipe or from other inputs."""
    record = lineage.read(output)
    digests = {name: entry["digest"] for name, entry in record["inputs"].items()}
    wanted = {name: lineage.read(path)["digest"] for name, path in inputs.items()}
    same = record["stage"] == stage and digests == wanted
    if not same or keys.digest(record["recipe"]) != keys.digest(recipe):
        raise MergelawError(f"{output}: holds another {stage}; name another folder")


def _run(
    output: Path,
    folder: Path,
    state: Path,
    inputs: Mapping[str, Path],
    work: Work,
    wanted: Mapping[str, str],
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """Do the work; return the lineage's entries for files, inputs, versions and times."""
    started, clock, cpu = datetime.now(UTC), time.perf_counter(), time.process_time()
    sources = {name: lineage.used(path, wanted.get(name)) for name, path in inputs.items()}
    lineage.unmixed(inputs.values())
    facts = work(folder, state) or {}
    files = lineage.content(folder, digests)
    return {
        "digest": lineage.content_digest(files),
        "files": files,
        "stamps": {name: lineage.stamp(folder / name) for name in files},
        "inputs": {
            name: {
                "path": Path(os.path.relpath(path, output)).as_posix(),
                "digest": sources[name]["digest"],
                "key": sources[name]["key"],
            }
            for name, path in inputs.items()
        },
        "facts": facts,
        "versions": lineage.versions(),
        "git_commit": lineage.git_commit(),
        "started": started.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(time.perf_counter() - clock, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "peak_memory": lineage.peak_memory(),
    }


def _check_vacant(output: Path) -> None:
    """Raise MergelawError for a link, or for a folder that holds something else.

    A folder with a key in its name but without a lineage is an incomplete artifact: it is replaced.
    """
    if output.is_symlink():
        raise MergelawError(f"{output}: is a link; artifacts are folders: remove the link")
    if keys.digits(output.name) or (output / LINEAGE).exists():
        return
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise MergelawError(f"{output}: exists and holds something else; name a new folder")


def _publish(folder: Path, output: Path) -> bool:
    """Move a whole artifact to its final path by one rename; return False if one has come there.

    Nothing is published over what exists: what is there is moved aside first.
    """
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            sync(path)
    aside = folder.with_name("aside")
    shutil.rmtree(aside, ignore_errors=True)
    if output.exists():  # empty, or a half artifact without a lineage
        output.rename(aside)
    is_new = not (aside / LINEAGE).exists()
    (folder if is_new else aside).rename(output)
    sync(output.parent)
    return is_new
