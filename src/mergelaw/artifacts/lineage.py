"""Lineage: where an artifact comes from.

An artifact is a folder with a ``lineage.json``, written last: its key, the digests of its files,
its recipe, its inputs with their digests, versions and times. Paths are relative to the artifact;
host names are left out, so that a results folder can be shared.
"""

import hashlib
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from mergelaw.artifacts import keys
from mergelaw.artifacts.cache import FileCache
from mergelaw.artifacts.files import file_digest, json_text
from mergelaw.artifacts.run_lock import MARK
from mergelaw.errors import MergelawError

LINEAGE = "lineage.json"
DIGESTS = Path("cache", "digests.jsonl")  # of users' files, in a results folder
SCHEMA = 2  # of lineage.json itself
PACKAGES = (
    "mergelaw", "torch", "transformers", "datasets", "tokenizers", "safetensors", "peft", "numpy",
    "scipy", "pandas", "pyarrow", "statsmodels",
)  # fmt: skip

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Input(BaseModel):
    """An input in a lineage."""

    path: Annotated[str, Field(pattern=r"^[^/\x00][^\x00]*$")]  # relative to the artifact
    digest: Digest
    key: Digest | None


class Facts(BaseModel):
    """Facts of a stage about its result."""

    sources: list[str] = []


class Lineage(BaseModel):
    """The entries of a lineage that mergelaw reads again."""

    stage: str
    version: int
    key: Digest | None
    artifact: str
    recipe: dict[str, Any]
    digest: Digest
    files: dict[str, Digest]
    stamps: dict[str, list[int]] = {}  # size and time of each file; earlier versions wrote none
    inputs: dict[str, Input]
    facts: Facts
    versions: dict[str, str]
    git_commit: str | None
    ended: str
    wall_seconds: float


def entries(folder: Path) -> dict[str, Path]:
    """Files of an artifact except its lineage, and links to folders, by relative path."""
    paths = {}
    for place, folders, names in os.walk(folder):
        linked = [name for name in folders if Path(place, name).is_symlink()]
        for path in (Path(place, name) for name in names + linked):
            paths[path.relative_to(folder).as_posix()] = path
    return {n: paths[n] for n in sorted(paths) if n not in (LINEAGE, ".snakemake_timestamp")}


