"""Commands about a study and its results folder."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mergelaw.artifacts import lineage, store
from mergelaw.errors import MergelawError

config_app = typer.Typer(help="Check and describe configurations.", no_args_is_help=True)

DEFAULT = Path("config/config.yaml")
StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="a study's configuration")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def load_study(file: Path) -> Any:
    """The study of a configuration file. Raises MergelawError for a bad one."""
    from mergelaw.config import load
    from mergelaw.workflow.study import Study

    return Study(load(file))


def fail_with(problems: Iterable[str]) -> None:
    """Print each problem as an error, and fail if there is one."""
    lines = list(problems)
    for line in lines[:-1]:
        print(f"mergelaw: error: {line}", file=sys.stderr)
    if lines:
        raise MergelawError(lines[-1])


# -- configurations ----------------------------------------------------------------------------


@config_app.command("check")
def config_check(
    file: StudyFile = DEFAULT,
    deep: Annotated[
        bool, typer.Option("--deep", help="read and tokenise all documents, not a few of each file")
    ] = False,
) -> None:
    """Check a configuration, its local models and documents, and say what it would measure.

    Example: mergelaw config check ours.yaml --deep
    """
    from mergelaw.workflow.inspect import inspect

    study = load_study(file)
    findings = inspect(study, deep)
    for note in findings.notes:
        print(f"note: {note}")
    fail_with(f"{file}: {problem}" for problem in findings.problems)
    config, artifacts = study.config, study.by_path.values()
    designs = [len(rows) for rows in study.rows.values()]  # the base itself included
    low, high = min(designs) - 1, max(designs) - 1
    merges = f"{low}" if low == high else f"{low} to {high}"
    bases, seeds = len(designs), len(config.training_seeds)
    learned = len(study.learned_evals)
    rules = len(config.designed)
    measured = (sum(designs) - bases) * rules + bases * len(config.baselines)
    cells = (measured * seeds + learned + bases) * len(config.domains)
    trained = sum(artifact.trains for artifact in artifacts)
    print(
        f"{file}: {bases} bases, {len(config.pool())} experts, {len(config.domains)} domains, "
        f"{rules} methods; {trained} models to train, {merges} merges per base and method, "
        f"{f'{learned} learned merges, ' if learned else ''}{cells:,} cells, {len(artifacts)} jobs"
    )


class Lists(TyperCommand):
    """A command whose repeatable options take several values: ``--data a b`` as well."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat a list's option before each of its values."""
        lists = {name for option in self.params if option.multiple for name in option.opts}
        words: list[str] = []
        option = None
        for word in args:
            if word.startswith("-"):
                option = word if word in lists else None
            elif option is not None and words[-1] != option:
                words.append(option)
            words.append(word)
        return super().parse_args(ctx, words)


def init(
    base: Annotated[Path, typer.Option(help="folder of the base model")],
    experts: Annotated[
        list[Path], typer.Option(help="folders of experts: whole models or adapters; or one above")
    ],
    data: Annotated[
        list[Path], typer.Option(help="a file or folder of documents for each domain; or one above")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="the file to write")] = Path(
        "study.yaml"
    ),
) -> None:
    """Write a configuration for a base, its experts and files of documents.

    Example: mergelaw init --base models/base --experts models/law models/code --data data/*.jsonl
    """
    from mergelaw.config.init import draft
    from mergelaw.config.load import parse_text
    from mergelaw.workflow.deploy import run_command
    from mergelaw.workflow.study import Study

    if output.exists():
        raise MergelawError(f"{output}: exists; name another file with -o")
    text = draft(output.stem, base, experts, data)
    study = Study(parse_text(text, str(output)))
    jobs = len(study.by_path)
    output.write_text(text, encoding="utf-8")
    config = study.config
    placed = [name for name in config.models if config.expert_domains(name)]
    print(
        f"{output}: {len(config.models)} experts ({len(placed)} with a domain), "
        f"{len(config.domains)} domains, {jobs} jobs. Read it, then run\n"
        f"  {run_command(output)}\n  mergelaw best {output}"
    )


def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a new folder")] = Path(
        "mergelaw-demo"
    ),
) -> None:
    """Lay the workflow out in a folder and run the demo there. The same command resumes it.

    Example: mergelaw demo study
    """
    from mergelaw.workflow.deploy import deploy, run_demo

    deploy(folder)
    raise typer.Exit(run_demo(folder))


# -- before, during and after a run ------------------------------------------------------------


def estimate(
    file: StudyFile = DEFAULT,
    rates: Annotated[
        Path | None, typer.Option(help="YAML file of rates, as `mergelaw rates` prints them")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Snakemake profile that describes the cluster's nodes")
    ] = None,
) -> None:
    """Estimate what is left of a study: GPU hours, tokens, bytes, and each kind of job's request.

    Example: mergelaw estimate ours.yaml --profile profiles/slurm
    """
    from mergelaw.workflow import estimate as costs
    from mergelaw.workflow.resources import read_profile

    hardware, threads = read_profile(profile) if profile else (None, 1)
    speeds = costs.read_rates(rates, hardware)
    print(costs.text(costs.estimate(load_study(file), speeds, hardware, threads), speeds))


