"""A results folder: check artifacts before use, collect garbage, verify all files."""

import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

from mergelaw.artifacts import keys, lineage
from mergelaw.artifacts.files import unique
from mergelaw.artifacts.lineage import LINEAGE
from mergelaw.artifacts.run_lock import MARK, check_layout, lock_results
from mergelaw.errors import MergelawError
from mergelaw.evaluation import cells, read_rows
from mergelaw.workflow.artifact import Artifact
from mergelaw.workflow.study import Study

# The scratch folder of an artifact; with a unique name, one that is being removed.
SCRATCH = re.compile(r"\.(.+?)(\.[0-9a-f]+-[0-9a-f]+)?\.work")
SCRATCH_FILE = re.compile(r"\.[0-9a-f]+-[0-9a-f]+$")
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}  # of losses that other hardware measures again


def use(study: Study, artifacts: Iterable[Artifact]) -> list[Path]:
    """Folders of a study's artifacts, after comparing keys, files and inputs with lineages.

    Raises MergelawError for the first that is not what the study asks for.
    """
    folders = []
    for artifact in artifacts:
        folders.append(study.results / artifact.path)
        lineage.used(folders[-1], artifact.key)
    lineage.unmixed(folders)
    return folders


def walk(root: Path) -> Iterator[Path]:
    """Links to folders, artifacts, their scratch folders and scratch files in a results folder.

    Links are not followed, and results folders in this one are left out.
    """
    for folder, names, files in os.walk(root):
        place, inside = Path(folder), []
        if place != root and MARK in files:
            names.clear()
        for name in names:
            path = place / name
            scratch = SCRATCH.fullmatch(name)
            if path.is_symlink() or keys.digits(scratch[1] if scratch else name):
                yield path
            else:
                inside.append(name)
        names[:] = inside
        yield from (place / name for name in files if SCRATCH_FILE.search(name))


def remove(path: Path) -> bool:
    """Remove an artifact, a scratch folder or a file; return False while a job works on it.

    A folder is renamed first, so that a kill leaves no half of an artifact.
    """
    from filelock import FileLock, Timeout

    if not path.is_dir():
        path.unlink(missing_ok=True)
        return True
    match = SCRATCH.fullmatch(path.name)
    name = match[1] if match else path.name
    try:
        with FileLock(path.parent / f".{name}.lock", timeout=0):
            grave = path.with_name(f".{name}.{unique()}.work")
            path.rename(grave)
    except Timeout:
        return False
    shutil.rmtree(grave)
    return True


def unused(studies: Sequence[Study]) -> list[tuple[Path, int]]:
    """Artifacts, scratch and prepared files that no study refers to, with their bytes.

    Raises MergelawError if the studies have several results folders.
    """
    roots = {study.results for study in studies}
    if len(roots) > 1:
        raise MergelawError(
            f"gc: the configurations have {len(roots)} results folders; give those of one"
        )
    (root,) = roots
    kept = {str(root / path) for study in studies for path in study.known}
    listed = []
    for path in walk(root):
        place = str(path)
        if path.is_symlink() or place in kept:
            continue
        # A killed training resumes from the states in its scratch folder.
        scratch = SCRATCH.fullmatch(path.name)
        if scratch and not scratch[2]:
            place = str(path.with_name(scratch[1]))
            if place in kept and not Path(place, LINEAGE).exists():
                continue
        listed.append(path)
    # Missing thresholds and masks are prepared again.
    for folder in sorted(root.glob("cells/*/prepared")):
        if any(place.is_symlink() for place in (folder, *folder.parents[:2])):
            continue
        used = any(path.startswith(f"{root}/evals/{folder.parent.name}/") for path in kept)
        listed += [file for file in folder.iterdir() if not used and file.is_file()]
    return [(path, size_of(path)) for path in sorted(set(listed))]


def size_of(path: Path) -> int:
    """Bytes of a file or of all files in a folder, links not followed."""
    return sum(p.lstat().st_size for p in (path, *path.rglob("*")) if not p.is_dir())


def collect_garbage(studies: Sequence[Study], delete: bool) -> Iterator[tuple[Path, int]]:
    """Yield unused files, and remove them if ``delete``. Measured cells are kept."""
    root = studies[0].results
    with lock_results(root):
        for path, size in unused(studies):
            if not delete or remove(path):
                yield path, size


def verify(root: Path) -> tuple[int, list[str]]:
    """Compare all of a results folder with what was written: every byte is read.

    Returns the number of artifacts and the problems. Raises MergelawError for another layout.
    """
    check_layout(root)
    artifacts, wrong = artifacts_in(root), []
    for path in sorted({*walk(root)} - {*artifacts}):
        if path.is_symlink():
            wrong.append(f"{path}: is a link; replace it by a copy of what it leads to")
        elif keys.digits(path.name) and path.is_dir() and lineage.entries(path):
            wrong.append(f"{path}: has no {LINEAGE}; finish the copy, or delete the folder")
    count, problems = lineage.verify(artifacts)
    for cells_of_base in sorted((root / "cells").glob("*/")):
        shards = [path for path in artifacts if root / "evals" / cells_of_base.name in path.parents]
        whole = [path for path in shards if not any(str(path) in line for line in problems)]
        wrong += cells.verify(cells_of_base, whole)
    return count, wrong + problems


def measure_again(study: Study, count: int) -> Iterator[str]:
    """Measure ``count`` merges of each evaluation again; yield the cells whose losses differ."""
    import torch

    from mergelaw.evaluation import shard

    def losses(folder: Path) -> dict[str, float]:
        rows = read_rows([folder])
        return dict(zip(rows["cell"], rows["ce"], strict=True))

    for artifact in filter(study.made, study.measurements):
        (folder,), (base,) = use(study, [artifact]), use(study, artifact.of_role("base"))
        vectors, corpora = (
            dict(zip(artifact.names(role), use(study, artifact.of_role(role)), strict=True))
            for role in ("task_vectors", "corpora")
        )
        rows = Random(artifact.key).sample(list(artifact.rows), min(count, len(artifact.rows)))
        torch.set_num_threads(int(read_rows([folder])["threads"][0]))
        with tempfile.TemporaryDirectory() as name:
            scratch, recipe = Path(name), artifact.recipe
            learned = next(iter(use(study, artifact.of_role("coefficients"))), None)
            shard.evaluate(
                recipe, rows, base, vectors, corpora, scratch / "cells", "again", scratch, learned
            )
            again = losses(scratch)
        before, tolerance = losses(folder), TOLERANCES[recipe["evaluation"]["dtype"]]
        for cell, loss in again.items():
            if not math.isclose(loss, before[cell], rel_tol=tolerance) and math.isfinite(loss):
                yield (
                    f"{folder}: cell {cell} has {before[cell]:.6g} nats per token, but {loss:.6g} "
                    "when measured again; delete this folder and its cells and rerun"
                )


def artifacts_in(root: Path) -> list[Path]:
    """Folders of all artifacts in a results folder, links and other results folders left out."""
    folders = (path for path in walk(root) if keys.digits(path.name))
    return sorted(p for p in folders if not p.is_symlink() and (p / LINEAGE).exists())
