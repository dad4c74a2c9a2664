"""Commands that answer questions from a study's results: ``mergelaw forecast`` and ``plan``."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from mergelaw.cli.study import DEFAULT, Json
from mergelaw.errors import MergelawError

if TYPE_CHECKING:
    import pandas as pd

    from mergelaw.planning import Answer, Costs, Curve

plan_app = typer.Typer(
    help="Ask fitted laws what to expect, merge, buy and measure next: each answer has an "
    "interval, a reason and the assumption that matters most.",
    no_args_is_help=True,
)
K = Annotated[float, Option("--k", help="number of experts")]
CostsFile = Annotated[
    Path | None,
    Option(
        "--costs",
        help="CSV with the column N and any of training (an expert), merging, evaluation (a "
        "merge), serving (a million tokens); default: the seconds that the study's jobs took",
    ),
]


class Population(StrEnum):
    """Population that intervals are for."""

    pool = "pool"
    documents = "documents"
    experts = "experts"

    @property
    def text(self) -> str:
        """The name of the population in the laws."""
        from mergelaw.laws import result

        return str(getattr(result, self.name.upper()))


@dataclass(frozen=True)
class Question:
    """Options that all questions share, and the points that they select."""

    study: Annotated[
        Path,
        Argument(
            metavar="STUDY", help="a study's configuration, a folder of laws or a table of points"
        ),
    ] = DEFAULT
    base: Annotated[str | None, Option(help="a measured base, by its name")] = None
    N: Annotated[float | None, Option("--N", help="a size in billions, instead of a base")] = None
    method: Annotated[str | None, Option(help="merge method, if there are several")] = None
    domain: Annotated[str | None, Option(help="evaluation domain; default: macro")] = None
    family: Annotated[str | None, Option(help="family of bases, if there are several")] = None
    level: Annotated[float, Option(help="level of the intervals")] = 0.9
    population: Annotated[
        Population,
        Option(
            help="what intervals speak of: this pool on these evaluation documents, or on "
            "documents like these, or experts like these"
        ),
    ] = Population.pool
    as_json: Json = False
    warnings: list[str] = field(default_factory=list, init=False)

    @cached_property
    def laws(self) -> Path:
        """The study's folder of fitted laws, or the table of points."""
        if self.study.suffix not in (".yaml", ".yml"):
            self.warnings.extend(outdated(self.study))
            return self.study
        from mergelaw.workflow.results import find_laws

        laws, warnings = find_laws(self.study)
        self.warnings.extend(warnings)
        return laws

    def points(self, every: str = "") -> "pd.DataFrame":
        """Points of one method, domain and family, with all values of the column ``every``."""
        from mergelaw.planning import choose, read

        table, assumed = read(self.laws)
        self.warnings.extend(assumed)
        return choose(table, self.method, self.domain, self.family, every=every)

    def curve(self, joint: bool = False) -> "Curve":
        """The curve at the selected size; with ``joint``, the joint law's."""
        from mergelaw.laws.law import MERGING
        from mergelaw.planning import Curve

        law = MERGING if joint else None
        return Curve(self.points(), self.N, base=self.base, law=law, **self.intervals)

    @property
    def intervals(self) -> dict[str, Any]:
        """Level and population of the intervals."""
        return {"level": self.level, "population": self.population.text}

    def costs(self, file: Path | None) -> "Costs":
        """Costs from a file, or otherwise the seconds of the study's jobs."""
        from mergelaw.planning import Costs
        from mergelaw.workflow.results import measured_costs

        if file is not None:
            return Costs.read(file)
        try:
            return Costs(measured_costs(self.laws), "seconds")
        except MergelawError as error:
            raise MergelawError(f"{error}; give --costs") from None


def outdated(laws: Path) -> list[str]:
    """A warning if another version of the stage has fitted these laws."""
    from mergelaw.artifacts import keys, lineage

    folder = laws.parent if laws.name == "laws.json" else laws
    if not (folder / lineage.LINEAGE).is_file():
        return []
    version = lineage.read(folder)["version"]
    if version == keys.STAGES["fit"]:
        return []
    return [
        f"{folder}: written by version {version} of the stage fit, now {keys.STAGES['fit']}; its "
        "points may lack what is used today: run the study again"
    ]


