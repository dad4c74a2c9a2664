"""The command line: one command a stage, and what people ask of a results folder."""

import atexit
import ctypes
import gc
import json
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mergelaw.artifacts import keys, lineage
from mergelaw.errors import MergelawError, of_system

app = typer.Typer(
    help="Measure the scaling law of model merging, and plan with it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
config_app = typer.Typer(help="Check and describe configurations.", no_args_is_help=True)
app.add_typer(config_app, name="config")
plan_app = typer.Typer(
    help="Questions to a fitted law, answered with interval, reason and assumption.",
    no_args_is_help=True,
)
app.add_typer(plan_app, name="plan")

Recipe = Annotated[str, typer.Option(help="the stage's recipe: JSON, or a file of it")]
Output = Annotated[Path, typer.Option(help="folder of the artifact to be made, a new one")]
Config = Annotated[Path, typer.Option("--config", help="the study's configuration")]
Threads = Annotated[int, typer.Option(min=1, help="threads of the processor")]
Corpora = Annotated[list[Path], typer.Option("--corpus", help="corpora, one or more")]
Vectors = Annotated[
    list[str], typer.Option("--task-vector", help="NAME=FOLDER of an expert, one or more")
]
Points = Annotated[
    Path, typer.Argument(help="a folder that `mergelaw fit` wrote, or a table of points")
]
MethodName = Annotated[str | None, typer.Option("--method", help="merge method, if several")]
Domain = Annotated[str | None, typer.Option(help="evaluation domain; macro if there is one")]
Family = Annotated[str | None, typer.Option(help="family of bases, if several")]
BaseName = Annotated[str | None, typer.Option("--base", help="a measured base, by its name")]
Size = Annotated[float | None, typer.Option("--N", help="size of the base, in billions")]
Level = Annotated[float, typer.Option(help="level of the intervals")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
CostsFile = Annotated[
    Path | None,
    typer.Option(
        help="CSV of costs by N: training, merging, evaluation, serving; else the lineage's seconds"
    ),
]
SaveEvery = Annotated[float, typer.Option(help="seconds between states to resume from")]


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit status 1."""
    # Importing torch and transformers makes objects by the million that all stay; to look for
    # garbage among them takes a fifth of the time, and at the end again as long.
    gc.set_threshold(100_000, 50, 50)
    atexit.register(gc.freeze)
    quiet()
    try:
        words = [word for given in sys.argv[1:] for word in arguments(given)]
        app(args=words, prog_name="mergelaw")
    except MergelawError as error:
        fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno is None:
            raise
        fail(of_system(error))


def fail(message: str) -> None:
    print(f"mergelaw: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)


def arguments(given: str) -> list[str]:
    """``@FILE`` stands for the arguments in a file, a JSON list; anything else for itself."""
    if not given.startswith("@"):
        return [given]
    try:
        words = json.loads(Path(given[1:]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise MergelawError(f"{given[1:]}: not a file of arguments, a JSON list of strings")
    return words


def recipe_of(text: str) -> dict[str, Any]:
    try:
        if not text.lstrip().startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        recipe = json.loads(text)
    except (OSError, ValueError):
        raise MergelawError(f"--recipe {text[:60]}: neither JSON nor a file of it") from None
    if not isinstance(recipe, dict):
        raise MergelawError("--recipe: is not a JSON object")
    return recipe


def split(recipe: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What defines the result, and where the files from outside lie."""
    return {k: v for k, v in recipe.items() if k != "sources"}, recipe.get("sources", {})


def named(paths: list[Path]) -> dict[str, Path]:
    """Artifacts by their own name: ``.../algebra@1a2b3c4d`` is ``algebra``."""
    return {path.name.split("@")[0]: path for path in paths}


def inputs_of(kind: str, artifacts: dict[str, Path]) -> dict[str, Path]:
    """As lineage names them: a domain may be called `base`."""
    return {f"{kind}:{name}": path for name, path in artifacts.items()}


def by_expert(options: list[str]) -> dict[str, Path]:
    """Task vectors by the name of their expert, from options NAME=FOLDER."""
    found = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not equals:
            raise MergelawError(f"--task-vector {option}: give the expert's name too, NAME=FOLDER")
        found[name] = Path(path)
    return found


def make(output: Path, stage: str, recipe: dict[str, Any], inputs: dict[str, Path], work) -> None:
    # A first line takes its block of the log's disk: when that is full, the last line has a place.
    print(f"mergelaw: {output} ...", file=sys.stderr, flush=True)
    made = lineage.make(output, stage, recipe, inputs, work)
    print(f"mergelaw: {output} {'made' if made else 'is there already'}", file=sys.stderr)


def quiet() -> None:
    """Keep logs free of progress bars, and linear algebra on one thread, for bits depend on it.

    To be called before the libraries are imported, which read this once.
    """
    os.environ.update(
        TQDM_DISABLE="1",
        TOKENIZERS_PARALLELISM="false",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        OPENBLAS_NUM_THREADS="1",
    )


def prepare_torch(threads: int) -> None:
    """Fix the number of threads, which bits depend on; keep memory that is freed.

    An activation is large enough for glibc to map it, and to unmap it when it is freed: a forward
    pass on a processor spent up to a third of its time on pages that came and went.
    """
    import torch

    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            libc.mallopt(option, value)


# -- stages ------------------------------------------------------------------------------------


@app.command()
def corpus(recipe: Recipe, output: Output) -> None:
    """Build a domain's train and eval split."""
    from mergelaw.data import documents as stage

    own, sources = split(recipe_of(recipe))
    full = {"eval_source": None, **own, **sources}

    def work(folder: Path, state: Path) -> dict[str, Any]:
        counts = stage.build(full, folder)
        for name, source in sources.items():
            stage.check_unchanged(own[name], source)
        return {**counts, "sources": list(map(keys.canonical_json, [sources]))}

    make(output, "corpus", own, {}, work)


@app.command("check-overlap")
def check_overlap(corpora: Corpora, output: Output) -> None:
    """Check that no domain evaluates a document that another one trains on."""
    from mergelaw.data import documents as stage

    def work(folder: Path, state: Path) -> dict[str, Any]:
        stage.check_overlap_of_corpora(named(corpora))
        return {"corpora": len(corpora)}

    make(output, "overlap", {}, inputs_of("corpus", named(corpora)), work)


@app.command()
def base(
    recipe: Recipe,
    output: Output,
    corpora: Annotated[
        list[Path] | None, typer.Option("--corpus", help="corpora to pre-train on, one or more")
    ] = None,
    threads: Threads = 1,
    save_every: SaveEvery = 600,
) -> None:
    """Fetch a base model, or pre-train one."""

    def train(own: dict[str, Any], folder: Path, state: Path) -> dict[str, Any]:
        from mergelaw.models import recipe as recipes
        from mergelaw.models.pretrain import pretrain

        settings = recipes.Pretraining.model_validate(own["pretraining"])
        return pretrain(settings, named(corpora or []), folder, state, save_every)

    model("base", recipe, output, inputs_of("corpus", named(corpora or [])), threads, train)


def model(stage: str, recipe: str, output: Path, inputs: dict, threads: int, train: Any) -> None:
    """Make a checkpoint: train it, or link one from outside that is found to be the one meant."""
    own, sources = split(recipe_of(recipe))

    def work(folder: Path, state: Path) -> dict[str, Any]:
        if "checkpoint" not in own:
            prepare_torch(threads)
            return train(own, folder, state)
        from mergelaw.models.checkpoint import link_known

        return link_known(own["checkpoint"], sources, folder)

    make(output, stage, own, inputs, work)


@app.command()
def expert(
    recipe: Recipe,
    output: Output,
    base: Annotated[Path | None, typer.Option(help="the base to train from")] = None,
    corpora: Annotated[
        list[Path] | None, typer.Option("--corpus", help="corpora to train on, with --base")
    ] = None,
    threads: Threads = 1,
    save_every: SaveEvery = 600,
) -> None:
    """Train an expert, or take a ready-made one."""

    def train(own: dict[str, Any], folder: Path, state: Path) -> dict[str, Any]:
        from mergelaw.models import finetune, openrlhf
        from mergelaw.models import recipe as recipes

        if base is None or not corpora:
            raise MergelawError("expert: training needs --base and --corpus")
        settings = recipes.Training.model_validate(own["training"])
        trainer = openrlhf if settings.trainer == "openrlhf" else finetune
        return trainer.fine_tune(
            settings, own["seed"], base, named(corpora), folder, state, save_every
        )

    inputs = ({"base": base} if base else {}) | inputs_of("corpus", named(corpora or []))
    model("expert", recipe, output, inputs, threads, train)


@app.command("task-vector")
def task_vector(
    base: Annotated[Path, typer.Option(help="the base")],
    expert: Annotated[Path, typer.Option(help="the expert")],
    output: Output,
    recipe: Recipe = "{}",
) -> None:
    """Subtract a base from its expert, without loss."""
    from mergelaw.merging import task_vector as stage

    own, how = split(recipe_of(recipe))

    def work(folder: Path, state: Path) -> dict[str, Any]:
        prepare_torch(1)
        return stage.write(base, expert, folder, **how, **own)

    make(output, "task_vector", own, {"base": base, "expert": expert}, work)


@app.command("sample")
def sample_merges(recipe: Recipe, output: Output) -> None:
    """Write the plan of a base as a table: which subsets are merged."""
    from mergelaw.evaluation.design import sample
    from mergelaw.workflow.study import subsets_recipe

    own, drawn_from = split(recipe_of(recipe))

    def work(folder: Path, state: Path) -> dict[str, Any]:
        import pandas as pd

        rows = subsets_recipe(sample(**drawn_from))
        if keys.digest(rows) != own["subsets"]:
            raise MergelawError("sample: draws other subsets than the recipe's; run again")
        columns = ["k", "replicate", "place", "experts"]
        table = pd.DataFrame(rows, columns=columns)
        table.to_parquet(folder / "plan.parquet", index=False)
        return {"merges": len(table)}

    make(output, "plan", own, {}, work)


@app.command()
def evaluate(
    recipe: Recipe,
    base: Annotated[Path, typer.Option(help="the base")],
    vectors: Vectors,
    corpora: Corpora,
    store: Annotated[Path, typer.Option("--cells", help="folder of the cell store")],
    output: Output,
    plan: Annotated[Path | None, typer.Option(help="the base's plan")] = None,
    rows: Annotated[str, typer.Option(help="rows of the plan, first:last, or a JSON list")] = ":",
    threads: Threads = 1,
) -> None:
    """Measure the cross-entropy of a shard of merges."""
    from mergelaw.evaluation import shard as stage

    own, pool = recipe_of(recipe), by_expert(vectors)

    def work(folder: Path, state: Path) -> dict[str, Any]:
        prepare_torch(threads)
        subsets = json.loads(rows) if plan is None else read_plan(plan, rows)
        if keys.digest(subsets) != own["subsets"]:
            raise MergelawError(f"{plan}: rows {rows} are not the shard's; run the workflow again")
        return stage.evaluate(own, subsets, base, pool, named(corpora), store, output.name, folder)

    inputs = {"base": base} | ({"plan": plan} if plan else {})
    inputs |= inputs_of("task-vector", pool) | inputs_of("corpus", named(corpora))
    make(output, "evaluate", own, inputs, work)


def read_plan(plan: Path, rows: str) -> list[list[Any]]:
    import pandas as pd

    first, last = (int(part) if part else None for part in rows.split(":"))
    table = pd.read_parquet(plan / "plan.parquet")[first:last]
    return [
        [int(k), int(replicate), int(place), list(experts)]
        for k, replicate, place, experts in table.itertuples(index=False)
    ]


@app.command()
def fit(
    evals: Annotated[
        list[Path] | None, typer.Option("--evals", help="evaluations, one or more")
    ] = None,
    points: Annotated[
        Path | None, typer.Option(help="instead: a table of points, CSV or Parquet")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder of the artifact to be made, a new one")
    ] = None,
) -> None:
    """Fit the laws to the rows of evaluations, or to a table of points of your own."""
    if points is not None:
        if evals:
            raise MergelawError("fit: takes --evals or --points, not both; leave one out")
        fit_own(points, output)
        return
    if not evals or output is None:
        raise MergelawError("fit: needs --evals and --output, or --points; give those")
    shards = {str(i): path for i, path in enumerate(evals)}

    def work(folder: Path, state: Path) -> dict[str, Any]:
        from mergelaw.laws import fits

        told = fits.write_artifacts(list(shards.values()), folder, [])
        print((folder / "summary.txt").read_text(encoding="utf-8"), end="")
        return told

    inputs = inputs_of("evals", shards)
    make(output, "fit", {}, inputs, work)


def fit_own(table: Path, output: Path | None) -> None:
    """Fit a table of points, print the fits, and keep them if a folder is given."""
    from mergelaw.laws import fits
    from mergelaw.laws.points import read_points

    study = fits.fit_points(*read_points(table))
    if not study.fits:
        raise MergelawError(f"{table}: {fits.first_reason(study)}")
    print(fits.summary(study), end="")
    if output is None:
        return
    recipe = {"points": lineage.file_digest(table)}
    made = (output / lineage.LINEAGE).exists()
    if made and lineage.read(output)["recipe"] != recipe:
        raise MergelawError(f"{output}: holds the fits of other points; name another folder")

    def work(folder: Path, state: Path) -> dict[str, Any]:
        return fits.write(study, folder, [])

    make(output, "fit", recipe, {}, work)


@app.command()
def forecast(
    source: Points,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="three-point, end-point or size; default: three-point, or size where --N is not "
            "measured"
        ),
    ] = None,
    base: BaseName = None,
    N: Size = None,
    k: Annotated[str | None, typer.Option(help="numbers of experts, 6,9,12; else all")] = None,
    method: MethodName = None,
    domain: Domain = None,
    family: Family = None,
    sigma: Annotated[
        float | None, typer.Option(help="what a law misses at a point, in nats per token")
    ] = None,
    level: Level = 0.9,
    as_json: Json = False,
) -> None:
    """Forecast losses from few points, beside what was measured, if it was."""
    from mergelaw.planning import forecast as stage
    from mergelaw.planning.plan import bases_of

    points, warnings = chosen(source, method, domain, family)
    try:
        sizes = None if k is None else [float(part) for part in k.split(",")]
    except ValueError:
        raise MergelawError(f"--k {k}: give numbers with commas between them") from None
    if recipe is None:
        new = base is None and N is not None and not bases_of(points, N)
        recipe = stage.SIZE if new else stage.THREE_POINT
    if recipe == stage.SIZE:
        if sigma is not None:
            raise MergelawError("--sigma: the size recipe finds it from residuals; leave it out")
        found = stage.along_N(points, N, base=base, k=sizes, level=level)
    else:
        name = base_name(points, base, N)
        found = stage.along_k(points, name, recipe, k=sizes, sigma=sigma, level=level)
    tell(found, warnings, as_json)


