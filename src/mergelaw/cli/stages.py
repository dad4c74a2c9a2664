"""`mergelaw stage`: the workflow's commands, one per stage, each with a job file as argument."""

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mergelaw.artifacts import keys
from mergelaw.artifacts.lineage import digest_cache
from mergelaw.cli.process import prepare_torch
from mergelaw.errors import MergelawError
from mergelaw.workflow.job import Job, read_job

stages = typer.Typer(help="Stages of the workflow, run by Snakemake's rules.", no_args_is_help=True)

# (job, folder for the artifact's files, folder of states) -> facts for the lineage
Work = Callable[[Job, Path, Path], dict[str, Any]]


def stage(work: Work) -> Work:
    """Make a stage's command from its work: it reads the job, makes the artifact and logs it."""
    name = work.__name__

    def command(
        file: Annotated[Path, typer.Argument(help="the job, a JSON file of the workflow's")],
        threads: Annotated[int, typer.Option(min=1, help="processor threads")] = 1,
        save_every: Annotated[float, typer.Option(help="seconds between saved states")] = 600,
    ) -> None:
        job = read_job(file, name, threads, save_every)
        # The first line takes a disk block for the log, so the last one fits on a full disk.
        print(f"mergelaw: {job.output} ...", file=sys.stderr, flush=True)
        is_new = job.make(lambda folder, state: work(job, folder, state))
        print(f"mergelaw: {job.output} {'made' if is_new else 'exists already'}", file=sys.stderr)

    stages.command(name.replace("_", "-"), help=work.__doc__)(command)
    return work


@stage
def corpus(job: Job, folder: Path, state: Path) -> dict[str, Any]:
    """Write a split of a domain's documents."""
    from mergelaw.data import documents
    from mergelaw.data.recipe import SplitRecipe

    recipe = SplitRecipe.model_validate(job.sources["recipe"])
    return documents.write_split(recipe, job.sources["split"], job.recipe, folder)


@stage
def overlap(job: Job, folder: Path, state: Path) -> dict[str, Any]:
    """Check that no document is in two splits, whatever the domains."""
    from mergelaw.data import SPLITS, documents

    splits = [job.all(split) for split in SPLITS]
    notes = documents.check_overlap(*splits)
    for note in notes:
        print(f"mergelaw: {note}", file=sys.stderr)
    return {"corpora": sum(map(len, splits))} | ({"notes": notes} if notes else {})


@stage
def base(job: Job, folder: Path, state: Path) -> dict[str, Any]:
    """Pre-train a base, or link a ready-made one after comparing its digests."""
    if "checkpoint" in job.recipe:
        from mergelaw.models.hub import locate
        from mergelaw.models.inspect import inspect_base

        notes = inspect_base(locate(job.sources))
        for note in notes:
            print(f"mergelaw: {note}", file=sys.stderr)
        return ready_made(job, folder) | ({"notes": notes} if notes else {})
    from mergelaw.models.pretrain import pretrain
    from mergelaw.models.recipe import Pretraining

    prepare_torch(job.threads)
    settings = Pretraining.model_validate(job.recipe["pretraining"])
    return pretrain(settings, job.all("corpora"), folder, state, job.save_every)


@stage
def expert(job: Job, folder: Path, state: Path) -> dict[str, Any]:
    """Train an expert, or link a ready-made one after comparing its digests."""
    if "checkpoint" in job.recipe:
        return ready_made(job, folder)
    from mergelaw.models import finetune, openrlhf
    from mergelaw.models.recipe import Training

    prepare_torch(job.threads)
    settings = Training.model_validate(job.recipe["training"])
    trainer = openrlhf if settings.trainer == "openrlhf" else finetune
    start, seed, corpora = job.one("base"), job.recipe["seed"], job.all("corpora")
    return dict(trainer.fine_tune(settings, seed, start, corpora, folder, state, job.save_every))


def ready_made(job: Job, folder: Path) -> dict[str, Any]:
    """Link the files of a ready-made checkpoint; those that are as when the run began are not read.

    Raises MergelawError for a file with another digest than the recipe's.
    """
    from mergelaw.models.hub import link_source

    facts, cache = link_source(job.sources, folder), digest_cache(job.output)
    for name, digest in job.recipe["checkpoint"].get("files", {}).items():
        path = Path(job.sources["path"], name)
        if cache.sha256(path) != digest:
            raise MergelawError(f"{path.resolve()}: changed since the run began; rerun")
    return facts


@stage
def task_vector(job: Job, folder: Path, state: Path) -> dict[str, Any]:
    """Subtract a base from its expert, without loss."""
    from mergelaw.merging import task_vector

    prepare_torch(1)
    settings = {**job.recipe, **job.sources}
    return task_vector.write(job.one("base"), job.one("expert"), folder, **settings)


@stage
def design(job: Job, folder: Path, state: Path) -> dict[str, Any]:
    """Write the design of a base as a table: which subsets are merged."""
    import pandas as pd

    table = pd.DataFrame(checked_rows(job), columns=["k", "replicate", "place", "experts"])
    table.to_parquet(folder / "design.parquet", index=False)
    return {"merges": len(table)}


