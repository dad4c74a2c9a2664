"""README and docs: their commands, configurations, programs and links are tried."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from ruamel.yaml import YAML
from typer.main import get_command
from typer.testing import CliRunner

from mergelaw import MERGING, config
from mergelaw.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        ROOT / "config/README.md",
        ROOT / "results/README.md",
    ]
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Commands of a page's shell blocks, as words."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def test_the_readme_fits_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


@each_page
def test_commands_exist_with_their_options(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for program, *words in commands(page):
        line = shlex.join([program, *words])
        if program == "mergelaw":
            words = words[: words.index(">")] if ">" in words else words
            result = CliRunner().invoke(app, [*words, "--help"])
            assert result.exit_code == 0, f"{line}: {result.output}"
        elif program == "make":
            assert set(words) <= targets, line
        elif program == "snakemake":
            place = next(after for word, after in pairwise(words) if word == "--profile")
            assert (ROOT / place).is_dir(), line
        elif program.endswith("python"):
            assert (ROOT / words[0]).is_file(), line
        else:
            assert program in ("rsync", "."), line


@each_page
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"(?:\]\(|src=\")([^)\s\"]+)", text):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^a-z0-9 _-]", "", t.lower()).replace(" ", "-") for t in titles
            }, target


@pytest.mark.parametrize("name", ["README.md", "docs/use-your-own-models.md"])
def test_configurations_are_valid(name):
    (text,) = blocks(ROOT / name, "yaml")
    study = config.parse(YAML(typ="safe").load(text))
    assert study.name == "ours" and len(study.pool()) == 3


def test_the_readmes_study_is_the_first_of_the_configurations_readme():
    assert blocks(ROOT / "README.md", "yaml")[0] == blocks(ROOT / "config/README.md", "yaml")[0]


@pytest.mark.parametrize("program", blocks(ROOT / "docs/python.md", "python"))
def test_programs_run(program):
    exec(program, {})


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Points and costs like the demo's."""
    folder = tmp_path_factory.mktemp("study")
    sizes = {"27k": 2.68e-5, "60k": 6.01e-5, "161k": 1.602e-4, "333k": 3.324e-4}
    laws = {
        "average": {
            "L_star": 0.892,
            "B": 2.86e-5,
            "A0": 1.2e-3,
            "beta": 0.995,
            "gamma": 0.45,
            "b": 0.1,
        },
        "ties": {
            "L_star": 0.786,
            "B": 3.39e-5,
            "A0": 0.268,
            "beta": 0.979,
            "gamma": 0.088,
            "b": 2.1,
        },
    }
    rows = [
        {"method": name, "base": base, "N": N, "k": k, "M": 9,
         "loss": float(MERGING.predict(law, N=N, k=k)) + 1e-4 * (k % 2)}
        for name, law in laws.items() for base, N in sizes.items() for k in range(1, 10)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "points.csv", index=False)
    costs = [{"N": N, "training": 1e4 * N, "evaluation": 1e3 * N} for N in sizes.values()]
    pd.DataFrame(costs).to_csv(folder / "costs.csv", index=False)
    return folder


QUESTIONS = {
    shlex.join(words[1:]): words[1:]
    for page in PAGES
    for words in commands(page)
    if words[:2] in (["mergelaw", "plan"], ["mergelaw", "forecast"]) and "ours.yaml" not in words
}


@pytest.mark.parametrize("words", QUESTIONS.values(), ids=QUESTIONS.keys())
def test_questions_are_answered(words, study, monkeypatch):
    monkeypatch.chdir(study)
    if "points.csv" not in words:
        words = [*words, "points.csv"]
    elif "--method" not in words:
        words = [*words, "--method", "average"]
    if "budget" in words:
        words = [*words, "--costs", "costs.csv"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "main assumption: " in result.output


def test_every_question_is_in_the_docs():
    asked = {words[1] if words[0] == "plan" else words[0] for words in QUESTIONS.values()}
    plan = get_command(app).commands["plan"]
    assert asked == {"forecast", *plan.commands}


def public_commands(group=None, path=()) -> list[tuple[str, ...]]:
    """Every command that is not hidden, as words."""
    found = []
    for name, command in (group or get_command(app)).commands.items():
        if not command.hidden:
            below = hasattr(command, "commands")
            found += public_commands(command, (*path, name)) if below else [(*path, name)]
    return found


@pytest.mark.parametrize("words", public_commands(), ids=" ".join)
def test_the_help_of_every_command_has_an_example_of_it(words):
    text = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"}).output
    (example,) = re.findall(r"^ Example: mergelaw (.*?)\s*$", text, re.MULTILINE)
    given = shlex.split(example.partition(" > ")[0])
    assert tuple(given[: len(words)]) == words
    result = CliRunner().invoke(app, [*given, "--help"])
    assert result.exit_code == 0, result.output