def chosen(source: Path, method: str | None, domain: str | None, family: str | None) -> Any:
    """Points of one method, domain and family, and what was assumed on reading them."""
    from mergelaw.planning import forecast

    points, warnings = forecast.read(source)
    return forecast.choose(points, method=method, domain=domain, family=family), warnings


def size_of(points: Any, base: str | None, N: float | None) -> float:
    """The size that is asked about, by a base's name or as a number."""
    from mergelaw.planning import forecast

    if base is not None and N is not None:
        raise MergelawError("give --base or --N, not both")
    if base is not None:
        return float(forecast.base_of(points, base)["N"].iloc[0])
    if N is None:
        sizes = points["N"].unique()
        if len(sizes) > 1:
            raise MergelawError(
                f"which size? give --N in billions, or --base: {', '.join(points['base'].unique())}"
            )
        return float(sizes[0])
    return N


def place(points: Any, base: str | None, N: float | None) -> tuple[Any, float]:
    """The points and the size asked about; of bases as large only the one that is named."""
    size = size_of(points, base, N)
    if base is not None:
        points = points[(points["base"] == base) | (points["N"] != size)]
    return points, size


def base_name(points: Any, base: str | None, N: float | None) -> str:
    """The measured base that is meant, by its name or its size."""
    from mergelaw.planning.plan import measured_base

    if base is not None and N is None:
        return base
    return measured_base(points, size_of(points, base, N))


