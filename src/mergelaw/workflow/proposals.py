"""Proposed merges as a configuration that includes a study and adds them to its ``merges``."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mergelaw import config
from mergelaw.decide.measured import Measured
from mergelaw.decide.objective import Objective
from mergelaw.decide.predict import predictor
from mergelaw.decide.select import Proposal, Selection
from mergelaw.decide.select import select as select_merges
from mergelaw.errors import MergelawError
from mergelaw.evaluation import read_rows
from mergelaw.merging.methods.learned import Learned
from mergelaw.workflow.folder import use
from mergelaw.workflow.study import Study

SUFFIX = ".select.yaml"


def output_of(file: Path, output: Path | None) -> Path:
    """The file that takes proposals. Raises MergelawError if another one is there."""
    if output is None:
        name = file.name if file.name.endswith(SUFFIX) else file.stem + SUFFIX
        output = file.with_name(name)
    if output.exists() and "include" not in config.read(output):
        raise MergelawError(
            f"{output}: is no file of `mergelaw select`; name another file with --output"
        )
    return output


def select(study: Study, measured: Measured, objective: Objective, batch: int) -> Selection:
    """The merges of a base to measure next; proposals in the study's configuration are compared."""
    methods = study.config.methods
    learned = [name for name, method in methods.items() if isinstance(method, Learned)]
    earlier = [
        Proposal(merge.method, merge.experts, p.value, p.low, p.high)
        for merge in study.config.merges.values()
        if (p := merge.predicted) and merge.base == measured.base and p.objective == objective.text
    ]
    gradients = study.gradients.get((measured.base, min(m.seed for m in measured.merges)))
    folder = use(study, [gradients])[0] if gradients and study.made(gradients) else None
    predicts = predictor(measured, folder)
    return select_merges(measured, predicts, objective, batch, learned, earlier)


def write(study: Study, file: Path, output: Path, selections: Sequence[Selection]) -> None:
    """Write the proposals, and those that the study has already, into ``output``.

    Raises MergelawError if the configuration with them is not valid; then nothing is written.
    """
    before = config.read(output) if output.exists() else {}
    include = before.get("include", os.path.relpath(file, output.parent))
    merges = before.get("merges", {})
    proposed = [(m["base"], m["method"], set(m["experts"])) for m in merges.values()]
    for selection in selections:
        for one in selection.proposals:
            place = (selection.measured.base, one.method, set(one.experts))
            if place in proposed:  # before, and not measured yet
                continue
            proposed.append(place)
            entry: dict[str, Any] = dict(zip(("base", "method", "experts"), place, strict=True))
            entry |= {"experts": list(one.experts), "write": False}
            if one.value is not None:
                entry["predicted"] = {
                    "objective": selection.objective.text,
                    "value": round(one.value, 6),
                    "low": round(one.low or 0.0, 6),
                    "high": round(one.high or 0.0, 6),
                }
            merges[f"select-{len(proposed):03d}"] = entry
    text = "# Merges that `mergelaw select` proposed, to measure in addition to the study's.\n"
    text += yaml.safe_dump({"include": include, "merges": merges}, sort_keys=False, width=100)
    scratch = output.with_suffix(".new")
    try:
        scratch.write_text(text, encoding="utf-8")
        config.load(scratch)
        scratch.replace(output)
    finally:
        scratch.unlink(missing_ok=True)


def cost(study: Study, selections: Sequence[Selection]) -> str:
    """Time to measure the proposals on the device that measured the other merges, in words."""
    rows = read_rows(use(study, filter(study.made, study.measurements))).drop_duplicates("cell")
    parts = []
    for selection in selections:
        one, count = selection.measured, len(selection.proposals)
        merges = rows[(rows["base"] == one.base) & (rows["k"] > 0)].groupby("merge")
        each = merges["eval_seconds"].sum().mean() + merges["merge_seconds"].first().mean()
        documents = sum(map(len, one.documents([one.reference]).tokens))
        time = f"{count * each:.0f} seconds"
        if count * each > 3600:
            time = f"{count * each / 3600:.1f} hours"
        parts.append(f"{one.base}: {count} merges on {documents} documents take about {time}")
    return "; ".join(parts)
