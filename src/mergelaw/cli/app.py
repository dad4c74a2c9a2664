"""The command line: commands for users, and those of the workflow's stages."""

import os
import sys
from typing import Annotated

import typer

import mergelaw
from mergelaw.cli import decide, planning, study
from mergelaw.cli.process import collect_less, quiet
from mergelaw.cli.stages import stages
from mergelaw.errors import MergelawError, out_of_memory, system_message

app = typer.Typer(
    help="Measure the scaling law of model merging, and decide with it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
STUDY, RESULTS, LAW = "A study", "Its results", "Answers of the law"
DECIDE = "Measured merges"
app.add_typer(study.config_app, name="config", rich_help_panel=STUDY)
app.command(rich_help_panel=STUDY)(study.demo)
app.command(cls=study.Lists, rich_help_panel=STUDY)(study.init)
app.command(rich_help_panel=STUDY)(study.estimate)
app.command(rich_help_panel=STUDY)(study.rates)
app.command(rich_help_panel=STUDY)(study.status)
app.command(rich_help_panel=RESULTS)(study.summary)
app.command(rich_help_panel=DECIDE)(decide.best)
app.command(rich_help_panel=DECIDE)(decide.select)
app.command(rich_help_panel=DECIDE)(decide.experts)
app.command(rich_help_panel=DECIDE)(decide.compare)
app.command("lineage", rich_help_panel=RESULTS)(study.show_lineage)
app.command(rich_help_panel=RESULTS)(study.merge)
app.command("gc", rich_help_panel=RESULTS)(study.collect_garbage)
app.command(rich_help_panel=LAW)(study.fit)
app.add_typer(stages, name="stage", hidden=True)
app.command(rich_help_panel=LAW)(planning.forecast)
app.add_typer(planning.plan_app, name="plan", rich_help_panel=LAW)


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
    """Entry point: an error that a user can fix is one line on stderr and exit status 1."""
    collect_less()
    quiet()
    try:
        app(prog_name="mergelaw")
    except MergelawError as error:
        fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if out_of_memory(error):
            fail("out of memory; give the job more of it, or fewer jobs at a time")
        if not isinstance(error, OSError) or error.errno is None:
            raise
        fail(system_message(error))


def fail(message: str) -> None:
    """Print one line and exit with status 1."""
    print(f"mergelaw: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)
