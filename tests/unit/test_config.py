"""Configurations: what is refused and in which words, how recipes are put together, the docs."""

import copy
import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import jsonschema
import pytest
import yaml
from ruamel.yaml import YAML

from mergelaw import config
from mergelaw.config.pool import Expert
from mergelaw.errors import MergelawError
from mergelaw.workflow.study import Study

sys.path.insert(0, str(Path(__file__).parents[2] / "config"))
import reference as config_reference

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "config" / "README.md"
BLOCKS = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
YAML_1_2 = YAML(typ="safe", pure=True)
(SMALL_TEXT,) = [block for block in BLOCKS if block.startswith("name: small")]
SMALL = YAML_1_2.load(SMALL_TEXT)


def small(**changes):
    """README's small study, with other values at dotted places (``a__b``)."""
    data = copy.deepcopy(SMALL)
    for place, value in changes.items():
        *parents, last = place.split("__")
        current = data
        for parent in parents:
            current = current.setdefault(parent, {})
        current[last] = value
    return data


def problem(**changes):
    with pytest.raises(MergelawError) as caught:
        config.parse(small(**changes), "x.yaml")
    text = str(caught.value)
    assert text.startswith("x.yaml: ") and "\n" not in text
    return text.removeprefix("x.yaml: ")


def check(path):
    """``mergelaw config check`` in a process of its own."""
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from mergelaw.cli.app import main; main()",
            "config",
            "check",
            path,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=path.parent,
    )