def content(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """SHA-256 of each file of an artifact except its lineage, by relative path.

    Files whose digests are ``known`` are not read.
    """
    digests = known or {}
    return {name: digests.get(name) or file_digest(path) for name, path in entries(folder).items()}


def stamp(path: Path) -> list[int]:
    """Size and modification time (ns) of a file, or of the file that a link leads to."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def content_digest(files: Mapping[str, str]) -> str:
    """Digest of an artifact from the digests of its files."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def checksum(lineage: Mapping[str, Any]) -> str:
    """Checksum of a lineage without this entry; it detects a flipped bit."""
    return keys.digest(lineage)[:16]


def read(artifact: Path) -> dict[str, Any]:
    """Lineage of an artifact.

    Raises MergelawError for a missing or damaged lineage, or one of another version.
    """
    path = artifact / LINEAGE
    damaged = MergelawError(f"{path}: damaged; delete the folder {artifact} and rerun")
    try:
        text = path.read_text(encoding="utf-8")
        lineage = json.loads(text)
        schema = lineage["schema"]
        whole = text == json_text(lineage) and lineage.pop("checksum") == checksum(lineage)
    except (FileNotFoundError, NotADirectoryError):
        raise MergelawError(f"{artifact}: no artifact (no {LINEAGE}); make it first") from None
    except (IsADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    if schema != SCHEMA:
        raise MergelawError(
            f"{path}: written by another version of mergelaw (lineage schema {schema}, this one "
            f"reads {SCHEMA}); use that version, or delete the folder {artifact} and rerun"
        )
    try:
        Lineage.model_validate(lineage, strict=True)
    except ValidationError:
        raise damaged from None
    if not whole:
        raise damaged
    return dict(lineage)


def is_current(artifact: Path) -> bool:
    """False for an artifact whose lineage is damaged, or of another version of mergelaw."""
    try:
        return bool(read(artifact))
    except MergelawError:
        return False


def used(artifact: Path, key: str | None = None, whole: bool = False) -> dict[str, Any]:
    """Lineage of an artifact that is about to be used.

    Raises MergelawError if the artifact has another ``key``, or if its recipe, its inputs' keys or
    its files are not those of the lineage. Files with the recorded size and time are read only if
    ``whole``.
    """
    lineage = read(artifact)
    if key is not None and lineage["key"] != key:
        raise MergelawError(
            f"{artifact}: holds another artifact (its key differs beyond the digits in the path); "
            "delete this folder and rerun"
        )
    for problem in problems(artifact, lineage, whole):
        raise MergelawError(f"{problem}; delete the folder {artifact} and rerun")
    return lineage


def problems(artifact: Path, lineage: Mapping[str, Any], whole: bool = True) -> Iterator[str]:
    """Differences between an artifact and its lineage, one line each; ``whole`` as in ``used``."""
    written, stamps, now = lineage["files"], lineage.get("stamps", {}), entries(artifact)
    key = lineage["key"]
    if content_digest(written) != lineage["digest"]:
        yield f"{artifact / LINEAGE}: its digest does not match the files it lists"
    inputs = {name: entry["key"] for name, entry in lineage["inputs"].items()}
    made_by = keys.stage_key(lineage["stage"], lineage["recipe"], inputs, lineage["version"])
    if key not in (None, made_by):
        yield f"{artifact / LINEAGE}: its key does not match its recipe and inputs"
    name = lineage["artifact"]
    if key and name != artifact.name:
        yield f"{artifact}: has the lineage of {name}"
    elif key and keys.digits(artifact.name) != key[: keys.KEY_DIGITS]:
        yield f"{artifact}: its key begins with {key[: keys.KEY_DIGITS]}"
    if (artifact / LINEAGE).is_symlink():
        yield f"{artifact / LINEAGE}: is a link"
    for name in sorted(written.keys() | now.keys()):
        if name not in now or not now[name].exists():
            yield f"{artifact / name}: is missing"
        elif name not in written or not now[name].is_file():
            yield f"{artifact / name}: does not belong to the artifact"
        elif not whole and stamps.get(name) == stamp(now[name]):
            continue
        elif file_digest(now[name]) != written[name]:
            yield f"{artifact / name}: is not what was written (digest differs)"


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    installed = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


@cache
def git_commit() -> str | None:
    """Commit of mergelaw's own checkout ("-dirty" if files differ); None for an installed package.

    The repository around a virtual environment is not mergelaw's.
    """
    package = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str | None:
        try:
            run = subprocess.run(
                ["git", *words], cwd=package, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() / "src" / "mergelaw" != package:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def peak_memory() -> int:
    """Peak resident bytes of this process, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def find(path: Path) -> Path:
    """The artifact whose folder is a path or contains it. Raises MergelawError if none does."""
    for folder in (path, *path.parents):
        if (folder / LINEAGE).is_file():
            return folder
    raise MergelawError(f"{path}: no artifact here or above; name a folder below results/")


def results_of(artifact: Path) -> Path | None:
    """The results folder of an artifact, by its mark; None outside of any."""
    return next((parent for parent in artifact.parents if (parent / MARK).exists()), None)


def digest_cache(artifact: Path) -> FileCache:
    """The cache of digests of users' files in an artifact's results folder."""
    root = results_of(artifact)
    return FileCache(root and root / DIGESTS)


def input_paths(artifact: Path, lineage: Mapping[str, Any]) -> dict[str, Path]:
    """Folders of an artifact's inputs by name.

    Inputs of an artifact with a key are artifacts with keys in the same results folder, and no
    links. Raises MergelawError for a lineage with other inputs, which mergelaw has not written.
    """
    root, paths = results_of(artifact), {}
    for name, entry in sorted(lineage["inputs"].items()):
        paths[name] = path = Path(os.path.normpath(artifact / entry["path"]))
        if lineage["key"] is None or root is None:
            continue
        below = path.parts[len(root.parts) :] if path.is_relative_to(root) else ()
        keyed = keys.digits(path.name) == (entry["key"] or "")[: keys.KEY_DIGITS]
        _, *places = accumulate(below, os.path.join, initial=str(root))
        if not keyed or not below or any(map(os.path.islink, places)):
            raise MergelawError(
                f"{artifact}: its input {name} ({entry['path']!r}) is no artifact of {root}; "
                "delete the folder and rerun"
            )
    return paths


def history(artifacts: Iterable[Path]) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """Lineages of artifacts and their ancestors by folder, and errors of those that are damaged."""
    lineages: dict[Path, dict[str, Any]] = {}
    wrong: dict[Path, str] = {}
    pending = [Path(os.path.normpath(path.absolute())) for path in artifacts]
    while pending:
        folder = pending.pop()
        if folder in lineages or folder in wrong:
            continue
        try:
            lineages[folder] = read(folder)
            pending += input_paths(folder, lineages[folder]).values()
        except MergelawError as error:
            wrong[folder] = str(error)
    return lineages, list(wrong.values())


def ancestors(artifact: Path) -> dict[Path, dict[str, Any]]:
    """Lineages of an artifact and of all artifacts that it depends on, by folder."""
    lineages, wrong = history([artifact])
    if wrong:
        raise MergelawError(wrong[0])
    return lineages


def mixed(lineages: Mapping[Path, Mapping[str, Any]]) -> Iterator[str]:
    """Inputs of artifacts that are not what the artifacts were made from, one line each."""
    for user, lineage in lineages.items():
        for name, entry in sorted(lineage["inputs"].items()):
            path = Path(os.path.normpath(user / entry["path"]))
            if path in lineages and any(lineages[path][k] != entry[k] for k in ("digest", "key")):
                yield (
                    f"{path}: is not the one that {user} was made from ({name}); "
                    "delete one of them and rerun"
                )


def unmixed(artifacts: Iterable[Path]) -> None:
    """Raise MergelawError if artifacts or their ancestors were made from other inputs than now."""
    for problem in mixed(history(artifacts)[0]):
        raise MergelawError(problem)


def tree(artifact: Path) -> list[str]:
    """Lineage back to the sources as indented lines. Raises MergelawError if one is damaged."""
    lines: list[str] = []
    seen: set[Path] = set()

    def visit(folder: Path, name: str, depth: int) -> None:
        indent, lineage = "  " * depth, read(folder)
        title = f"{indent}{name}: {lineage['artifact']}  {lineage['digest'][:12]}"
        if folder in seen:
            lines.append(f"{title}  (above)")
            return
        seen.add(folder)
        commit = (lineage["git_commit"] or "no checkout")[:12]
        version = lineage["versions"].get("mergelaw", "?")
        lines.append(
            f"{title}  {lineage['stage']} v{lineage['version']}, mergelaw {version} ({commit}), "
            f"{lineage['ended']}, {lineage['wall_seconds']:.1f} s"
        )
        lines.extend(f"{indent}  source: {s}" for s in lineage["facts"].get("sources", []))
        for child, below in input_paths(folder, lineage).items():
            visit(below, child, depth + 1)

    visit(Path(artifact).absolute(), "artifact", 0)
    return lines


def verify(artifacts: Iterable[Path]) -> tuple[int, list[str]]:
    """Compare artifacts, and all that they depend on, with their lineages: every byte is read.

    Returns the number of artifacts and the problems.
    """
    lineages, wrong = history(artifacts)
    for folder, lineage in lineages.items():
        wrong += [f"{p}; delete the folder {folder} and rerun" for p in problems(folder, lineage)]
    return len(lineages), [*wrong, *mixed(lineages)]
