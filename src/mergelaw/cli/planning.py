"""Commands that ask a study's results: ``mergelaw forecast`` and ``mergelaw plan``."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergelaw.cli.results import find_laws
from mergelaw.errors import MergelawError

if TYPE_CHECKING:
    import pandas as pd

    from mergelaw.planning import Answer, Costs, Curve

plan_app = typer.Typer(
    help="Ask fitted laws what to expect, merge, buy and measure next: each answer has an "
    "interval, a reason and the assumption that matters most.",
    no_args_is_help=True,
)
K = Annotated[float, typer.Option("--k", help="number of experts")]
CostsFile = Annotated[
    Path | None,
    typer.Option(
        "--costs",
        help="CSV with the column N and any of training (an expert), merging, evaluation (a "
        "merge), serving (a million tokens); default: the seconds that the study's jobs took",
    ),
]


@dataclass(frozen=True)
class Asked:
    """Shared options of all questions, and the points that they choose."""

    study: Annotated[
        Path | None,
        typer.Argument(
            metavar="STUDY",
            help="a study's configuration, a folder of laws or a table of points; default: "
            "config/config.yaml",
        ),
    ] = None
    base: Annotated[str | None, typer.Option(help="a measured base, by its name")] = None
    N: Annotated[
        float | None, typer.Option("--N", help="a size in billions, instead of a base")
    ] = None
    method: Annotated[
        str | None, typer.Option(help="merge method; required if there are several")
    ] = None
    domain: Annotated[str | None, typer.Option(help="evaluation domain; default: macro")] = None
    family: Annotated[
        str | None, typer.Option(help="family of bases; required if there are several")
    ] = None
    level: Annotated[float, typer.Option(help="level of the intervals")] = 0.9
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False
    warnings: Annotated[list[str], "of the command itself"] = field(default_factory=list)

    @cached_property
    def laws(self) -> Path:
        """The folder of laws or the table that is asked."""
        path, warnings = find_laws(self.study)
        self.warnings.extend(warnings)
        return path

    def points(self, *every: str) -> "pd.DataFrame":
        """Points of one method, domain and family; with all values of the columns in ``every``."""
        from mergelaw.planning import choose, read

        table, assumed = read(self.laws)
        self.warnings.extend(assumed)
        return choose(
            table, method=self.method, domain=self.domain, family=self.family, every=every
        )

    def curve(self, joint: bool = False) -> "Curve":
        """The curve at the chosen size; with ``joint`` of the joint law."""
        from mergelaw.laws.law import MERGING
        from mergelaw.planning import Curve

        law = MERGING if joint else None
        return Curve(self.points(), self.N, base=self.base, level=self.level, law=law)

    def costs(self, file: Path | None) -> "Costs":
        """Costs from a file; without one, the seconds of the study's jobs."""
        from mergelaw.planning import Costs

        if file is not None:
            return Costs.read(file)
        from mergelaw.workflow.costs import measured_costs

        try:
            return Costs(measured_costs(self.laws), "seconds")
        except MergelawError as error:
            raise MergelawError(f"{error}; give --costs") from None


def question(ask: "Callable[..., Answer]", without: tuple[str, ...] = ()) -> Callable[..., None]:
    """Make a command of a function: it takes the shared options too, and prints the answer.

    Args:
        ask: from ``Asked`` and options of its own to an answer.
        without: shared options that the command does not take.
    """
    options = list(inspect.signature(ask).parameters.values())[1:]
    argument, *shared = list(inspect.signature(Asked).parameters.values())[:-1]
    parameters = [argument, *options, *(p for p in shared if p.name not in without)]

    def command(**values: Any) -> None:
        asked = Asked(**{p.name: values.pop(p.name, p.default) for p in (argument, *shared)})
        answer = ask(asked, **values)
        answer = replace(answer, warnings=(*asked.warnings, *answer.warnings))
        print(answer.to_json() if asked.as_json else answer.summary())

    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    command.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__name__, command.__doc__ = ask.__name__, ask.__doc__
    return command


