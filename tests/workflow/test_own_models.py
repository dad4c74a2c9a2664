"""A user's own documents, bases and experts, from files to a fitted law."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from studies import TINY, TRAINING, Place, ready_config, records, write_jsonl

import models
from mergelaw.artifacts import lineage
from mergelaw.data import documents as corpus

# model_type, and how the checkpoint is stored
BASES = {
    "llama": {"model_type": "llama", "tied": True, "dtype": "float32", "shards": 2},
    "qwen": {"model_type": "qwen2", "tied": False, "dtype": "bfloat16", "hidden_size": 24},
    "gemma": {"model_type": "gemma2", "tied": True, "dtype": "bfloat16", "num_hidden_layers": 2},
}
EXPERTS = ("sums", "tales", "proofs")


def write_domains(folder: Path) -> dict[str, dict]:
    """A domain in each format and form of record that the README names."""
    folder.mkdir()
    pairs = {name: records(name) for name in ("sums", "tales", "proofs", "chats")}
    instructions = [{"instruction": r["prompt"], "output": r["response"]} for r in pairs["sums"]]
    (folder / "sums.json").write_text(json.dumps(instructions))
    write_jsonl(folder / "tales.jsonl", pairs["tales"])
    table = pd.DataFrame(
        {
            "problem": [r["prompt"] for r in pairs["proofs"]],
            "solution": [r["response"] for r in pairs["proofs"]],
            "classification": ["proofs", "other"] * 12,
        }
    )
    table.to_parquet(folder / "proofs.parquet")
    chats = [
        {
            "messages": [
                {"role": "user", "content": r["prompt"]},
                {"role": "assistant", "content": r["response"]},
            ]
        }
        for r in pairs["chats"]
    ]
    write_jsonl(folder / "chats.jsonl", chats)
    write_jsonl(folder / "news.jsonl", [{"text": f"Headline {i}: {i} foxes."} for i in range(9)])
    where = {"where": {"classification": "proofs"}}
    return {
        "sums": {"source": {"files": [str(folder / "sums.json")]}},
        "tales": {"source": {"files": [str(folder / "tales.jsonl")]}},
        "proofs": {"source": {"files": [str(folder / "proofs.parquet")], **where}},
        "chats": {"source": {"files": [str(folder / "chats.jsonl")]}, "held_out": True},
        "news": {"source": {"files": [str(folder / "news.jsonl")]}, "held_out": True},
    }


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("own")
    for name, how in BASES.items():
        base = models.write_checkpoint(folder / name, **{**TINY, "head_dim": 8, **how})
        for seed, expert in enumerate(EXPERTS):
            models.write_expert(base, folder / f"{name}-{expert}", 0.05, seed, shards=1 + seed % 2)
    checkpoints = {e: {b: {"path": str(folder / f"{b}-{e}")} for b in BASES} for e in EXPERTS}
    place = Place(
        folder,
        {
            "name": "own",
            "corpus": {"eval_documents": 6, "calibration_documents": 2},
            "domains": write_domains(folder / "data"),
            "bases": {name: {"path": str(folder / name)} for name in BASES},
            "experts": {name: {"checkpoints": checkpoints[name]} for name in EXPERTS},
            "methods": {"average": {}},
            "evaluation": {"max_tokens": 128},
            "merges": {
                "pair": {"base": "llama", "method": "average", "experts": ["proofs", "sums"]}
            },
        },
    )
    place.finish()
    return place


def test_own_models_and_documents_come_to_a_fitted_law(own):
    rows = own.rows()
    assert len(rows) == 3 * 8 * 5
    assert rows["finite"].all() and (rows["tokens"] > 0).all()
    assert set(rows[rows["held_out"]]["domain"]) == {"chats", "news"}
    assert rows.groupby("base")["N"].nunique().eq(1).all() and rows["N"].nunique() == 3
    laws = own.laws()
    fitted = {(fit["base"], fit["domain"]) for fit in laws["fits"]}
    assert {(base, "macro") for base in BASES} <= fitted
    assert {(base, domain) for base in BASES for domain in own.config["domains"]} <= fitted
    (report,) = own.artifacts("reports").values()
    assert "<html" in (report / "report.html").read_text()


def test_an_expert_alone_is_that_expert(own):
    """k = 1 through base, task vector and merge engine gives the checkpoint's own loss."""
    rows = own.rows()
    for base in BASES:
        alone = rows[
            (rows["base"] == base) & (rows["experts"].map(list).map(lambda e: e == ["tales"]))
        ]
        folder = own.folder / f"{base}-tales"
        for domain in ("sums", "news"):
            (row,) = alone[alone["domain"] == domain].to_dict("records")
            np.testing.assert_allclose(row["ce"], loss(own, folder, domain), rtol=2e-6)


def test_a_named_merge_is_a_checkpoint_and_the_one_that_was_measured(own):
    (folder,) = own.artifacts("merges").values()
    rows = own.rows()
    same = (rows["base"] == "llama") & rows["experts"].map(
        lambda experts: list(experts) == ["sums", "proofs"]
    )
    for domain in own.config["domains"]:
        (row,) = rows[same & (rows["domain"] == domain)].to_dict("records")
        np.testing.assert_allclose(row["ce"], loss(own, folder, domain), rtol=2e-6)
    recipe = yaml.safe_load((folder / "mergekit.yaml").read_text())
    assert recipe["merge_method"] == "linear" and len(recipe["models"]) == 2
    for model in recipe["models"]:
        assert (folder / model["model"]["model"]["path"] / "config.json").exists()


