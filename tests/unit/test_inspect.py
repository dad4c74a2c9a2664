"""`config check` opens local models and files: each problem is one line with its place."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import yaml
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import models
from mergelaw.artifacts import lineage
from mergelaw.artifacts.files import file_digest
from mergelaw.artifacts.run_lock import lock_results
from mergelaw.cli.app import app
from mergelaw.config import parse
from mergelaw.workflow.artifact import Artifact
from mergelaw.workflow.folder import use
from mergelaw.workflow.inspect import inspect
from mergelaw.workflow.job import job_file, write_job
from mergelaw.workflow.study import Study

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}


def lines(path: Path, count: int) -> Path:
    records = ({"prompt": f"What is {n} + 1?", "response": f"It is {n + 1}."} for n in range(count))
    return models.write_jsonl(path, records)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base, two experts of it and an adapter, and a file of documents."""
    folder = tmp_path_factory.mktemp("made")
    base = models.write_checkpoint(folder / "base", dtype="float32", **TINY)
    for seed, name in enumerate(("sums", "tales")):
        models.write_expert(base, folder / name, 0.05, seed)
    models.write_adapter(base, folder / "adapter", r=2)
    lines(folder / "sums.jsonl", 30)
    return folder


@pytest.fixture
def place(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "place"))


def study(place: Path, **changes) -> Study:
    experts = {
        name: {"checkpoints": {"tiny": {"path": str(place / name)}}} for name in ("sums", "tales")
    }
    data = {
        "name": "checked",
        "results": str(place / "results"),
        "domains": {"sums": {"source": {"files": [str(place / "sums.jsonl")]}}},
        "bases": {"tiny": {"path": str(place / "base")}},
        "experts": experts,
        "methods": {"average": {}},
    }
    return Study(parse(data | changes))


def problems(place: Path, deep: bool = False, **changes) -> list[str]:
    found = inspect(study(place, **changes), deep).problems
    assert all("\n" not in problem for problem in found)
    return found


def test_what_fits_is_accepted_and_said(place):
    found = inspect(study(place))
    assert found.problems == [] and found.notes == []
    shutil.copytree(place / "sums", place / "again")
    checkpoints = {name: {"tiny": {"path": str(place / name)}} for name in ("sums", "again")}
    checkpoints["sums"]["other"] = {"path": str(place / "sums")}
    experts = {name: {"checkpoints": where} for name, where in checkpoints.items()}
    bases = {"tiny": {"path": str(place / "base")}, "other": {"path": str(place / "base")}}
    notes = "\n".join(inspect(study(place, experts=experts, bases=bases)).notes)
    assert "experts sums and again: are the same checkpoint" in notes
    assert "bases.other: has no checkpoint of again" in notes
    assert "laws over several sizes are about the experts of all bases: sums" in notes


def test_trust_is_part_of_a_task_vectors_key_and_only_its(place):
    config = place / "sums" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.01}))
    experts = {
        name: {"checkpoints": {"tiny": {"path": str(place / name)}}} for name in ("sums", "tales")
    }
    (problem,) = problems(place, experts=experts)
    assert "rms_norm_eps 0.01, the base's has 1e-06" in problem and "trust: [" in problem
    before = study(place, experts=experts)
    experts["sums"]["checkpoints"]["tiny"]["trust"] = ["rms_norm_eps"]
    after = study(place, experts=experts)
    assert after.task_vectors["tiny", "sums", 0].recipe == {"trust": ["rms_norm_eps"]}
    new = {artifact.stage for path, artifact in after.by_path.items() if path not in before.by_path}
    assert new == {"task_vector", "evaluate", "fit", "report"}
    assert problems(place, experts=experts) == []


