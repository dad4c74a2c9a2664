"""LoRA adapters as experts: what peft's own merge makes of them, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from mergelaw.errors import MergelawError
from mergelaw.merging import engine as merge
from mergelaw.merging import task_vector
from mergelaw.merging.methods import method_of
from mergelaw.merging.task_vector import TaskVector
from mergelaw.models import checkpoint
from mergelaw.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Tensors

BASES = {
    "tied": {"tied": True, "dtype": "float32"},
    "untied": {"tied": False, "dtype": "float32"},
    "gpt2": {"model_type": "gpt2", "dtype": "float32"},
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
            "alpha_pattern": {"v_proj": 3, r"layers.1.self_attn.q_proj": 20},
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
    "fan in, fan out, biases": (
        "gpt2",
        {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "bias": "all"},
    ),
    "bfloat16": ("half", {"r": 4, "target_modules": ATTENTION}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: models.write_checkpoint(folder / name, **how) for name, how in BASES.items()}


def merged_by_peft(base, adapter) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    whole = PeftModel.from_pretrained(models.load(base), adapter).merge_and_unload()
    return {name: tensor.detach() for name, tensor in whole.state_dict().items()}


def vector_of(base, expert, folder, **how) -> TaskVector:
    return models.write_task_vector(base, expert, folder, **how)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_it_is_the_model_that_peft_makes_of_it(tmp_path, bases, kind):
    name, config = ADAPTERS[kind]
    base, adapter = bases[name], models.write_adapter(bases[name], tmp_path / "adapter", **config)
    vector = vector_of(base, adapter, tmp_path / "vector")
    theirs = merged_by_peft(base, adapter)
    changed = set()
    with Tensors(base) as ours:
        for name in ours.names():
            found = ours[name].float() + vector[name].view(ours.shape(name))
            # peft's sums over the rank and ours may be rounded differently, once each.
            size = (found - ours[name].float()).abs().max()
            torch.testing.assert_close(found, theirs[name], rtol=3e-7, atol=float(size) * 1e-6)
            changed |= {name} if size else set()
    assert changed == set(vector.statistics()["tensors"])
    assert vector.statistics()["norm"] > 0
    assert not (vector.folder / task_vector.VECTOR).exists()


def test_any_slices_on_any_threads_give_the_same_bits(tmp_path, bases):
    adapter = models.write_adapter(
        bases["untied"], tmp_path / "a", **ADAPTERS["embedding and head"][1]
    )
    vector = vector_of(bases["untied"], adapter, tmp_path / "vector")
    for name in vector.names:
        whole = vector[name]
        threads = torch.get_num_threads()
        for size in (1, 7, 100, len(whole)):
            torch.set_num_threads(2)
            parts = [vector.part(name, i, i + size) for i in range(0, min(len(whole), 999), size)]
            torch.set_num_threads(threads)
            joined = torch.cat(parts)
            assert models.bits(joined) == models.bits(whole[: len(joined)])


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "average"},
        {"method": "ties", "density": 0.3},
        {"method": "ties", "density": 0.3, "trim": "global"},
        {"method": "dare_linear"},
    ],
)
def test_merges_of_an_adapter_and_a_whole_expert(tmp_path, bases, recipe):
    """Resident, streamed and written out: the same bits, though the adapter has fewer tensors."""
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
    merge.write(base, pool, method, None, out)
    found.append(models.read_tensors(out))
    for name, values in found[0].items():
        assert models.bits(values) == models.bits(found[1][name]) == models.bits(found[2][name])


def test_an_adapter_is_merged_as_the_expert_that_it_makes(tmp_path, bases):
    """Also where a method looks at all of an expert: the tensors it leaves alone are zeros."""
    base = bases["untied"]
    adapter = models.write_adapter(base, tmp_path / "adapter", **ADAPTERS["alpha over r"][1])
    theirs = {n: t for n, t in merged_by_peft(base, adapter).items()}
    whole = models.write_tensors(
        tmp_path / "whole", theirs, json.loads((base / "config.json").read_text())
    )
    for recipe in ({"method": "ties", "density": 0.05, "trim": "global"}, {"method": "average"}):
        made = []
        for number, expert in enumerate((adapter, whole)):
            folder = tmp_path / f"{recipe['method']}{number}"
            vector = vector_of(base, expert, tmp_path / f"v-{recipe['method']}{number}")
            folder.mkdir()
            merge.write(base, {"expert": vector}, method_of(recipe), None, folder)
            made.append(models.read_tensors(folder))
        for name in made[0]:
            torch.testing.assert_close(made[0][name], made[1][name], rtol=1e-6, atol=1e-6)


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
        ({"peft_type": "IA3"}, ["IA3 adapter", "merge_and_unload"]),
        ({"use_dora": True}, ["use_dora", "merge_and_unload"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4", "changes the base"]),
        ({"trainable_token_indices": [1]}, ["trainable_token_indices"]),
        ({"layer_replication": [[0, 1]]}, ["layer_replication"]),
        ({"some_later_invention": 3}, ["some_later_invention"]),
    ],
)
def test_other_kinds_are_refused(tmp_path, bases, plain, change, words):
    path = plain / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(bases["tied"], plain, tmp_path / "vector", *words)
    with pytest.raises(MergelawError):  # already where it is taken in, without the base
        checkpoint.link(plain, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '"LORA"'])
def test_a_broken_configuration_is_named(tmp_path, bases, plain, text):
    (plain / ADAPTER_CONFIG).write_text(text)
    refused(bases["tied"], plain, tmp_path / "vector", ADAPTER_CONFIG)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
        {"r": 4, "target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    ],
)
def test_half_of_what_the_base_ties_cannot_be_changed(tmp_path, bases, config):
    adapter = models.write_adapter(bases["tied"], tmp_path / "adapter", **config)
    refused(bases["tied"], adapter, tmp_path / "vector", "embed_tokens", "head as well")


def test_a_head_of_its_own_over_a_tied_base(tmp_path, bases):
    adapter = models.write_adapter(
        bases["tied"], tmp_path / "a", r=4, target_modules=ATTENTION, modules_to_save=["lm_head"]
    )
    refused(bases["tied"], adapter, tmp_path / "vector", "lm_head", "the base has no tensor")


def edit(adapter, change):
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / ADAPTER_WEIGHTS)


def test_half_a_product_is_named(tmp_path, bases, plain):
    edit(plain, lambda tensors: tensors.pop(min(tensors)))
    refused(bases["tied"], plain, tmp_path / "vector", "half of the product", "q_proj")


@pytest.mark.parametrize("shape", [(4, 99), (3, 32), (4, 32, 1), (4,)])
def test_factors_that_do_not_fit_are_named(tmp_path, bases, plain, shape):
    edit(plain, lambda tensors: tensors.update({min(tensors): torch.zeros(shape)}))
    refused(bases["tied"], plain, tmp_path / "vector", str(list(shape)), "adapter of this base")


def test_an_adapter_of_another_base(tmp_path, bases, plain):
    refused(bases["gpt2"], plain, tmp_path / "vector", "q_proj", "adapter of this base")


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
