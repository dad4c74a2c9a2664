"""Sizes by arithmetic against the models themselves."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mergelaw import config
from mergelaw.errors import MergelawError
from mergelaw.models.size import (
    count_parameters,
    size_of_architecture,
    size_of_nominal,
)
from mergelaw.workflow.study import Study

STUDY = {
    "name": "sizes",
    "domains": {"algebra": {"source": {"synthetic": "algebra"}}},
    "corpus": {"train_documents": 10},
    "training": {"steps": 1, "learning_rate": 1e-4},
    "methods": {"average": None},
}
# As their makers publish them.
QWEN = {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2}
QWEN_HALF = {
    **QWEN,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "intermediate_size": 4864,
    "tie_word_embeddings": True,
}
QWEN_72 = {
    **QWEN,
    "vocab_size": 152064,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 29568,
    "tie_word_embeddings": False,
}
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "vocab_size": 300,
}
MIXTURE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
HEADS = {"num_key_value_heads": 2}
ARCHITECTURES = [
    QWEN_HALF,
    {"model_type": "llama", "num_key_value_heads": 2, **SMALL},
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True, **SMALL},
    {"model_type": "mistral", "num_key_value_heads": 2, **SMALL},
    {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": False, **SMALL},
    {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 20, **SMALL},
    {"model_type": "gemma", "num_key_value_heads": 2, "head_dim": 16, **SMALL},
    {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 16, **SMALL},
    {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 16, **SMALL},
    {"model_type": "olmo2", "num_key_value_heads": 2, **SMALL},
    {"model_type": "phi3", "num_key_value_heads": 2, "pad_token_id": 0, **SMALL},
    {"model_type": "granite", "num_key_value_heads": 2, **SMALL},
    {"model_type": "gpt_neox", "tie_word_embeddings": False, **SMALL},
    {"model_type": "mixtral", "num_local_experts": 6, **HEADS, **SMALL},
    {"model_type": "olmoe", "num_experts": 6, **HEADS, **SMALL},
    {
        "model_type": "qwen3_moe",
        "mlp_only_layers": [1],
        **MIXTURE,
        **HEADS,
        **SMALL,
        "head_dim": 12,
    },
    {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 40, **MIXTURE, **HEADS, **SMALL},
    {
        "model_type": "gpt2",
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 70,
        "vocab_size": 300,
    },
]


@pytest.mark.parametrize("given", ARCHITECTURES, ids=lambda given: given["model_type"])
def test_counts_are_those_of_the_model(given):
    settings = dict(given)
    with torch.device("meta"):
        made = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = AutoModelForCausalLM.from_config(made)
    counted = count_parameters(model)
    saved = made.to_dict()
    for architecture in (given, saved):
        size = size_of_architecture(architecture)
        assert size is not None
        assert size.total == counted["parameters"]
        assert size.non_embedding == counted["non_embedding"]
    assert size.layers == made.num_hidden_layers and size.hidden == made.hidden_size
    assert size.largest == max(parameter.numel() for parameter in model.parameters())


def test_a_mixture_of_experts_is_held_whole_and_passed_in_part():
    mixtral = {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }
    size = size_of_architecture(mixtral)
    assert (round(size.total / 1e9, 1), round(size.active / 1e9, 1)) == (46.7, 12.9)
    assert size.forward_flops(1, 0) == pytest.approx(2 * (size.active - 32000 * 4096), rel=1e-9)


def test_published_sizes():
    assert round(size_of_architecture(QWEN_72).total / 1e9, 2) == 72.71
    assert round(size_of_architecture(QWEN_HALF).total / 1e9, 3) == 0.494


def test_a_nominal_size_is_near_the_real_one():
    for architecture in (QWEN_HALF, QWEN_72):
        real = size_of_architecture(architecture)
        nominal = size_of_nominal(real.total / 1e9)
        assert nominal.total == pytest.approx(real.total, rel=1e-6)
        assert 0.5 < nominal.layers / real.layers < 1.5
        assert 0.9 < nominal.hidden / real.hidden <= 2


def test_the_size_of_a_base_comes_from_what_is_at_hand(tmp_path, monkeypatch):
    import json

    recipe = {
        "architecture": {"model_type": "llama", **SMALL, "tie_word_embeddings": True},
        "vocab_size": 300,
        "domains": ["algebra"],
        "steps": 1,
        "learning_rate": 1e-3,
    }
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN_HALF))
    cached = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc123"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text(json.dumps(QWEN_72))
    study = config.parse(
        STUDY
        | {
            "pretraining": recipe,
            "bases": {
                "recipe": {"pretraining": {}},
                "folder": {"path": str(folder), "N": 3},
                "named": {"hub": "some/other", "revision": "def", "N": 7},
                "unknown": {"hub": "some/other", "revision": "def"},
            },
        }
    )
    assert Study(study).size("recipe").total == size_of_architecture(recipe["architecture"]).total
    assert Study(study).size("folder").total == size_of_architecture(QWEN_HALF).total
    assert Study(study).size("named").total == 7e9
    with pytest.raises(MergelawError, match=r"bases.unknown: .* give its 'N'"):
        Study(study).size("unknown")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    study = config.parse(
        STUDY | {"bases": {"hub": {"hub": "some/model", "revision": "abc123", "N": 1}}}
    )
    assert Study(study).size("hub").total == size_of_architecture(QWEN_72).total
