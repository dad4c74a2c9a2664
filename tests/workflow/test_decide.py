"""From a pool with a bad expert to the right merge, written: one real run, and what is asked of it."""

import json
import re
import shlex

import pandas as pd
import pytest
from studies import Place, once
from test_own_models import loss

EXPERTS = ("algebra", "analysis", "geometry", "discrete", "chemistry", "code")
GOOD = EXPERTS[:-1]


def make_pool(folder) -> Place:
    """A base of 27k and six experts of it, of which `code` is trained to death."""
    optimiser = {"adam_beta2": 0.99, "batch_size": 8, "max_tokens": 128, "warmup": 0.1}
    place = Place(
        folder,
        {
            "name": "pool",
            "corpus": {"train_documents": 400, "eval_documents": 16},
            "domains": {name: {"source": {"synthetic": name}} for name in EXPERTS},
            "pretraining": {
                **optimiser,
                "domains": list(EXPERTS),
                "architecture": {
                    "model_type": "llama",
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "initializer_range": 0.06,
                    "intermediate_size": 96,
                    "tie_word_embeddings": True,
                },
                "vocab_size": 512,
                "steps": 200,
                "learning_rate": 1.4e-2,
                "chat_share": 0.02,
            },
            "bases": {"tiny": {"pretraining": {}}},
            "training": {**optimiser, "packing": True, "steps": 30, "learning_rate": 7e-4},
            "experts": {name: {} for name in GOOD}
            | {"code": {"training": {"learning_rate": 2e-2, "steps": 60}}},
            "methods": {"average": {}, "ties": {"density": 0.2}},
            "evaluation": {"max_tokens": 256},
            "merges": {
                "heavy": {
                    "base": "tiny",
                    "method": "average",
                    "experts": ["geometry", "algebra"],
                    "weights": [3, 1],
                }
            },
        },
    )
    (folder / "run.log").write_text(place.finish().output)
    return place


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Place:
    return once(tmp_path_factory, "pool", make_pool)


def test_a_run_ends_with_the_merge_to_ship_and_it_leaves_the_bad_expert_out(pool):
    log = (pool.folder / "run.log").read_text()
    (sentence,) = re.findall(r"^tiny: (Ship .*)$", log, re.MULTILINE)
    assert "code" not in sentence.partition(":")[0].replace("without code", "")
    assert "which costs" in sentence or "code" not in sentence
    rows = pool.rows()
    merges = rows[rows["role"] == "merge"].groupby("merge")["ce"].mean()
    assert f": {merges.min():.4f} (base" in sentence
    answers = json.loads(pool.mergelaw("best", "study.yaml", "--json").output)
    assert answers[0]["sentence"] == sentence


def test_a_written_merge_is_measured_with_its_weights_and_is_in_no_law(pool):
    (folder,) = pool.artifacts("merges").values()
    (answer,) = json.loads(pool.mergelaw("best", "study.yaml", "--top", "500", "--json").output)
    (heavy,) = (one for one in answer["ranking"] if len(set(one["weights"])) > 1)
    assert heavy["experts"] == ["algebra", "geometry"] and heavy["weights"] == [1.0, 3.0]
    losses = [loss(pool, folder, domain) for domain in EXPERTS]
    assert heavy["value"] == pytest.approx(sum(losses) / 6, rel=2e-6)
    points = pd.read_parquet(pool.results / pool.study().laws.path / "points.parquet")
    pairs = points[(points["k"] == 2) & (points["method"] == "average")]
    assert set(pairs["subsets"]) == {15}


def test_the_command_writes_the_best_merge_with_its_measured_losses_on_the_card(pool):
    output = pool.mergelaw("best", "study.yaml").output
    (command,) = re.findall(r"^write it: mergelaw (.*)$", output, re.MULTILINE)
    run = pool.mergelaw(*shlex.split(command))
    assert run.status == 0, run.output
    folder, card = pool.folder / "tiny-best", (pool.folder / "tiny-best" / "README.md").read_text()
    rows = {row.split(" | ")[0][2:]: row.split(" | ") for row in card.splitlines()}
    for domain in ("algebra", "code"):
        assert f"{loss(pool, folder, domain):.4f} (90%: " in rows[domain][2]
    assert "| algebra | trained by the study on algebra | not stated | 1 |" in card
    documents = pd.concat(map(pd.read_parquet, pool.results.glob("corpora/*/eval@*/*.parquet")))
    assert len(documents) == 96
    assert not any(text in card for text in documents["response"] if len(text) > 12)
