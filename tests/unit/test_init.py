"""`mergelaw init`: from models and files that lie there to a configuration that is accepted."""

import shutil
import warnings
from pathlib import Path

import pytest
from transformers.utils import logging
from typer.testing import CliRunner

import models
from mergelaw import config
from mergelaw.cli.app import app
from mergelaw.config.init import domain_of, domains_of, draft, named
from mergelaw.errors import MergelawError
from mergelaw.models.inspect import without_warnings
from mergelaw.workflow.deploy import run_command
from mergelaw.workflow.inspect import inspect
from mergelaw.workflow.study import Study

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
DOMAINS = ("law", "medicine", "code")


def lines(path: Path, domain: str, count: int = 40) -> Path:
    records = ({"question": f"{domain} {n}?", "answer": f"{domain} is {n}."} for n in range(count))
    return models.write_jsonl(path, records)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base, two adapters, a whole expert and a file for each domain."""
    folder = tmp_path_factory.mktemp("made")
    base = models.write_checkpoint(folder / "tiny-base", dtype="float32", **TINY)
    models.write_adapter(base, folder / "experts" / "tiny-law-lora", r=2)
    models.write_adapter(base, folder / "experts" / "tiny-medical-lora", r=2)
    models.write_expert(base, folder / "experts" / "tiny-coder-lora", 0.05)
    for domain in DOMAINS:
        lines(folder / "data" / f"{domain}_eval.jsonl", domain)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "place"))
    return Path()


def init(*words: str, base: str = "tiny-base"):
    return CliRunner().invoke(app, ["init", "--base", base, *words])


ALL = ("--experts", "experts", "--data", "data")


def test_what_is_written_is_accepted_by_the_check(place):
    files = [str(place / "data" / f"{domain}_eval.jsonl") for domain in DOMAINS]
    folders = sorted(str(path) for path in (place / "experts").iterdir())
    run = init("--experts", *folders, "--data", *files, "-o", "ours.yaml")
    assert run.exit_code == 0, run.output
    study = Study(config.load("ours.yaml"))
    assert study.config.name == "ours" and list(study.config.domains) == [*DOMAINS]
    assert {n: study.config.expert_domains(n) for n in study.config.models} == {
        "coder": ["code"], "law": ["law"], "medical": ["medicine"],
    }  # fmt: skip
    assert inspect(study, deep=True).problems == []
    assert "3 experts (3 with a domain), 3 domains" in run.output
    text = Path("ours.yaml").read_text()
    assert "# adapter" in text and "# whole model" in text and study.by_path
    assert init(*ALL, "-o", "ours.yaml").exit_code == 1  # it is not written over
    assert Path("ours.yaml").read_text() == text


def test_the_command_to_run_next_works_outside_a_checkout(place):
    run = init(*ALL)
    (words,) = (line.split() for line in run.output.splitlines() if "snakemake" in line)
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert (Path(options["--snakefile"])).is_file() and Path(options["--profile"]).is_dir()
    assert options["--configfile"] == "study.yaml"
    Path("workflow").mkdir()
    Path("workflow/Snakefile").touch()
    assert run_command("a b.yaml") == "snakemake --profile profiles/local --configfile 'a b.yaml'"


def test_warnings_of_libraries_are_not_shown(recwarn):
    usual = logging.get_verbosity()
    with without_warnings():
        warnings.warn("something is deprecated", FutureWarning, stacklevel=1)
        assert logging.get_verbosity() == logging.ERROR
    assert not recwarn.list and logging.get_verbosity() == usual
    assert draft.__wrapped__ and inspect.__wrapped__  # as these do


def test_names_that_yaml_would_read_as_something_else_are_quoted(place):
    for old, new in (("law", "123"), ("code", "true"), ("medicine", "1e5")):
        Path(f"data/{old}_eval.jsonl").rename(f"data/{new}.jsonl")
    assert init(*ALL, "-o", "0.5.yaml").exit_code == 0
    study = config.load("0.5.yaml")
    assert study.name == "0.5" and [*study.domains] == ["123", "1e5", "true"]


def test_folders_stand_for_what_is_in_them(place):
    assert init(*ALL).exit_code == 0
    study = config.load("study.yaml")
    assert [*study.models] == ["coder", "law", "medical"] and [*study.domains] == sorted(DOMAINS)
    assert "learned" in study.methods
    lines(Path("data/law_eval.jsonl"), "law", 15)
    assert init(*ALL, "-o", "few.yaml").exit_code == 0
    assert "learned" not in config.load("few.yaml").methods


@pytest.mark.parametrize(
    ("spoil", "words", "error"),
    [
        (lambda: None, ("--experts", "experts/tiny-law-lora", "--data", "data"), "at least two"),
        (lambda: None, ("--experts", "data", "--data", "data"), "data: holds no checkpoint"),
        (lambda: None, ("--experts", "experts", "--data", "experts/none"), "experts/none"),
        (
            lambda: Path("data/law_eval.jsonl").write_text('{"a": 1}\n'),
            ALL,
            "law_eval.jsonl, line 1: no response among its columns ['a']",
        ),
        (
            lambda: Path("experts/tiny-coder-lora/model.safetensors").write_bytes(b"half"),
            ALL,
            "model.safetensors: corrupt or half-copied",
        ),
        (lambda: shutil.rmtree("tiny-base"), ALL, "tiny-base"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(place, spoil, words, error):
    spoil()
    run = init(*words)
    assert run.exit_code == 1 and isinstance(run.exception, MergelawError)
    assert error in str(run.exception) and "\n" not in str(run.exception)
    assert not Path("study.yaml").exists()


def test_names_are_the_words_that_differ(tmp_path):
    paths = [tmp_path / f"qwen-0.5b-{name}-v2" for name in ("law", "med", "code it")]
    assert list(named(paths)) == ["law", "med", "code_it"]
    same = [tmp_path / name / "model" for name in ("a", "b")]
    assert list(named(same)) == ["model", "b_model"]
    with pytest.raises(MergelawError, match="rename one"):
        named(tmp_path / name for name in ("a b", "a-b", "a.b"))


@pytest.mark.parametrize(
    ("expert", "domain"),
    [("law", "law"), ("med", "medicine"), ("lawyer", "law"), ("python_coder", "code"),
     ("chemistry", "chemistry"), ("sums", None), ("general", None), ("maths_2", "math")],
)  # fmt: skip
def test_an_experts_domain_is_that_of_its_words(expert, domain):
    assert domain_of(expert, ["law", "medicine", "code", "math", "chemistry", "physics"]) == domain
    assert domain_of("law_code", ["law", "code"]) is None


def test_splits_of_a_domain_belong_together(tmp_path):
    for name in ("law_train", "law_test", "code.eval", "maths"):
        lines(tmp_path / "d" / f"{name}.jsonl", name)
    found = domains_of([tmp_path / "d"])
    assert {name: {k: p.name for k, p in files.items()} for name, files in found.items()} == {
        "code": {"source": "code.eval.jsonl"},
        "law": {"source": "law_train.jsonl", "eval_source": "law_test.jsonl"},
        "maths": {"source": "maths.jsonl"},
    }
