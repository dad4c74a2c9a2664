"""The command line itself: help, version, job files."""

import json
import subprocess
import sys
from contextlib import ExitStack

import pytest

import jobs
import mergelaw
from mergelaw import config
from mergelaw.artifacts import keys, store
from mergelaw.cli.planning import outdated
from mergelaw.errors import MergelawError
from mergelaw.workflow.job import job_file, read_job, write_job
from mergelaw.workflow.study import Study


def run(*words: str) -> subprocess.CompletedProcess:
    program = "from mergelaw.cli.app import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
    )


def test_a_job_is_read_as_it_was_written(tmp_path):
    inputs = {"base": "results/b", "corpora": {"algebra": "results/c"}}
    file = jobs.write(tmp_path / "a b.json", "expert", "x y", {"a": "é"}, inputs=inputs)
    job = read_job(file, "expert")
    assert (str(job.output), job.recipe) == ("x y", {"a": "é"})
    assert str(job.one("base")) == "results/b"
    assert {name: str(path) for name, path in job.all("corpora").items()} == inputs["corpora"]
    assert job.all("task_vectors") == {}
    with pytest.raises(MergelawError, match=r"job of stage expert, not base"):
        read_job(file, "base")


def test_laws_of_another_version_are_named(tmp_path, monkeypatch):
    store.make(tmp_path / "laws", "fit", {}, {}, lambda folder, state: {})
    assert outdated(tmp_path / "laws") == outdated(tmp_path / "points.csv") == []
    monkeypatch.setitem(keys.STAGES, "fit", 99)
    (warning,) = outdated(tmp_path / "laws" / "laws.json")
    assert "of the stage fit, now 99" in warning


def test_a_job_keeps_the_order_of_its_corpora(tmp_path):
    """Documents are trained on in this order."""
    order = ["logic", "algebra", "code"]
    study = {
        "name": "s",
        "corpus": {"train_documents": 9},
        "domains": {name: {"source": {"synthetic": "algebra"}} for name in order},
        "pretraining": {"domains": order, "steps": 1, "learning_rate": 1e-3,
                        "architecture": {"model_type": "llama"}},
        "bases": {"small": {"pretraining": {}}},
        "experts": {"both": {"domains": order}},
        "training": {"steps": 1, "learning_rate": 1e-3},
        "methods": {"average": {}},
    }  # fmt: skip
    parsed = Study(config.parse(study))
    for artifact in [*parsed.bases.values(), *parsed.experts.values()]:
        write_job(tmp_path, artifact)
        job = read_job(job_file(tmp_path, artifact), artifact.stage)
        assert list(job.all("corpora")) == order


@pytest.mark.parametrize("text", [None, "", "{}", '"a"', "[1]", "\x00", '{"output": 1}'])
def test_a_file_that_is_no_job_is_refused(tmp_path, text):
    file = tmp_path / "job.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(MergelawError, match=r"job.json: "):
        read_job(file, "fit")
    ended = run("stage", "fit", str(file))
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"mergelaw: error: {file}: ")


def test_a_job_has_room_for_more_inputs_than_a_command_line(tmp_path):
    shards = {f"shard{i}": f"evals/none@{i:08}" for i in range(99_999)}
    file = jobs.write(tmp_path / "job.json", "fit", tmp_path / "laws", {}, inputs={"evals": shards})
    ended = run("stage", "fit", str(file))
    assert ended.returncode == 1
    assert "evals/none@00000000: no artifact" in ended.stderr.splitlines()[-1]


def test_stages_are_hidden_and_the_rest_is_grouped():
    text = run("--help").stdout
    assert "│ stage " not in text
    for command in ("status", "summary", "estimate", "lineage", "gc", "merge", "fit", "plan"):
        assert f" {command} " in text
    assert json.dumps(run("--version").stdout.split()) == json.dumps(
        ["mergelaw", mergelaw.__version__]
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        type("OutOfMemoryError", (RuntimeError,), {})(
            "CUDA out of memory. Tried to allocate 2 GiB"
        ),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=repr,
)
def test_memory_that_runs_out_is_said_as_that(tmp_path, monkeypatch, capsys, error):
    """By whatever library, and not as a tokenizer or a checkpoint that is missing."""
    import transformers

    from mergelaw.cli import app
    from mergelaw.models import causal_lm, checkpoint

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fails)
    for load in (causal_lm.load_tokenizer, lambda folder: causal_lm.load(folder, "float32")):
        with pytest.raises(type(error)):
            load(tmp_path)
    monkeypatch.setattr("safetensors.safe_open", fails)
    if isinstance(error, OSError):
        with pytest.raises(OSError, match="allocate"):
            checkpoint.open_mapped(tmp_path / "model.safetensors", ExitStack())
    monkeypatch.setattr(app, "app", fails)
    with pytest.raises(SystemExit):
        app.main()
    assert capsys.readouterr().err.startswith("mergelaw: error: out of memory; give the job more")
