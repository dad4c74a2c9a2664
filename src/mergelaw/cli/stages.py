"""`mergelaw stage`: the workflow's own commands, one a stage, each given a job file."""

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mergelaw.artifacts import keys, store
from mergelaw.cli.process import prepare_torch
from mergelaw.errors import MergelawError
from mergelaw.workflow.job import Job, read_job

stages = typer.Typer(help="Stages of the workflow, run by Snakemake's rules.", no_args_is_help=True)

JobFile = Annotated[Path, typer.Argument(help="the job, a JSON file that the workflow writes")]
Threads = Annotated[int, typer.Option(min=1, help="processor threads")]
SaveEvery = Annotated[float, typer.Option(help="seconds between saved states")]


def run(job: Job, work: store.Work) -> None:
    """Make a job's artifact and log it."""
    # The first line takes a block of the log's disk, so that the last one fits when it is full.
    print(f"mergelaw: {job.output} ...", file=sys.stderr, flush=True)
    made = job.make(work)
    print(f"mergelaw: {job.output} {'made' if made else 'exists already'}", file=sys.stderr)


@stages.command()
def corpus(file: JobFile) -> None:
    """Write a split of a domain's documents."""
    from mergelaw.data import documents
    from mergelaw.data.recipe import SplitRecipe

    job = read_job(file, "corpus")
    sources = job.sources or {}
    recipe = SplitRecipe.model_validate(sources["recipe"])

    def work(folder: Path, state: Path) -> dict[str, Any]:
        return documents.write_split(recipe, sources["split"], job.recipe, folder)

    run(job, work)


@stages.command("check-overlap")
def check_overlap(file: JobFile) -> None:
    """Check that no document is in two splits, whatever the domains."""
    from mergelaw.data import documents

    job = read_job(file, "overlap")
    train, evaluation, calibration = map(job.all, ("train", "eval", "calibration"))

    def work(folder: Path, state: Path) -> dict[str, Any]:
        documents.check_overlap(train, evaluation, calibration)
        return {"corpora": len(train) + len(evaluation) + len(calibration)}

    run(job, work)


def model(job: Job, train: store.Work, threads: int) -> None:
    """Make a checkpoint: train it, or link a ready-made one after comparing its digests."""

    def work(folder: Path, state: Path) -> dict[str, Any] | None:
        if "checkpoint" in job.recipe:
            from mergelaw.models.hub import link_verified

            return link_verified(job.recipe["checkpoint"], job.sources or {}, folder)
        prepare_torch(threads)
        return train(folder, state)

    run(job, work)


@stages.command()
def base(file: JobFile, threads: Threads = 1, save_every: SaveEvery = 600) -> None:
    """Pre-train a base, or link a ready-made one to its folder."""
    job = read_job(file, "base")

    def train(folder: Path, state: Path) -> dict[str, Any]:
        from mergelaw.models.pretrain import pretrain
        from mergelaw.models.recipe import Pretraining

        settings = Pretraining.model_validate(job.recipe["pretraining"])
        return pretrain(settings, job.all("corpora"), folder, state, save_every)

    model(job, train, threads)


@stages.command()
def expert(file: JobFile, threads: Threads = 1, save_every: SaveEvery = 600) -> None:
    """Train an expert, or link a ready-made one to its folder."""
    job = read_job(file, "expert")

    def train(folder: Path, state: Path) -> dict[str, Any]:
        from mergelaw.models import finetune, openrlhf
        from mergelaw.models.recipe import Training

        settings, corpora = Training.model_validate(job.recipe["training"]), job.all("corpora")
        trainer = openrlhf if settings.trainer == "openrlhf" else finetune
        seed, start = job.recipe["seed"], job.one("base")
        return trainer.fine_tune(settings, seed, start, corpora, folder, state, save_every)

    model(job, train, threads)


@stages.command("task-vector")
def task_vector(file: JobFile) -> None:
    """Subtract a base from its expert, without loss."""
    from mergelaw.merging import task_vector as stage

    job = read_job(file, "task_vector")

    def work(folder: Path, state: Path) -> dict[str, Any]:
        prepare_torch(1)
        settings = {**job.recipe, **(job.sources or {})}
        return stage.write(job.one("base"), job.one("expert"), folder, **settings)

    run(job, work)


