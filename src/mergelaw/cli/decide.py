"""Commands that decide on measured merges: best, select, experts and compare."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Exit, Option

from mergelaw.cli.study import DEFAULT, Json, StudyFile, load_study
from mergelaw.errors import MergelawError, nearest

if TYPE_CHECKING:
    import pandas as pd

    from mergelaw.decide import Best, Measured, Objective
    from mergelaw.decide.compare import Guard

Base = Annotated[str | None, Option(help="a base of the study; default: all")]


Kind = Annotated[
    Literal["macro", "worst"],
    Option(
        "--objective",
        help="macro: mean loss of the domains that are not held out; worst: loss above the "
        "base in the domain that gains least",
    ),
]
Weights = Annotated[
    str | None, Option(help="weights of the domains that count, as in maths=2,code=1")
]
NotAbove = Annotated[
    str | None,
    Option(
        help="limits in nats above the base, as in code=0.01,law=0; all=0: no domain above it; "
        "held_out=0: no held-out domain"
    ),
]
NotAboveExpert = Annotated[
    str | None, Option(help="the same above the best single expert on each domain")
]
AtMost = Annotated[int | None, Option(min=1, help="most experts in the merge")]
Require = Annotated[list[str] | None, Option(help="an expert that it must have; repeatable")]
Exclude = Annotated[list[str] | None, Option(help="an expert that it must not have; repeatable")]
Methods = Annotated[
    list[str] | None, Option("--method", help="merges by this method only; repeatable")
]


def objective_of(
    kind: Literal["macro", "worst"],
    weights: str | None,
    not_above: str | None,
    not_above_expert: str | None,
    at_most: int | None,
    *names: list[str] | None,
) -> "Objective":
    """The objective that the options of a choice describe; ``names``: of experts and methods."""
    from mergelaw.decide import Objective

    return Objective(
        kind,
        numbers("--weights", weights),
        numbers("--not-above", not_above),
        numbers("--not-above-expert", not_above_expert),
        at_most,
        *(one or () for one in names),
    )


def best(
    file: StudyFile = DEFAULT,
    base: Base = None,
    objective: Kind = "macro",
    weights: Weights = None,
    not_above: NotAbove = None,
    not_above_expert: NotAboveExpert = None,
    at_most: AtMost = None,
    require: Require = None,
    exclude: Exclude = None,
    method: Methods = None,
    top: Annotated[int, Option(min=1, help="merges to list")] = 10,
    pareto: Annotated[
        str | None,
        Option(
            help="instead of a ranking, the merges that no other beats in all of these domains or "
            "groups, as in maths,law+code"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Rank the measured merges: which one to ship, how sure that is, and how to write it.

    Example: mergelaw best ours.yaml --objective macro --not-above all=0.01
    """
    from mergelaw import decide

    limits = weights, not_above, not_above_expert
    wanted = objective_of(objective, *limits, at_most, require, exclude, method)
    study = load_study(file)
    if pareto is not None:
        print_fronts(study, base, wanted, pareto.split(","), as_json)
        return
    results = for_each_base(study, base, lambda measured: decide.best(measured, wanted))
    if as_json:
        answers = [
            b.to_dict(top) | {"command": b.command(str(file), len(study.bases) > 1)}
            for b in results
        ]
        print(json.dumps(answers, indent=1, ensure_ascii=False, allow_nan=False))
        return
    print("\n\n".join(best_text(b, str(file), top, len(study.bases) > 1) for b in results))
    from mergelaw.workflow.results import confirmed

    print("".join(f"\n{line}" for line in confirmed(study)))


def print_fronts(
    study: Any, base: str | None, objective: "Objective", groups: list[str], as_json: bool
) -> None:
    """Print the Pareto front of each base."""
    from mergelaw.decide import tables
    from mergelaw.decide.measured import to_json
    from mergelaw.decide.pareto import pareto

    answers = {}
    for one, points in for_each_base(study, base, lambda m: (m, pareto(m, objective, groups))):
        table = tables.front(one, points, groups)
        answers[one.base] = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
        if not as_json:
            print(
                "\n".join([f"{one.base}: * no measured merge is lower in all", *table.lines(), ""])
            )
    if as_json:
        print(json.dumps(to_json(answers), indent=1, ensure_ascii=False, allow_nan=False))