def rates(file: StudyFile = DEFAULT) -> None:
    """Print how fast a study's jobs were, as a file for `estimate --rates`.

    Example: mergelaw rates config/config.yaml > rates.yaml
    """
    import yaml

    from mergelaw.workflow import estimate as costs

    speeds = costs.measured(load_study(file)).model_dump(exclude_none=True)
    print(yaml.safe_dump(speeds, sort_keys=False), end="")


def status(file: StudyFile = DEFAULT, as_json: Json = False) -> None:
    """Show a study's progress: stages, merges measured, time left, failures.

    Example: mergelaw status ours.yaml
    """
    from mergelaw.workflow.folder import artifacts_in
    from mergelaw.workflow.progress import progress

    study = load_study(file)
    now = progress(study)
    unused = sum(not lineage.is_current(artifact) for artifact in artifacts_in(study.results))
    if as_json:
        print(json.dumps(now.to_dict() | {"unusable_artifacts": unused}, indent=1))
        return
    print(now.text())
    if unused:
        print(
            f"{unused} artifacts were made by another version of mergelaw, or are damaged, and are "
            "not used; `mergelaw gc` lists them"
        )


def summary(file: StudyFile = DEFAULT, as_json: Json = False) -> None:
    """Print a study's laws, the time of each stage and where the report is.

    Example: mergelaw summary ours.yaml
    """
    from mergelaw.workflow import results

    values = results.summary(load_study(file))
    print(json.dumps(values, indent=1) if as_json else results.summary_text(values))


def show_lineage(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="STUDY|PATH",
            help="a configuration, an artifact, a file in one, or a results folder",
        ),
    ] = DEFAULT,
    verify: Annotated[
        bool, typer.Option("--verify", help="compare every file with its digest")
    ] = False,
    measure: Annotated[
        int, typer.Option(min=0, help="merges of each of a study's evaluations to measure again")
    ] = 0,
) -> None:
    """Print where an artifact comes from, back to the sources. A study stands for its report.

    Example: mergelaw lineage results --verify
    """
    from mergelaw.artifacts.run_lock import MARK
    from mergelaw.workflow import folder

    is_root, study = (path / MARK).exists(), None
    if is_root:
        artifacts = folder.artifacts_in(path)
    elif path.suffix in (".yaml", ".yml") and path.is_file():
        study = load_study(path)
        artifacts = [study.results / study.report.path]
    else:
        artifacts = [lineage.find(path)]
    if measure and study is None:
        raise MergelawError(f"{path}: no study; --measure needs the configuration of one")
    if not verify and not measure:
        for artifact in artifacts:
            print("\n".join(lineage.tree(artifact)))
        return
    count, wrong = folder.verify(path) if is_root else lineage.verify(artifacts)
    wrong += folder.measure_again(study, measure) if study and not wrong else []
    fail_with(wrong)
    print(f"verified: {count} artifacts, every file is what was written")
    if measure:
        print(f"{measure} merges of each evaluation have the same losses when measured again")
    else:
        print("losses are trusted; `mergelaw lineage STUDY --measure 2` measures a sample again")


def collect_garbage(
    files: Annotated[
        list[Path], typer.Argument(metavar="STUDY...", help="configurations of studies to keep")
    ],
    delete: Annotated[bool, typer.Option("--delete", help="remove what is listed")] = False,
) -> None:
    """List what none of the named studies needs. Measured cells are always kept.

    Example: mergelaw gc ours.yaml theirs.yaml
    """
    from mergelaw.workflow import folder

    count, freed = 0, 0
    for path, size in folder.collect_garbage([load_study(file) for file in files], delete):
        print(f"{size:>14,}  {path}")
        count, freed = count + 1, freed + size
    verb = "removed" if delete else "not referred to (--delete removes them)"
    print(f"{count} artifacts and files, {freed:,} bytes {verb}; measured cells are kept")


# -- with what was made ------------------------------------------------------------------------