def checked_rows(job: Job) -> list[Any]:
    """The rows or subsets in a job, after comparing them with their digest in the recipe."""
    if keys.digest(list(job.rows)) != job.recipe["subsets"]:
        raise MergelawError(f"{job.output}: the job's rows are not the recipe's; rerun snakemake")
    return list(job.rows)


@stage
def learn(job: Job, folder: Path, state: Path) -> dict[str, Any]:
    """Learn the coefficients of merges from calibration documents."""
    from mergelaw.decide import calibration

    prepare_torch(job.threads)
    start, vectors, corpora = job.one("base"), job.all("task_vectors"), job.all("corpora")
    return calibration.write(job.recipe, checked_rows(job), start, vectors, corpora, folder, state)


@stage
def gradients(job: Job, folder: Path, state: Path) -> dict[str, Any]:
    """Compute gradients at the mean of all experts, from which merges are predicted."""
    from mergelaw.decide import gradients as stage_of_gradients

    prepare_torch(job.threads)
    vectors, corpora = job.all("task_vectors"), job.all("corpora")
    cache = Path(job.sources["cells"]) / "prepared"
    return stage_of_gradients.write(job.recipe, job.one("base"), vectors, corpora, cache, folder)


@stage
def evaluate(job: Job, folder: Path, state: Path) -> dict[str, Any]:
    """Measure the cross-entropy of a shard of merges."""
    from mergelaw.evaluation import shard

    prepare_torch(job.threads)
    start, vectors, corpora = job.one("base"), job.all("task_vectors"), job.all("corpora")
    rows, store, name = checked_rows(job), Path(job.sources["cells"]), job.output.name
    coefficients = job.optional("coefficients")
    return shard.evaluate(
        job.recipe, rows, start, vectors, corpora, store, name, folder, coefficients
    )


@stage
def fit(job: Job, folder: Path, state: Path) -> dict[str, Any]:
    """Fit the laws to the cells of evaluations."""
    from mergelaw.evaluation import read_cells
    from mergelaw.laws import fits

    rows, documents = read_cells(list(job.all("evals").values()))
    study = fits.fit_study(rows, documents, job.recipe.get("common_experts"))
    facts = fits.write(study, folder)
    print((folder / "summary.txt").read_text(encoding="utf-8"), end="")
    return facts


@stage
def report(job: Job, folder: Path, state: Path) -> dict[str, Any]:
    """Write the report: one HTML page with its figures and tables."""
    from mergelaw.evaluation import read_rows
    from mergelaw.merging.methods.learned import read_coefficients
    from mergelaw.report import write_report
    from mergelaw.workflow.results import facts_of, measured_in

    laws, shards = job.one("laws"), list(job.all("evals").values())
    title, facts, rows = job.recipe["title"], facts_of(laws), read_rows(shards)
    every, _ = measured_in(shards)
    learned = job.all("coefficients").items()
    tables = {name: max(read_coefficients(path).values(), key=len) for name, path in learned}
    write_report(laws, rows, folder, title=title, facts=facts, measured=every, coefficients=tables)
    return {}


@stage
def merge(job: Job, folder: Path, state: Path) -> dict[str, Any]:
    """Write a merge as a checkpoint, and as mergekit's YAML where mergekit merges the same way."""
    from mergelaw.decide.card import write_card
    from mergelaw.evaluation import read_rows
    from mergelaw.merging.export import export

    start, vectors = job.one("base"), job.all("task_vectors")
    rows = read_rows([job.one("evaluation")], documents=True)
    other = job.optional("confirmation")
    confirmed = read_rows([other], documents=True) if other else None
    write_card(job.recipe, start, vectors, rows, folder, confirmed)
    return export(job.recipe, start, vectors, folder, job.output, job.optional("coefficients"))


@stages.command()
def partial(
    configuration: Annotated[Path, typer.Argument(help="the study's configuration")],
) -> None:
    """Fit and report what has been measured so far, and say what is missing."""
    from mergelaw import config
    from mergelaw.decide import best
    from mergelaw.evaluation import read_cells
    from mergelaw.laws import fits
    from mergelaw.report import write_report
    from mergelaw.workflow.folder import use
    from mergelaw.workflow.results import measured_in, nothing_measured
    from mergelaw.workflow.study import Study

    study = Study(config.load(configuration))
    shards = study.evals.values()
    measured = use(study, filter(study.made, shards))
    missing = [a.folder for a in shards if not study.made(a)]
    if not measured:
        raise MergelawError(nothing_measured(study))
    folder = study.results / "partial" / study.config.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    rows, documents = read_cells(measured)
    common = study.laws.recipe.get("common_experts")
    facts = {"measured so far": f"{len(measured)} of {len(shards)} shards"}
    every, _ = measured_in(measured)
    title = study.config.name
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        scratch, laws = Path(name) / "new", Path(name) / "new" / "laws"
        laws.mkdir(parents=True)
        fits.write(fits.fit_study(rows, documents, common), laws, missing)
        write_report(laws, rows, scratch, title=title, facts=facts, measured=every)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    for one in every:
        print(f"{one.base}, of what is measured: {best(one).sentence}")
    if missing:
        print(f"{len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:6])}")
    print(f"report on the rest: {folder / 'report.html'}")