def tell(answer: Any, warnings: list[str], as_json: bool) -> None:
    """Print an answer; what was assumed on the way to it goes first."""
    from mergelaw.planning.plan import to_json

    for warning in warnings:
        print(f"mergelaw: {warning}", file=sys.stderr)
    print(to_json(answer) if as_json else answer.summary())


def costs_of(source: Path, costs: Path | None) -> Any:
    from mergelaw.planning.plan import Costs

    return Costs.measured(source) if costs is None else Costs.read(costs)


@plan_app.command("loss")
def plan_loss(
    source: Points,
    k: Annotated[float, typer.Option("--k", help="number of experts")],
    base: BaseName = None,
    N: Size = None,
    method: MethodName = None,
    domain: Domain = None,
    family: Family = None,
    level: Level = 0.9,
    as_json: Json = False,
) -> None:
    """The loss to expect at (N, k)."""
    from mergelaw.planning import plan

    points, warnings = chosen(source, method, domain, family)
    tell(plan.loss(*place(points, base, N), k, level), warnings, as_json)


@plan_app.command("experts")
def plan_experts(
    source: Points,
    target: Annotated[float, typer.Option(help="loss to reach, in nats per token")],
    base: BaseName = None,
    N: Size = None,
    method: MethodName = None,
    domain: Domain = None,
    family: Family = None,
    level: Level = 0.9,
    as_json: Json = False,
) -> None:
    """How many experts reach a target loss."""
    from mergelaw.planning import plan

    points, warnings = chosen(source, method, domain, family)
    tell(plan.experts(*place(points, base, N), target, level), warnings, as_json)