def merge(
    output: Annotated[Path, typer.Option(help="folder of the checkpoint; must be new")],
    experts: Annotated[
        list[str], typer.Option("--expert", help="an expert of the study; repeatable")
    ],
    method: Annotated[str, typer.Option(help="one of the study's methods")],
    file: StudyFile = DEFAULT,
    base: Annotated[
        str | None, typer.Option(help="a base of the study; required if it has several")
    ] = None,
    weights: Annotated[
        list[float] | None,
        typer.Option("--weight", help="one for each expert; default: equal weights"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="training seed; default: the study's first")
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(min=1, help="write one LoRA adapter of this rank; all experts are adapters"),
    ] = None,
) -> None:
    """Write a merge of a study's experts as a Hugging Face checkpoint, or as one adapter.

    Example: mergelaw merge ours.yaml --method ties --expert law --expert medicine --output merged
    """
    from mergelaw.config import parse
    from mergelaw.decide.card import write_card
    from mergelaw.merging.export import export, export_adapter
    from mergelaw.workflow.results import rows_of_merge
    from mergelaw.workflow.study import Study

    study = load_study(file)
    if base is None:
        if len(study.bases) > 1:
            raise MergelawError(f"merge: give --base, one of {', '.join(study.bases)}")
        (base,) = study.bases
    wanted = {"base": base, "method": method, "experts": experts, "weights": weights, "seed": seed}
    settings = study.config.model_dump(by_alias=True, exclude_unset=True)
    (artifact,) = Study(parse(settings | {"merges": {"merge": wanted}}, "merge")).merges.values()
    places = _parts(study, artifact, file)
    vectors = {name: places[f"task_vectors:{name}"] for name in artifact.names("task_vectors")}
    coefficients = places.get("coefficients")
    rows = rows_of_merge(study, artifact.recipe, places["base"], vectors, coefficients)
    recipe, start = artifact.recipe | ({"lora": lora} if lora else {}), places["base"]

    def work(folder: Path, state: Path) -> dict[str, Any]:
        if lora is None:
            write_card(recipe, start, vectors, rows, folder)
            return export(recipe, start, vectors, folder, output, coefficients)
        errors = export_adapter(recipe, start, vectors, folder, lora, coefficients)
        note = truncation(study, start, folder, errors, lora, rows)
        write_card(recipe, start, vectors, rows, folder, note=note)
        return {"relative_errors": errors}

    keys = {name: dependency.key for name, dependency in artifact.named_inputs()}
    is_new = store.make(output, "merge", recipe, places, work, wanted=keys)
    print(f"{output}: {'written' if is_new else 'exists already'}")


def _parts(study: Any, artifact: Any, file: Path) -> dict[str, Path]:
    """Folders of what a merge is made from. Raises MergelawError if one is not made yet."""
    from mergelaw.workflow.deploy import run_command

    places = {}
    for name, dependency in artifact.named_inputs():
        if name in ("evaluation", "confirmation"):
            continue
        if not study.made(dependency):
            also = "" if dependency.path in study.known else "name the merge in `merges`, then "
            raise MergelawError(
                f"{study.results / dependency.path}: is not made yet; {also}run "
                f"`{run_command(file)}` first"
            )
        places[name] = study.results / dependency.path
    return places


def truncation(
    study: Any, base: Path, adapter: Path, errors: dict[str, float], rank: int, rows: Any
) -> str:
    """Print what a merge loses as one adapter of a rank; return a sentence for its card.

    ``rows`` are those of the merge itself, or None.
    """
    from mergelaw.cli.process import prepare_torch
    from mergelaw.evaluation.shard import measure_model

    for module, error in errors.items():
        print(f"{module}: relative error {error:.2g}")
    note = f"This adapter is the merge's closest one of rank {rank}: relative Frobenius errors up "
    note += f"to {max(errors.values(), default=0):.2g} by module."
    corpora = {name: study.results / a.path for name, a in study.corpora["eval"].items()}
    if all(path.exists() for path in corpora.values()):
        prepare_torch(1)
        losses = measure_model(base, study.config.evaluation.model_dump(), corpora, adapter)
        nats = [
            sum(nll) / sum(tokens)
            for nll, tokens in losses[["document_nll", "document_tokens"]].to_numpy()
        ]
        note += f" Its mean loss over all domains, measured, is {sum(nats) / len(nats):.4f}"
        merges = None if rows is None else rows[rows["k"] > 0]
        note += "." if merges is None else f"; the merge's is {merges['ce'].mean():.4f}."
    print(note)
    return note


def fit(
    points: Annotated[
        Path,
        typer.Option(
            help="CSV or Parquet file with the columns N, k and loss, and any of se, circles, M, "
            "domain, method, family and base"
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="folder for the fits; must be new")] = None,
) -> None:
    """Fit the laws to a table of points that were measured elsewhere.

    Example: mergelaw fit --points points.csv --output laws
    """
    from mergelaw.artifacts.files import file_digest
    from mergelaw.laws import fits
    from mergelaw.laws.points import read_points
    from mergelaw.laws.summary import study_text

    study = fits.fit_all(*read_points(points))
    if not study.fits:  # the law of one base was tried last and needs the fewest points
        raise MergelawError(f"{points}: {study.refused[-1]['reason']}")
    print(study_text(study.to_dict()), end="")
    if output is None:
        return
    recipe = {"points": file_digest(points)}
    store.make(output, "fit", recipe, {}, lambda folder, state: fits.write(study, folder))
