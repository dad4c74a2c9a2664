"""What jobs ask a cluster for: from the model's size, more at each attempt, refused in time."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_size import QWEN_72, QWEN_HALF
from transformers import AutoConfig, AutoModelForCausalLM

from mergelaw.errors import MergelawError
from mergelaw.models.size import size_of_architecture
from mergelaw.workflow import resources, slurm
from mergelaw.workflow.resources import (
    GB,
    Hardware,
    ask,
    check,
    evaluation,
    sharded_training,
    training,
)

NODES = Hardware(gpus_per_node=8, gpu_memory_gb=80, node_memory_gb=1000, max_runtime=1440)
HALF, BIG = size_of_architecture(QWEN_HALF), size_of_architecture(QWEN_72)
TRAINING = {
    "batch_size": 16,
    "micro_batch_size": 1,
    "max_tokens": 2048,
    "dtype": "bfloat16",
    "gradient_checkpointing": True,
}
EVALUATION = {"dtype": "bfloat16", "batch_tokens": 8192, "max_tokens": 2048}


def saved_bytes(architecture: dict, tokens: int, bfloat16: bool) -> int:
    """Bytes that autograd keeps of a forward pass beside parameters and logits."""
    settings = dict(architecture)
    config = AutoConfig.for_model(
        settings.pop("model_type"), attn_implementation="sdpa", **settings
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):
        model(input_ids=ids, labels=ids)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_activations_are_those_that_autograd_saves(kind, bfloat16):
    architecture = {
        "model_type": kind,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "vocab_size": 32,
        "head_dim": 16,
        "tie_word_embeddings": True,
    }
    size = size_of_architecture(architecture)
    dtype = "bfloat16" if bfloat16 else "float32"
    # Twice the tokens and no less: what does not grow with them (tables of rotations) falls out.
    saved = saved_bytes(architecture, 128, bfloat16) - saved_bytes(architecture, 64, bfloat16)
    counted = resources.activations(size, 64, dtype)
    assert 0.8 * counted < saved <= counted


def test_a_larger_model_asks_for_more_of_everything():
    small, large = (
        ask(evaluation("x", size, EVALUATION, 9, 128, 1800), NODES) for size in (HALF, BIG)
    )
    assert small["gpu"] == 1 and large["gpu"] > 1
    assert large["gpu"] * NODES.gpu_memory_gb * GB > 2 * BIG.total  # the weights have room
    assert large["mem_mb"] * resources.MB > 2 * BIG.total > 10 * small["mem_mb"] * resources.MB
    assert large["runtime"] > small["runtime"]


def test_training_asks_for_more_than_evaluation_and_less_where_it_shares():
    single = training("x", HALF, TRAINING, 100)
    assert single.each > 16 * HALF.total > evaluation("x", HALF, EVALUATION, 9, 1, 1).shared
    by_stage = [
        sharded_training("x", BIG, TRAINING | {"openrlhf": {"zero_stage": stage}}, 100)
        for stage in (0, 1, 2, 3)
    ]
    of_eight = [need.shared / 8 + need.each for need in by_stage]
    assert of_eight == sorted(of_eight, reverse=True) and len(set(of_eight)) == 4
    assert len({need.shared + need.each for need in by_stage}) == 1
    own = {"zero_stage": 3, "adam_offload": True}
    offloaded = sharded_training("x", BIG, TRAINING | {"openrlhf": own}, 100)
    assert offloaded.shared < by_stage[3].shared / 3 and offloaded.host > by_stage[3].host
    own = {"zero_stage": 3, "lora": {"rank": 16}}
    adapter = sharded_training("x", BIG, TRAINING | {"openrlhf": own}, 100)
    assert 2 * BIG.total < adapter.shared < 2.2 * BIG.total
    # A batch is cut evenly: 16 sequences go to 1, 2, 4, 8 or 16 GPUs.
    assert adapter.counts == (1, 2, 4, 8, 16)


def test_each_attempt_asks_for_more_up_to_what_there_is():
    need = evaluation("x", BIG, EVALUATION, 9, 8, 100)
    asked = [ask(need, NODES, attempt=attempt) for attempt in (1, 2, 3)]
    for key in ("gpu", "mem_mb", "runtime"):
        values = [request[key] for request in asked]
        assert values == sorted(values) and values[0] < values[-1]
    last = ask(need, NODES, attempt=100)
    assert (last["gpu"], last["mem_mb"], last["runtime"]) == (8, 1_000_000, 1440)


def test_time_that_is_not_known_is_all_that_there_is():
    need = training("x", HALF, TRAINING, None)
    assert ask(need, NODES)["runtime"] == 1440


def test_without_gpus_everything_is_asked_of_the_processor():
    nodes = Hardware(gpus_per_node=0, slurm_partition="cpu", gpu_partition="gpu")
    need = training("x", HALF, TRAINING, 100)
    asked = ask(need, nodes, threads=4)
    assert (asked["gpu"], asked["slurm_partition"]) == (0, "cpu")
    assert asked["mem_mb"] * resources.MB > 16 * HALF.total
    assert ask(need, NODES)["gpu"] == 1


def test_what_fits_no_node_is_refused_in_one_line():
    with pytest.raises(
        MergelawError, match=r"bases.72B: .*1 GPU of about [\d,]+ GB, .* 8 of 80 GB"
    ):
        check([training("bases.72B: training an expert", BIG, TRAINING, 1)], NODES)
    check([evaluation("x", BIG, EVALUATION, 9, 1, 1)], NODES)
    own = {"zero_stage": 3, "adam_offload": True}
    need = sharded_training("x", BIG, TRAINING | {"openrlhf": own}, 1)
    with pytest.raises(MergelawError, match=r"GB of host memory, .* 500 GB \(node_memory_gb\)"):
        check([need], Hardware(gpus_per_node=8, node_memory_gb=500))
    check([need], Hardware(gpus_per_node=8, node_memory_gb=2000))


def test_a_profile_is_read_as_snakemake_gives_it():
    given = {"gpus_per_node": 4, "gpu_partition": "'gpu'", "mem_mb": "8000 * attempt"}
    assert Hardware.of(given) == Hardware(gpus_per_node=4, gpu_partition="gpu")
    assert Hardware.of({"mem_mb": 100}) is None
    with pytest.raises(MergelawError, match="max_runtime is '24h'; give a whole number"):
        Hardware.of({"gpus_per_node": 4, "max_runtime": "24h"})


def test_the_profile_names_hardware_that_is_read():
    root = Path(__file__).parents[2]
    text = (
        root / "slurm" / "profile.v9+.yaml"
    ).read_text()  # where snakemake --profile slurm looks
    settings = yaml.safe_load(text)["default-resources"]
    assert Hardware.of(settings) is not None
    for name in Hardware.__dataclass_fields__:
        assert f"{name}: " in text


def test_what_slurm_writes_is_understood():
    assert slurm.minutes("1-12:30:00") == 36 * 60 + 30
    assert slurm.minutes("30:00") == 30 and slurm.minutes("infinite") is None
    assert slurm.gpus("gpu:4") == 4 and slurm.gpus("(null)") == 0
    assert slurm.gpus("gpu:h100:8(S:0-1),nvme:2,gpu:a100:2") == 10


def test_nothing_here_imports_torch():
    program = "import sys, mergelaw.workflow.resources, mergelaw.workflow.slurm; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