@plan_app.command("stop")
def plan_stop(
    source: Points,
    threshold: Annotated[float, typer.Option(help="a gain that is just worth it, in nats")],
    base: BaseName = None,
    N: Size = None,
    method: MethodName = None,
    domain: Domain = None,
    family: Family = None,
    level: Level = 0.9,
    as_json: Json = False,
) -> None:
    """From how many experts on one more gains too little."""
    from mergelaw.planning import plan

    points, warnings = chosen(source, method, domain, family)
    tell(plan.stop(*place(points, base, N), threshold, level), warnings, as_json)


@plan_app.command("budget")
def plan_budget(
    source: Points,
    k: Annotated[int, typer.Option("--k", help="experts merged now")],
    base: BaseName = None,
    N: Size = None,
    budget: Annotated[
        float | None, typer.Option(help="what may be spent; else gains per cost are compared")
    ] = None,
    costs: CostsFile = None,
    have: Annotated[int | None, typer.Option(help="experts trained at this size; else k")] = None,
    serve: Annotated[float, typer.Option(help="million tokens to be served")] = 0,
    sizes: Annotated[
        list[float] | None, typer.Option("--size", help="larger bases to consider, in billions")
    ] = None,
    method: MethodName = None,
    domain: Domain = None,
    family: Family = None,
    level: Level = 0.9,
    as_json: Json = False,
) -> None:
    """Whether the next unit of budget goes to a larger base or to more experts."""
    from mergelaw.planning import plan

    points, warnings = chosen(source, method, domain, family)
    answer = plan.budget(
        *place(points, base, N),
        k,
        costs_of(source, costs),
        amount=budget,
        have=have,
        serve=serve,
        sizes=sizes or None,
        level=level,
    )
    tell(answer, warnings, as_json)


