"""Architectures: a merge of one expert alone is the model that transformers or peft makes of it.

`pytest -s tests/conformance/test_architectures.py` prints the table of what works.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import models
from mergelaw.merging.engine import Merger, write_merge
from mergelaw.merging.methods import method_of
from mergelaw.models.inspect import inspect_base, inspect_expert

WIDTHS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OLDER = {"num_key_value_heads": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": OLDER,
    "phi3": {},
    "olmo2": {},
    "cohere": {},
    "granite": {},
    "stablelm": {},
    "starcoder2": {},
    "smollm3": {},
    "nemotron": {},
    "gpt2": {"n_positions": 128},
    "gpt_neox": OLDER,
    "gpt_bigcode": {"n_positions": 128},
    "gptj": {"rotary_dim": 8, "n_positions": 128},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
    "falcon": {"head_dim": "unset"},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16},
    "jamba": {"num_experts": 4, "use_mamba_kernels": False},
    "qwen3_next": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "mamba": {"state_size": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "granitemoe": {"num_local_experts": 4},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
    },
    "gpt_oss": {"num_local_experts": 4},
}
IDS = torch.arange(3, 60)[None]
ROWS: list[str] = []


def write_model(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return folder


def change(model: Any, seed: int) -> Any:
    """A made-up fine-tune: noise on every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.01
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def merged_alone(base: Path, expert: Path, folder: Path) -> torch.Tensor:
    """Logits of the merge of one expert, in memory and as a written checkpoint."""
    vector = models.write_task_vector(base, expert, folder)
    method = method_of({"method": "average"})
    model = models.load(base)
    for memory in (0, 1 << 40):
        with Merger(model, base, {"e": vector}, method, memory) as merger:
            merger.merge(["e"])
            found = logits(model)
            merger.merge([])
    out = folder.with_name(f"{folder.name}-written")
    out.mkdir()
    write_merge(base, {"e": vector}, method, None, out)
    written = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    torch.testing.assert_close(written, found, rtol=1e-5, atol=1e-5)
    return found


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print("\n| architecture | base | expert | adapter |\n|---|---|---|---|")
    print("\n".join(ROWS))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_merge_of_one_expert_is_that_expert(tmp_path, kind):
    torch.manual_seed(0)
    settings = {k: v for k, v in (WIDTHS | ARCHITECTURES[kind]).items() if v != "unset"}
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base = write_model(model, tmp_path / "base")
    assert inspect_base(base) == []
    expert = write_model(change(model, 1), tmp_path / "expert")
    assert inspect_expert(expert, base) == []
    wanted = logits(AutoModelForCausalLM.from_pretrained(expert, dtype=torch.float32))
    torch.testing.assert_close(
        merged_alone(base, expert, tmp_path / "vector"), wanted, rtol=1e-5, atol=1e-5
    )
    row, adapter = f"| {kind} | yes | yes |", tmp_path / "adapter"
    layers = ["in_proj", "x_proj"] if kind == "mamba" else "all-linear"
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=layers, r=2)
    wrapped = change(peft.get_peft_model(models.load(base), lora), 2)
    wrapped.save_pretrained(adapter)
    whole = peft.PeftModel.from_pretrained(models.load(base), adapter).merge_and_unload()
    assert inspect_expert(adapter, base) == []
    found = merged_alone(base, adapter, tmp_path / "adapted")
    torch.testing.assert_close(found, logits(whole), rtol=1e-5, atol=1e-5)
    ROWS.append(f"{row} yes |")
