"""What a job asks a cluster for: GPUs, host memory and time, worked out from the model's size.

Torch-free, for every job of the workflow evaluates it. The formulas say what they count, and are
made to be a little too large; what they miss, the next attempt asks for.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mergelaw.errors import MergelawError
from mergelaw.models.size import Size
from mergelaw.workflow.study import Artifact, Study

GB = 1_000_000_000
MB = 1_000_000
WIDTH = {"float32": 4, "bfloat16": 2}
# Host memory of a process: Python, torch, transformers and the two Snakemakes of a cluster's job;
# with a GPU the CUDA libraries besides.
PROCESS = 3 * GB
GPU_PROCESS = 5 * GB
USABLE = 0.9  # of a GPU's memory: the rest is its context, and gaps of the allocator
SLICE = 1 << 24  # elements merged at a time on a GPU
LOGITS = 1 << 26  # logits widened to fp32 at a time in an evaluation
FLOAT32 = 0.1  # a GPU's rate in float32 against bfloat16
PROCESSOR = 1e10  # FLOP/s of a core
STORAGE = 500 * MB  # bytes/s of shared storage, digests included
MAPPED = 2 * GB  # bytes/s of what was read before, from the page cache or local disks
START = 15  # minutes for imports, for loading, and for what is the same for every size

NAMES = ("slurm_partition", "gpu_partition", "slurm_account")
ASKED = ("gpu", "nodes", "mem_mb", "runtime", "slurm_partition")


@dataclass(frozen=True)
class Hardware:
    """The nodes that jobs run on, as the profile's `default-resources` say."""

    gpus_per_node: int  # 0: what would run on GPUs runs on the processor
    gpu_memory_gb: int = 80
    gpu_tflops: int = 100  # of one GPU, bfloat16, sustained
    node_memory_gb: int = 0  # 0: not known
    max_runtime: int = 0  # minutes; 0: not known
    slurm_partition: str | None = None
    gpu_partition: str | None = None
    slurm_account: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Hardware | None":
        """From a profile's settings; None where it says nothing of GPUs, as a laptop's."""
        if "gpus_per_node" not in settings:
            return None
        known = {name: settings[name] for name in cls.__dataclass_fields__ if name in settings}
        for name, value in known.items():
            if name in NAMES:
                known[name] = str(value).strip("'\"")
            elif not isinstance(value, int):
                raise MergelawError(f"profile: {name} is {value!r}; give a whole number")
        return cls(**known)


@dataclass(frozen=True)
class Need:
    """What one job needs, whatever it runs on. Bytes, FLOPs."""

    what: str
    host: float = PROCESS
    counts: tuple[int, ...] = ()  # numbers of GPUs that it can use; none: a job of the processor
    shared: float = 0  # on the GPUs together
    each: float = 0  # on every GPU
    flops: float | None = 0  # None: not known before documents are counted
    parallel: bool = False  # its GPUs compute at the same time
    dtype: str = "bfloat16"
    moved: float = 0  # read from storage, or written to it
    resident: float = 0  # what is read only once where so much is free on the GPUs ...
    streamed: float = 0  # ... and what is read otherwise
    remedy: str = ""  # what to change where no node holds it

    def gpus(self, hardware: Hardware, factor: float = 1) -> int | None:
        """The fewest GPUs of one node that hold it; None where no number does."""
        room = USABLE * hardware.gpu_memory_gb * GB
        for count in self.counts:
            if (
                count <= hardware.gpus_per_node
                and factor * (self.shared / count + self.each) <= room
            ):
                return count
        return None


def ask(need: Need, hardware: Hardware, threads: int = 1, attempt: int = 1) -> dict[str, Any]:
    """What a job asks for, by the names of :data:`ASKED`; ``runtime`` is in minutes.

    Each further attempt asks for half as much memory again and for as much time again, up to what
    a node has and a job may take: a job that ran out of time goes on where it was.
    """
    factor = (1 + attempt) / 2
    gpus, host = 0, need.host
    rate = PROCESSOR * threads
    room = 0.0
    if need.counts and hardware.gpus_per_node:
        usable = [count for count in need.counts if count <= hardware.gpus_per_node]
        gpus = need.gpus(hardware, factor) or max(usable, default=1)
        host += GPU_PROCESS
        rate = hardware.gpu_tflops * 1e12 * (gpus if need.parallel else 1)
        rate *= FLOAT32 if need.dtype == "float32" else 1
        room = gpus * hardware.gpu_memory_gb * GB - need.shared
    elif need.counts:
        host += need.shared + need.each
    reading = need.moved / STORAGE
    if need.resident > room / 2:
        reading += need.streamed / MAPPED
    runtime = hardware.max_runtime or 24 * 60
    if need.flops is not None:
        seconds = 2 * (need.flops / rate + reading)
        runtime = min((START + math.ceil(seconds / 60)) * attempt, runtime)
    memory = math.ceil(host * factor / MB)
    if hardware.node_memory_gb:
        memory = min(memory, hardware.node_memory_gb * 1000)
    partition = hardware.gpu_partition if gpus else None
    return {
        "gpu": gpus,
        "nodes": 1,
        "mem_mb": memory,
        "runtime": runtime,
        "slurm_partition": partition or hardware.slurm_partition,
    }