def assert_one_line(result, *words):
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("mergelaw: error: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


# -- what ships --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_are_valid(path):
    config.load(path)
    jsonschema.validate(config.read(path), config_reference.schema())


@pytest.mark.parametrize("block", BLOCKS)
def test_the_examples_of_the_readme_are_valid(block):
    data = SMALL | YAML_1_2.load(block)
    config.parse(data)
    jsonschema.validate(data, config_reference.schema())


def test_the_readme_begins_with_ten_lines_for_ones_own_models():
    assert BLOCKS[0].count("\n") <= 10 and "checkpoints" in BLOCKS[0]
    study = config.parse(YAML_1_2.load(BLOCKS[0]))
    assert list(study.pool()) == ["lawyer", "doctor", "coder"] and list(study.methods) == [
        "average",
        "ties",
    ]


def test_the_readmes_tables_are_the_generated_ones():
    text = README.read_text(encoding="utf-8")
    tables = text.partition("<!-- tables -->\n")[2].partition("\n<!-- end of tables -->")[0]
    assert tables == config_reference.tables(), "run: python config/reference.py"


def test_the_schema_file_is_the_generated_one():
    path = ROOT / "workflow" / "schemas" / "config.schema.json"
    assert path.read_text(encoding="utf-8") == (
        json.dumps(config_reference.schema(), indent=2, ensure_ascii=False) + "\n"
    ), "run: python config/reference.py"


def test_the_schema_refuses_unknown_keys_in_parts_of_recipes():
    jsonschema.Draft202012Validator.check_schema(config_reference.schema())
    for place in ("training__stepz", "pretraining__stepz", "bases__27k__training__stepz"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(small(**{place: 3}), config_reference.schema())


def test_every_key_is_described():
    for row in re.findall(r"^\| `.*$", config_reference.tables(), re.MULTILINE):
        assert len([cell for cell in row.split(" | ") if cell.strip("| ")]) == 4, row


@pytest.mark.parametrize(("name", "merges"), [("demo_exhaustive", 511), ("learned_law", 73)])
def test_other_studies_of_the_demo_share_everything_but_plan_and_evaluations(name, merges):
    demo = Study(config.load(ROOT / "config" / "config.yaml"))
    whole = Study(config.load(ROOT / "config" / f"{name}.yaml"))
    assert {len(whole.subsets(base)) - 1 for base in whole.config.bases} == {merges}
    assert demo.results == whole.results
    assert {a.path for a in demo.known.values() if a.stage == "corpus"} == {
        a.path for a in whole.known.values() if a.stage == "corpus"
    }
    for stage in ("bases", "experts", "task_vectors"):
        paths = {name: made.path for name, made in getattr(demo, stage).items()}
        assert paths == {name: made.path for name, made in getattr(whole, stage).items()}
    assert demo.overlap.path == whole.overlap.path and demo.laws.path != whole.laws.path


# -- mistakes, in the words that a person reads ------------------------------------------------


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("trainig", {}, "unknown key 'trainig'; did you mean 'training'?"),
        (
            "corpus__train_document",
            3,
            "corpus: unknown key 'train_document'; did you mean 'train_d",
        ),
        (
            "domains__code__hold_out",
            True,
            "domains.code: unknown key 'hold_out'; did you mean 'held",
        ),
        (
            "domains__code__source__synthetics",
            "x",
            "unknown key 'synthetics'; did you mean 'synthe",
        ),
        ("bases__27k__revison", "x", "bases.27k: unknown key 'revison'; did you mean 'revision'"),
        (
            "experts",
            {"code": {"checkpoints": {"27k": {"paht": "x"}}}},
            "experts.code.checkpoints.27k: unknown key 'paht'; did you mean 'path'?",
        ),
        (
            "baselines",
            {"all": {"domain": ["code"]}},
            "baselines.all: unknown key 'domain'; did you",
        ),
        (
            "methods__ties__densty",
            0.1,
            "methods.ties: unknown key 'densty'; did you mean 'density'?",
        ),
        ("methods__average__average", 1, "methods.average: unknown key 'average'; there is method"),
        ("sampling__circle", 3, "sampling: unknown key 'circle'; did you mean 'circles'?"),
        (
            "evaluation__max_token",
            3,
            "evaluation: unknown key 'max_token'; did you mean 'max_token",
        ),
        ("merges", {"m": {"bas": "27k"}}, "merges.m: unknown key 'bas'; did you mean 'base'?"),
        (
            "training__learning_rat",
            1,
            "training: unknown key 'learning_rat'; did you mean 'learnin",
        ),
        ("pretraining__step", 1, "pretraining: unknown key 'step'; did you mean 'steps'?"),
        ("bases__27k__training__stepz", 1, "bases.27k.training: unknown key 'stepz'; did you mean"),
        ("bases__27k__pretraining__stepz", 1, "bases.27k.pretraining: unknown key 'stepz'; did"),
        (
            "experts",
            {"code": {"training": {"stepz": 1}}},
            "experts.code.training: unknown key 'stepz'",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(place, value, words):
    if place == "methods__average__average":
        text = problem(methods={"average": {"average": 1}})
    else:
        text = problem(**{place: value})
    assert words in text
    assert text.count("unknown key") == 1, "reported once, where it stands"


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("name", "a/b", "name: a name has up to 64 letters"),
        ("name", "../x", "name: a name"),
        ("name", "", "name: a name"),
        ("name", "x" * 65, "name: a name"),
        ("results", "a{b}", "results: "),
        ("seed", -1, "seed: Input should be greater than or equal to 0 (got -1)"),
        ("corpus__eval_documents", 0, "corpus.eval_documents: "),
        ("corpus__calibration_documents", -1, "corpus.calibration_documents: "),
        ("domains", {}, "domains: is empty"),
        ("domains", None, "domains: is not a mapping"),
        ("domains__a/b", {"source": {"synthetic": "code"}}, "domains.a/b: a name has up to 64"),
        ("domains__code", None, "domains.code: is not a mapping"),
        ("domains__code__source", {}, "domains.code.source: give exactly one of 'synthetic'"),
        ("domains__code__source", {"synthetic": "cod"}, "no generator 'cod'; did you mean 'code'?"),
        ("domains__code__source", {"files": []}, "domains.code.source.files: is empty"),
        ("domains__code__source__revision", "x", "'revision' goes with 'dataset' only"),
        ("domains__code__source__where", {"a": 1}, "'where' goes with 'files' or 'dataset'"),
        (
            "domains__code__source__invalid_records",
            "skip",
            "'invalid_records' goes with 'files' or 'dataset'",
        ),
        ("domains__code__source", {"dataset": "a/b"}, "a dataset of the hub needs its 'revision'"),
        ("domains__code__train_documents", 0, "experts.code.domains: domain 'code' has train_doc"),
        ("corpus__train_documents", None, "domains.algebra.train_documents: a synthetic source"),
        ("bases", {}, "bases: is empty"),
        ("bases__x", {}, "bases.x: give exactly one of 'path', 'hub', 'pretraining'"),
        ("bases__x", {"hub": "a/b"}, "bases.x: a hub model needs its 'revision'"),
        ("bases__x", {"path": "a", "revision": "b"}, "bases.x: 'revision' goes with 'hub' only"),
        ("bases__x", {"path": "a", "N": 0}, "bases.x.N: Input should be greater than 0"),
        ("pretraining", None, "bases.27k.pretraining.learning_rate: is required"),
        ("pretraining__domains", ["cod"], "pretraining.domains: no domain 'cod'; did you mean"),
        ("pretraining__domains", ["code", "code"], "pretraining.domains: code is given twice"),
        ("pretraining__domains", [], "pretraining.domains: is empty"),
        ("pretraining__architecture", {}, "needs a 'model_type'"),
        ("pretraining__architecture", 3, "pretraining.architecture: is not a mapping"),
        ("pretraining__architecture__rope_theta", float("inf"), "is inf; give a finite number"),
        ("pretraining__architecture__a", 2**63, "architecture.a: is too large a number"),
        ("pretraining__architecture__a", date(2024, 1, 31), "a: 2024-01-31 is a date; put it in"),
        ("bases__27k__pretraining__domains", ["x"], "bases.27k.pretraining.domains: no domain 'x'"),
        ("training", {}, "training.learning_rate: is required"),
        ("training", None, "training: is not a mapping"),
        ("training__learning_rate", 2, "training.learning_rate: Input should be less than 1"),
        ("training__learning_rate", "fast", "training.learning_rate: "),
        ("training__epochs", 1, "training: give exactly one of 'steps' and 'epochs'"),
        ("training__steps", None, "training: give exactly one of 'steps' and 'epochs'"),
        ("training__micro_batch_size", 3, "'batch_size' must be a multiple"),
        ("training__schedule", "cosin", "training.schedule: Input should be 'cosine'"),
        ("training__weight_decay", "1e999", "training.weight_decay: "),
        ("bases__27k__training", {"batch_size": 9, "micro_batch_size": 2}, "experts.algebra on ba"),
        ("training_seeds", [], "training_seeds: is empty"),
        ("training_seeds", [1, 1], "training_seeds: 1 is given twice"),
        ("training_seeds", [-1], "training_seeds.0: "),
        ("experts", {}, "experts: is empty"),
        (
            "experts",
            {"cod": None},
            "experts.cod.domains: no domain 'cod'; did you mean 'code'?",
        ),
        ("experts", {"x": {"domains": ["cod"]}}, "experts.x.domains: no domain 'cod'; did you"),
        ("experts", {"x": {"domains": ["code"] * 2}}, "experts.x.domains: code is given twice"),
        ("experts", {"x": {"domains": []}}, "experts.x.domains: is empty"),
        ("experts", {"x": {"checkpoints": {}}}, "experts.x.checkpoints: is empty"),
        (
            "experts",
            {"x": {"checkpoints": {"27k": {"path": "a"}, "28k": {"path": "b"}}}},
            "experts.x.checkpoints: no base '28k'; did you mean '27k'?",
        ),
        (
            "experts",
            {"x": {"checkpoints": {"27k": {"hub": "a/b"}}}},
            "experts.x.checkpoints.27k: a hub model needs its 'revision'",
        ),
        (
            "experts",
            {"x": {"checkpoints": {"27k": {"path": "a"}}, "training": {"steps": 3}}},
            "experts.x: ready-made checkpoints take no 'training'",
        ),
        ("baselines", {"code": {}}, "baselines.code: the pool has an expert of this name"),
        ("baselines", {"all": {"domains": ["x"]}}, "baselines.all.domains: no domain 'x'"),
        ("methods", {}, "methods: is empty"),
        ("methods", {"tis": None}, "methods.tis: no merge method 'tis'; did you mean 'ties'?"),
        ("methods", {"x": {"method": "tis"}}, "methods.x: no merge method 'tis'; did you mean"),
        ("methods", {"x": {"method": 3}}, "methods.x: no merge method '3'"),
        ("methods", {"baselines": {"method": "average"}}, "methods.baselines: the name is reserve"),
        ("methods", {"a/b": {"method": "average"}}, "methods.a/b: a name has up to 64 letters"),
        ("methods__ties__density", 0, "methods.ties.density: Input should be greater than 0"),
        ("sampling__circles", 0, "sampling.circles: Input should be greater than or equal to 1"),
        ("sampling__design", "rings", "sampling.design: Input should be 'exhaustive', 'ring'"),
        ("sampling__k", [], "sampling.k: is empty"),
        ("sampling__k", [4], "sampling.k: 4 is larger than the pool of 3 experts"),
        ("sampling__k", [2, 2], "sampling.k: 2 is given twice"),
        (
            "sampling__circles",
            10**9,
            "sampling.circles: Input should be less than or equal to 1000",
        ),
        ("evaluation__dtype", "float16", "evaluation.dtype: Input should be 'float32' or"),
        ("merges", {"m": {"base": "27k", "method": "ties"}}, "merges.m.experts: is required"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(place, value, words):
    assert words in problem(**{place: value})


def test_a_learned_merge_takes_no_weights():
    learned = {"average": {}, "learned": {}}
    merge = {"base": "27k", "method": "learned", "experts": ["algebra", "code"], "weights": [1, 2]}
    text = problem(methods=learned, merges={"m": merge})
    assert "merges.m.weights: method 'learned' learns them; remove" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"corpus__calibration_documents": 0}, "methods.learned: no domain has calibration"),
        ({"corpus__calibration_documents": 3}, "calibration_documents: 3, of which a third is"),
        ({"methods": {"learned": {}}}, "methods: laws need a method that merges more than the"),
        ({"methods": {"learned": {"by": "layer"}}}, "methods.learned.by: "),
        ({"methods": {"learned": {"gradients": 0}}}, "methods.learned.gradients: "),
    ],
)
def test_a_learned_merge_needs_documents_to_learn_from(changes, words):
    assert words in problem(**{"methods": {"average": {}, "learned": {}}} | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "28k"}, "merges.m.base: no base '28k'; did you mean '27k'?"),
        ({"method": "tie"}, "merges.m.method: no method 'tie'; did you mean 'ties'?"),
        ({"experts": ["cod"]}, "merges.m.experts: no expert 'cod'; did you mean 'code'?"),
        ({"experts": ["code", "code"]}, "merges.m.experts: code is given twice"),
        ({"experts": []}, "merges.m.experts: is empty"),
        ({"weights": [1]}, "merges.m.weights: 1 for 2 experts"),
        ({"weights": [1, 0]}, "merges.m.weights.1: Input should be greater than 0"),
        ({"seed": 5}, "merges.m.seed: 5 is not among 'training_seeds'"),
    ],
)
def test_a_merge_to_write_out_names_what_there_is(changes, words):
    merge = {"base": "27k", "method": "ties", "experts": ["algebra", "code"]} | changes
    assert words in problem(merges={"m": merge})


