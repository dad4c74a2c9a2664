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
from pathlib import Path
from typing import Any

from mergelaw.artifacts import keys
from mergelaw.artifacts.files import file_digest, json_text
from mergelaw.errors import MergelawError

LINEAGE = "lineage.json"
SCHEMA = 2  # of lineage.json itself
PACKAGES = (
    "mergelaw",
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "peft",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "statsmodels",
)


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of an artifact except its lineage, by relative path."""
    return {
        path.relative_to(folder).as_posix(): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LINEAGE
    }


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
    except FileNotFoundError:
        raise MergelawError(f"{artifact}: no artifact (no {LINEAGE}); make it first") from None
    except (ValueError, KeyError, TypeError):
        raise damaged from None
    if schema != SCHEMA:
        raise MergelawError(
            f"{path}: written by another version of mergelaw (lineage schema {schema}, this one "
            f"reads {SCHEMA}); use that version, or delete the folder {artifact} and rerun"
        )
    if not whole:
        raise damaged
    return dict(lineage)


def is_current(artifact: Path) -> bool:
    """False for an artifact whose lineage another version of mergelaw wrote, or a damaged one."""
    try:
        return bool(json.loads((artifact / LINEAGE).read_text("utf-8"))["schema"] == SCHEMA)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def verified(artifact: Path, stage: str | None = None) -> dict[str, Any]:
    """Lineage of an artifact; raises MergelawError if its files differ from the lineage."""
    lineage = read(artifact)
    if stage is not None and lineage["stage"] != stage:
        raise MergelawError(f"{artifact}: is a {lineage['stage']}, not a {stage}; give a {stage}")
    for problem in problems(artifact, lineage):
        raise MergelawError(f"{problem}; delete the folder {artifact} and rerun")
    return lineage


def problems(artifact: Path, lineage: Mapping[str, Any]) -> Iterator[str]:
    """Differences between an artifact's files and its lineage, one line each."""
    now, written = content(artifact), lineage["files"]
    if content_digest(written) != lineage["digest"]:
        yield f"{artifact / LINEAGE}: its digest does not match the files it lists"
    for name in sorted(written.keys() | now.keys()):
        if name not in now:
            yield f"{artifact / name}: is missing"
        elif name not in written:
            if not name.startswith(".snakemake"):
                yield f"{artifact / name}: does not belong to the artifact"
        elif now[name] != written[name]:
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


def input_paths(artifact: Path, lineage: Mapping[str, Any]) -> dict[str, Path]:
    """Folders of an artifact's inputs by name."""
    return {
        name: Path(os.path.normpath(artifact / entry["path"]))
        for name, entry in sorted(lineage["inputs"].items())
    }


def ancestors(artifact: Path) -> dict[Path, dict[str, Any]]:
    """Lineages of an artifact and of all artifacts that it depends on, by folder."""
    lineages: dict[Path, dict[str, Any]] = {}
    pending = [Path(os.path.normpath(artifact.absolute()))]
    while pending:
        folder = pending.pop()
        if folder not in lineages:
            lineages[folder] = read(folder)
            pending += input_paths(folder, lineages[folder]).values()
    return lineages


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


def verify(artifacts: Iterable[Path], root: Path | None = None) -> tuple[int, list[str]]:
    """Compare artifacts, and all that they depend on, with their lineages.

    ``root`` is the results folder of all inputs. Returns the number of artifacts and the problems.
    """
    pending = [Path(os.path.normpath(path.absolute())) for path in artifacts]
    digests: dict[Path, str | None] = {}
    uses: list[tuple[Path, Path, str]] = []
    wrong: list[str] = []
    while pending:
        folder = pending.pop()
        if folder in digests:
            continue
        digests[folder] = None
        try:
            lineage = read(folder)
        except MergelawError as error:
            wrong.append(str(error))
            continue
        digests[folder] = lineage["digest"]
        if "@" in lineage["artifact"] and lineage["artifact"] != folder.name:
            wrong.append(f"{folder}: has the lineage of {lineage['artifact']}; delete the folder")
        wrong += problems(folder, lineage)
        for name, path in input_paths(folder, lineage).items():
            if root is not None and not path.is_relative_to(root.absolute()):
                wrong.append(f"{folder}: its input {name} lies outside of {root}; delete it")
                continue
            uses.append((folder, path, lineage["inputs"][name]["digest"]))
            pending.append(path)
    wrong += [
        f"{path}: is not the one that {user} was made from; delete one of them and rerun"
        for user, path, digest in uses
        if digests[path] not in (None, digest)
    ]
    return len(digests), wrong