def check(needs: Iterable[Need], hardware: Hardware) -> None:
    """Raise MergelawError, one line, for the first job that fits no node."""
    for need in needs:
        node, room = hardware.gpus_per_node, hardware.node_memory_gb * GB
        if node and need.counts and need.gpus(hardware) is None:
            most = max((count for count in need.counts if count <= node), default=need.counts[0])
            each = (need.shared / most + need.each) / USABLE / GB
            raise MergelawError(
                f"{need.what} takes {most} GPU{'s' * (most > 1)} of about {each:,.0f} GB, the "
                f"profile's nodes have {node} of {hardware.gpu_memory_gb} GB (gpus_per_node, "
                f"gpu_memory_gb); {need.remedy}"
            )
        asked = ask(need, replace(hardware, node_memory_gb=0))["mem_mb"] * MB
        if room and asked > room:
            raise MergelawError(
                f"{need.what} takes about {asked / GB:,.0f} GB of host memory, the profile's nodes "
                f"have {hardware.node_memory_gb} GB (node_memory_gb); name larger nodes"
            )


# -- what each stage needs ---------------------------------------------------------------------


def activations(size: Size, tokens: int, dtype: str, checkpointing: bool = False) -> float:
    """Bytes that autograd keeps of a forward pass over ``tokens`` tokens, logits included.

    A layer's are counted from what transformers' decoders save (norms, rotated queries and keys,
    the gated MLP; attention keeps its inputs and its output): in float32 4 bytes x 6 hidden, 4
    query, 4 key-value, 4 intermediate widths; in bfloat16, which is mixed precision, the residual
    stream and the norms stay fp32. Logits: 4 x 4 bytes, for they are widened, and their log-softmax
    and gradients kept. Checkpointing keeps the residual stream of each layer, and one whole layer.
    """
    heads = size.query + size.key_value
    layer = 24 * size.hidden + 16 * heads + 16 * size.intermediate
    if dtype == "bfloat16":
        layer = 26 * size.hidden + 10 * heads + 8 * size.intermediate
    kept = layer + 4 * size.hidden * size.layers if checkpointing else layer * size.layers
    return float(tokens * (kept + 12 * size.hidden + 16 * size.vocab))


def training(what: str, size: Size, recipe: Mapping[str, Any], sequences: float | None) -> Need:
    """Training all parameters on one GPU, by transformers' Trainer or TRL.

    Weights, gradients and AdamW's two moments in fp32 are 16 bytes a parameter; mixed precision
    keeps a bfloat16 copy of the weights during a pass, 2 more. ``sequences``: how many in all.
    """
    dtype, checkpointing = recipe["dtype"], recipe.get("gradient_checkpointing", False)
    micro = recipe["micro_batch_size"] or recipe["batch_size"]
    return Need(
        what,
        host=PROCESS + 4 * size.total,
        counts=(1,),
        each=size.total * (18 if dtype == "bfloat16" else 16)
        + activations(size, micro * recipe["max_tokens"], dtype, checkpointing),
        flops=training_flops(size, recipe, sequences),
        dtype=dtype,
        moved=20 * size.total,
        remedy="train with less (micro_batch_size, gradient_checkpointing), or on several GPUs "
        "(trainer: openrlhf)",
    )


def training_flops(size: Size, recipe: Mapping[str, Any], sequences: float | None) -> float | None:
    """6 FLOPs per parameter and token, 8 where activations are computed twice."""
    if sequences is None:
        return None
    passes = 8 if recipe.get("gradient_checkpointing") else 6
    return float(passes * size.total * sequences * recipe["max_tokens"])