def select(
    file: StudyFile = DEFAULT,
    base: Base = None,
    objective: Kind = "macro",
    weights: Weights = None,
    not_above: NotAbove = None,
    not_above_expert: NotAboveExpert = None,
    at_most: AtMost = None,
    require: Require = None,
    exclude: Exclude = None,
    method: Methods = None,
    batch: Annotated[int, Option(min=1, help="most merges to propose for each base")] = 10,
    output: Annotated[
        Path | None,
        Option("--output", "-o", help="the file to write; default: beside STUDY, NAME.select.yaml"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Propose merges to measure next, as a configuration that adds them to the study.

    Called again, it compares proposals with measurements and goes on, or says that nothing is left.

    Example: mergelaw select ours.yaml --batch 8 --not-above held_out=0
    """
    from mergelaw.workflow import proposals

    limits = weights, not_above, not_above_expert
    wanted = objective_of(objective, *limits, at_most, require, exclude, method)
    output = proposals.output_of(file, output)
    study = load_study(output if output.exists() else file)
    results = for_each_base(
        study, base, lambda measured: proposals.select(study, measured, wanted, batch)
    )
    if as_json:
        answers = [one.to_dict() for one in results]
        print(json.dumps(answers, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        from mergelaw.decide import tables

        for one in results:
            lines = [f"{one.measured.base}: {sentence}" for sentence in one.sentences]
            table = tables.proposals(one)
            print("\n".join([*lines, *(table.lines() if table.rows else []), ""]))
    if any(one.proposals for one in results):
        proposals.write(study, file, output, results)
        print(proposals.cost(study, results), file=sys.stderr)
        print(
            f"{output}: written; measure its merges, and only those, and choose again:\n"
            f"  snakemake --profile profiles/local --configfile {output}\n"
            f"  mergelaw select {output}",
            file=sys.stderr,
        )


def experts(
    file: StudyFile = DEFAULT,
    base: Base = None,
    method: Annotated[
        str | None, Option(help="merges of one method; default: the mean over methods")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what each expert does to the merges that it is in, and which ones to leave out.

    Example: mergelaw experts ours.yaml --base 1B
    """
    from mergelaw import decide
    from mergelaw.decide import tables

    study = load_study(file)
    results = for_each_base(study, base, lambda one: (one, decide.experts(one, method)))
    if as_json:
        answers = {one.base: [v.to_dict() for v in verdicts] for one, verdicts in results}
        print(json.dumps(answers, indent=1, ensure_ascii=False, allow_nan=False))
        return
    for one, verdicts in results:
        names = [method] if method else dict.fromkeys(m.method for m in one.merges if m.equal)
        means = " (means over these methods)" if len(names) > 1 else ""
        print(f"{one.base}: merges by {', '.join(names)}{means}")
        flagged = [f"{one.base}: {v.sentence}" for v in verdicts if v.flagged]
        print("\n".join([*flagged, *tables.verdicts(verdicts).lines(), ""]))
        donors = tables.donors(verdicts)
        if donors.rows:
            print("change of a domain's loss when an expert joins a merge (negative: it helps)")
            print("\n".join(donors.lines()))


def compare(
    first: Annotated[
        str, Argument(metavar="BEFORE", help="a measured merge, by its id, or a model's folder")
    ],
    second: Annotated[str, Argument(metavar="AFTER", help="another one")],
    file: StudyFile = DEFAULT,
    against: Annotated[
        Path | None,
        Option(help="YAML of thresholds: allow (nats), domains (nats by domain), alpha"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two merges or models by domain. Exit status 1 if AFTER is worse than is allowed.

    Example: mergelaw compare 0c2aec3bc306 merged/ ours.yaml --against guard.yaml
    """
    from mergelaw.decide import compare as comparison
    from mergelaw.decide.tables import Table

    study = load_study(file)
    domains = list(study.config.domains)
    guard = read_guard(against, domains) if against else comparison.Guard()
    before, after = (rows_of(study, model) for model in (first, second))
    held_out = [name for name in domains if study.config.domains[name].held_out]
    table, mean = comparison.compare(before, after, domains, guard, held_out)
    sentence, failed = comparison.conclusion(table), any(c.regressed for c in table)
    if as_json:
        from mergelaw.decide.measured import to_json

        entries = [vars(c) | {"verdict": c.word} for c in table]
        answer = {"sentence": sentence, "regression": failed, "mean": mean, "domains": entries}
        print(json.dumps(to_json(answer), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        rows = [
            [c.domain, f"{c.before:.4f}", f"{c.after:.4f}", c.difference.text(),
             f"{c.allowed:+.4f}", f"{c.p:.2g}", c.word]
            for c in table
        ]  # fmt: skip
        heads = ["domain", "before", "after", "after - before", "allowed", "p (Holm)", ""]
        lines = Table(heads, rows).lines()
        print("\n".join([sentence, f"macro loss: {mean.text()}", "", *lines]))
    if failed:
        raise Exit(1)


def read_guard(path: Path, domains: Sequence[str]) -> "Guard":
    """The guard in a YAML file. Raises MergelawError for a bad file or an unknown domain."""
    from pydantic import ValidationError

    from mergelaw import config
    from mergelaw.decide.compare import Guard

    try:
        guard = Guard.model_validate(config.read(path))
    except ValidationError as error:
        raise MergelawError(f"{path}: {config.describe(error)}") from None
    for name in guard.domains:
        if name not in domains:
            raise MergelawError(
                f"{path}, domains.{name}: no such domain{nearest(name, domains)}; the study "
                f"measures {', '.join(domains)}"
            )
    return guard


def rows_of(study: Any, model: str) -> "pd.DataFrame":
    """Losses by document of a measured merge, by its id, or of a model's folder."""
    folder = Path(model)
    if folder.is_dir():
        from mergelaw.cli.process import prepare_torch
        from mergelaw.evaluation.shard import measure_model

        corpora = {name: study.results / a.path for name, a in study.corpora["eval"].items()}
        for path in corpora.values():
            if not path.exists():
                raise MergelawError(f"{path}: is not made yet; run the study first")
        prepare_torch(1)
        return measure_model(folder, study.config.evaluation.model_dump(), corpora)
    from mergelaw.workflow.results import measured

    every, _ = measured(study)
    matches = {
        i: one for one in every for i in one.models if len(model) > 3 and i.startswith(model)
    }
    if len(matches) != 1:
        many = f"{len(matches)} measured merges have an id that starts with"
        what = many if matches else "no measured merge or folder is named"
        raise MergelawError(f"compare: {what} {model!r}; `mergelaw best --top 100` lists ids")
    ((identity, one),) = matches.items()
    return one.read([identity])


def for_each_base(study: Any, base: str | None, decide: "Callable[[Measured], Any]") -> list[Any]:
    """Answers by base. What one base lacks is a warning, unless no base has an answer."""
    from mergelaw.workflow.results import measured

    if base is not None and base not in study.bases:
        raise MergelawError(f"--base {base}: no such base; give one of {', '.join(study.bases)}")
    every, warnings = measured(study)
    answers = []
    for one in every:
        if base in (None, one.base):
            try:
                answers.append(decide(one))
            except MergelawError as error:
                warnings.append(str(error))
    for warning in warnings[: None if answers else -1]:
        print(f"mergelaw: warning: {warning}", file=sys.stderr)
    if not answers:
        raise MergelawError(warnings[-1] if warnings else f"--base {base}: nothing is measured yet")
    return answers


def numbers(option: str, text: str | None) -> dict[str, float]:
    """The values of an option such as maths=2,code=1."""
    values: dict[str, float] = {}
    for part in (text or "").split(",") if text is not None else ():
        name, _, number = (word.strip() for word in part.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name or not math.isfinite(value) or name in values:
            raise MergelawError(f"{option} {text}: give each domain once, as in maths=2,code=1")
        values[name] = value
    return values


def best_text(best: "Best", file: str, top: int, several_bases: bool) -> str:
    """A ranking as text for a terminal."""
    from mergelaw.decide import tables

    command = best.command(file, several_bases)
    lines = [f"{best.measured.base}: {best.sentence}"]
    lines += [f"rule: {best.model.recipe}"] if command else []
    lines += [best.doubt, *([best.share] if best.share else []), ""]
    lines += [*tables.ranking(best, top).lines(), "", *tables.domains(best).lines()]
    return "\n".join([*lines, *(["", f"write it: {command}"] if command else [])])
