"""What a study will cost: counts by hand, rates that are measured, and configurations that ship."""

import json
import math
from pathlib import Path

import pytest
import yaml

from mergelaw import config
from mergelaw.artifacts import files, keys, lineage, store
from mergelaw.errors import MergelawError
from mergelaw.workflow import estimate
from mergelaw.workflow.cost import work_of
from mergelaw.workflow.estimate import Rates, StageRate
from mergelaw.workflow.resources import CORE, Hardware, ask
from mergelaw.workflow.study import Study

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(ROOT.glob("config/*.yaml"))
DOCUMENTS = 50
PAPER = {"domains": 9, "k": 9}


def study_of(tmp_path, **changes) -> Study:
    data = {
        "name": "small",
        "results": str(tmp_path / "results"),
        "corpus": {"train_documents": DOCUMENTS, "eval_documents": 10},
        "domains": {name: {"source": {"synthetic": name}} for name in ("algebra", "code")},
        "bases": {"one": {"hub": "ours/none", "revision": "main", "N": 1}},
        "training": {"epochs": 2, "max_tokens": 512, "learning_rate": 1e-5, "dtype": "bfloat16"},
        "methods": {"average": {}},
        "evaluation": {"dtype": "bfloat16", "max_tokens": 512},
    }
    return Study(config.parse(data | changes))


def rows(study: Study, rates: Rates) -> dict[str, dict[str, float]]:
    return estimate.estimate(study, rates).stages


def test_tokens_flops_and_bytes_by_hand(tmp_path):
    study = study_of(tmp_path)
    rates = Rates(start_seconds=0, teraflops=100, gigabytes_per_second=2, tokens_per_document=300)
    found, size = rows(study, rates), study.size("one")
    weights = size.non_embedding + size.vocab * size.hidden
    a_token = 2 * weights + 2 * size.layers * size.query * 300
    trained, evaluated = 2 * DOCUMENTS * 300, 4 * 20 * 300  # of each expert; of four merges
    assert found["expert"]["tokens"] == 2 * trained
    seconds = 2 * (3 * a_token * trained / 1e14 + 4 * size.total / 2e9)
    assert found["expert"]["hours"] == pytest.approx(seconds / 3600)
    assert found["evaluate"]["tokens"] == evaluated
    moved = 2 * size.total + 2 * 4 * size.total  # the base, and both vectors once
    assert found["evaluate"]["hours"] * 3600 == pytest.approx(
        a_token * evaluated / 1e14 + moved / 2e9
    )
    assert found["evaluate"]["GPU hours"] == found["evaluate"]["hours"]  # one GPU holds it
    assert found["task_vector"]["bytes"] == 2 * 4 * size.total
    assert found["base"]["bytes"] == 2 * size.total
    total = found.pop("in all")
    assert total["jobs"] == sum(row["jobs"] for row in found.values()) == len(study.by_path)
    assert total["hours"] == pytest.approx(sum(row["hours"] for row in found.values()))


def test_derived_vectors_take_no_disk_and_checkpointing_a_third_more_time(tmp_path):
    plain, rates = study_of(tmp_path), Rates(start_seconds=0, gigabytes_per_second=1e9)
    training = {
        **plain.config.training.model_dump(exclude_unset=True),
        "gradient_checkpointing": True,
    }
    other = rows(study_of(tmp_path, storage="derived", training=training), rates)
    before = rows(plain, rates)
    assert other["task_vector"]["bytes"] == 0 < before["task_vector"]["bytes"]
    assert other["expert"]["hours"] == pytest.approx(before["expert"]["hours"] * 4 / 3)


def test_the_longest_chain_is_that_of_the_slowest_inputs(tmp_path):
    bases = {"one": {"hub": "ours/none", "revision": "main", "N": 1}}
    bases["two"] = bases["one"] | {"N": 30}
    found = estimate.estimate(study_of(tmp_path, bases=bases), Rates())
    names = [name for name, _ in found.chain]
    assert names[-2:] == ["laws/small", "reports/small"]
    assert "bases/two" in names and not any("/one" in name for name in names)
    hours = sum(hours for _, hours in found.chain)
    *stages, total = found.stages.values()
    assert max(row["hours"] for row in stages) / 2 < hours < total["hours"]
    assert any("training an expert takes 1 GPU" in problem for problem in found.problems)


