"""OpenRLHF's real command line on a processor: from its checkpoint to a law, kills, refusals."""

import dataclasses
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from studies import TINY, Ended, Place, environment, kill, mergelaw, records, wait_for, write_jsonl

import jobs
import models
from mergelaw.artifacts import lineage
from mergelaw.data import documents as corpus
from mergelaw.data.tokenize import encode
from mergelaw.models import openrlhf
from mergelaw.models.recipe import Training

DOMAINS = ("sums", "tales", "riddles")
DOCUMENTS = 18  # to train on, of each domain: one batch is all of them
TRAINING = {
    "trainer": "openrlhf",
    "epochs": 5,
    "batch_size": DOCUMENTS,
    "max_tokens": 128,
    "learning_rate": 3e-3,
    "dtype": "bfloat16",
    "openrlhf": {"attn_implementation": "eager"},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Place:
    """A workflow from a base to a law: two experts of all weights, one by an adapter."""
    folder = tmp_path_factory.mktemp("study")
    models.write_checkpoint(folder / "base", dtype="bfloat16", **TINY)
    for domain in DOMAINS:
        write_jsonl(folder / "data" / f"{domain}.jsonl", records(domain))
    files = {d: {"source": {"files": [str(folder / "data" / f"{d}.jsonl")]}} for d in DOMAINS}
    adapter = {"openrlhf": {"lora": {"rank": 4, "alpha": 64}}}
    place = Place(
        folder,
        {
            "name": "openrlhf",
            "corpus": {"eval_documents": 6, "calibration_documents": 0},
            "domains": files,
            "bases": {"tiny": {"path": str(folder / "base")}},
            "training": TRAINING,
            "experts": {"sums": {}, "tales": {}, "riddles": {"training": adapter}},
            "methods": {"average": {}},
            "evaluation": {"max_tokens": 128},
        },
    )
    place.finish()
    return place


def expert_of(place: Place, name: str) -> Path:
    (folder,) = (p for n, p in place.artifacts("experts").items() if f"/{name}-" in n)
    return folder


def test_experts_of_openrlhf_come_to_a_law(study):
    fitted = {(fit["base"], fit["domain"]) for fit in study.laws()["fits"]}
    assert {("tiny", domain) for domain in (*DOMAINS, "macro")} <= fitted
    rows = study.rows()
    assert len(rows) == 8 * len(DOMAINS) and rows["finite"].all()
    for domain in DOMAINS:
        of_domain = rows[rows["domain"] == domain]
        (base,) = of_domain[of_domain["k"] == 0]["ce"]
        (own,) = of_domain[of_domain["experts"].map(lambda e, own=domain: list(e) == [own])]["ce"]
        assert own < base - 0.05, domain


def test_an_expert_says_what_made_it(study):
    for name in DOMAINS:
        known = lineage.used(expert_of(study, name), whole=True)
        versions = known["facts"]["trainer_versions"]
        assert versions["openrlhf"] == openrlhf.VERSION and "deepspeed" in versions
        assert versions["transformers"] != known["versions"]["transformers"]
        assert known["facts"]["steps"] == TRAINING["epochs"] == len(known["facts"]["losses"])
        assert known["facts"]["resumed_at_step"] is None
        assert known["inputs"].keys() == {"base", f"corpora:{name}"}
    count, wrong = lineage.verify([expert_of(study, "riddles")])
    assert count >= 3 and not wrong


def test_an_expert_alone_is_its_checkpoint(study):
    """Through task vector and merge engine, an expert has the loss of what OpenRLHF wrote."""
    rows = study.rows()
    for name in DOMAINS:
        alone = rows[rows["experts"].map(lambda e, name=name: list(e) == [name])]
        for domain in DOMAINS:
            (row,) = alone[alone["domain"] == domain].to_dict("records")
            expected, _ = loss(expert_of(study, name), documents(study, domain, "eval"))
            np.testing.assert_allclose(row["ce"], expected, rtol=2e-6)


@pytest.mark.parametrize("name", DOMAINS)
def test_the_loss_is_of_the_response_alone(study, name):
    """The first step's loss is the base's, on all training documents, in bfloat16."""
    train = documents(study, name, "train")
    assert len(train) == DOCUMENTS
    (first_step, first), *_ = lineage.read(expert_of(study, name))["facts"]["losses"]
    response, whole = loss(study.folder / "base", train, "bfloat16")
    assert first_step == 1 and abs(whole - response) > 0.02, "the test could not tell"
    np.testing.assert_allclose(first, response, rtol=1e-3)


def test_an_adapter_changes_the_layers_that_it_is_put_on(study):
    """And is merged into them: embeddings and norms stay the base's, bit for bit."""
    base, expert = (
        models.read_tensors(p) for p in (study.folder / "base", expert_of(study, "riddles"))
    )
    changed = {name for name in base if not torch.equal(base[name], expert[name])}
    assert changed == {name for name in base if "_proj." in name}


def documents(place: Place, domain: str, split: str) -> list[corpus.Document]:
    corpora = place.artifacts("corpora").items()
    (folder,) = (path for name, path in corpora if name.startswith(f"{domain}/{split}@"))
    return list(corpus.read_split(folder))


def loss(folder: Path, of: list[corpus.Document], dtype: str = "float32") -> tuple[float, float]:
    """Mean negative log-likelihood of responses, and of the documents as a whole."""
    from transformers import AutoTokenizer

    model, tokenizer = models.load(folder, dtype), AutoTokenizer.from_pretrained(folder)
    sums = np.zeros(4)
    for window in encode(tokenizer, of, 128, "refuse", "here").windows:
        with torch.no_grad():
            scores = model(torch.tensor([window.ids])).logits[0].float().log_softmax(-1).double()
        nll = [-float(scores[place - 1, window.ids[place]]) for place in range(1, window.stop)]
        response = nll[window.start - 1 :]
        sums += sum(response), len(response), sum(nll), len(nll)
    return sums[0] / sums[1], sums[2] / sums[3]


# Kills


def command(place: Place, name: str, output: Path, **changes) -> list[str]:
    """The stage's command for an expert, made into ``output``."""
    artifact = place.study().expert("tiny", name, 0)
    training = {**artifact.recipe["training"], **changes}
    changed = dataclasses.replace(artifact, recipe={"training": training, "seed": 0})
    return ["mergelaw", "stage", "expert", str(jobs.of(changed, place.results, output))]


def run(words: list[str], cwd: Path, **more: str) -> Ended:
    return mergelaw(*words[1:], cwd=cwd, **more)


def test_a_training_goes_on_from_its_state_after_kills(study, tmp_path):
    """Two processes that share weights, gradients and optimiser; killed alone, then as a group."""
    two = {"STAND_IN_GPUS": "2"}
    settings = {"epochs": None, "steps": 30, "openrlhf": {**TRAINING["openrlhf"], "zero_stage": 3}}
    output = tmp_path / "sums"
    words = command(study, "sums", output, **settings)
    state = tmp_path / ".sums.work" / "state"
    reached = 0
    for group in (False, True):
        with (tmp_path / "log").open("a") as log:
            started = subprocess.Popen(
                words, env=environment(**two), stdout=log, stderr=log, start_new_session=True
            )
            wait_for(lambda least=reached + 3: saved(state) >= least, started)
            kill(started, group)
        reached = saved(state)
        assert 0 < reached < 30 and not output.exists()
        wait_for(lambda: not working_in(state))  # nothing that was started outlives it
    ended = run(words, tmp_path, **two)
    assert ended.status == 0, ended.output[-4000:]
    facts = lineage.used(output, whole=True)["facts"]
    assert facts["resumed_at_step"] == reached and facts["steps"] == 30 and facts["gpus"] == 2
    last = dict(map(tuple, facts["losses"]))[30]
    calm = run(command(study, "sums", tmp_path / "calm", **settings), tmp_path, **two)
    assert calm.status == 0, calm.output[-4000:]
    undisturbed = dict(map(tuple, lineage.read(tmp_path / "calm")["facts"]["losses"]))[30]
    np.testing.assert_allclose(last, undisturbed, rtol=0.02)
    assert not state.parent.exists()


def saved(state: Path) -> int:
    marks = state.glob("states/global_step*/metric.json")
    return max((int(mark.parent.name.removeprefix("global_step")) for mark in marks), default=0)


def working_in(folder: Path) -> list[int]:
    """Processes whose working directory this is."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if link.readlink() == folder:
                found.append(int(link.parent.name))
        except OSError:
            continue  # ended meanwhile
    return found


# What the command line takes


def test_openrlhf_knows_every_option():
    """Also those that need GPUs: all that it complains of is one that is not there."""
    recipe = Training.model_validate(
        {
            **TRAINING,
            "packing": True,
            "gradient_checkpointing": True,
            "openrlhf": {
                "zero_stage": 3,
                "adam_offload": True,
                "ring_attn_size": 2,
                "lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]},
            },
        }
    )
    for plain in (False, True):
        words = openrlhf.arguments(recipe, 0, openrlhf.batches(recipe, 100, 4), plain)
        python, _ = openrlhf.interpreter()
        made = subprocess.run(
            [python, "-m", "openrlhf.cli.train_sft", *words, "--no.such.option"],
            env=openrlhf.environment(python), capture_output=True, text=True,
        )  # fmt: skip
        assert made.returncode == 2
        assert made.stderr.strip().endswith("error: unrecognized arguments: --no.such.option")


def test_two_nodes_train_one_expert(study, tmp_path):
    """As srun starts them, but on one machine: a torchrun each, that meet."""
    python, _ = openrlhf.interpreter()
    recipe = Training.model_validate({**TRAINING, "epochs": 2})
    (base,) = study.artifacts("bases").values()
    from transformers import AutoTokenizer

    rows, end, _ = openrlhf.render(
        AutoTokenizer.from_pretrained(base), documents(study, "sums", "train"), recipe, "sums"
    )
    openrlhf.stage_model(base, tmp_path / openrlhf.MODEL, end)
    plan = openrlhf.batches(recipe, len(rows), 2)
    openrlhf.write_data(tmp_path / openrlhf.DATA, rows, plan.rows, 0)
    words = openrlhf.arguments(recipe, 0, plan, plain=False)
    launch = openrlhf.launcher(python, 2, 1, str(os.getpid()), "localhost")
    launch = [*launch[launch.index("srun") :], "openrlhf.cli.train_sft", *words]
    launch = launch[launch.index(python) :]
    nodes = [
        subprocess.Popen(
            launch, cwd=tmp_path, env=openrlhf.environment(python), stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for node in nodes:
        _, errors = node.communicate()
        assert node.returncode == 0, errors[-4000:]
    losses = openrlhf.ask(python, "losses", openrlhf.LOG, tmp_path)
    assert [step for step, _ in losses] == [1, 2]
    assert (tmp_path / openrlhf.OUTPUT / "model.safetensors").exists()


# Bad input: one line, before time is spent, nothing half-written


def test_a_workflow_does_not_begin_without_its_trainer(study, tmp_path):
    place = Place(tmp_path, study.config)
    (line,) = place.snakemake(MERGELAW_OPENRLHF_PYTHON="").errors()
    assert line.startswith(
        "MERGELAW_OPENRLHF_PYTHON is not set; name the Python of the environment"
    )
    named = ("--config", "openrlhf_python=/nowhere/bin/python")  # as a profile does
    (line,) = place.snakemake(*named).errors()
    assert "MERGELAW_OPENRLHF_PYTHON: /nowhere/bin/python does not answer" in line
    assert not list(place.results.rglob("lineage.json"))
    assert study.planned(MERGELAW_OPENRLHF_PYTHON="") == {}, "it has nothing to train"


@pytest.mark.parametrize(
    ("changes", "more", "said"),
    [
        ({}, {"STAND_IN_GPUS": "0"}, "OpenRLHF: sees no GPU"),
        (
            {"micro_batch_size": 9},
            {"STAND_IN_GPUS": "4"},
            "18 is no multiple of micro_batch_size 9",
        ),
        ({"max_tokens": 8}, {}, "max_tokens is 8; raise it"),
        (
            {"packing": True, "openrlhf": {"ring_attn_size": 2}},
            {"STAND_IN_GPUS": "2"},
            "cannot import ring_flash_attn",
        ),
    ],
)
def test_what_cannot_be_trained_is_said_at_once(study, tmp_path, changes, more, said):
    started = time.monotonic()
    ended = run(command(study, "sums", tmp_path / "sums", **changes), tmp_path, **more)
    assert ended.status == 1 and said in ended.errors()[-1]
    assert "Traceback" not in ended.output and not (tmp_path / "sums").exists()
    assert "torch.distributed.run" not in ended.output, "it was started"
    assert time.monotonic() - started < 120
