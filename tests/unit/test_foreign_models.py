"""Experts and bases that others made: what transformers reads of them, or one clear line."""

import json
import math
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

import models
from mergelaw.artifacts import lineage
from mergelaw.data import documents, tokenize
from mergelaw.data.recipe import SplitRecipe
from mergelaw.errors import MergelawError
from mergelaw.merging import engine, task_vector
from mergelaw.merging.methods import method_of
from mergelaw.models import causal_lm
from mergelaw.models.checkpoint import INDEX, WEIGHTS, Tensors
from mergelaw.models.finetune import fine_tune
from mergelaw.models.inspect import inspect_base, inspect_expert, same_checkpoints
from mergelaw.models.parameters import build
from mergelaw.models.recipe import Training


@pytest.fixture
def base(tmp_path):
    return models.write_checkpoint(tmp_path / "base", "qwen3", tied=False, dtype="float32")


@pytest.fixture
def expert(tmp_path, base):
    return models.write_expert(base, tmp_path / "expert")


def edit(path, **changes):
    """Change a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def refused(call, *words):
    with pytest.raises(MergelawError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 60)[None], use_cache=False).logits


def merged_alone(base, expert, folder):
    vector = models.write_task_vector(base, expert, folder)
    model = models.load(base)
    with engine.Merger(model, base, {"e": vector}, method_of({"method": "average"}), 0) as merger:
        merger.merge(["e"])
    return logits(model)


def as_transformers(base, expert, tmp_path):
    """The expert fits, and alone it is what transformers loads from its folder."""
    assert inspect_expert(expert, base) == []
    found = merged_alone(base, expert, tmp_path / "vector")
    torch.testing.assert_close(found, logits(models.load(expert)), rtol=1e-5, atol=1e-5)


def test_values_that_are_no_numbers_are_named_before_a_run(base, tmp_path):
    broken = models.write_expert(base, tmp_path / "broken", scale=math.nan)
    refused(lambda: inspect_expert(broken, base), str(broken), "holds NaN or Inf")
    expert = models.write_expert(base, tmp_path / "expert")
    refused(lambda: inspect_expert(expert, broken), str(broken), "holds NaN or Inf")


# Configurations


@pytest.mark.parametrize(
    "changes, key, values",
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e7}}, "rope_theta", 2e7),
        ({"rope_parameters": None, "rope_theta": 5e5}, "rope_theta", 5e5),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps", 0.001),
        ({"hidden_act": "gelu"}, "hidden_act", "gelu"),
        ({"num_attention_heads": 2, "head_dim": 16}, "head_dim", 16),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "window", 8),
    ],
)
def test_a_configuration_that_computes_something_else_is_refused(
    base, expert, changes, key, values
):
    edit(expert / "config.json", **changes)
    refused(lambda: inspect_expert(expert, base), str(expert), key, str(values), "the base's")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": None, "rope_theta": 10000},
        {"rope_parameters": None, "rope_scaling": None, "rope_theta": 10000.0},
        {"hidden_act": "swish"},
        {"torch_dtype": "bfloat16", "use_cache": False, "transformers_version": "4.40.0"},
        {"attention_dropout": 0.3, "eos_token_id": [1, 2], "initializer_range": 0.5},
        {"max_position_embeddings": 4096, "some_later_note": {"a": 1}},
        {"num_key_value_heads": 2, "max_window_layers": 1, "layer_types": None},
    ],
)
def test_what_the_forward_pass_does_not_read_may_differ(tmp_path, base, expert, changes):
    edit(expert / "config.json", **changes)
    as_transformers(base, expert, tmp_path)


def test_settings_that_a_user_trusts_may_differ(tmp_path, base, expert):
    ropes = {"rope_type": "default", "rope_theta": 2e7}
    edit(expert / "config.json", rope_parameters=ropes, rms_norm_eps=1e-3)
    trust = ["rope_theta", "rms_norm_eps"]
    refused(lambda: inspect_expert(expert, base, trust=trust[:1]), "trust: [rms_norm_eps]")
    notes = inspect_expert(expert, base, trust=trust)
    assert len(notes) == 2 and "rope_parameters.rope_theta 20000000.0" in notes[1]
    vector = models.write_task_vector(base, expert, tmp_path / "v", trust=trust, storage="derived")
    assert notes == lineage.read(vector.folder)["facts"]["notes"] and len(vector["lm_head.weight"])
    for names in (["rope_theta", "hidden_act"], ["rope_thet"], ["theta"]):
        refused(lambda t=names: inspect_expert(expert, base, trust=t), "trust names", names[-1])
    adapter = models.write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    refused(lambda: inspect_expert(adapter, base, trust=["rope_theta"]), "trust names")
    vectors = tmp_path / "w"
    refused(lambda: task_vector.write(base, adapter, vectors, trust=["rope_theta"]), "trust names")


def test_the_length_matters_where_rotary_embeddings_are_scaled(base, expert):
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    for folder in (base, expert):
        edit(folder / "config.json", rope_parameters=scaled)
    assert inspect_expert(expert, base) == []
    edit(expert / "config.json", max_position_embeddings=512)
    refused(lambda: inspect_expert(expert, base), "max_position_embeddings 512", "256")


# Tokenizers


def change_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swap(content):
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


@pytest.mark.parametrize(
    "change, words",
    [
        (swap, ["token 31", "other tokens"]),
        (lambda c: c["model"]["merges"].reverse(), ["other merges"]),
        (lambda c: c["model"]["merges"].pop(), ["other merges"]),
        (lambda c: c["added_tokens"][3].update(content="<|x|>"), ["added token 3", "<|x|>"]),
    ],
)
def test_a_tokenizer_that_gives_other_tokens_is_refused(base, expert, change, words):
    change_tokenizer(expert, change)
    refused(lambda: inspect_expert(expert, base), str(expert), *words)


def test_the_same_tokenizer_in_another_form_passes(base, expert):
    def respell(content):
        merges = content["model"]["merges"]
        content["model"]["merges"] = [" ".join(m) if isinstance(m, list) else m for m in merges]

    change_tokenizer(expert, respell)
    assert Tokenizer.from_file(str(expert / "tokenizer.json"))
    assert inspect_expert(expert, base) == []
    (expert / "tokenizer.json").unlink()  # not an expert's business
    assert inspect_expert(expert, base) == []


def test_other_templates_and_more_tokens_are_notes(base, expert):
    (expert / "chat_template.jinja").write_text("{{ messages }}")
    more = {"id": 900, "content": "<think>", "special": True}
    change_tokenizer(expert, lambda content: content["added_tokens"].append(more))
    template, added = inspect_expert(expert, base)
    assert "another chat template" in template and "adds 1 tokens ('<think>')" in added


# Two sources of weights


def test_a_whole_file_is_read_before_an_old_index(tmp_path, base):
    expert = models.write_expert(base, tmp_path / "expert", seed=1, shards=3)
    newer = models.write_expert(base, tmp_path / "newer", seed=2)
    shutil.copy(newer / WEIGHTS, expert)
    assert (expert / INDEX).exists()
    as_transformers(base, expert, tmp_path)
    for shard in expert.glob("model-*"):
        shard.unlink()
    as_transformers(base, expert, tmp_path / "again")


def test_a_model_with_an_adapter_beside_it_is_refused(base, expert):
    adapter = models.write_adapter(base, base.with_name("adapter"), target_modules=["q_proj"])
    for folder in (base, expert):
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        refused(lambda f=folder: Tensors(f), "beside a whole model", "adapter_config.json")


# Names


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("side", ["base", "expert"])
def test_names_with_and_without_the_models_prefix(tmp_path, kind, side):
    base = models.write_checkpoint(tmp_path / "base", kind, tied=True, dtype="float32")
    expert = models.write_expert(base, tmp_path / "expert")
    bare = {"base": base, "expert": expert}[side]
    prefix = f"{build(base).base_model_prefix}."
    tensors = {n.removeprefix(prefix): t for n, t in load_file(bare / WEIGHTS).items()}
    assert not any(name.startswith(prefix) for name in tensors)
    save_file(tensors, bare / WEIGHTS, metadata={"format": "pt"})
    as_transformers(base, expert, tmp_path)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("side", ["base", "expert", "both"])
def test_names_with_the_wrappers_of_trainers(tmp_path, base, expert, wrapper, side):
    wanted = logits(models.load(expert))
    for folder in [base, expert] if side == "both" else [{"base": base, "expert": expert}[side]]:
        tensors = load_file(folder / WEIGHTS)
        save_file({wrapper + n: t for n, t in tensors.items()}, folder / WEIGHTS)
    assert inspect_base(base) == inspect_expert(expert, base) == []
    found = merged_alone(base, expert, tmp_path / "vector")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sides", ["base", "expert", "both"])
def test_a_tied_model_stored_as_its_head_alone(tmp_path, sides):
    base = models.write_checkpoint(tmp_path / "base", tied=True, dtype="float32")
    expert = models.write_expert(base, tmp_path / "expert")
    for folder in [f for f in (base, expert) if sides in (f.name, "both")]:
        tensors = load_file(folder / WEIGHTS)
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert inspect_base(base) == []
    as_transformers(base, expert, tmp_path)


def test_two_tensors_for_one_parameter_must_be_equal(tmp_path):
    base = models.write_checkpoint(tmp_path / "base", tied=True, dtype="float32")
    expert = models.write_expert(base, tmp_path / "expert")
    tensors = load_file(expert / WEIGHTS)
    for change in (0.0, 1.0):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
        save_file(tensors, expert / WEIGHTS, metadata={"format": "pt"})
        if change:
            words = "'lm_head.weight' and", "one tensor for both"
            refused(lambda: inspect_expert(expert, base), str(expert), *words)
        else:
            as_transformers(base, expert, tmp_path)


@pytest.mark.parametrize("sides", [["base"], ["base", "expert"], ["expert"]])
def test_tensors_that_transformers_ignores(tmp_path, base, expert, sides):
    for folder in (base, expert):
        if folder.name in sides:
            tensors = load_file(folder / WEIGHTS) | {"mtp.fc.weight": torch.ones(3, 4)}
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    notes = inspect_base(base)
    assert len(notes) == ("base" in sides) and all("mtp.fc.weight" in note for note in notes)
    as_transformers(base, expert, tmp_path)


def test_a_text_expert_and_its_adapter_on_a_multimodal_base(tmp_path):
    tokens = models.tokenizer()
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    text = {"vocab_size": len(tokens), "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **ends}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    base, expert = tmp_path / "base", tmp_path / "expert"
    whole = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
    part = Gemma3ForCausalLM(whole.config.text_config)
    part.model.load_state_dict(whole.model.language_model.state_dict())
    part.tie_weights()
    for model, folder in ((whole, base), (part, tmp_path / "part")):
        model.save_pretrained(folder)
        tokens.save_pretrained(folder)
    models.write_expert(tmp_path / "part", expert)
    assert inspect_base(base) == []
    as_transformers(base, expert, tmp_path)
    adapter = models.write_adapter(
        tmp_path / "part", tmp_path / "adapter", target_modules=["q_proj"]
    )
    refused(lambda: inspect_expert(adapter, base), "was trained on", "is a gemma3 model")
    edit(adapter / "adapter_config.json", base_model_name_or_path=None)
    refused(
        lambda: inspect_expert(adapter, base),
        "its weights lack",
        "language_model",
        "an adapter of a Gemma3ForConditionalGeneration",
    )


# Bases


def test_a_base_that_lacks_its_head(tmp_path):
    base = models.write_checkpoint(tmp_path / "base", tied=True, dtype="float32")
    edit(base / "config.json", tie_word_embeddings=False)
    refused(lambda: inspect_base(base), "'lm_head.weight'", "at random")
    refused(lambda: causal_lm.load(base, "float32"), "'lm_head.weight'", "at random")


@pytest.mark.parametrize("shape", [(0,), (4, 3)])
def test_hollow_and_wrong_tensors_are_named(base, shape):
    tensors = load_file(base / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(shape)
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    refused(lambda: inspect_base(base), "layers.1.mlp.up_proj", str(list(shape)), "[48, 32]")


def test_what_is_no_base(tmp_path, base):
    adapter = models.write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    refused(lambda: inspect_base(adapter), str(adapter), "is an adapter")
    edit(base / "config.json", quantization_config={"bits": 4})
    refused(lambda: inspect_base(base), "quantised")
    edit(base / "config.json", quantization_config=None, model_type="unheard_of")
    refused(lambda: inspect_base(base), "unheard_of")


def test_what_is_wrong_with_an_expert_is_said_by_its_reason(base, expert):
    whole = (expert / WEIGHTS).read_bytes()
    (expert / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\nsize 5\n")
    refused(lambda: inspect_expert(expert, base), WEIGHTS, "git lfs pull")
    (expert / WEIGHTS).write_bytes(whole)
    edit(expert / "config.json", num_hidden_layers=1)  # two layer_types are left
    refused(lambda: inspect_expert(expert, base), "transformers cannot read its config.json")
    (expert / "config.json").write_text("\ufeff{}")
    refused(lambda: inspect_expert(expert, base), "config.json: not JSON (", "BOM")
    shutil.copy(base / "config.json", expert)
    tensors = load_file(expert / WEIGHTS)
    tensors.pop("lm_head.weight")
    save_file(tensors, expert / WEIGHTS, metadata={"format": "pt"})
    refused(lambda: inspect_expert(expert, base), "no tensor 'lm_head.weight'; the base has it")
    edit(expert / "config.json", tie_word_embeddings=True)
    refused(lambda: inspect_expert(expert, base), "config.json ties head and embedding")
    pickled = models.write_adapter(base, base.with_name("pickled"), target_modules=["q_proj"])
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(lambda: inspect_expert(pickled, base), "adapter_model.bin (a pickle can run code)")


def test_a_base_without_a_tokenizer(base):
    for path in [*base.glob("tokenizer*"), *base.glob("*.jinja")]:
        path.unlink()
    refused(lambda: inspect_base(base), str(base), "has no tokenizer")


def test_tokens_beyond_the_embedding(tmp_path, base):
    rows = Tensors(base).shape("model.embed_tokens.weight")[0]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    more = {"id": rows, "content": "[PAD]", "special": True, **flags}
    change_tokenizer(base, lambda content: content["added_tokens"].append(more))
    (note,) = inspect_base(base)
    assert f"beyond the {rows} rows" in note and "'[PAD]'" in note
    document = documents.Document("0" * 16, None, "a [PAD] b")
    refused(
        lambda: tokenize.encode(
            causal_lm.load_tokenizer(base), [document], 99, "refuse", "documents of x", rows=rows
        ),
        f"documents of x: the documents have the token '[PAD]' ({rows})",
        f"{rows} rows",
    )


def test_a_padding_token_beyond_the_embedding_does_not_stop_a_training(tmp_path, base):
    tokens = causal_lm.load_tokenizer(base)
    tokens.add_special_tokens({"pad_token": "[PAD]"})
    assert tokens.pad_token_id == Tensors(base).shape("model.embed_tokens.weight")[0]
    tokens.save_pretrained(base)
    texts = [{"prompt": f"What is {n}?", "response": "It is. " * n} for n in range(1, 9)]
    source = {"files": [str(models.write_jsonl(tmp_path / "texts.jsonl", texts))]}
    recipe = SplitRecipe(source=source, eval_documents=0, train_documents=None, seed=0)
    documents.write_split(recipe, "train", {}, tmp_path / "corpus")
    training = Training(steps=3, batch_size=4, learning_rate=1e-3)
    corpora, expert = {"d": tmp_path / "corpus"}, tmp_path / "expert"
    expert.mkdir()
    facts = fine_tune(training, 0, base, corpora, expert, tmp_path / "state", 100)
    assert math.isfinite(facts["train_loss"]) and inspect_expert(expert, base) == []


# Lengths and packing


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "opt"])
def test_documents_longer_than_a_models_positions(tmp_path, capsys, kind):
    window = tokenize.Window(0, tuple(range(3, 45)), 1, 42)
    more = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "gptj": {"rotary_dim": 8}}
    models.ARCHITECTURES.setdefault(kind, more.get(kind, {}))
    base = models.write_checkpoint(tmp_path / "base", kind, tied=kind != "gptj", max_tokens=40)
    words = "42 tokens", "40 positions", "max_tokens: 40"
    refused(lambda: causal_lm.check_windows(models.load(base), [window], "long ones"), *words)
    other = models.write_checkpoint(tmp_path / "other", "llama", max_tokens=40)
    causal_lm.check_windows(models.load(other), [window], "long ones")
    assert "long ones: the longest has 42 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mamba", "recurrent_gemma", "minimax"])
def test_recurrent_models_are_not_packed(tmp_path, base, kind):
    more = {"mamba": {"state_size": 4}, "minimax": {"num_local_experts": 2, "head_dim": 8}}
    models.ARCHITECTURES.setdefault(kind, more.get(kind, {}))
    recurrent = models.write_checkpoint(tmp_path / "recurrent", kind)
    for model in (models.load(recurrent), build(recurrent)):
        refused(lambda m=model: causal_lm.check_packing(m, recurrent), "packing: false", kind)
    for model in (models.load(base), build(base)):
        causal_lm.check_packing(model, base)


def test_models_that_attend_to_packed_neighbours_are_not_packed(tmp_path):
    models.ARCHITECTURES.setdefault("bloom", {})
    bloom = models.write_checkpoint(tmp_path / "bloom", "bloom")
    refused(lambda: causal_lm.check_packing(models.load(bloom), bloom), "packing: false", "bloom")


# Relations


def test_an_adapter_that_names_another_base_is_a_note_and_no_warning_of_peft(tmp_path, base):
    adapter = models.write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    copied = shutil.copytree(base, tmp_path / "copy")
    for named, count in [(base, 0), ("them/Base", 0), (None, 0), (copied, 1), ("them/x-8B", 1)]:
        edit(adapter / "adapter_config.json", base_model_name_or_path=named and str(named))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            notes = inspect_expert(adapter, base)
        assert len(notes) == count
        assert all(f"{adapter}: was trained on {named} by its" in note for note in notes)


def test_another_initialisation_is_refused_with_figures(tmp_path, base, capsys):
    other = models.write_checkpoint(tmp_path / "other", "qwen3", False, "float32", seed=7)
    words = "nothing in common", "times the base's norm, the mean cosine", "trust: [weights]"
    refused(lambda: inspect_expert(other, base), *words)
    refused(lambda: models.write_task_vector(base, other, tmp_path / "vector"), *words)
    (note,) = inspect_expert(other, base, trust=["weights"])
    assert "accepted (trust)" in note
    models.write_task_vector(base, other, tmp_path / "vector", trust=["weights"])
    far = models.write_expert(base, tmp_path / "far", scale=0.5)
    assert "differs much from its base" in inspect_expert(far, base)[0]
    capsys.readouterr()
    models.write_task_vector(base, models.write_expert(base, tmp_path / "e"), tmp_path / "v")
    assert "its base" not in capsys.readouterr().err


def test_a_new_embedding_does_not_make_models_unrelated(tmp_path, base, expert):
    tensors = load_file(expert / WEIGHTS)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn_like(tensors[name])  # of a larger norm than all layers
    save_file(tensors, expert / WEIGHTS, metadata={"format": "pt"})
    assert inspect_expert(expert, base) == []


def test_one_checkpoint_under_two_names():
    identities = {
        "a": {"files": {"model.safetensors": "1", "config.json": "2"}},
        "b": {"files": {"model.safetensors": "1", "config.json": "3"}},
        "c": {"files": {"model.safetensors": "4", "config.json": "2"}},
        "d": {"hub": "x/y", "revision": "5"},
        "e": {"hub": "x/y", "revision": "5"},
    }
    first, second = same_checkpoints(identities)
    assert "experts a and b: are the same checkpoint" in first and "d and e" in second