@question
def forecast(
    asked: Asked,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="three-point, end-point or size; default: three-point at a measured size, size "
            "elsewhere"
        ),
    ] = None,
    k: Annotated[
        str | None, typer.Option("--k", help="numbers of experts, as in 6,9; default: all")
    ] = None,
    misfit: Annotated[
        float | None,
        typer.Option(help="misfit in nats: standard deviation of what the law misses at a point"),
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
        asked.points(),
        scheme,
        N=asked.N,
        base=asked.base,
        k=sizes,
        misfit=misfit,
        level=asked.level,
    )


@plan_app.command("loss")
@question
def loss(asked: Asked, k: K) -> "Answer":
    """Say which loss to expect of k experts on a base.

    Example: mergelaw plan loss --method average --N 0.001 --k 9
    """
    from mergelaw.planning import loss

    return loss(asked.curve(), k)


@plan_app.command("experts")
@question
def experts(
    asked: Asked,
    target: Annotated[float, typer.Option(help="loss to reach, in nats per token")],
) -> "Answer":
    """Say how many experts reach a target loss.

    Example: mergelaw plan experts --method average --base 333k --target 0.978
    """
    from mergelaw.planning import experts

    return experts(asked.curve(), target)


@plan_app.command("stop")
@question
def stop(
    asked: Asked,
    threshold: Annotated[
        float, typer.Option(help="smallest gain that is worth one more expert, in nats")
    ],
) -> "Answer":
    """Say at how many experts to stop, because one more gains too little.

    Example: mergelaw plan stop --method average --base 333k --threshold 0.002
    """
    from mergelaw.planning import stop

    return stop(asked.curve(), threshold)


@plan_app.command("budget")
@question
def budget(
    asked: Asked,
    k: Annotated[int, typer.Option("--k", help="number of experts merged now")],
    amount: Annotated[
        float | None,
        typer.Option("--budget", help="what may be spent; default: compare gains per cost"),
    ] = None,
    costs: CostsFile = None,
    have: Annotated[
        int | None, typer.Option(help="experts trained at this size; default: k")
    ] = None,
    serve: Annotated[float, typer.Option(help="tokens that will be served, in millions")] = 0,
    larger: Annotated[
        list[float] | None, typer.Option(help="a larger size to consider, in billions; repeatable")
    ] = None,
) -> "Answer":
    """Say whether the next unit of budget goes to a larger base or to more experts.

    Example: mergelaw plan budget --method average --base 161k --k 4 --budget 60
    """
    from mergelaw.planning import budget

    curve, prices = asked.curve(joint=True), asked.costs(costs)
    return budget(curve, k, prices, amount=amount, have=have, serve=serve, larger=larger or None)


@plan_app.command("rule")
@partial(question, without=("method",))
def rule(
    asked: Asked,
    k: Annotated[
        int | None, typer.Option("--k", help="number of experts; default: compare at every k")
    ] = None,
) -> "Answer":
    """Say which merge method is best at one size and k, or at each of them.

    Example: mergelaw plan rule --base 333k --k 5
    """
    from mergelaw.planning import rule

    points = asked.points("method")
    return rule(points, asked.N, k, base=asked.base, level=asked.level)


@plan_app.command("measure")
@question
def measure(
    asked: Asked,
    k: K,
    share: Annotated[
        float, typer.Option(help="width to reach, as a share of the interval's width now")
    ] = 0.5,
    costs: CostsFile = None,
) -> "Answer":
    """Say which measurements narrow a forecast's interval most.

    Example: mergelaw plan measure --method average --N 0.001 --k 9
    """
    from mergelaw.planning import measure

    curve = asked.curve()
    try:
        prices = asked.costs(costs)
    except MergelawError as error:
        if costs is not None:
            raise
        prices = None
        asked.warnings.append(f"costs are unknown and not compared: {error}")
    return measure(curve, k, prices, share=share)
