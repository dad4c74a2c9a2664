"""Results of a study: measured merges, laws of the macro-average, and times."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mergelaw.artifacts import lineage
from mergelaw.artifacts.lineage import LINEAGE
from mergelaw.config import load
from mergelaw.decide import Measured, best, by_base, flagged
from mergelaw.errors import MergelawError
from mergelaw.evaluation import read_rows
from mergelaw.evaluation.cells import identities
from mergelaw.laws.points import MACRO
from mergelaw.laws.summary import STATES, refusals
from mergelaw.merging.methods.learned import read_coefficients, weights_of
from mergelaw.merging.task_vector import digest_of
from mergelaw.workflow.deploy import run_command
from mergelaw.workflow.folder import use
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


def measured(study: Study) -> tuple[list[Measured], list[str]]:
    """Models that a study has measured so far, by base, and warnings on what is missing.

    Raises MergelawError if no base has measured merges.
    """
    shards = use(study, filter(study.made, study.measurements))
    missing = len(study.measurements) - len(shards)
    if not shards:
        raise MergelawError(nothing_measured(study))
    every, warnings = measured_in(shards)
    if not every:
        raise MergelawError(f"{'; '.join(warnings)}; run the study first")
    if missing:
        warnings.append(f"{missing} of {len(study.measurements)} shards are not measured yet")
    return every, warnings


def nothing_measured(study: Study) -> str:
    """Why a study has no table of evaluations, and what to do."""
    if not any((study.results / "cells").glob("*/*.jsonl")):
        return (
            f"{study.results}: no shard of {study.config.name} is finished yet (`mergelaw status` "
            "says what runs); run the study first"
        )
    return (
        f"{study.results}: holds no evaluations of {study.config.name} as it is configured now, in "
        "this version (gc may have removed them, or none is finished); run the study: no cell is "
        "measured again"
    )


def measured_in(shards: Sequence[Path]) -> tuple[list[Measured], list[str]]:
    """Models in the tables of evaluations, by base, and warnings on what is left out."""
    return by_base(
        read_rows(shards), lambda models: read_rows(shards, documents=True, merges=models)
    )


def confirmed(study: Study) -> list[str]:
    """Losses of written merges on documents that no choice has seen, a sentence each."""
    lines = []
    for name, artifact in study.confirmations.items():
        if study.made(artifact):
            every, warnings = measured_in(use(study, [artifact]))
            lines += warnings
            for one in every:
                (merge,), base, shares = one.merges, one.reference, one.counted
                documents = one.documents([merge, base])
                loss = documents.difference({merge.identity: shares})
                gain = documents.difference({merge.identity: shares, base.identity: -shares})
                lines.append(
                    f"{one.base}: {name} has {loss.text(sign='')} on documents that no choice has "
                    f"seen, {gain.text()} against the base"
                )
    return lines


def rows_of_merge(
    study: Study,
    recipe: Mapping[str, Any],
    base: Path,
    vectors: Mapping[str, Path],
    coefficients: Path | None = None,
) -> pd.DataFrame | None:
    """Rows of a merge and its base, with the columns per document; None if it is not measured."""
    experts, weights = recipe["experts"], recipe["weights"]
    if coefficients is not None:
        weights = weights_of(read_coefficients(coefficients)[tuple(experts)])
    digests = [digest_of(vectors[expert]) for expert in experts]
    start = lineage.read(base)["digest"]
    wanted, _ = identities(start, digests, recipe["method"], {}, {}, weights)
    itself, _ = identities(start, [], None, {}, {})
    shards = use(study, filter(study.made, study.measurements))
    rows = read_rows(shards, documents=True, merges=[wanted, itself]) if shards else None
    if rows is None or wanted not in set(rows["merge"]):
        return None
    return rows[~rows.duplicated(["merge", "domain"])]


def summary(study: Study) -> dict[str, Any]:
    """The best merge of each base, fits of the macro-average, jobs and seconds by stage, files.

    Raises MergelawError if the study is not finished.
    """
    if not (study.made(study.laws) and study.made(study.report)):
        raise MergelawError(
            f"{study.results}: study {study.config.name} is not finished; `mergelaw status` "
            "says what is missing"
        )
    laws, report, *shards = use(study, [study.laws, study.report, *study.measurements])
    fits = json.loads((laws / "laws.json").read_text(encoding="utf-8"))
    times = stage_times(lineage.ancestors(report).values())
    every, warnings = measured_in(shards)
    return {
        "best": {one.base: best(one).sentence for one in every},
        "flagged": {one.base: flagged(one) for one in every},
        "warnings": warnings,
        "laws": fits["laws"],
        "fits": [fit for fit in fits["fits"] if fit["domain"] == MACRO],
        "refused": [fit for fit in fits["refused"] if fit["domain"] == MACRO],
        "stages": {title: {"jobs": jobs, "seconds": s} for title, (jobs, s) in times.items()},
        "summary": str(laws / "summary.txt"),
        "report": str(report / "report.html"),
    }


def summary_text(values: Mapping[str, Any]) -> str:
    """A :func:`summary` as text: the best merges, joint laws, laws of one base, times, paths."""
    lines = [f"{base}: {sentence}" for base, sentence in values["best"].items()]
    lines += [f"{base}: {text}" for base, texts in values["flagged"].items() for text in texts]
    lines += [f"warning: {warning}" for warning in values["warnings"]]
    lines += ["`mergelaw best` ranks all measured merges and says how to write the first", ""]
    lines += ["macro-average cross-entropy in nats per token; N in billions, without embeddings"]
    law = None
    for fit in sorted(values["fits"], key=lambda fit: fit["base"] is not None):
        if fit["law"] != law:
            law = fit["law"]
            lines.append(f"\n{values['laws'][law]}")
        where = f"{fit['method']}, {fit['base']}" if fit["base"] else fit["method"]
        numbers = {name: (value, ".4g") for name, value in fit["parameters"].items()}
        for floor in fit["floors"] if fit["base"] else ():
            numbers[f"L({floor['M']})"] = (floor["reachable"], ".4g")
        numbers |= {"R^2": (fit["r2"], ".5f"), "RMSE": (fit["rmse"], ".2g")}
        texts = (  # R^2 of equal losses is not known
            f"{name} = {'unknown' if value is None else format(value, form)}"
            for name, (value, form) in numbers.items()
        )
        state = fit["verdict"]["state"]
        verdict = "" if state == "holds" else f"  the law {STATES[state]}"
        lines.append(f"  {where:<24}{'  '.join(texts)}{verdict}")
    lines += [f"  not fitted: {text}" for text in refusals(values["refused"])]
    lines.append(f"all fits, with their warnings: {values['summary']}")
    lines.append("\ntime by stage, in all; jobs run side by side")
    for title, stage in values["stages"].items():
        lines.append(f"  {title:<13}{stage['jobs']:>5} jobs {stage['seconds']:>9.1f} s")
    return "\n".join([*lines, f"\nreport: {values['report']}"])


def find_laws(file: Path) -> tuple[Path, list[str]]:
    """Folder of the current laws of a configuration, and warnings.

    Laws of a part of the study come with a warning. Raises MergelawError without any laws.
    """
    study = Study(load(file))
    if study.made(study.laws):
        return use(study, [study.laws])[0], []
    name = study.config.name
    partial = study.results / "partial" / name / "laws"
    if (partial / "laws.json").is_file():
        missing = json.loads((partial / "laws.json").read_text(encoding="utf-8"))["missing"]
        return partial, [
            f"{partial}: a part of the study, {len(missing)} of {len(study.evals)} shards were "
            "missing when it was fitted; the answer may change"
        ]
    others = sorted((study.results / "laws").glob(f"{name}@*"))
    hint = f"; laws of another configuration or version are in {others[-1]}" if others else ""
    raise MergelawError(f"{file}: its laws are not fitted yet; run `{run_command(file)}`{hint}")


def measured_costs(laws: Path) -> pd.DataFrame:
    """Mean seconds of a study's jobs, one row per base.

    Columns: N (billions), training (an expert; NaN if the study trained none), merging and
    evaluation (a merge), serving (evaluating a million tokens). Raises MergelawError if the laws
    were not fitted to evaluations, or if inputs are gone.
    """
    if laws.is_file() and laws.name != "laws.json":
        raise MergelawError(f"{laws}: a table of points says nothing of costs")
    laws = laws if laws.is_dir() else laws.parent
    if not (laws / LINEAGE).is_file():
        raise MergelawError(f"{laws}: has no lineage, which says what jobs cost")
    shards = lineage.input_paths(laws, lineage.read(laws)).values()
    if not shards:
        raise MergelawError(f"{laws}: fitted to a table of points, which says nothing of costs")
    base, tables = ["base", "N"], []
    trainings: dict[tuple[str, float], dict[Path, float]] = {}
    for shard in shards:
        tables.append(read_rows([shard]))
        trainings.setdefault(tuple(tables[-1][base].iloc[0]), {}).update(_trainings(shard))
    rows = pd.concat(tables, ignore_index=True)
    cells = rows[rows["role"] == "merge"].drop_duplicates([*base, "cell"])
    by_base = cells.groupby(base)
    # A merge is evaluated on every domain.
    merges = cells.groupby([*base, "method", "merge"])["eval_seconds"].sum()
    training = {place: np.mean(list(s.values()) or [np.nan]) for place, s in trainings.items()}
    costs = {
        "training": pd.Series(training),
        "merging": by_base["merge_seconds"].mean(),
        "evaluation": merges.groupby(base).mean(),
        "serving": by_base["eval_seconds"].sum() / by_base["tokens"].sum() * 1e6,
    }
    table = pd.DataFrame(costs).rename_axis(base).reset_index("N")
    return table.astype(float).sort_values("N", ignore_index=True)


def _trainings(shard: Path) -> dict[Path, float]:
    """Seconds of the trainings whose experts an evaluation merged, by expert."""
    seconds = {}
    for path in lineage.input_paths(shard, lineage.read(shard)).values():
        vector = lineage.read(path)
        if vector["stage"] == "task_vector":
            expert = lineage.input_paths(path, vector)["expert"].resolve()
            model = lineage.read(expert)
            if "training" in model["recipe"]:
                seconds[expert] = float(model["wall_seconds"])
    return seconds