def pools(**changes):
    """Two bases; one expert has a checkpoint for each, one for the first base only."""
    one, two = ({"path": f"models/{name}"} for name in ("one", "two"))
    experts = {
        "all": {"checkpoints": {"small": one, "large": two}, "domains": ["code"]},
        "some": {"checkpoints": {"small": two}},
    }
    return small(**{"bases": {"small": one, "large": two}, "experts": experts, **changes})


def test_an_expert_may_have_checkpoints_for_some_bases_only():
    study = config.parse(pools())
    assert study.pool() == study.pool("small") == ["all", "some"]
    assert study.pool("large") == study.common_pool() == ["all"]
    assert study.expert_domains("all") == ["code"] and study.expert_domains("some") == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling": {"k": [1, 2]}}, "sampling.k: 2 is larger than the pool of 1 experts of base 'large'"),
        ({"experts__all__checkpoints": {"small": {"path": "a"}}}, "bases.large: no expert has a checkpoint"),
        ({"experts__some__domains": ["cod"]}, "experts.some.domains: no domain 'cod'; did you mean 'code'"),
        (
            {"merges": {"m": {"base": "large", "method": "ties", "experts": ["some"]}}},
            "merges.m.experts: no expert 'some'; there is all",
        ),
    ],
)  # fmt: skip
def test_a_base_is_measured_with_the_experts_that_it_has(changes, words):
    data = pools()
    for place, value in changes.items():
        *parents, last = place.split("__")
        inner = data
        for key in parents:
            inner = inner[key]
        inner[last] = value
    with pytest.raises(MergelawError) as caught:
        config.parse(data, "x.yaml")
    assert words in str(caught.value)