@stages.command()
def design(file: JobFile) -> None:
    """Write the design of a base as a table: which subsets are merged."""
    job = read_job(file, "design")

    def work(folder: Path, state: Path) -> dict[str, Any]:
        import pandas as pd

        table = pd.DataFrame(checked_rows(job), columns=["k", "replicate", "place", "experts"])
        table.to_parquet(folder / "design.parquet", index=False)
        return {"merges": len(table)}

    run(job, work)


def checked_rows(job: Job) -> list[Any]:
    """The design's rows of a job, compared with their digest in the recipe."""
    if keys.digest(list(job.rows)) != job.recipe["subsets"]:
        raise MergelawError(f"{job.output}: the job's rows are not the recipe's; rerun snakemake")
    return list(job.rows)


@stages.command()
def evaluate(
    file: JobFile,
    cells: Annotated[Path, typer.Option("--cells", help="folder of the cell store")],
    threads: Threads = 1,
) -> None:
    """Measure the cross-entropy of a shard of merges."""
    from mergelaw.evaluation import shard

    job = read_job(file, "evaluate")

    def work(folder: Path, state: Path) -> dict[str, Any]:
        prepare_torch(threads)
        vectors, corpora = job.all("task_vectors"), job.all("corpora")
        rows, name = checked_rows(job), job.output.name
        return shard.evaluate(
            job.recipe, rows, job.one("base"), vectors, corpora, cells, name, folder
        )

    run(job, work)


@stages.command()
def fit(file: JobFile) -> None:
    """Fit the laws to the cells of evaluations."""
    job = read_job(file, "fit")

    def work(folder: Path, state: Path) -> dict[str, Any]:
        from mergelaw.evaluation import read_cells
        from mergelaw.laws import fits

        study = fits.fit_study(*read_cells(list(job.all("evals").values())))
        facts = fits.write(study, folder)
        print((folder / "summary.txt").read_text(encoding="utf-8"), end="")
        return facts

    run(job, work)


@stages.command()
def report(file: JobFile) -> None:
    """Write the report: one HTML page with its figures and tables."""
    job = read_job(file, "report")

    def work(folder: Path, state: Path) -> None:
        from mergelaw.evaluation import read_rows
        from mergelaw.report import page
        from mergelaw.workflow.results import facts_of

        laws, rows = job.one("laws"), read_rows(list(job.all("evals").values()))
        page.write_report(laws, rows, folder, title=job.recipe["title"], facts=facts_of(laws))

    run(job, work)


@stages.command()
def merge(file: JobFile) -> None:
    """Write a merge as a checkpoint, and as mergekit's YAML where mergekit merges the same way."""
    from mergelaw.merging.export import export

    job = read_job(file, "merge")

    def work(folder: Path, state: Path) -> dict[str, Any]:
        vectors = job.all("task_vectors")
        return export(job.recipe, job.one("base"), vectors, folder, job.output)

    run(job, work)


@stages.command()
def partial(
    configuration: Annotated[Path, typer.Argument(help="the study's configuration")],
) -> None:
    """Fit and report what has been measured so far, and say what is missing."""
    from mergelaw import config
    from mergelaw.evaluation import read_cells
    from mergelaw.laws import fits
    from mergelaw.report import page
    from mergelaw.workflow.study import Study

    study = Study(config.load(configuration))
    shards = study.evals.values()
    measured = [study.results / a.path for a in shards if study.made(a)]
    missing = [a.folder for a in shards if not study.made(a)]
    if not measured:
        raise MergelawError(f"{study.results}: nothing of {study.config.name} is measured yet")
    folder = study.results / "partial" / study.config.name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "laws").mkdir(parents=True)
    rows, documents = read_cells(measured)
    fits.write(fits.fit_study(rows, documents), folder / "laws", missing)
    facts = {"measured so far": f"{len(measured)} of {len(shards)} shards"}
    page.write_report(folder / "laws", rows, folder, title=study.config.name, facts=facts)
    some = ", ".join(missing[:6]) + (", ..." if len(missing) > 6 else "")
    print(f"{len(missing)} of {len(shards)} shards are missing{': ' if some else ''}{some}")
    print(f"report on the rest: {folder / 'report.html'}")