def test_earlier_answers_of_chats_are_said_to_be_context(place):
    turns = [{"role": role, "content": f"{role} says"} for role in ("user", "assistant")]
    chats = (
        {"messages": [*turns, *turns, {**turns[0], "content": f"{n}"}, turns[1]]} for n in range(9)
    )
    models.write_jsonl(place / "sums.jsonl", chats)
    (note,) = (n for n in inspect(study(place), deep=True).notes if "earlier" in n)
    assert note.startswith("domains.sums.source: 18 earlier answers in the chats of 9 documents")


def test_documents_longer_than_a_base_has_positions_are_found_before_a_run(place):
    long = ({"prompt": f"{n}", "response": "x y " * 40} for n in range(9))
    models.write_jsonl(place / "sums.jsonl", long)
    for kind, found in (("gpt2", "but the model has 64 positions"), ("llama", "was made for 64")):
        small = {k: v for k, v in TINY.items() if kind == "llama" or k != "intermediate_size"}
        base = models.write_checkpoint(place / kind, kind, True, "float32", max_tokens=64, **small)
        models.write_expert(base, place / f"{kind}-e")
        where = {"tiny": {"path": str(place / f"{kind}-e")}}
        changes = {"bases": {"tiny": {"path": str(base)}}, "experts": {"e": {"checkpoints": where}}}
        seen = inspect(study(place, **changes))
        assert found in str(seen.problems if kind == "gpt2" else seen.notes)
        assert inspect(study(place, **changes, evaluation={"max_tokens": 64})).problems == []


def test_a_bad_record_beyond_the_first_ones_hides_no_other_problem(place):
    with (place / "sums.jsonl").open("a") as file:
        file.write("{}\n")
    (place / "tales" / "model.safetensors").write_bytes(b"half")
    (problem,) = problems(place)
    assert "experts.tales" in problem
    assert "line 31" in problems(place, deep=True)[-1]


def test_domains_of_few_or_the_same_documents_are_said(place):
    lines(place / "few.jsonl", 3)
    domains = {n: {"source": {"files": [str(place / f"{n}.jsonl")]}} for n in ("sums", "few")}
    few, shared = sorted(inspect(study(place, domains=domains)).notes)
    assert few.startswith("domain few: evaluates 3 documents, too few")
    assert "domains sums (23) and few (3): 3 evaluation documents are in both" in shared
    shutil.copyfile(place / "sums.jsonl", place / "few.jsonl")
    (problem,) = problems(place, domains=domains)
    assert "domains sums and few: evaluate the same" in problem


def test_an_expert_that_equals_its_base_is_refused(place):
    for file in (place / "base").glob("*.safetensors"):
        shutil.copyfile(file, place / "sums" / file.name)
    untrained = models.write_adapter(place / "base", place / "untrained", r=2)
    weights = load_file(untrained / "adapter_model.safetensors")
    zero = {n: t * ("lora_A" in n) for n, t in weights.items()}
    save_file(zero, untrained / "adapter_model.safetensors")
    experts = {
        name: {"checkpoints": {"tiny": {"path": str(place / name)}}}
        for name in ("sums", "untrained", "tales", "adapter")
    }
    first, second = problems(place, experts=experts)
    assert "experts.sums" in first and "equals its base" in first
    assert "experts.untrained" in second and "equals its base" in second


def test_an_adapter_is_no_base(place):
    (problem,) = problems(place, bases={"tiny": {"path": str(place / "adapter")}})
    assert problem.startswith("bases.tiny: ") and "is an adapter" in problem


def test_each_model_that_does_not_fit_is_named(place):
    wide = models.write_checkpoint(place / "wide", dtype="float32", **TINY | {"hidden_size": 32})
    experts = {
        name: {"checkpoints": {"tiny": {"path": str(path)}}}
        for name, path in (("wide", wide), ("sums", place / "sums"), ("tales", place / "tales"))
    }
    (place / "tales" / "model.safetensors").write_bytes(b"half")
    first, second = problems(place, experts=experts)
    assert first.startswith("experts.wide.checkpoints.tiny: ") and "give an expert" in first
    assert second.startswith("experts.tales.checkpoints.tiny: ") and "corrupt" in second