def test_no_expert_trains_on_a_held_out_domain():
    held_out = {"source": {"synthetic": "code"}, "held_out": True}
    words = "experts.code.domains: domain 'code' is held out"
    assert words in problem(domains__code=held_out, experts={"code": None})
    assert "pretraining.domains: domain 'code' is held out" in problem(domains__code=held_out)


def test_too_many_merges_are_refused_before_they_are_counted_out():
    domains = {f"d{i}": {"source": {"synthetic": "code"}} for i in range(400)}
    for sampling in ({}, {"design": "exhaustive"}, {"exhaustive_up_to": 10**6}):
        text = problem(domains=domains, pretraining__domains=["d0"], sampling=sampling)
        assert "sampling: over 100,000 merges for each base" in text


def test_many_mistakes_are_still_one_line():
    text = problem(**{f"domains__d{i}": 1 for i in range(50)})
    assert text.endswith("; and 45 more") and len(text) < 1000


# -- how a configuration is read ---------------------------------------------------------------


def test_experts_left_out_are_one_for_each_domain_that_is_not_held_out():
    held_out = {"source": {"synthetic": "biology"}, "held_out": True}
    for experts in ({}, {"experts": None}):
        study = config.parse(small(domains__history=held_out) | experts)
        assert list(study.pool()) == ["algebra", "code", "physics"]
        assert study.expert_domains("code") == ["code"]