@plan_app.command("rule")
def plan_rule(
    source: Points,
    k: Annotated[int | None, typer.Option("--k", help="number of experts; else every")] = None,
    base: BaseName = None,
    N: Size = None,
    domain: Domain = None,
    family: Family = None,
    level: Level = 0.9,
    as_json: Json = False,
) -> None:
    """Which merge method has the lowest loss, at one (N, k) or over all."""
    from mergelaw.planning import forecast, plan

    table, warnings = forecast.read(source)
    points = forecast.choose(table, domain=domain, family=family, every=["method"])
    size = None
    if base is not None or N is not None:
        points, size = place(points, base, N)
    tell(plan.rule(points, size, k, level), warnings, as_json)


@plan_app.command("measure")
def plan_measure(
    source: Points,
    k: Annotated[float, typer.Option("--k", help="number of experts of the forecast")],
    base: BaseName = None,
    N: Size = None,
    share: Annotated[float, typer.Option(help="of the interval's width that is to be left")] = 0.5,
    costs: CostsFile = None,
    method: MethodName = None,
    domain: Domain = None,
    family: Family = None,
    level: Level = 0.9,
    as_json: Json = False,
) -> None:
    """Which measurements to buy next to halve a forecast's interval."""
    from mergelaw.planning import plan

    points, warnings = chosen(source, method, domain, family)
    try:
        prices = costs_of(source, costs)
    except MergelawError:
        if costs is not None:
            raise
        prices = None  # what narrows the interval most is worth knowing without prices
    asked = place(points, base, N)
    tell(plan.measure(*asked, k, prices, share=share, level=level), warnings, as_json)


@app.command()
def report(
    recipe: Recipe,
    laws: Annotated[Path, typer.Option(help="the fitted laws")],
    output: Output,
) -> None:
    """Write the report as one HTML page with its figures and tables."""
    from mergelaw.evaluation import read_rows
    from mergelaw.report import page as stage

    own = recipe_of(recipe)

    def work(folder: Path, state: Path) -> dict[str, Any]:
        inputs = lineage.read(laws)["inputs"].values()
        rows = read_rows([laws / entry["path"] for entry in inputs])
        stage.write_report(laws, rows, folder, title=own["title"], facts=facts_of(laws))
        return {}

    make(output, "report", own, {"laws": laws}, work)


