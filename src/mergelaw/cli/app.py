"""The command line: what people ask of a study, and the workflow's own stages."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import mergelaw
from mergelaw.cli import study
from mergelaw.cli.process import collect_less, quiet
from mergelaw.cli.stages import stages
from mergelaw.errors import MergelawError, system_message

app = typer.Typer(
    help="Measure the scaling law of model merging, and decide with it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
STUDY, RESULTS, LAW = "A study", "Its results", "Answers of the law"
app.add_typer(study.config_app, name="config", rich_help_panel=STUDY)
app.command(rich_help_panel=STUDY)(study.demo)
app.command(rich_help_panel=STUDY)(study.estimate)
app.command(rich_help_panel=STUDY)(study.rates)
app.command(rich_help_panel=STUDY)(study.status)
app.command(rich_help_panel=RESULTS)(study.summary)
app.command("lineage", rich_help_panel=RESULTS)(study.show_lineage)
app.command(rich_help_panel=RESULTS)(study.merge)
app.command("gc", rich_help_panel=RESULTS)(study.collect_garbage)
app.command(rich_help_panel=LAW)(study.fit)
app.add_typer(stages, name="stage", hidden=True)
plan_app = typer.Typer(
    help="Questions to a fitted law, answered with interval, reason and assumption.",
    no_args_is_help=True,
)
app.add_typer(plan_app, name="plan", rich_help_panel=LAW)

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


@app.command(rich_help_panel=LAW)
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


def print_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        print(f"mergelaw {mergelaw.__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="print the version"),
    ] = False,
) -> None:
    """Measure the scaling law of model merging, and decide with it."""


def main() -> None:
    """Entry point: an error that a user can mend is one line on stderr and exit status 1."""
    collect_less()
    quiet()
    try:
        app(prog_name="mergelaw")
    except MergelawError as error:
        fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno is None:
            raise
        fail(system_message(error))


def fail(message: str) -> None:
    """Print one line and exit with status 1."""
    print(f"mergelaw: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)
