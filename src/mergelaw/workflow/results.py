"""What a study's results say: laws of the macro-average, times, what nothing refers to."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelaw.artifacts import lineage
from mergelaw.artifacts.lineage import LINEAGE
from mergelaw.artifacts.run_lock import lock_results
from mergelaw.errors import MergelawError
from mergelaw.workflow.progress import TITLES
from mergelaw.workflow.study import Study


def stage_times(lineages: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, float]]:
    """Jobs and wall seconds by stage, in the pipeline's order."""
    seconds: dict[str, list[float]] = {}
    for entry in lineages:
        seconds.setdefault(entry["stage"], []).append(entry["wall_seconds"])
    return {
        title: (len(seconds[stage]), sum(seconds[stage]))
        for stage, title in TITLES.items()
        if stage in seconds
    }


def facts_of(laws: Path) -> dict[str, str]:
    """Facts that a report states about fitted laws: versions, jobs and times."""
    lineages = lineage.ancestors(laws)
    entry = lineage.read(laws)
    facts = {
        "mergelaw": f"{entry['versions']['mergelaw']} ({entry['git_commit'] or 'no checkout'})",
        "torch, transformers": f"{entry['versions']['torch']}, {entry['versions']['transformers']}",
    }
    for title, (jobs, seconds) in stage_times(lineages.values()).items():
        facts[f"time, {title}"] = f"{jobs} jobs, {seconds:.0f} s in all"
    return facts


def law_lines(fits: Mapping[str, Any]) -> Iterator[str]:
    """Laws of the macro-average, one line each: joint ones first, then those of one size."""
    for joint in (True, False):
        chosen = [
            f for f in fits["fits"] if f["domain"] == "macro" and (f["base"] is None) == joint
        ]
        if chosen:
            yield f"\n{fits['laws'][chosen[0]['law']]}"
        for fit in chosen:
            where = fit["method"] if joint else f"{fit['method']}, {fit['base']}"
            values = "  ".join(f"{name} = {v:.4g}" for name, v in fit["parameters"].items())
            (floor,) = fit["floors"] if not joint else ({},)
            reach = f"  reachable floor L({floor['M']}) = {floor['reachable']:.4g}" if floor else ""
            yield f"  {where:<24}{values}{reach}  R^2 = {fit['r2']:.5f}  RMSE = {fit['rmse']:.2g}"
    for refused in fits["refused"]:
        if refused["domain"] == "macro":
            where = refused["base"] or "all sizes"
            yield f"  {refused['method']}, {where}: not fitted, {refused['reason']}"


def summary(study: Study) -> str:
    """Laws of a study's macro-average, the time of each stage and where the report is.

    Raises MergelawError if the study is not finished.
    """
    laws, report = (study.results / a.path for a in (study.laws, study.report))
    for folder in (laws, report):
        if not (folder / LINEAGE).exists():
            raise MergelawError(
                f"{study.results}: study {study.config.name} is not finished; `mergelaw status` "
                "says what is missing"
            )
    fits = json.loads((laws / "laws.json").read_text(encoding="utf-8"))
    lines = ["macro-average cross-entropy in nats per token; N in billions, without embeddings"]
    lines += law_lines(fits)
    lines += [
        f"all of {len(fits['fits'])} fits, with their warnings: {laws / 'summary.txt'}",
        "\ntime by stage, in all; jobs run side by side",
    ]
    for title, (jobs, seconds) in stage_times(lineage.ancestors(report).values()).items():
        lines.append(f"  {title:<13}{jobs:>5} jobs {seconds:>9.1f} s")
    return "\n".join([*lines, f"\nreport: {report / 'report.html'}"])


def unused(studies: Sequence[Study]) -> list[tuple[Path, int]]:
    """Artifacts, half artifacts and prepared files that no study refers to, with their bytes.

    Raises MergelawError if the studies have several results folders.
    """
    roots = {study.results for study in studies}
    if len(roots) > 1:
        raise MergelawError(
            f"gc: the configurations have {len(roots)} results folders; give those of one"
        )
    (root,) = roots
    kept = {path for study in studies for path in study.known}
    # What a killed or failed job left to resume from goes with the artifact it was to become.
    halves = {path: path.name[1:].removesuffix(".work") for path in root.rglob(".*@*.work")}
    places = {path: path.with_name(name) for path, name in halves.items()}
    places |= {mark.parent: mark.parent for mark in root.rglob(f"*@*/{LINEAGE}")}
    listed = [
        (folder, sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file()))
        for folder, place in sorted(places.items())
        if place.relative_to(root).as_posix() not in kept
    ]
    # Prepared thresholds and masks are made again where they are missing.
    for folder in sorted(root.glob("cells/*/prepared")):
        used = any(path.startswith(f"evals/{folder.parent.name}/") for path in kept)
        for file in sorted(folder.iterdir()):
            if not used or file.suffix not in (".json", ".safetensors", ".sha256"):
                listed.append((file, file.stat().st_size))
    return listed


def collect_garbage(studies: Sequence[Study], delete: bool) -> Iterator[tuple[Path, int]]:
    """Yield what no study refers to; remove it if ``delete``. Measured cells are kept."""
    root = studies[0].results
    with lock_results(root):
        for path, size in unused(studies):
            if delete and path.is_dir():
                shutil.rmtree(path)
            elif delete:
                path.unlink()
            yield path, size


def artifacts_in(root: Path) -> list[Path]:
    """Folders of all artifacts in a results folder, without those in the making."""
    folders = (mark.parent for mark in sorted(root.glob(f"*/**/*@*/{LINEAGE}")))
    return [f for f in folders if not any(p.startswith(".") for p in f.relative_to(root).parts)]