def test_an_empty_expert_has_all_defaults():
    assert config.parse(small(experts={"code": None})).models == {"code": Expert()}


def test_a_baseline_sees_every_domain_that_is_not_held_out():
    held_out = {"source": {"synthetic": "biology"}, "held_out": True}
    study = config.parse(small(domains__history=held_out, baselines={"multitask": None}))
    assert study.expert_domains("multitask") == ["algebra", "code", "physics"]


def test_training_is_the_studys_then_the_bases_then_the_experts():
    study = config.parse(
        small(
            training={"steps": 30, "learning_rate": 1e-3, "warmup": 0.2, "weight_decay": 0.1},
            bases__27k__training={"learning_rate": 2e-3, "warmup": 0.3},
            experts={"code": {"training": {"warmup": 0.4}}},
        )
    )
    recipe = study.training_of("27k", "code")
    assert (recipe.weight_decay, recipe.learning_rate, recipe.warmup) == (0.1, 2e-3, 0.4)


def test_steps_and_epochs_stand_for_each_other():
    study = config.parse(
        small(
            bases__27k__training={"epochs": 2},
            bases__27k__pretraining__epochs=3,
            experts={"code": {"training": {"steps": 7}}, "algebra": None},
        )
    )
    assert study.training_of("27k", "algebra").epochs == 2
    assert study.training_of("27k", "algebra").steps is None
    assert study.training_of("27k", "code").steps == 7
    assert study.training_of("27k", "code").epochs is None
    assert study.pretraining_of("27k").epochs == 3
    both = {"code": {"training": {"steps": 7, "epochs": 1}}}
    assert "experts.code.training: give exactly one of 'steps' and 'epoch" in problem(experts=both)