def test_a_base_needs_a_tokenizer(place):
    for file in (place / "base").glob("tokenizer*"):
        file.unlink()
    assert "bases.tiny: " in problems(place)[0] and "tokenizer" in problems(place)[0]


def test_documents_are_looked_at_and_all_of_them_if_asked(place):
    file = place / "sums.jsonl"
    lines(file, 30)
    whole = file.read_text()
    file.write_text(whole + json.dumps({"question": "a"}) + "\n")
    settings = {"files": [str(file)], "invalid_records": "skip"}
    assert problems(place, True, domains={"sums": {"source": settings}}) == []
    long = whole + json.dumps({"prompt": "p", "response": "x y " * 300}) + "\n"
    file.write_text(long)
    short = {"max_tokens": 64}
    assert inspect(study(place, evaluation=short)).notes == []
    (note,) = inspect(study(place, evaluation=short), deep=True).notes
    assert "the longest of 31 documents has" in note and "max_tokens (64)" in note


def test_learned_coefficients_need_documents_that_evaluation_leaves(place):
    methods = {"average": {}, "learned": {}}
    assert problems(place, methods=methods) == []
    for count, left in ((9, 2), (2, 0)):
        lines(place / "sums.jsonl", count)
        (problem,) = problems(place, methods=methods)
        assert problem.startswith(f"domains.sums: {left} documents are left for calibration")


def test_the_command_fails_with_every_problem(place):
    config = study(place).config.model_dump(exclude_unset=True, by_alias=True)
    file = place / "study.yaml"
    file.write_text(yaml.safe_dump(config))
    run = CliRunner().invoke(app, ["config", "check", str(file)])
    assert run.exit_code == 0 and "1 bases, 2 experts" in run.output
    for name in ("sums", "tales"):
        (place / name / "model.safetensors").write_bytes(b"half")
    run = CliRunner().invoke(app, ["config", "check", str(file)])
    assert run.exit_code == 1
    assert "experts.sums" in run.output and "experts.tales" in str(run.exception)


def stage(known: Study, artifact: Artifact) -> Result:
    """Run the job of an artifact, as the workflow does."""
    write_job(known.results, artifact)
    command = artifact.stage.replace("_", "-")
    return CliRunner().invoke(app, ["stage", command, str(job_file(known.results, artifact))])


def test_a_checkpoint_that_changed_since_the_run_began_is_not_linked(place):
    known = study(place)
    lock_results(known.results).release()
    expert, weights = known.experts["tiny", "sums", 0], place / "sums" / "model.safetensors"
    assert expert.path  # its key was made, and its digests are remembered
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    run = stage(known, expert)
    assert str(run.exception) == f"{weights}: changed since the run began; rerun"
    assert not (known.results / expert.path).exists()
    weights.write_bytes(before)
    assert stage(known, expert).exit_code == 0


def test_a_ready_made_checkpoint_is_read_once_for_its_digests(place, monkeypatch):
    """By a run's start, all of its jobs and the next run together, however large it is."""
    read, digest = Counter[Path](), hashlib.file_digest

    def counted(file: BinaryIO, how: str) -> Any:
        read[Path(file.name).resolve()] += 1
        return digest(file, how)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    lock_results(place / "results").release()
    known = study(place)
    assert known.by_path
    models = [*known.bases.values(), *known.experts.values()]
    for artifact in (*models, *known.task_vectors.values()):
        assert stage(known, artifact).exit_code == 0
    again = study(place)
    use(again, filter(again.made, again.by_path.values()))
    written = [file for name in ("base", "sums", "tales") for file in (place / name).iterdir()]
    assert len(written) >= 9 and {read[file] for file in written} == {1}
    # As many digests as there are files: the lineages have those of the run's start.
    linked = lineage.read(known.results / models[0].path)["files"]
    assert linked == {name: file_digest(place / "base" / name) for name in linked}
