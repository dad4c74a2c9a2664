"""Adapters as experts: what peft's own merge makes of them, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from mergelaw.errors import MergelawError
from mergelaw.merging import engine as merge
from mergelaw.merging import export
from mergelaw.merging.methods import method_of
from mergelaw.merging.task_vector import TaskVector
from mergelaw.models import hub
from mergelaw.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Tensors
from mergelaw.models.inspect import inspect_expert

BASES = {
    "tied": {"tied": True, "dtype": "float32"},
    "untied": {"tied": False, "dtype": "float32"},
    "gpt2": {"model_type": "gpt2", "tied": False, "dtype": "float32"},
    "biased": {"model_type": "qwen2", "tied": False, "dtype": "float32"},
    "half": {"tied": False, "dtype": "bfloat16"},
}
ATTENTION = ["q_proj", "v_proj"]
ADAPTERS = {
    "alpha over r": ("tied", {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION}),
    "rank stabilised": ("tied", {"r": 4, "use_rslora": True, "target_modules": ATTENTION}),
    "all linear layers": ("tied", {"r": 3, "target_modules": "all-linear"}),
    "ranks by layer": (
        "tied",
        {
            "r": 4,
            "target_modules": ATTENTION,
            "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2},
            "alpha_pattern": {"v_proj": 3, r"^model.layers.1.self_attn.q_proj": 20},
        },
    ),
    "embedding and head": (
        "untied",
        {"r": 4, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
    "modules to save": (
        "untied",
        {"r": 4, "target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]},
    ),
    "tied modules to save": (
        "tied",
        {
            "target_modules": ATTENTION,
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "Conv1D, a linear head, biases": (
        "gpt2",
        {
            "r": 4,
            "target_modules": ["c_attn", "c_fc", "lm_head"],
            "fan_in_fan_out": True,
            "bias": "all",
        },
    ),
    "biases of its own": ("biased", {"target_modules": ["q_proj"], "lora_bias": True}),
    "DoRA": ("untied", {"target_modules": [*ATTENTION, "embed_tokens"], "use_dora": True}),
    "single tokens": ("tied", {"target_modules": ATTENTION, "trainable_token_indices": [3, 9]}),
    "parameters": ("untied", {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]}),
    "one layer": ("tied", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "bfloat16": ("half", {"r": 4, "target_modules": ATTENTION}),
    "LoHa": ("untied", {"kind": "LoHaConfig", "target_modules": ATTENTION}),
    "LoKr": ("untied", {"kind": "LoKrConfig", "target_modules": ATTENTION}),
    "IA3": (
        "untied",
        {"kind": "IA3Config", "target_modules": ATTENTION, "feedforward_modules": []},
    ),
    "OFT": ("untied", {"kind": "OFTConfig", "target_modules": ATTENTION, "oft_block_size": 4}),
    "HRA": ("untied", {"kind": "HRAConfig", "target_modules": ATTENTION}),
    "VeRA": ("untied", {"kind": "VeraConfig", "target_modules": ["q_proj"]}),
    "norms": ("untied", {"kind": "LNTuningConfig", "target_modules": ["norm"]}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: models.write_checkpoint(folder / name, **how) for name, how in BASES.items()}


def merged_by_peft(base, adapter) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    whole = PeftModel.from_pretrained(models.load(base), adapter).merge_and_unload()
    return {name: tensor.detach() for name, tensor in whole.named_parameters()}


def vector_of(base, expert, folder, **how) -> TaskVector:
    return models.write_task_vector(base, expert, folder, **how)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_it_is_the_model_that_peft_makes_of_it(tmp_path, bases, kind):
    """Bit for bit, on any number of threads, and as another checkpoint in fp32 would be."""
    name, config = ADAPTERS[kind]
    base, adapter = bases[name], models.write_adapter(bases[name], tmp_path / "adapter", **config)
    theirs = merged_by_peft(base, adapter)
    torch.set_num_threads(2)
    try:
        vector = vector_of(base, adapter, tmp_path / "vector")
    finally:
        torch.set_num_threads(1)
    settings = json.loads((base / "config.json").read_text())
    whole = models.write_tensors(tmp_path / "whole", theirs, settings)
    assert vector.digest == vector_of(base, whole, tmp_path / "vector-of-whole").digest
    with Tensors(base) as ours:
        assert vector.names == ours.names()
        for tensor in vector.names:
            found = ours[tensor].float().view(-1) + vector[tensor]
            if exceptions := vector.exceptions(tensor):
                found[exceptions[0]] = exceptions[1]
            assert models.bits(found) == models.bits(theirs[tensor])


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "average"},
        {"method": "ties", "density": 0.3},
        {"method": "ties", "density": 0.3, "trim": "global"},
        {"method": "dare_linear"},
    ],
)
def test_merges_of_an_adapter_and_a_checkpoint(tmp_path, bases, recipe):
    """Resident, streamed and written out: the same bits."""
    base = bases["untied"]
    adapter = models.write_adapter(base, tmp_path / "adapter", **ADAPTERS["alpha over r"][1])
    whole = models.write_expert(base, tmp_path / "whole")
    pool = {
        "adapter": vector_of(base, adapter, tmp_path / "v1"),
        "whole": vector_of(base, whole, tmp_path / "v2"),
    }
    method, found = method_of(recipe), []
    for memory in (1 << 40, 0):
        model = models.load(base)
        with merge.Merger(model, base, pool, method, memory) as merger:
            assert merger.resident == bool(memory)
            merger.merge(list(pool))
        found.append({n: p.detach().clone() for n, p in model.named_parameters()})
    out = tmp_path / "out"
    out.mkdir()
    merge.write_merge(base, pool, method, None, out)
    found.append(models.read_tensors(out))
    for name, values in found[0].items():
        assert models.bits(values) == models.bits(found[1][name]) == models.bits(found[2][name])


def test_a_resized_embedding_is_merged_where_the_study_allows_it(tmp_path, bases):
    from peft import LoraConfig, get_peft_model

    base, wanted = bases["untied"], {}
    model = models.load(base)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows - 20)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=ATTENTION, init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    wanted = dict(wrapped.merge_and_unload().named_parameters())
    refused(base, tmp_path / "adapter", tmp_path / "no", f"vocab_size is {rows - 20}", f"is {rows}")
    vector = vector_of(base, tmp_path / "adapter", tmp_path / "v", vocabulary="common_rows")
    with Tensors(base) as before:
        for name in vector.names:
            after = wanted[name].detach().view(-1)
            difference = after - before[name].view(-1)[: len(after)]
            assert torch.equal(vector[name][: len(after)], difference)
            assert not vector[name][len(after) :].any()


# What is refused


@pytest.fixture
def plain(tmp_path, bases):
    return models.write_adapter(bases["tied"], tmp_path / "adapter", **ADAPTERS["alpha over r"][1])


def refused(base, adapter, folder, *words):
    with pytest.raises(MergelawError) as error:
        vector_of(base, adapter, folder)
    assert "\n" not in str(error.value) and str(adapter) in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not folder.exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"peft_type": "XLORA"}, ["XLORA adapter", "merge_and_unload"]),
        ({"peft_type": ["LORA"]}, ["['LORA'] adapter"]),
        ({"megatron_config": {"a": 1}}, ["megatron_config"]),
        ({"arrow_config": {"a": 1}}, ["arrow_config"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4", "changes the base"]),
        ({"layer_replication": [[0, 1]]}, ["layer_replication"]),
        ({"some_later_invention": 3}, ["some_later_invention"]),
    ],
)
def test_other_kinds_are_refused(tmp_path, bases, plain, change, words):
    path = plain / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(bases["tied"], plain, tmp_path / "vector", *words)
    with pytest.raises(MergelawError):  # already where it is taken in, without the base
        hub.link(plain, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '"LORA"'])
def test_a_broken_configuration_is_named(tmp_path, bases, plain, text):
    (plain / ADAPTER_CONFIG).write_text(text)
    refused(bases["tied"], plain, tmp_path / "vector", ADAPTER_CONFIG)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, ["embed_tokens' alone", "ties"]),
        ({"target_modules": ["q_proj", "lm_head"]}, ["lm_head' alone", "ties"]),
        ({"modules_to_save": ["embed_tokens"]}, ["embed_tokens' alone", "ties"]),
        ({"modules_to_save": ["lm_head"]}, ["lm_head' alone", "ties"]),
    ],
)
def test_half_of_what_the_base_ties_cannot_be_changed(tmp_path, bases, config, words):
    config = {"target_modules": ATTENTION, **config}
    adapter = models.write_adapter(bases["tied"], tmp_path / "adapter", **config)
    refused(bases["tied"], adapter, tmp_path / "vector", *words)
    with pytest.raises(MergelawError, match="' alone, but the base ties"):  # before a run too
        inspect_expert(adapter, bases["tied"])


def edit(adapter, change):
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / ADAPTER_WEIGHTS)


def test_a_missing_weight_is_named(tmp_path, bases, plain):
    edit(plain, lambda tensors: tensors.pop(min(tensors)))
    refused(bases["tied"], plain, tmp_path / "vector", "weights lack", "q_proj")


@pytest.mark.parametrize("shape", [(4, 99), (3, 32), (4, 32, 1), (4,)])
def test_weights_that_do_not_fit_are_named(tmp_path, bases, plain, shape):
    edit(plain, lambda tensors: tensors.update({min(tensors): torch.zeros(shape)}))
    refused(bases["tied"], plain, tmp_path / "vector", str(list(shape)), "adapter of this base")


def test_weights_without_a_place_are_named(tmp_path, bases, plain):
    edit(plain, lambda tensors: tensors.update({"base_model.model.x.lora_A.weight": torch.ones(2)}))
    refused(bases["tied"], plain, tmp_path / "vector", "x.lora_A", "not part of it")


def test_an_adapter_of_another_base(tmp_path, bases, plain):
    refused(bases["gpt2"], plain, tmp_path / "vector", str(bases["tied"]), "adapter of this base")


def test_values_that_are_none_are_refused(tmp_path, bases, plain):
    edit(plain, lambda tensors: tensors[min(tensors)].fill_(float("nan")))
    refused(bases["tied"], plain, tmp_path / "vector", "NaN or Inf")


def test_a_pickled_adapter_is_refused(tmp_path, bases, plain):
    shutil.move(plain / ADAPTER_WEIGHTS, plain / "adapter_model.bin")
    refused(bases["tied"], plain, tmp_path / "vector", "not adapter_model.bin")


def test_a_truncated_adapter_is_named(tmp_path, bases, plain):
    path = plain / ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes()[:-3])
    refused(bases["tied"], plain, tmp_path / "vector", ADAPTER_WEIGHTS, "half-copied")


# Merges as one adapter


def adapters(tmp_path, which="untied", **more):
    """A base, and the task vectors of two adapters of it, of ranks 2 and 3."""
    base = models.write_checkpoint(tmp_path / "base", **BASES[which])
    every = {"r": 3, "target_modules": "all-linear", **more}
    names = ["c_attn"] if which == "gpt2" else ["q_proj"]
    for name, settings in {"a": {"r": 2, "target_modules": names}, "b": every}.items():
        models.write_adapter(base, tmp_path / name, **settings)
    vectors = {n: models.write_task_vector(base, tmp_path / n, tmp_path / f"v-{n}") for n in "ab"}
    return base, {name: vector.folder for name, vector in vectors.items()}


def export_as_adapter(base, vectors, folder, rank, method, weights=None):
    folder.mkdir()
    recipe = {"method": method, "experts": [*vectors], "weights": weights}
    return export.export_adapter(recipe, base, vectors, folder, rank)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 23)[None]).logits


@pytest.mark.parametrize("which", ["untied", "gpt2"])
def test_a_linear_merge_of_adapters_is_one_adapter_of_the_sum_of_their_ranks(tmp_path, which):
    from peft import PeftModel

    base, vectors = adapters(tmp_path, which, fan_in_fan_out=which == "gpt2")
    method = {"method": "task_arithmetic", "lambda": 1.5}
    errors = export_as_adapter(base, vectors, tmp_path / "one", 5, method, [1.0, 2.0])
    assert len(errors) > 3 and max(errors.values()) < 1e-4
    pool = {name: TaskVector(path) for name, path in vectors.items()}
    (tmp_path / "whole").mkdir()
    merge.write_merge(base, pool, method_of(method), [1.0, 2.0], tmp_path / "whole")
    one = PeftModel.from_pretrained(models.load(base), tmp_path / "one")
    away = logits(models.load(tmp_path / "whole")) - logits(models.load(base))
    assert away.abs().max() > 1e-2
    assert torch.allclose(logits(one) - logits(models.load(base)), away, atol=1e-5)
    # Like any adapter it can be an expert, or measured.
    again = models.write_task_vector(base, tmp_path / "one", tmp_path / "again")
    for name in again.names:
        change = sum(weight * pool[n][name] for n, weight in (("a", 0.5), ("b", 1.0)))
        assert torch.allclose(again[name], change, atol=1e-5)


def test_a_truncated_adapter_is_the_closest_of_its_rank(tmp_path):
    base, vectors = adapters(tmp_path)
    errors = export_as_adapter(base, vectors, tmp_path / "one", 2, {"method": "ties"})
    vector = models.write_task_vector(base, tmp_path / "one", tmp_path / "again")
    pool = {name: TaskVector(path) for name, path in vectors.items()}
    (tmp_path / "whole").mkdir()
    merge.write_merge(base, pool, method_of({"method": "ties"}), None, tmp_path / "whole")
    with Tensors(base) as before, Tensors(tmp_path / "whole") as after:
        for module, error in errors.items():
            name = f"{module}.weight"
            change = after[name] - before[name]
            tail = torch.linalg.svdvals(change)[2:].norm() / change.norm()
            assert error == pytest.approx(float(tail), rel=1e-3) and error > 0.05
            left = (vector[name].view(change.shape) - change).norm() / change.norm()
            assert float(left) == pytest.approx(error, rel=1e-3)


def test_what_no_adapter_can_hold_is_refused(tmp_path):
    base, vectors = adapters(tmp_path, modules_to_save=["norm"])
    with pytest.raises(MergelawError, match=r"change 'model.layers.*norm.weight'.* drop --lora"):
        export_as_adapter(base, vectors, tmp_path / "one", 2, {"method": "average"})
    whole = models.write_expert(base, tmp_path / "whole"), tmp_path / "v-whole"
    vectors["whole"] = models.write_task_vector(base, *whole, storage="derived").folder
    with pytest.raises(MergelawError, match="'whole' is a whole model, not an adapter"):
        export_as_adapter(base, vectors, tmp_path / "two", 2, {"method": "average"})