def test_an_architecture_is_laid_over_the_shared_one():
    architecture = config.parse(small()).pretraining_of("27k").architecture
    assert architecture["model_type"] == "llama" and architecture["hidden_size"] == 32


def test_files_are_read_as_yaml_1_2(tmp_path):
    path = tmp_path / "x.yaml"
    values = {
        "1e-2": 0.01, "1E3": 1000.0, "0123": 123, "0o17": 15, "1:30": "1:30",
        "yes": "yes", "on": "on", "no": "no", "true": True, "~": None, "'1'": "1", ".5": 0.5,
    }  # fmt: skip
    path.write_text("values:\n" + "".join(f"- {text}\n" for text in values))
    data = config.read(path)["values"]
    assert data == list(values.values())
    assert [type(value) for value in data] == [type(value) for value in values.values()]


def test_a_number_gives_the_same_keys_however_it_is_written(tmp_path):
    path = tmp_path / "x.yaml"
    text = SMALL_TEXT.replace("num_attention_heads: 2", "num_attention_heads: 2, rope_theta: 1e6")
    path.write_text(text.replace("ties: {density: 0.2}", "task_arithmetic: {lambda: 1}"))
    study = config.load(path)
    assert study.training_of("27k", "code").learning_rate == 5e-4
    assert study.pretraining_of("27k").architecture["rope_theta"] == 1e6
    assert study.methods["task_arithmetic"].model_dump(by_alias=True)["lambda"] == 1.0
    path.write_text(path.read_text().replace("1e6", "1000000.0").replace("1e-2", "0.01"))
    assert Study(config.load(path)).by_path.keys() == Study(study).by_path.keys()