def ancestors(artifact: Path) -> dict[Path, dict[str, Any]]:
    """The lineages of an artifact and of all that it comes from, by folder."""
    found: dict[Path, dict[str, Any]] = {}
    pending = [artifact.absolute()]
    while pending:
        folder = Path(os.path.normpath(pending.pop()))
        if folder in found:
            continue
        found[folder] = lineage.read(folder)
        pending += [folder / entry["path"] for entry in found[folder]["inputs"].values()]
    return found


STAGE_TITLES = {
    "corpus": "corpora",
    "base": "bases",
    "expert": "experts",
    "task_vector": "task vectors",
    "plan": "plans",
    "evaluate": "evaluations",
    "fit": "law fits",
    "report": "report",
}


def stage_times(found: dict[Path, dict[str, Any]]) -> dict[str, tuple[int, float]]:
    """Jobs and seconds by stage, in the pipeline's order."""
    times: dict[str, tuple[int, float]] = {}
    for stage, title in STAGE_TITLES.items():
        walls = [entry["wall_seconds"] for entry in found.values() if entry["stage"] == stage]
        if walls:
            times[title] = len(walls), sum(walls)
    return times


def facts_of(laws: Path) -> dict[str, str]:
    found = ancestors(laws)
    own = found[laws.absolute()]
    facts = {
        "mergelaw": f"{own['versions']['mergelaw']} ({own['git_commit'] or 'no checkout'})",
        "torch, transformers": f"{own['versions']['torch']}, {own['versions']['transformers']}",
    }
    for title, (jobs, seconds) in stage_times(found).items():
        facts[f"time, {title}"] = f"{jobs} jobs, {seconds:.0f} s in all"
    return facts


@app.command()
def merge(
    recipe: Recipe,
    base: Annotated[Path, typer.Option(help="the base")],
    vectors: Vectors,
    output: Output,
) -> None:
    """Write a merge out as a checkpoint, and as mergekit's YAML where that merges the same way."""
    import yaml

    from mergelaw.merging import engine as stage
    from mergelaw.merging.methods import method_of
    from mergelaw.merging.task_vector import TaskVector
    from mergelaw.models.checkpoint import Tensors, is_adapter

    own = recipe_of(recipe)
    pool = by_expert(vectors)

    def work(folder: Path, state: Path) -> dict[str, Any]:
        method = method_of(own["method"])
        ordered = {name: TaskVector(pool[name]) for name in own["experts"]}
        stage.write(base, ordered, method, own["weights"], folder)
        experts, adapters = {}, []
        for name in own["experts"]:
            place = pool[name] / lineage.read(pool[name])["inputs"]["expert"]["path"]
            experts[name] = os.path.relpath(place, output)
            adapters += [name] if is_adapter(place) else []
        with Tensors(base) as tensors:
            dtype = tensors.float_dtype()
        paths = os.path.relpath(base, output), experts
        same = stage.mergekit_recipe(*paths, method, own["weights"], dtype, adapters)
        if same is not None:
            text = (
                "# The same merge by mergekit, from this folder: mergekit-yaml mergekit.yaml OUT\n"
            )
            (folder / "mergekit.yaml").write_text(text + yaml.safe_dump(same, sort_keys=False))
        return {"mergekit": same is not None}

    inputs = {"base": base} | inputs_of("task-vector", pool)
    make(output, "merge", own, inputs, work)


# -- what people ask ---------------------------------------------------------------------------