def sharded_training(
    what: str, size: Size, recipe: Mapping[str, Any], sequences: float | None
) -> Need:
    """Training by OpenRLHF over DeepSpeed's ZeRO, on several GPUs of a node.

    bfloat16 weights and gradients are 2 + 2 bytes a parameter, AdamW's fp32 weights and moments 12.
    Of stage 1 the GPUs share the last, from 2 on the gradients, from 3 on the weights; what is
    offloaded is in host memory. An adapter (LoRA) trains its own few parameters only.
    """
    own = recipe.get("openrlhf") or {}
    stage, lora, ring = own.get("zero_stage", 2), own.get("lora"), own.get("ring_attn_size", 1)
    offload = own.get("adam_offload", False)
    trained = size.total
    if lora:
        ends = 2 * (size.hidden + size.query) + 2 * (size.hidden + size.key_value)
        trained = lora["rank"] * size.layers * (ends + 3 * (size.hidden + size.intermediate))
    optimiser = 0 if offload else 12 * trained
    parts = {1: optimiser, 2: 2 * trained, 3: 2 * size.total}
    batch = recipe["batch_size"]
    micro = recipe["micro_batch_size"] or 1
    tokens = math.ceil(micro * recipe["max_tokens"] / ring)
    # ZeRO gathers some layers at a time, and reduces gradients in buckets of half a billion.
    layer = (size.total - size.embedding) / size.layers
    gathered = 2 * (2 * layer + size.vocab * size.hidden) + 4 * min(trained, 500_000_000)
    return Need(
        what,
        host=PROCESS + (2 * size.total + 14 * trained if offload else 4 * size.total),
        counts=tuple(n for n in range(ring, 65, ring) if batch % (micro * (n // ring)) == 0),
        shared=sum(part for least, part in parts.items() if least <= stage),
        each=sum(part for least, part in parts.items() if least > stage)
        + gathered
        + activations(size, tokens, "bfloat16", recipe.get("gradient_checkpointing", False)),
        flops=training_flops(size, recipe, sequences),
        parallel=True,
        moved=20 * size.total,
        remedy="share or keep less (openrlhf: zero_stage, adam_offload, lora; "
        "gradient_checkpointing, micro_batch_size)",
    )


def evaluation(
    what: str, size: Size, recipe: Mapping[str, Any], members: int, merges: int, documents: int
) -> Need:
    """Merging and evaluating: one resident model, its layers spread over the GPUs.

    Besides its share of the weights a GPU holds one layer's activations, the logits, the slices
    that are merged and, while loading, a second copy of the largest tensor. The GPUs work one after
    the other. ``members`` experts take part in ``merges`` merges over ``documents`` documents,
    taken to be half as long as they may be.
    """
    width = WIDTH[recipe["dtype"]]
    tokens = max(recipe["batch_tokens"], recipe["max_tokens"])
    flowing = width * tokens * (4 * size.hidden + 4 * size.intermediate + size.vocab)
    working = flowing + 12 * LOGITS + 4 * SLICE * (members + 4)
    layer = width * (size.total - size.embedding) / size.layers
    vector = 4 * size.total
    return Need(
        what,
        host=PROCESS + width * size.total,
        counts=tuple(range(1, size.layers + 1)),
        shared=width * size.total,
        each=max(working, 2 * width * size.largest) + layer,
        flops=float(2 * size.total * merges * documents * recipe["max_tokens"] / 2),
        dtype=recipe["dtype"],
        moved=vector * (members + 1),
        resident=vector * (members + 3),
        streamed=vector * merges * (members / 2 + 1),
        remedy="evaluate with less (evaluation: dtype, batch_tokens)",
    )


def need_of(study: Study, artifact: Artifact) -> Need:
    """What the job of an artifact needs. MergelawError where a base's size cannot be known yet."""
    stage, recipe = artifact.stage, artifact.recipe
    sized = stage in ("task_vector", "merge", "evaluate") or (
        stage in ("base", "expert") and "checkpoint" not in recipe
    )
    if not sized:
        return Need(artifact.folder)
    base = str(artifact.base)
    size = study.size(base)
    domains = artifact.names("corpora")
    if stage == "base":
        own, what = recipe["pretraining"], f"bases.{base}: pre-training"
        return training(what, size, own, sequences_of(study, own, domains))
    if stage == "expert":
        own, what = recipe["training"], f"bases.{base}: training an expert"
        kind = sharded_training if own["trainer"] == "openrlhf" else training
        return kind(what, size, own, sequences_of(study, own, domains))
    members = len(artifact.names("task_vectors"))
    if stage == "evaluate":
        merges = len(artifact.rows)
        count = documents_of(study, domains, "eval_documents") or 0
        own, what = recipe["evaluation"], f"bases.{base}: evaluating a merge"
        return evaluation(what, size, own, members, merges, count)
    # One tensor at a time, as it is stored and in fp32, with what is made of it.
    what = f"bases.{base}: {'a task vector' if stage == 'task_vector' else 'writing a merge'}"
    return Need(what, host=PROCESS + 24 * size.largest, moved=8 * size.total * (members + 2))


def documents_of(study: Study, domains: Iterable[str], kind: str) -> int | None:
    """``train_documents`` or ``eval_documents`` of domains; None where they are counted later."""
    shared, total = getattr(study.config.corpus, kind), 0
    for name in domains:
        own = getattr(study.config.domains[name], kind)
        count = shared if own is None else own
        if count is None:
            return None
        total += count
    return total


def sequences_of(study: Study, recipe: Mapping[str, Any], domains: Iterable[str]) -> float | None:
    """Sequences that a training passes; None where documents are counted later."""
    if recipe["steps"] is not None:
        return recipe["steps"] * recipe["batch_size"]
    count = documents_of(study, domains, "train_documents")
    return None if count is None else count * recipe["epochs"]