def test_several_files_are_merged_as_snakemake_merges_them(tmp_path):
    from snakemake.utils import update_config

    texts = (
        "{a: {b: {c: 1, d: 2}, e: [1, 2]}, f: 1, g: {h: 1}}",
        "{a: {b: {c: 3}, e: [4]}, f: {i: 1}, g: 2}",
        "{a: {b: {j: 1}}, g: {k: 1}}",
    )
    paths = [tmp_path / f"{number}.yaml" for number in range(3)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    overrides = {"a": {"b": {"d": 5}}, "l": 123, "m": "yes", "n": None}
    settings = ["a={b: {d: 5}}", "l=0123", "m=yes", "n="]
    expected = {}
    for data in [*map(config.read, paths), overrides]:
        update_config(expected, data)
    assert config.read_files(paths, settings) == expected
    assert expected["a"] == {"b": {"c": 3, "d": 5, "j": 1}, "e": [4]} and expected["g"] == {"k": 1}
    paths[1].write_text("- 1\n")
    with pytest.raises(MergelawError, match=r"1\.yaml: holds no keys"):
        config.read_files(paths)
    with pytest.raises(MergelawError, match=r"^--config a=\[1:1: not valid YAML"):
        config.read_files([], ["a=[1"])


def test_paths_begin_at_the_users_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/us")
    study = config.parse(
        small(
            results="~/results",
            domains__code__source={"files": ["~/code.jsonl", "./~/b.jsonl"]},
            bases={"tiny": {"path": "~"}},
        )
    )
    assert study.results == "/home/us/results" and study.bases["tiny"].path == "/home/us"
    assert study.domains["code"].source.files == ["/home/us/code.jsonl", "./~/b.jsonl"]
    assert "names no user's home folder" in problem(results="~nobody-of-this-name/x")
    assert "NUL" in problem(bases={"tiny": {"path": "a\0b"}})


# -- files -------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no keys"),
        (b"# nothing\n", "holds no keys"),
        (b"- a\n- b\n", "holds no keys"),
        (b"name", "holds no keys"),
        (b"name: x\n\tseed: 1\n", "not valid YAML"),
        (b"name: \xff\xfe", "not valid YAML ('utf-8' codec"),
        (bytes(range(256)) * 8, "not valid YAML ('utf-8' codec"),
        (b"name: a\x00b", "not valid YAML"),
        (b"name: a\nname: b\n", ':2: not valid YAML (found duplicate key "name"'),
        (
            b"name: a\nsampling: {seed: 1, seed: 2}\n",
            ':2: not valid YAML (found duplicate key "seed"',
        ),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "not valid YAML (maximum recursion depth"),
        (b"a: " + b"{a: " * 100 + b"1" + b"}" * 100, "nested too deeply"),
        (b"a: &a [*a]\n", "nested too deeply"),
        (BOMB.encode(), "over 100,000 values"),
        (MERGE_BOMB.encode(), "merge keys expand without end"),
        (b"name: !!python/object/apply:os.system ['touch executed']\n", "not valid YAML"),
        (b"name: !!python/name:os.system\n", "not valid YAML"),
        (b"? [a, b]\n: 1\n", "the key ('a', 'b') is not text; put it in quotes"),
        (b"name: *nobody\n", "not valid YAML"),
        (b"name: [1, 2\n", "not valid YAML"),
        (b"--- {name: a}\n--- {name: b}\n", "not valid YAML"),
        (b"name: !!binary aGVsbG8=\n", "is a bytes; put it in quotes"),
        (b"name: !!set {a}\n", "is a set; put it in quotes"),
        (b"name: 2024-01-31\n", "name: 2024-01-31 is a date; put it in quotes if it is text"),
        (b"seed: .nan\n", "seed: is nan; give a finite number"),
        (b"seed: " + b"9" * 5000, "not valid YAML"),
        (b"seed: 0x" + b"f" * 5000, "seed: is too large a number"),
        (b'name: "\\ud800"\n', "name: Input should be a valid string"),
        (b"bases: {0.5: {path: a}}\n", "bases: the key 0.5 is not text; put it in quotes"),
        (b"domains: {true: {}}\n", "domains: the key True is not text; put it in quotes"),
        (b"pretraining: {architecture: {a: {1: 2}}}\n", "pretraining.architecture.a: the key 1 is"),
        (b"pretraining: {architecture: {a: 1e999}}\n", "architecture.a: is inf; give a finite"),
        (b"name: true\n", "name: is not text; put it in quotes (got True)"),
        (b"name: 0.5\n", "name: is not text; put it in quotes (got 0.5)"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, words):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(MergelawError) as caught:
        config.load(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and words in text
    assert "\n" not in text and len(text) < 1000
    assert list(tmp_path.iterdir()) == [path] and not Path("executed").exists()


def test_a_name_in_quotes_may_look_like_anything(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        SMALL_TEXT.replace("27k:", '"0.5":').replace("code", '"on"').replace(': "on"}', ": code}")
    )
    study = config.load(path)
    assert list(study.bases) == ["0.5"] and "on" in study.domains


def test_anchors_and_merge_keys_may_be_used(tmp_path):
    path = tmp_path / "x.yaml"
    changed = SMALL_TEXT.replace("  average:\n", "  a: &a {method: ties, density: 0.3}\n")
    # The alias is read before the mapping that it stands for, which it overrides in part.
    changed += "  b: &b {<<: *a, density: 0.4}\n  c: {<<: *b, lambda: 2}\n"
    path.write_bytes(b"\xef\xbb\xbf" + changed.replace("\n", "\r\n").encode())
    methods = config.load(path).methods
    assert [methods[name].density for name in ("a", "b", "c")] == [0.3, 0.4, 0.4]
    path.write_text("z: &z {x: 1}\nouter: {inner: &a {<<: *z, x: 2}}\nb: {<<: *a}\n")
    with pytest.raises(MergelawError, match="unknown key 'z'"):  # and not: x is given twice
        config.load(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no keys"),
        (b"\x00\x01\x02\xff", "not valid YAML ('utf-8' codec"),
        (b"name: x\nnmae: y\n", "unknown key 'nmae'; did you mean 'name'?"),
        (BOMB.encode(), "over 100,000 values"),
        (b"name: !!python/object/apply:os.system ['touch executed']\n", "not valid YAML"),
    ],
)
def test_check_says_it_in_one_line(tmp_path, content, words):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    assert_one_line(check(path), str(path), words)
    assert not (tmp_path / "executed").exists()