@config_app.command("check")
def config_check(file: Annotated[Path, typer.Argument(help="a configuration")]) -> None:
    """Check a configuration and say what it would measure."""
    from mergelaw.config import schema as config
    from mergelaw.workflow.study import Study

    study = Study(config.load(file))
    own, made = study.config, study.by_path.values()
    plans = [len(study.subsets(base)) for base in own.bases]  # with the base itself
    low, high = min(plans) - 1, max(plans) - 1
    merges = f"{low}" if low == high else f"{low} to {high}"
    measured = (sum(plans) - len(plans)) * len(own.methods) + len(plans) * len(own.baselines)
    cells = (measured * len(own.training_seeds) + len(plans)) * len(own.domains)
    trained = sum(artifact.trains for artifact in made)
    print(
        f"{file}: {len(own.bases)} bases, {len(own.pool())} experts, {len(own.domains)} domains, "
        f"{len(own.methods)} methods; {trained} models to train, {merges} merges per base and "
        f"method, {cells:,} cells, {len(made)} jobs"
    )


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of configurations."""
    from mergelaw.config import reference as config_reference

    print(json.dumps(config_reference.schema(), indent=2, ensure_ascii=False))


@config_app.command("table")
def config_table(
    into: Annotated[
        Path | None, typer.Option(help="a Markdown file that takes them between its markers")
    ] = None,
) -> None:
    """Print every key of a configuration as Markdown tables."""
    from mergelaw.config import reference as config_reference

    if into is None:
        print(config_reference.tables())
        return
    start, end = "<!-- tables -->", "<!-- end of tables -->"
    before, found, rest = into.read_text(encoding="utf-8").partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise MergelawError(f"{into}: lacks the markers {start} and {end}; add them")
    into.write_text(f"{before}{start}\n{config_reference.tables()}\n{end}{after}", encoding="utf-8")


@app.command()
def estimate(
    file: Annotated[Path, typer.Argument(help="a configuration")],
    rates: Annotated[Path | None, typer.Option(help="what the cluster does, as YAML")] = None,
) -> None:
    """Say what a study will cost: jobs, GPU hours, tokens, bytes and the longest chain."""
    from mergelaw.config import schema as config
    from mergelaw.workflow import estimate as costs
    from mergelaw.workflow.study import Study

    known = costs.read_rates(rates)
    print(costs.text(costs.estimate(Study(config.load(file)), known), known))


@app.command()
def rates(configuration: Config) -> None:
    """Print the rates that a study's results show, for `estimate --rates`."""
    import yaml

    from mergelaw.config import schema as config
    from mergelaw.workflow import estimate as costs
    from mergelaw.workflow.study import Study

    found = costs.measured(Study(config.load(configuration))).model_dump(exclude_none=True)
    print(yaml.safe_dump(found, sort_keys=False), end="")


@app.command("lineage")
def show_lineage(
    path: Annotated[Path, typer.Argument(help="an artifact, or a file in one")],
    verify: Annotated[bool, typer.Option("--verify", help="recompute every digest")] = False,
) -> None:
    """Print where an artifact comes from, back to the sources."""
    lines, wrong = lineage.tree(lineage.find(path), verify)
    print("\n".join(lines))
    if wrong:
        raise MergelawError("; ".join(dict.fromkeys(wrong)))
    if verify:
        print(f"verified: {len(lines)} entries, every file is what was written")


@app.command("gc")
def collect_garbage(
    configs: Annotated[list[Path], typer.Option("--config", help="studies to keep, one or more")],
    delete: Annotated[bool, typer.Option("--delete", help="remove what is listed")] = False,
) -> None:
    """List what none of the given configurations refers to; with --delete, remove it."""
    import shutil

    from mergelaw.config import schema as config
    from mergelaw.workflow.study import Study

    studies = [Study(config.load(path)) for path in configs]
    roots = {study.results for study in studies}
    if len(roots) > 1:
        raise MergelawError(f"gc: the configurations name {len(roots)} results folders; give one's")
    root = roots.pop()
    kept = {path for study in studies for path in study.by_path}
    # What a killed or failed job left to resume from goes with the artifact it was to become.
    halves = {path: path.name[1:].removesuffix(".work") for path in root.rglob(".*@*.work")}
    places = {path: path.with_name(name) for path, name in halves.items()}
    places |= {mark.parent: mark.parent for mark in root.rglob(f"*@*/{lineage.LINEAGE}")}
    unused, freed = [], 0
    for folder, place in sorted(places.items()):
        if place.relative_to(root).as_posix() not in kept:
            size = sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file())
            unused.append((folder, size))
            freed += size
    # What was prepared of experts is made again where it is missing; unfinished files are nobody's.
    for folder in sorted(root.glob("cells/*/prepared")):
        base = folder.parent.name
        used = any(path.startswith(f"evals/{base}/") for path in kept)
        for file in sorted(folder.iterdir()):
            if not used or file.suffix not in (".json", ".safetensors", ".sha256"):
                unused.append((file, file.stat().st_size))
                freed += file.stat().st_size
    with lineage.only_run(root):
        for folder, size in unused:
            print(f"{size:>14,}  {folder}")
            if delete and folder.is_dir():
                shutil.rmtree(folder)
            elif delete:
                folder.unlink()
    verb = "removed" if delete else "not referred to (--delete removes them)"
    print(f"{len(unused)} artifacts and files, {freed:,} bytes {verb}; measured cells are kept")