def test_what_is_left_costs_and_what_is_there_does_not(tmp_path):
    study = study_of(tmp_path)
    before = estimate.estimate(study, Rates())
    first = [a for a in study.by_path.values() if a.stage in ("corpus", "overlap", "base")]
    for artifact in first:
        store.make(study.results / artifact.path, artifact.stage, {}, {}, lambda f, s: {})
    after = estimate.estimate(study, Rates())
    assert after.stages["base"] == dict.fromkeys(estimate.COLUMNS, 0) | {"jobs": 1}
    assert after.stages["expert"] == before.stages["expert"]
    total, whole = after.stages["in all"], before.stages["in all"]
    assert (total["jobs"], total["left"]) == (whole["jobs"], whole["jobs"] - len(first))
    assert total["hours"] == pytest.approx(
        whole["hours"] - sum(before.stages[s]["hours"] for s in ("corpus", "overlap", "base"))
    )
    assert after.chain[0][0].startswith("experts/")
    assert f"{len(first)} of {whole['jobs']:.0f} results are there already" in estimate.text(
        after, Rates()
    )


def test_requests_are_those_of_the_workflow(tmp_path):
    study = study_of(tmp_path)
    nodes = Hardware(gpus_per_node=2, gpu_memory_gb=24, node_memory_gb=64, max_runtime=600)
    found = estimate.estimate(study, Rates(), nodes)
    asking = [
        a for a in study.by_path.values() if a.trains or a.stage in ("task_vector", "evaluate")
    ]
    assert found.requests == {
        stage: [ask(work_of(study, a), nodes) for a in asking if a.stage == stage]
        for stage in ("expert", "task_vector", "evaluate")
    }
    (problem,) = found.problems  # the same for both experts
    assert problem.startswith("bases.one: training an expert takes 1 GPU of about")
    lines = estimate.text(found, Rates()).splitlines()
    (line,) = (line for line in lines[lines.index("") :] if line.startswith("experts"))
    request = found.requests["expert"][0]
    memory, hours = f"{request['mem_mb'] / 1000:.3g}", f"{request['runtime'] / 60:.3g}"
    assert line.split() == ["experts", "1", memory, hours]
    assert estimate.read_rates(None, nodes).gpu_memory_gb == 24