def loss(place: Place, folder: Path, domain: str) -> float:
    """Cross-entropy of a checkpoint as transformers loads it, one document at a time."""
    from transformers import AutoTokenizer

    model, tokenizer = models.load(folder), AutoTokenizer.from_pretrained(folder)
    corpora = place.artifacts("corpora").items()
    (evaluation,) = (path for name, path in corpora if name.startswith(f"{domain}/eval@"))
    total, count = 0.0, 0
    for document in corpus.read_split(evaluation):
        if document.messages is None:
            text = document.response
            ids, start = tokenizer(text, add_special_tokens=False)["input_ids"], 1
        else:
            answer = {"role": "assistant", "content": document.response}
            chat = tokenizer.apply_chat_template([*document.messages, answer], tokenize=False)
            asked = tokenizer.apply_chat_template(
                document.messages, tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
            start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1).double()
        places = range(start, len(ids))
        total -= sum(float(scores[place - 1, ids[place]]) for place in places)
        count += len(places)
    return total / count


# From the hub's cache, without a network

REVISION = hashlib.sha1(b"a commit").hexdigest()


def test_models_of_the_hub_are_found_in_its_cache(ready, tmp_path):
    cache = tmp_path / "hub" / "hub"
    for name in ("base", "amber", "birch", "cedar"):
        repository = cache / f"models--ours--{name}"
        shutil.copytree(ready.folder / "models" / name, repository / "snapshots" / REVISION)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)
    config = ready_config(ready.folder, ("amber", "birch", "cedar"))
    config["bases"]["tiny"] = {"hub": "ours/base", "revision": REVISION}
    for name, expert in config["experts"].items():
        expert["checkpoints"] = {"tiny": {"hub": f"ours/{name}", "revision": REVISION}}
    place = Place(tmp_path / "study", config)
    offline = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    place.finish("--until", "fetch_expert", **offline)
    for name in ("amber", "birch", "cedar"):
        (mine,) = (p for n, p in place.artifacts("experts").items() if name in n)
        (theirs,) = (p for n, p in ready.artifacts("experts").items() if name in n)
        assert lineage.read(mine)["digest"] == lineage.read(theirs)["digest"]
        assert REVISION in str(lineage.read(mine)["facts"]["sources"])
    config["experts"]["amber"]["checkpoints"]["tiny"]["revision"] = "0" * 40
    place.configure(config)
    failed = place.snakemake("--until", "fetch_expert", **offline)
    assert failed.status and any("ours/amber" in line for line in failed.errors())


def test_a_baseline_and_two_training_seeds_beside_ready_made_experts(ready, tmp_path):
    """And an expert that fails takes along what needs it, and nothing else."""
    place = ready.copy(tmp_path).forget("cells")
    config = ready_config(ready.folder, ("amber", "birch"))
    config |= {
        "name": "mixed",
        "training_seeds": [0, 1],
        "baselines": {"multitask": {}},
        "experts": config["experts"] | {"sums": {"training": {"max_tokens": 8}}},
        "training": TRAINING,
    }
    place.configure(config)
    before = place.lineages()
    failed = place.snakemake()
    assert failed.status
    (line,) = failed.errors()
    assert line.startswith("training documents of sums: document")
    assert line.endswith("max_tokens is 8; raise it, or set long_documents to split or truncate")
    for log in (place.results / "logs" / "experts").rglob("sums-*.log"):
        assert log.read_text().strip().splitlines()[-1] == f"mergelaw: error: {line}"
    assert "Traceback" not in failed.output
    done = place.lineages()
    new = sorted(path.split("@")[0] for path in done.keys() - before.keys())
    # Ready-made experts wanted no training documents, so those of the baselines are new.
    assert new == [
        "checks/overlap", "corpora/sums/train", "corpora/tales/train", "designs/tiny",
        "evals/tiny/baselines/s0-000", "evals/tiny/baselines/s1-000",
        "experts/tiny/multitask-s0", "experts/tiny/multitask-s1",
        "task_vectors/tiny/multitask-s0", "task_vectors/tiny/multitask-s1",
    ]  # fmt: skip

    config["experts"]["sums"] = {}
    place.configure(config)
    place.finish()
    assert done.items() <= place.lineages().items()
    rows = place.rows()
    assert set(rows["seed"]) == {0, 1}
    assert rows.groupby(["method", "seed"]).size().to_dict() == {
        ("average", 0): 24, ("average", 1): 24, ("baselines", 0): 3, ("baselines", 1): 3
    }  # fmt: skip
    assert rows[rows["role"] == "baseline"]["experts"].map(list).map(len).eq(1).all()
    with_sums = rows[rows["experts"].map(lambda experts: "sums" in experts)]
    assert with_sums.groupby(["domain", "place", "merge"])["cell"].nunique().eq(1).all()
    seeds = {seed: set(table["cell"]) for seed, table in with_sums.groupby("seed")}
    assert not seeds[0] & seeds[1]
    # What no trained expert is in is one cell for both seeds, measured once, by whoever is first.
    assert sorted(place.cells()) == sorted(set(rows["cell"]))
    assert len(place.cells()) < len(rows)