@app.command("import")
def take_over(
    source: Annotated[Path, typer.Argument(help="another results folder")],
    configuration: Config,
) -> None:
    """Take what a study needs from another results folder: verified artifacts, and cells."""
    from mergelaw.config import schema as config
    from mergelaw.workflow.study import Study
    from mergelaw.workflow.transfer import Transfer

    transfer = Transfer(Study(config.load(configuration)), source)
    transfer.run()
    print(f"{len(transfer.taken)} artifacts and {transfer.cells} cells taken from {source}")
    if transfer.left:
        raise MergelawError(f"{len(transfer.left)} left out: {'; '.join(transfer.left)}")


@app.command()
def partial(configuration: Config) -> None:
    """Fit and report what has been measured so far, and say what is missing."""
    import shutil

    from mergelaw.config import schema as config
    from mergelaw.evaluation import read_rows
    from mergelaw.laws import fits as laws
    from mergelaw.report import page as stage
    from mergelaw.workflow.study import Study

    study = Study(config.load(configuration))
    there = [a for a in study.evals.values() if (study.results / a.path / lineage.LINEAGE).exists()]
    missing = [a.name for a in study.evals.values() if a not in there]
    if not there:
        raise MergelawError(f"{study.results}: nothing of {study.config.name} is measured yet")
    rows = read_rows([study.results / artifact.path for artifact in there])
    folder = study.results / "partial" / study.config.name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "laws").mkdir(parents=True)
    laws.write_artifacts([study.results / a.path for a in there], folder / "laws", missing)
    facts = {"measured so far": f"{len(there)} of {len(study.evals)} shards"}
    stage.write_report(folder / "laws", rows, folder, title=study.config.name, facts=facts)
    some = ", ".join(missing[:6]) + (", ..." if len(missing) > 6 else "")
    print(f"{len(missing)} of {len(study.evals)} shards are missing{': ' if some else ''}{some}")
    print(f"report on the rest: {folder / 'report.html'}")


@app.command()
def summary(configuration: Config) -> None:
    """Print a study's laws, the time of each stage and where the report is."""
    from mergelaw.config import schema as config
    from mergelaw.workflow.study import Study

    study = Study(config.load(configuration))
    laws, report_folder = (study.results / a.path for a in (study.laws, study.report))
    lineage.read(laws)
    fits = json.loads((laws / "laws.json").read_text(encoding="utf-8"))
    print("macro-average cross-entropy in nats per token; N in billions, without embeddings")
    for line in law_lines(fits):
        print(line)
    print(f"all of {len(fits['fits'])} fits, with their warnings: {laws / 'summary.txt'}")
    print("\ntime by stage, in all; jobs run side by side")
    for title, (jobs, seconds) in stage_times(ancestors(report_folder)).items():
        print(f"  {title:<13}{jobs:>5} jobs {seconds:>9.1f} s")
    print(f"\nreport: {report_folder / 'report.html'}")


def law_lines(fits: dict[str, Any]) -> list[str]:
    """The laws of the macro-average, a line each: joint ones first, then those at one size."""
    lines = []
    for joint in (True, False):
        chosen = [
            f for f in fits["fits"] if f["domain"] == "macro" and (f["base"] is None) == joint
        ]
        if chosen:
            lines.append(f"\n{fits['laws'][chosen[0]['law']]}")
        for fit in chosen:
            where = fit["method"] if joint else f"{fit['method']}, {fit['base']}"
            values = "  ".join(f"{name} = {v:.4g}" for name, v in fit["parameters"].items())
            (floor,) = fit["floors"] if not joint else ({},)
            reach = f"  reachable floor L({floor['M']}) = {floor['reachable']:.4g}" if floor else ""
            quality = f"R^2 = {fit['r2']:.5f}  RMSE = {fit['rmse']:.2g}"
            lines.append(f"  {where:<24}{values}{reach}  {quality}")
    for refused in fits["refused"]:
        if refused["domain"] == "macro":
            where = refused["base"] or "all sizes"
            lines.append(f"  {refused['method']}, {where}: not fitted, {refused['reason']}")
    return lines