def test_rates_differ_by_stage(tmp_path):
    study = study_of(tmp_path)
    fast = Rates(stages={"expert": StageRate(start_seconds=0, teraflops=4000)})
    slow = rows(study, Rates())
    quick = rows(study, fast)
    assert quick["expert"]["hours"] < slow["expert"]["hours"]
    assert quick["evaluate"] == slow["evaluate"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("teraflops: fast", "teraflops: "),
        ("terraflops: 3", "unknown key 'terraflops'; did you mean 'teraflops'?"),
        ("stages: {experts: {}}", "no stage 'experts'; did you mean 'expert'?"),
        ("stages: {expert: {teraflops: -1}}", "stages.expert.teraflops"),
        ("[1]", "rates.yaml: "),
    ],
)
def test_wrong_rates_are_named(tmp_path, text, words):
    path = tmp_path / "rates.yaml"
    path.write_text(text)
    with pytest.raises(MergelawError) as error:
        estimate.read_rates(path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_a_base_of_unknown_size_is_named(tmp_path):
    with pytest.raises(MergelawError, match=r"bases.one: its size .* give its 'N'"):
        rows(study_of(tmp_path, bases={"one": {"hub": "ours/none", "revision": "main"}}), Rates())


# Measured


def made(study: Study, rates: Rates, seconds) -> None:
    """Results whose lineage says that each job took ``seconds(artifact)`` of processor time."""
    for artifact in study.by_path.values():
        facts = {}
        if artifact.stage == "evaluate":
            cells = len(artifact.rows) * len(study.config.domains)
            facts = {"cells": cells, "measured": cells, "tokens": cells * 10 * 123}
        folder = study.results / artifact.path
        store.make(folder, artifact.stage, artifact.recipe, {}, lambda f, s, facts=facts: facts)
        known = lineage.read(folder) | {"cpu_seconds": seconds(artifact)}
        files.write_json(folder / lineage.LINEAGE, known | {"checksum": lineage.checksum(known)})


def test_rates_are_found_again_in_the_results_that_they_made(tmp_path):
    bases = {
        name: {"hub": "ours/none", "revision": "main", "N": n}
        for name, n in (("small", 0.5), ("large", 3))
    }
    study = study_of(tmp_path, bases=bases)
    with pytest.raises(MergelawError, match="holds no expert and no evaluation"):
        estimate.measured(study)
    stages = {
        stage: StageRate(start_seconds=2, teraflops=CORE / 10, gigabytes_per_second=0.05)
        for stage in estimate.TITLES
    }
    true = Rates(float32_share=1, gpus_per_node=0, tokens_per_document=123, stages=stages)

    def seconds(artifact):
        return 2 + true.working(study, artifact)

    made(study, true, seconds)
    found = estimate.measured(study)
    assert found.tokens_per_document == pytest.approx(123)
    assert found.gpus_per_node == 0
    for artifact in study.by_path.values():
        if artifact.stage in ("expert", "evaluate", "task_vector"):
            start = found.stages[artifact.stage].start_seconds
            predicted = start + found.working(study, artifact)
            assert predicted == pytest.approx(seconds(artifact), rel=1e-3)
    assert found.stages["design"].start_seconds == pytest.approx(2)
    text = yaml.safe_dump(found.model_dump(exclude_none=True))
    (tmp_path / "rates.yaml").write_text(text)
    assert estimate.read_rates(tmp_path / "rates.yaml") == found


def test_linked_models_do_not_tell_how_fast_models_are_trained(tmp_path):
    """The time of jobs without arithmetic, however short, gives no arithmetic rate."""
    for name in ("base", "expert"):
        (tmp_path / name).mkdir()
        config_text = '{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, '
        config_text += '"num_attention_heads": 4, "vocab_size": 1000}'
        (tmp_path / name / "config.json").write_text(config_text)
    bases = {"one": {"path": str(tmp_path / "base")}}
    experts = {"some": {"checkpoints": {"one": {"path": str(tmp_path / "expert")}}}}
    study = study_of(tmp_path, bases=bases, experts=experts)
    made(study, Rates(), lambda artifact: 1e-6 if artifact.stage in ("base", "expert") else 3)
    rates = estimate.measured(study)
    assert rates.teraflops == CORE
    assert rates.stages["base"].teraflops is rates.stages["expert"].teraflops is None
    # Nor does one shard, whose time may be all start.
    assert 0 < (rates.stages["evaluate"].teraflops or CORE) <= CORE


def test_documents_of_local_files_are_counted(tmp_path):
    for name, count, length in (("algebra", 30, 40), ("code", 70, 400)):
        lines = (json.dumps({"text": f"{n:02}" + "x" * (length - 2)}) for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    domains = {
        n: {"source": {"files": [str(tmp_path / f"{n}.jsonl")]}} for n in ("algebra", "code")
    }
    study = study_of(tmp_path, domains=domains, corpus={"eval_documents": 10})
    found = rows(study, Rates())
    # Two epochs of what evaluation and calibration leave, 4 bytes a token.
    assert found["expert"]["tokens"] == 2 * (8 * 10 + 48 * 100)
    assert found["evaluate"]["tokens"] == 4 * (10 * 10 + 10 * 100)
    twice = rows(study, Rates(bytes_per_token=2))
    assert twice["evaluate"]["tokens"] == 2 * found["evaluate"]["tokens"]


def test_a_local_multimodal_base_has_a_size(tmp_path):
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    whole = {
        "model_type": "gemma3",
        "text_config": {**text, "vocab_size": 1000},
        "vision_config": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(whole))
    study = study_of(tmp_path, bases={"one": {"path": str(tmp_path)}})
    assert study.size("one").layers == 2 and study.size("one").vocab == 1000
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    with pytest.raises(
        MergelawError, match=r"bases.one: its size is not known from its config.json"
    ):
        study_of(tmp_path, bases={"one": {"path": str(tmp_path)}}).size("one")


# What ships


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_has_an_estimate(path, tmp_path):
    study = Study(config.load(path).model_copy(update={"results": str(tmp_path)}))
    found = estimate.estimate(study, Rates())
    total = found.stages["in all"]
    assert total["jobs"] == total["left"] == len(study.by_path) < 2000
    assert all(math.isfinite(value) for value in total.values())
    assert estimate.text(found, Rates()).count("\n") > len(found.stages)


def test_the_papers_grid_is_the_papers():
    study = Study(config.load(ROOT / "config" / "qwen2.5.yaml"))
    assert len(study.config.bases) == 7 and len(study.config.domains) == PAPER["domains"]
    assert list(study.config.methods) == ["average", "task_arithmetic", "ties", "dare"]
    for base, given in study.config.bases.items():
        subsets = study.subsets(base)
        if given.N < 8:
            assert len(subsets) == 2**9  # the base itself, and all subsets
        else:
            assert {subset.replicate for subset in subsets} == {-1, 0, 1, 2}
    merges = sum(len(study.subsets(base)) - 1 for base in study.config.bases)
    assert 4 * merges == pytest.approx(10_866, rel=0.1)


def test_the_pool_of_sixteen():
    study = Study(config.load(ROOT / "config" / "pool16.yaml"))
    assert len(study.config.pool()) == 16
    (base,) = study.config.bases
    assert sorted({subset.k for subset in study.subsets(base)}) == [0, 2, 4, 6, 8, 10, 12, 14, 16]


def test_keys_are_known_without_any_model():
    for path in SHIPPED:
        study = Study(config.load(path))
        for path, artifact in study.by_path.items():
            assert len(artifact.key) == 64 and path.endswith(f"@{artifact.key[: keys.KEY_DIGITS]}")
            assert json.dumps(artifact.recipe)