def command(ask: "Callable[..., Answer]", without: str = "") -> Callable[..., None]:
    """A command with a question's options and those of ``ask``, which prints the answer.

    ``without`` is the question's option that the command lacks.
    """
    _, *options = inspect.signature(ask).parameters.values()
    shared = inspect.signature(Question).parameters
    study, *others = (parameter for name, parameter in shared.items() if name != without)
    parameters = [study, *options, *others]

    def run(**values: Any) -> None:
        question = Question(**{name: values.pop(name) for name in shared if name in values})
        answer = ask(question, **values)
        answer = replace(answer, warnings=(*question.warnings, *answer.warnings))
        print(answer.to_json() if question.as_json else answer.summary())

    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__name__, run.__doc__ = ask.__name__, ask.__doc__
    return run


@command
def forecast(
    question: Question,
    scheme: Annotated[
        str | None,
        Option(
            help="three-point, end-point or size; default: three-point at a measured size, size "
            "elsewhere"
        ),
    ] = None,
    k: Annotated[
        str | None, Option("--k", help="numbers of experts, as in 6,9; default: all")
    ] = None,
    misfit: Annotated[
        float | None,
        Option(help="misfit in nats: standard deviation of what the law misses at a point"),
    ] = None,
) -> "Answer":
    """Forecast losses from few points, and score the forecast where the rest was measured.

    Example: mergelaw forecast --method average --base 333k
    """
    from mergelaw.planning import forecast

    try:
        sizes = None if k is None else [float(part) for part in k.split(",")]
    except ValueError:
        raise MergelawError(f"--k {k}: give numbers with commas between them") from None
    return forecast(
        question.points(),
        scheme,
        N=question.N,
        base=question.base,
        k=sizes,
        misfit=misfit,
        **question.intervals,
    )


@command
def loss(question: Question, k: K) -> "Answer":
    """Say which loss to expect of k experts on a base.

    Example: mergelaw plan loss --method average --N 0.001 --k 9
    """
    from mergelaw.planning import loss

    return loss(question.curve(), k)


@command
def experts(
    question: Question,
    target: Annotated[float, Option(help="loss to reach, in nats per token")],
) -> "Answer":
    """Say how many experts reach a target loss.

    Example: mergelaw plan experts --method average --base 333k --target 0.978
    """
    from mergelaw.planning import experts

    return experts(question.curve(), target)


@command
def stop(
    question: Question,
    threshold: Annotated[
        float, Option(help="smallest gain that is worth one more expert, in nats")
    ],
) -> "Answer":
    """Say at how many experts to stop, because one more gains too little.

    Example: mergelaw plan stop --method average --base 333k --threshold 0.002
    """
    from mergelaw.planning import stop

    return stop(question.curve(), threshold)


@command
def budget(
    question: Question,
    k: Annotated[int, Option("--k", help="number of experts merged now")],
    amount: Annotated[
        float | None,
        Option("--budget", help="what may be spent; default: compare gains per cost"),
    ] = None,
    costs: CostsFile = None,
    have: Annotated[int, Option(help="experts trained at this size", show_default="k")] = 0,
    serve: Annotated[float, Option(help="tokens that will be served, in millions")] = 0,
    larger: Annotated[
        list[float], Option(help="a larger size to consider, in billions; repeatable")
    ] = [],  # noqa: B006
) -> "Answer":
    """Say whether the next unit of budget goes to a larger base or to more experts.

    Example: mergelaw plan budget --method average --base 161k --k 4 --budget 60
    """
    from mergelaw.planning import budget

    curve, prices = question.curve(joint=True), question.costs(costs)
    return budget(curve, k, prices, amount=amount, have=have, serve=serve, larger=larger)


@partial(command, without="method")
def rule(
    question: Question,
    k: Annotated[
        int | None, Option("--k", help="number of experts; default: compare at every k")
    ] = None,
) -> "Answer":
    """Say which merge method is best at one size and k, or at each of them.

    Example: mergelaw plan rule --base 333k --k 5
    """
    from mergelaw.planning import rule

    points = question.points("method")
    return rule(points, question.N, k, base=question.base, **question.intervals)


@command
def measure(
    question: Question,
    k: K,
    share: Annotated[
        float, Option(help="width to reach, as a share of the interval's width now")
    ] = 0.5,
    costs: CostsFile = None,
) -> "Answer":
    """Say which measurements narrow a forecast's interval most.

    Example: mergelaw plan measure --method average --N 0.001 --k 9
    """
    from mergelaw.planning import measure

    curve = question.curve()
    try:
        prices = question.costs(costs)
    except MergelawError as error:
        if costs is not None:
            raise
        prices = None
        question.warnings.append(f"costs are unknown and not compared: {error}")
    return measure(curve, k, prices, share=share)


for question in (loss, experts, stop, budget, rule, measure):
    plan_app.command()(question)