def test_check_of_what_is_not_there(tmp_path):
    assert_one_line(check(tmp_path / "x.yaml"), "No such file")
    (tmp_path / "folder").mkdir()
    assert_one_line(check(tmp_path / "folder"), "folder: Is a directory")
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(small(domains__code__source={"files": ["absent.json"]})))
    assert_one_line(check(path), "absent.json")
    path.write_text(yaml.safe_dump(small(bases__x={"path": "absent"})))
    assert_one_line(check(path), "absent: no such folder")


def test_check_says_what_would_be_measured():
    result = check(ROOT / "config" / "config.yaml")
    assert result.returncode == 0 and result.stderr == ""
    assert "4 bases, 9 experts, 9 domains, 4 methods" in result.stdout
    assert (
        "40 models to train, 73 merges per base and method, 4 learned merges, 10,584 cells"
        in result.stdout
        and result.stdout.count("\n") == 1
    )


def test_check_counts_each_bases_own_merges_and_the_base_once():
    from mergelaw.workflow.study import Study

    path = ROOT / "config" / "qwen2.5.yaml"
    study = Study(config.load(path))
    merges = sum(bool(row[3]) for shard in study.evals.values() for row in shard.rows)
    cells = (merges + len(study.bases)) * len(study.config.domains)
    told = check(path).stdout
    assert f"{cells:,} cells" in told and "181 to 511 merges per base and method" in told


# -- what every job of the workflow pays -------------------------------------------------------


def test_reading_a_configuration_loads_nothing_heavy():
    code = (
        "import sys; from mergelaw import config; from mergelaw.workflow.study import Study;"
        "Study(config.load('config/config.yaml')).by_path;"
        "print(*{'torch', 'pandas', 'pyarrow', 'datasets', 'transformers', 'numpy', 'scipy'}"
        " & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert result.stdout == "\n", result.stdout + result.stderr


def test_a_grid_as_large_as_the_papers_is_resolved():
    data = config.read(ROOT / "config" / "demo_exhaustive.yaml")
    first = next(iter(data["bases"].values()))
    data["bases"] = {f"b{i}": copy.deepcopy(first) for i in range(7)}
    study = Study(config.parse(data))
    assert len(study.by_path) > 200


def test_a_file_adds_to_the_one_that_it_includes(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "a.yaml").write_text("name: a\nmerges: {x: {base: b}}\nseed: 1\n")
    (tmp_path / "more" / "b.yaml").write_text(
        "include: ../a.yaml\nmerges: {y: {base: c}}\nseed: 2\n"
    )
    assert config.read_files([tmp_path / "more" / "b.yaml"]) == {
        "name": "a",
        "merges": {"x": {"base": "b"}, "y": {"base": "c"}},
        "seed": 2,
    }
    for text, words in (
        ("include: self.yaml", "include each other"),
        ("include: [a.yaml]", "the path of one file"),
        ("include: gone.yaml", "gone.yaml"),
    ):
        (tmp_path / "self.yaml").write_text(text)
        with pytest.raises(MergelawError, match=words):
            config.load(tmp_path / "self.yaml")
    with pytest.raises(MergelawError, match="only a file of its own"):
        config.parse(small(include="a.yaml"))
