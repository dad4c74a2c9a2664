"""Artifacts: folders that are whole or absent, and say where they come from.

An artifact is a folder with a ``lineage.json`` that is written last: what it is, the digest of its
files, the recipe, the inputs with their digests, versions, times. It is made in a hidden folder
beside its place, under a lock, and put there by one rename, so that a kill at any moment leaves
either nothing or all of it. Paths are kept relative to the results folder, host names nowhere.
"""

import atexit
import hashlib
import importlib.metadata
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from mergelaw.artifacts import keys
from mergelaw.errors import MergelawError

LINEAGE = "lineage.json"
SCHEMA = 1  # of lineage.json itself
PACKAGES = (
    "mergelaw",
    "torch",
    "transformers",
    "trl",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an artifact but its lineage, by relative path."""
    return {
        path.relative_to(folder).as_posix(): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LINEAGE
    }


def content_digest(files: Mapping[str, str]) -> str:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def checksum(lineage: Mapping[str, Any]) -> str:
    """Of a lineage without this entry: a flipped bit in it is found as well."""
    return keys.digest(lineage)[:16]


def read(artifact: Path) -> dict[str, Any]:
    """The lineage of an artifact. Raises MergelawError where there is none or a newer one."""
    path = artifact / LINEAGE
    try:
        text = path.read_text(encoding="utf-8")
        lineage = json.loads(text)
        schema = lineage["schema"]
        whole = text == json_text(lineage) and lineage.pop("checksum") == checksum(lineage)
    except FileNotFoundError:
        raise MergelawError(f"{artifact}: no artifact here (no {LINEAGE}); make it first") from None
    except (ValueError, KeyError, TypeError):
        raise MergelawError(
            f"{path}: damaged; delete the folder {artifact} and run again"
        ) from None
    if not whole and schema == SCHEMA:
        raise MergelawError(f"{path}: damaged; delete the folder {artifact} and run again")
    if schema != SCHEMA:
        raise MergelawError(
            f"{path}: written by another version of mergelaw (lineage schema {schema}, this one "
            f"reads {SCHEMA}); use another results folder or that version"
        )
    return lineage


def verified(artifact: Path, stage: str | None = None) -> dict[str, Any]:
    """The lineage, after the files were found to be what it says. Names a damaged file."""
    lineage = read(artifact)
    if stage is not None and lineage["stage"] != stage:
        raise MergelawError(f"{artifact}: is a {lineage['stage']}, not a {stage}; give a {stage}")
    for problem in problems(artifact, lineage):
        raise MergelawError(f"{problem}; delete the folder {artifact} and run again")
    return lineage


def problems(artifact: Path, lineage: dict[str, Any]) -> Iterator[str]:
    """What is wrong with an artifact's files, a line each."""
    found, known = content(artifact), lineage["files"]
    if content_digest(known) != lineage["digest"]:
        yield f"{artifact / LINEAGE}: its digest is not that of the files it lists"
    for name in sorted(known.keys() | found.keys()):
        if name not in found:
            yield f"{artifact / name}: is missing"
        elif name not in known:
            if not name.startswith(".snakemake"):
                yield f"{artifact / name}: does not belong to the artifact"
        elif found[name] != known[name]:
            yield f"{artifact / name}: is not what was written (digest differs)"


@cache
def _versions() -> dict[str, str]:
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@cache
def git_commit() -> str | None:
    """Commit of mergelaw's own checkout ("-dirty" where files differ), None outside of one."""
    here = Path(__file__).parent
    try:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        run = subprocess.run(describe, cwd=here, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


def peak_memory() -> int:
    """Peak resident bytes of this process (mapped files included)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def make(
    output: Path,
    stage: str,
    recipe: dict[str, Any],
    inputs: Mapping[str, Path],
    work: Callable[[Path, Path], dict[str, Any] | None],
) -> bool:
    """Make the artifact ``output`` unless it is there; return whether it was made.

    ``work(folder, state)`` writes the artifact's files into ``folder`` and may keep in ``state``
    what lets it go on after a kill. What it returns is added to the lineage. Inputs are artifacts
    and are verified first. A second process that makes the same artifact waits for the first.
    """
    from filelock import FileLock

    output = Path(os.path.normpath(output))
    _check_vacant(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = output.parent / f".{output.name}.work"
    with FileLock(output.parent / f".{output.name}.lock"):
        if (output / LINEAGE).exists():
            return False
        started, clock, cpu = datetime.now(UTC), time.perf_counter(), time.process_time()
        sources = {name: verified(path) for name, path in inputs.items()}
        folder, state = scratch / "artifact", scratch / "state"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        state.mkdir(exist_ok=True)
        try:
            facts = work(folder, state) or {}
            files = content(folder)
            lineage = {
                "schema": SCHEMA,
                "stage": stage,
                "version": keys.STAGES[stage],
                "artifact": output.name,
                "digest": content_digest(files),
                "files": files,
                "recipe": recipe,
                "inputs": {
                    name: {
                        "path": Path(os.path.relpath(path, output)).as_posix(),
                        "digest": sources[name]["digest"],
                    }
                    for name, path in inputs.items()
                },
                "facts": facts,
                "versions": _versions(),
                "git_commit": git_commit(),
                "started": started.isoformat(timespec="seconds"),
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
                "wall_seconds": round(time.perf_counter() - clock, 3),
                "cpu_seconds": round(time.process_time() - cpu, 3),
                "peak_memory": peak_memory(),
            }
            write_json(folder / LINEAGE, lineage | {"checksum": checksum(lineage)})
            _publish(folder, output)
        except BaseException as error:
            cause = None
            if isinstance(error, Exception) and not isinstance(error, (MergelawError, OSError)):
                cause = unwritable(state, error)
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # not empty: what a training goes on from
                state.rmdir()
                scratch.rmdir()
            if cause:
                raise cause from error
            raise
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def take(source: Path, output: Path) -> bool:
    """Make the artifact ``output`` a copy of ``source``, unless it is there; whether it was made.

    The copy is verified; a damaged source is named. Links stay links.
    """
    from filelock import FileLock

    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = output.parent / f".{output.name}.work"
    with FileLock(output.parent / f".{output.name}.lock"):
        if (output / LINEAGE).exists():
            return False
        lineage = read(source)
        if lineage["artifact"] != output.name:
            raise MergelawError(f"{source}: is another artifact by its {LINEAGE}; delete it there")
        folder = scratch / "artifact"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            shutil.copytree(source, folder, symlinks=True)
            if any(problems(folder, lineage)):
                verified(source)
                raise MergelawError(f"{output}: the copy of {source} was damaged; run again")
            _publish(folder, output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # not empty: what a training goes on from
                scratch.rmdir()
    return True


def _check_vacant(output: Path) -> None:
    """Raise MergelawError for a folder that somebody keeps something else in.

    One with a key in its name is ours: without a lineage it is half an artifact and is replaced.
    """
    if re.search(r"@[0-9a-f]{8}$", output.name) or (output / LINEAGE).exists():
        return
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise MergelawError(f"{output}: is there and holds something else; name a new folder")


def _publish(folder: Path, output: Path) -> None:
    """Put a whole artifact in its place, by one rename."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            sync(path)
    if output.exists():  # an empty or half folder without a lineage: not an artifact
        shutil.rmtree(output)
    folder.rename(output)
    sync(output.parent)


def unwritable(folder: Path, error: Exception) -> OSError | None:
    """What hinders writing where a library failed: of a full disk many say no more than that."""
    said = re.search(r"\(os error (\d+)\)", str(error))
    if said:
        return OSError(int(said[1]), os.strerror(int(said[1])), str(folder.parent))
    probe = folder / f"probe-{unique()}"
    try:
        probe.write_bytes(bytes(1 << 20))
    except OSError as reason:
        return OSError(reason.errno, os.strerror(reason.errno or 0), str(folder.parent))
    finally:
        probe.unlink(missing_ok=True)
    return None


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, whenever it is killed or the disk is full."""
    scratch = path.with_name(f"{path.name}.{unique()}")
    try:
        scratch.write_text(json_text(value), encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        scratch.unlink(missing_ok=True)


def json_text(value: Any) -> str:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find(path: Path) -> Path:
    """The artifact that a path is or lies in."""
    for folder in (path, *path.parents):
        if (folder / LINEAGE).is_file():
            return folder
    raise MergelawError(f"{path}: no artifact here or above; name a folder below results/")


def tree(artifact: Path, verify: bool = False) -> tuple[list[str], list[str]]:
    """The lineage back to the sources as indented lines, and the problems found on the way."""
    lines: list[str] = []
    wrong: list[str] = []
    seen: set[Path] = set()

    def visit(folder: Path, name: str, depth: int, expected: str | None) -> None:
        indent = "  " * depth
        try:
            lineage = read(folder)
        except MergelawError as error:
            lines.append(f"{indent}{name}: {error}")
            wrong.append(str(error))
            return
        known = f"{indent}{name}: {lineage['artifact']}  {lineage['digest'][:12]}"
        if folder in seen:
            lines.append(f"{known}  (above)")
            return
        seen.add(folder)
        commit = (lineage["git_commit"] or "no checkout")[:12]
        version = lineage["versions"].get("mergelaw", "?")
        lines.append(
            f"{known}  {lineage['stage']} v{lineage['version']}, mergelaw {version} ({commit}), "
            f"{lineage['ended']}, {lineage['wall_seconds']:.1f} s"
        )
        for source in lineage["facts"].get("sources", []):
            lines.append(f"{indent}  source: {source}")
        if expected is not None and expected != lineage["digest"]:
            wrong.append(
                f"{folder}: is not the one that was used (digest {lineage['digest'][:12]}, "
                f"used {expected[:12]})"
            )
        if verify:
            wrong.extend(problems(folder, lineage))
        for child, entry in sorted(lineage["inputs"].items()):
            below = Path(os.path.normpath(folder / entry["path"]))
            visit(below, child, depth + 1, entry["digest"])

    visit(Path(artifact).absolute(), "artifact", 0, None)
    return lines, wrong


def unique() -> str:
    """A name that no other process or moment has."""
    return f"{time.time_ns():x}-{os.getpid():x}"


LAYOUT = 1  # of a results folder, which its mark says
MARK = ".mergelaw.json"
BEAT = 20  # seconds between a run's signs of life
SILENCE = 120  # seconds without one after which a run on another host has ended


class OnlyRun:
    """The right to work on a results folder, held until the process ends or the context is left.

    A lock of the file system, which a kill releases. Not every shared file system carries locks
    from host to host, so a run also leaves a sign of life, with its host, every 20 seconds; one
    that is older than two minutes, by the file system's own clock, is a dead run's.
    """

    def __init__(self, results: Path):
        from filelock import FileLock, Timeout

        self._sign, self._ended = results / ".run.json", threading.Event()
        self._process = os.getpid()  # forks leave it alone
        lock = results / ".run.lock"
        self._lock = FileLock(lock)
        own = {"host": socket.gethostname(), "process": self._process}
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise self._taken(results, self._read()) from None
        os.utime(lock)
        other = self._read()
        elsewhere = other is not None and other["host"] != own["host"]
        if elsewhere and lock.stat().st_mtime - self._sign.stat().st_mtime < SILENCE:
            self._lock.release()
            raise MergelawError(
                f"{self._taken(results, other)}; if it was killed, try again in {SILENCE} s"
            )
        write_json(self._sign, own)
        self._beat = threading.Thread(target=self._show_life, daemon=True)
        self._beat.start()
        atexit.register(self.release)

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._sign.read_text(encoding="utf-8"))
            return found if {"host", "process"} <= found.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    @staticmethod
    def _taken(results: Path, other: dict[str, Any] | None) -> MergelawError:
        who = f" (process {other['process']} on {other['host']})" if other else ""
        return MergelawError(
            f"{results}: another run is working on this folder{who}; wait for it, or stop it"
        )

    def _show_life(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):
                os.utime(self._sign)

    def release(self) -> None:
        if not self._ended.is_set() and os.getpid() == self._process:
            self._ended.set()
            atexit.unregister(self.release)
            self._sign.unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> "OnlyRun":
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def check_layout(results: Path) -> None:
    """Raise MergelawError for a results folder of another version; an unmarked one passes."""
    mark = results / MARK
    try:
        layout = json.loads(mark.read_text(encoding="utf-8"))["layout"] if mark.exists() else LAYOUT
    except (ValueError, KeyError, TypeError):
        layout = "unknown"
    if layout != LAYOUT:
        raise MergelawError(
            f"{results}: laid out by another version of mergelaw (layout {layout}, this one has "
            f"{LAYOUT}); use another results folder or that version"
        )


def only_run(results: Path) -> OnlyRun:
    """The right to be the one run on a results folder.

    Raises MergelawError where another run has it, or the folder was made by an older version.
    """
    results.mkdir(parents=True, exist_ok=True)
    check_layout(results)
    mark = results / MARK
    if not mark.exists():
        write_json(mark, {"layout": LAYOUT})
    return OnlyRun(results)
