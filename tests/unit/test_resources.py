"""What jobs ask a cluster for: from the model's size, more at each attempt, refused in time."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_size import QWEN_72, QWEN_HALF
from transformers import AutoConfig, AutoModelForCausalLM

from mergelaw.errors import MergelawError
from mergelaw.evaluation.recipe import Evaluation
from mergelaw.models.recipe import Training
from mergelaw.models.size import Size, size_of_architecture
from mergelaw.workflow import cost, slurm
from mergelaw.workflow.artifact import Artifact
from mergelaw.workflow.cost import UNKNOWN, Documents, Work
from mergelaw.workflow.resources import Hardware, ask, problems, read_profile

ROOT = Path(__file__).parents[2]
NODES = Hardware(gpus_per_node=8, gpu_memory_gb=80, node_memory_gb=1000, max_runtime=1440)
HALF, BIG = size_of_architecture(QWEN_HALF), size_of_architecture(QWEN_72)


def corpus(split: str, documents: int | None = 100) -> Artifact:
    sources = {"recipe": {f"{split}_documents": documents}}
    return Artifact("corpus", f"corpora/sums/{split}", {}, split=split, sources=sources)


def training(size: Size, documents: Documents = UNKNOWN, train: int | None = 100, **more) -> Work:
    """Cost of training an expert on one domain for an epoch."""
    settings = {
        "epochs": 1,
        "batch_size": 16,
        "micro_batch_size": 1,
        "max_tokens": 2048,
        "learning_rate": 1e-5,
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
    }
    recipe = {"training": Training.model_validate(settings | more).model_dump(), "seed": 0}
    inputs = {"corpora": {"sums": corpus("train", train)}}
    artifact = Artifact("expert", "experts/72B/sums-s0", recipe, base="72B", inputs=inputs)
    return cost.training(artifact, size, 2 * size.total, documents)


def sharded(size: Size, **options) -> Work:
    """The same by OpenRLHF."""
    return training(size, trainer="openrlhf", openrlhf=options)


def evaluation(size: Size, merges: int = 128, documents: Documents = UNKNOWN) -> Work:
    """Cost of evaluating merges of nine experts each, on one domain."""
    settings = Evaluation(dtype="bfloat16", batch_tokens=8192, max_tokens=2048)
    vectors = {f"e{i}": Artifact("task_vector", f"task_vectors/72B/e{i}-s0", {}) for i in range(9)}
    artifact = Artifact(
        "evaluate",
        "evals/72B/average/s0-000",
        {"evaluation": settings.model_dump()},
        base="72B",
        inputs={"task_vectors": vectors, "corpora": {"sums": corpus("eval")}},
        rows=[[9, -1, -1, list(vectors)]] * merges,
    )
    return cost.evaluation(artifact, size, 2 * size.total, 4 * size.total, documents)


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
    counted = size.activations(64, dtype)
    assert 0.8 * counted < saved <= counted


def test_flops_are_two_a_weight_and_token_and_attention_three_times_in_training():
    """By hand: a head of 896 x 151,936, 24 layers of 896 query units, sequences of 300 tokens."""
    documents = Documents(tokens=300)
    a_token = 2 * (HALF.non_embedding + 896 * 151936) + 2 * 24 * 896 * 300
    assert evaluation(HALF, 7, documents).flops == pytest.approx(7 * 100 * 300 * a_token)
    plain = training(HALF, documents, gradient_checkpointing=False)
    assert plain.flops == pytest.approx(3 * 100 * 300 * a_token)
    assert training(HALF, documents).flops == pytest.approx(4 * 100 * 300 * a_token)
    # A packed training of a number of steps fills its sequences.
    packed = training(HALF, documents, epochs=None, steps=5, packing=True)
    assert packed.tokens == 5 * 16 * 2048


def test_documents_of_unknown_length_are_as_long_as_they_may_be_and_half_in_an_evaluation():
    assert training(HALF).tokens == 100 * 2048
    assert evaluation(HALF, 7).tokens == 7 * 100 * 1024


def test_what_is_read_and_written():
    """By hand, in bytes a parameter: 2 as stored, 4 of a vector; OpenRLHF saves ten states."""
    assert training(HALF).moved == 4 * HALF.total
    assert sharded(HALF).moved == pytest.approx((4 + 10 * (2 + 12)) * HALF.total)
    shard = evaluation(HALF, 7)
    assert shard.moved == (2 + 9 * 4) * HALF.total
    assert shard.streamed == 7 * (2 + 9 * 4) * HALF.total


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("kind", ["trained", "checkpoint", "adapter", "hub"])
def test_the_task_vector_of_an_adapter_loads_its_base_and_is_kept(kind, derived):
    recipes = {
        "trained": {"training": {}, "seed": 0},
        "checkpoint": {"checkpoint": {"files": {"config.json": "0" * 64}}},
        "adapter": {"checkpoint": {"files": {"adapter_config.json": "0" * 64}}},
        "hub": {"checkpoint": {"hub": "ours/coder", "revision": "main"}},
    }
    expert = Artifact("expert", "experts/72B/sums", recipes[kind], base="72B")
    vector = Artifact("task_vector", "t", {}, base="72B", inputs={"expert": expert})
    work = cost.subtraction(vector, BIG, 2 * BIG.total, derived)
    assert work.kept == (0 if derived and kind != "adapter" else 4 * BIG.total)
    loaded = 4 * BIG.total if kind in ("adapter", "hub") else 0
    assert work.host == cost.PROCESS + 24 * BIG.largest + loaded


def test_vectors_that_gpus_cannot_keep_are_read_for_every_merge():
    seconds = Hardware(teraflops=1e9, gigabytes_per_second=1).seconds
    small, large = evaluation(HALF, 7), evaluation(BIG, 7)
    assert seconds(small, 1) == pytest.approx(small.moved / 1e9, rel=1e-3)
    assert seconds(large, 1) == pytest.approx((large.moved + large.streamed) / 1e9, rel=1e-3)
    # Several GPUs hold a model, but no vectors: as merging.engine does.
    assert seconds(small, 2) == pytest.approx(8 * small.moved / 1e9, rel=1e-3)


def test_a_larger_model_asks_for_more_of_everything():
    small, large = (ask(evaluation(size), NODES) for size in (HALF, BIG))
    assert small["gpu"] == 1 and large["gpu"] > 1
    assert large["gpu"] * NODES.gpu_memory_gb * 1e9 > 2 * BIG.total  # the weights have room
    assert large["mem_mb"] * 1e6 > 2 * BIG.total > 10 * small["mem_mb"] * 1e6
    assert large["runtime"] > small["runtime"]


def test_training_asks_for_more_than_evaluation_and_less_where_it_shares():
    assert training(HALF).each > 16 * HALF.total > evaluation(HALF).shared
    by_stage = [sharded(BIG, zero_stage=stage) for stage in (0, 1, 2, 3)]
    of_eight = [work.shared / 8 + work.each for work in by_stage]
    assert of_eight == sorted(of_eight, reverse=True) and len(set(of_eight)) == 4
    assert len({work.shared + work.each for work in by_stage}) == 1
    # Stage 3 shares all 16 bytes a parameter, stage 2 all but the weights, stage 1 the optimiser's.
    assert [work.shared / BIG.total for work in by_stage] == [0, 12, 14, 16]
    offloaded = sharded(BIG, zero_stage=3, adam_offload=True)
    assert offloaded.shared < by_stage[3].shared / 3 and offloaded.host > by_stage[3].host
    adapter = sharded(BIG, zero_stage=3, lora={"rank": 16})
    assert 2 * BIG.total < adapter.shared < 2.2 * BIG.total
    # A batch is cut evenly: 16 sequences go to 1, 2, 4, 8 or 16 GPUs, or rings of them.
    assert adapter.counts == (1, 2, 4, 8, 16)
    ring = training(
        BIG, packing=True, trainer="openrlhf", openrlhf={"zero_stage": 3, "ring_attn_size": 4}
    )
    assert ring.counts == (4, 8, 16, 32, 64)


def test_each_attempt_asks_for_more_up_to_what_there_is():
    work = evaluation(BIG, 2)
    asked = [ask(work, NODES, attempt=attempt) for attempt in (1, 2, 3)]
    for key in ("gpu", "mem_mb", "runtime"):
        values = [request[key] for request in asked]
        assert values == sorted(values) and values[0] < values[-1]
    last = ask(work, NODES, attempt=100)
    assert (last["gpu"], last["mem_mb"], last["runtime"]) == (8, 1_000_000, 1440)


def test_time_that_is_not_known_is_all_that_there_is():
    assert ask(training(HALF, train=None), NODES)["runtime"] == 1440
    assert ask(training(HALF), NODES)["runtime"] < 1440


def test_without_gpus_everything_is_asked_of_the_processor():
    nodes = Hardware(gpus_per_node=0, slurm_partition="cpu", gpu_partition="gpu")
    asked = ask(training(HALF), nodes, threads=4)
    assert (asked["gpu"], asked["slurm_partition"]) == (0, "cpu")
    assert asked["mem_mb"] * 1e6 > 16 * HALF.total
    assert (
        ask(training(HALF, train=1), nodes)["runtime"]
        > ask(training(HALF, train=1), NODES)["runtime"]
    )
    assert ask(training(HALF), NODES)["gpu"] == 1


def test_what_fits_no_node_is_refused_in_one_line():
    (line,) = problems(training(BIG), NODES)
    assert re.match(r"bases.72B: .*1 GPU of about [\d,]+ GB, .* 8 of 80 GB", line)
    assert not [*problems(evaluation(BIG), NODES)]
    work = sharded(BIG, zero_stage=3, adam_offload=True)
    (line,) = problems(work, Hardware(gpus_per_node=8, node_memory_gb=500))
    assert re.search(r"GB of host memory, .* 500 GB \(node_memory_gb\)", line)
    assert not [*problems(work, Hardware(gpus_per_node=8, node_memory_gb=2000))]
    ring = training(
        HALF, packing=True, trainer="openrlhf", openrlhf={"zero_stage": 3, "ring_attn_size": 16}
    )
    (line,) = problems(ring, NODES)
    assert re.search(r"takes 16 GPUs .* 8 of 80 GB", line)


def test_a_profile_is_read_as_snakemake_gives_it():
    settings = {"gpus_per_node": 4, "gpu_partition": "'gpu'", "mem_mb": "8000 * attempt"}
    assert Hardware.of(settings) == Hardware(gpus_per_node=4, gpu_partition="gpu")
    assert Hardware.of({"mem_mb": 100}) is None
    with pytest.raises(MergelawError, match=r"profile.max_runtime: .*'24h'"):
        Hardware.of({"gpus_per_node": 4, "max_runtime": "24h"})


def test_the_profile_names_hardware_that_is_read(tmp_path, monkeypatch):
    file = ROOT / "slurm" / "profile.v9+.yaml"  # where snakemake --profile slurm looks
    text = file.read_text()
    hardware, threads = read_profile(ROOT / "slurm")
    assert (hardware, threads) == read_profile(file)
    assert hardware.teraflops == 150 and hardware.node_memory_gb == 2000 and threads == 8
    spoken = set(Hardware.model_fields) - {"teraflops", "float32_share", "gigabytes_per_second"}
    for name in spoken | {"gpu_tflops"}:
        assert f"{name}: " in text
    for folder in (ROOT / "profiles" / "local", tmp_path):
        with pytest.raises(MergelawError, match="gpus_per_node among its default-resources"):
            read_profile(folder)
    with pytest.raises(MergelawError, match="nothing"):
        read_profile(tmp_path / "nothing")
    # By name, as Snakemake takes them, also where there is no link in the folder.
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    monkeypatch.chdir(tmp_path)
    assert read_profile(Path("slurm")) == (hardware, threads)
    with pytest.raises(MergelawError, match="profiles/local: is no profile that names hardware"):
        read_profile(Path("local"))


def test_what_slurm_writes_is_understood():
    assert slurm.minutes("1-12:30:00") == 36 * 60 + 30
    assert slurm.minutes("30:00") == 30 and slurm.minutes("infinite") is None
    assert slurm.gpus_of("gpu:4") == 4 and slurm.gpus_of("(null)") == 0
    assert slurm.gpus_of("gpu:h100:8(S:0-1),nvme:2,gpu:a100:2") == 10


def test_nothing_here_imports_torch():
    modules = "mergelaw.workflow.resources, mergelaw.workflow.slurm, mergelaw.workflow.estimate"
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
