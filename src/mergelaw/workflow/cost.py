"""Cost of one job: tokens, FLOPs, bytes and memory, from its recipe and the model's size.

Requests to a cluster (``resources``) and the estimate of a study (``estimate``) are both made from
it. Nothing here imports torch, because every job of the workflow evaluates it.
"""

import math
from dataclasses import dataclass, replace

from mergelaw.evaluation.recipe import Evaluation
from mergelaw.models.checkpoint import ADAPTER_CONFIG
from mergelaw.models.recipe import OpenRLHF, Optimisation, Pretraining, Training
from mergelaw.models.size import Size
from mergelaw.workflow.artifact import Artifact
from mergelaw.workflow.study import Study

WIDTH = {"float32": 4, "bfloat16": 2}  # bytes
PROCESS = 3e9  # bytes of host memory: Python, torch, transformers, a cluster job's two Snakemakes
SLICE = 1 << 24  # elements merged at a time on a GPU
LOGITS = 1 << 26  # logits widened to fp32 at a time in an evaluation
BUCKET = 500_000_000  # gradients that ZeRO reduces at a time
STATES = 10  # training states that OpenRLHF saves in a training
TEXT = 4  # bytes of a token's text
ROW = 400  # bytes of a cell and of its row, beside 24 for each document


@dataclass(frozen=True)
class Work:
    """Cost of one job. Sizes are in bytes."""

    what: str  # names the job in messages
    tokens: float = 0
    flops: float | None = 0  # None: unknown before documents are counted or files are fetched
    dtype: str = "bfloat16"
    moved: float = 0  # read from storage, or written to it
    streamed: float = 0  # read besides, unless the task vectors stay in GPU memory ...
    vectors: float = 0  # ... where they take this much
    kept: float = 0  # in the results when the job is done
    host: float = PROCESS  # host memory
    counts: tuple[int, ...] = ()  # numbers of GPUs that the job can use; (): a processor's job
    shared: float = 0  # GPU memory, on all of its GPUs together
    each: float = 0  # GPU memory, on every GPU
    parallel: bool = False  # its GPUs compute at the same time
    remedy: str = ""  # what to change if no node holds it


@dataclass(frozen=True)
class Documents:
    """What is assumed of documents before they are counted and tokenised."""

    train: int | None = None  # where a domain leaves their number open; None: unknown
    tokens: float | None = None  # in a document; None: unknown

    def count(self, artifact: Artifact) -> float | None:
        """Documents in an artifact's corpora, or in a corpus; None if unknown."""
        corpora = [artifact] if artifact.stage == "corpus" else artifact.of_role("corpora")
        counts = [corpus.sources["recipe"][f"{corpus.split}_documents"] for corpus in corpora]
        known = [count for n in counts if (count := self.train if n is None else n) is not None]
        return sum(known) if len(known) == len(counts) else None

    def length(self, longest: float) -> float:
        """Tokens of a document that is cut at ``longest``; if unknown, all of these."""
        return longest if self.tokens is None else min(longest, self.tokens)


UNKNOWN = Documents()


def work_of(study: Study, artifact: Artifact, documents: Documents = UNKNOWN) -> Work:
    """Cost of the job of an artifact.

    Raises MergelawError if the base's size cannot be known yet.
    """
    if artifact.stage == "corpus":
        tokens = (documents.count(artifact) or 0) * (documents.tokens or 0)
        return Work(artifact.folder, tokens=tokens, kept=TEXT * tokens)
    if artifact.base is None or artifact.stage == "design":
        return Work(artifact.folder)
    size, name = study.size(artifact.base), f"bases.{artifact.base}"
    pretrained = study.bases[artifact.base].trains
    stored = WIDTH["float32" if pretrained else "bfloat16"] * size.total
    derived = study.config.storage == "derived"
    vector = stored if derived else 4 * size.total
    members = len(artifact.names("task_vectors"))
    match artifact.stage:
        case "task_vector":
            return subtraction(artifact, size, stored, derived)
        case "merge":
            moved = 2 * stored + members * vector
            return Work(f"{name}: writing a merge", moved=moved, kept=stored, host=tensorwise(size))
        case "evaluate":
            return evaluation(artifact, size, stored, vector, documents)
    if artifact.trains:
        return training(artifact, size, stored, documents)
    return Work(f"{name}: fetching a model", flops=None, moved=stored, kept=stored)


def tensorwise(size: Size) -> float:
    """Host memory of a job that works on one tensor at a time, as stored and in fp32."""
    return PROCESS + 24 * size.largest


def subtraction(artifact: Artifact, size: Size, stored: float, derived: bool) -> Work:
    """Cost of a task vector. An adapter's is always kept, and its job holds the base in fp32.

    A hub id may be an adapter: its job asks for as much memory.
    """
    checkpoint = artifact.of_role("expert")[0].recipe.get("checkpoint", {})
    adapter = ADAPTER_CONFIG in checkpoint.get("files", {})
    loaded = 4 * size.total if adapter or "hub" in checkpoint else 0
    kept = 0 if derived and not adapter else 4 * size.total
    host = tensorwise(size) + loaded
    what = f"bases.{artifact.base}: a task vector"
    return Work(what, moved=2 * stored + kept, kept=kept, host=host)


def training(artifact: Artifact, size: Size, stored: float, documents: Documents) -> Work:
    """Cost of a training: 3 forward passes a token, 4 where activations are computed twice.

    bfloat16 weights and gradients are 2 + 2 bytes a parameter, AdamW's fp32 weights and moments 12;
    in fp32 weights, gradients and moments are 16 as well. Mixed precision by transformers' Trainer
    or TRL keeps a bfloat16 copy of the weights besides. OpenRLHF trains on several GPUs of a node,
    by DeepSpeed's ZeRO: they share the 12 from stage 1 on, the gradients from 2, the weights from 3
    (Rajbhandari et al. 2020, section 3). Offloaded optimiser states are in host memory. With LoRA
    only the adapter's parameters have gradients and optimiser states.
    """
    tuning = artifact.recipe.get("training")
    recipe: Optimisation = (
        Training.model_validate(tuning)
        if tuning
        else Pretraining.model_validate(artifact.recipe["pretraining"])
    )
    checkpointing = isinstance(recipe, Training) and recipe.gradient_checkpointing
    length, count = documents.length(recipe.max_tokens), documents.count(artifact)
    tokens: float | None = None
    if recipe.steps is not None:
        full = not isinstance(recipe, Training) or recipe.packing
        tokens = recipe.steps * recipe.batch_size * (recipe.max_tokens if full else length)
    elif recipe.epochs is not None and count is not None:
        tokens = recipe.epochs * count * length
    passes = 4 if checkpointing else 3
    work = Work(
        f"bases.{artifact.base}: {'training an expert' if tuning else 'pre-training'}",
        tokens=tokens or 0,
        flops=None if tokens is None else passes * size.forward_flops(tokens, length),
        dtype=recipe.dtype,
        moved=2 * stored,
        kept=stored,
        host=PROCESS + 4 * size.total,
    )
    if isinstance(recipe, Training) and recipe.trainer == "openrlhf":
        return sharded(work, size, recipe, recipe.openrlhf or OpenRLHF())
    batch = (recipe.micro_batch_size or recipe.batch_size) * recipe.max_tokens
    copy = WIDTH["bfloat16"] if recipe.dtype == "bfloat16" else 0
    each = (16 + copy) * size.total + size.activations(batch, recipe.dtype, checkpointing)
    remedy = "set a smaller micro_batch_size, gradient_checkpointing: true, or trainer: openrlhf"
    return replace(work, counts=(1,), each=each, remedy=f"{remedy} (several GPUs)")


def sharded(work: Work, size: Size, recipe: Training, options: OpenRLHF) -> Work:
    """The same training by OpenRLHF; see :func:`training`."""
    trained, ring, micro = size.total, options.ring_attn_size, recipe.micro_batch_size or 1
    if options.lora:
        ends = 2 * (size.hidden + size.query) + 2 * (size.hidden + size.key_value)
        trained = options.lora.rank * size.layers * (ends + 3 * (size.hidden + size.intermediate))
    offload = options.adam_offload
    parts = {1: 0 if offload else 12 * trained, 2: 2 * trained, 3: 2 * size.total}
    shared = sum(part for stage, part in parts.items() if stage <= options.zero_stage)
    # ZeRO gathers two layers at a time, and reduces gradients in buckets.
    layers = 2 * size.non_embedding / size.layers
    gathered = 2 * (layers + size.vocab * size.hidden) + 4 * min(trained, BUCKET)
    batch = math.ceil(micro * recipe.max_tokens / ring)
    activations = size.activations(batch, "bfloat16", recipe.gradient_checkpointing)
    cuts = (ring * n for n in range(1, 64 // ring + 1) if recipe.batch_size % (micro * n) == 0)
    return replace(
        work,
        moved=work.moved + STATES * (2 * size.total + 12 * trained),
        host=PROCESS + 2 * size.total + 14 * trained if offload else work.host,
        counts=tuple(cuts),
        shared=shared,
        each=sum(parts.values()) - shared + gathered + activations,
        parallel=True,
        remedy="set openrlhf.zero_stage, adam_offload or lora, gradient_checkpointing: true, or a "
        "smaller micro_batch_size",
    )


def evaluation(
    artifact: Artifact, size: Size, stored: float, vector: float, documents: Documents
) -> Work:
    """Cost of merging and evaluating a shard: one resident model, its layers spread over the GPUs.

    Besides its share of the weights a GPU holds one layer's activations, the logits, the slices
    that are merged and, while loading, a second copy of the largest tensor. The GPUs work one after
    the other. Documents of unknown length are taken to be half as long as they may be.
    """
    recipe = Evaluation.model_validate(artifact.recipe["evaluation"])
    members, merges = len(artifact.names("task_vectors")), len(artifact.rows)
    longest, width = recipe.max_tokens, WIDTH[recipe.dtype]
    length = longest / 2 if documents.tokens is None else documents.length(longest)
    count = documents.count(artifact) or 0
    tokens = merges * count * length
    widest = 4 * size.hidden + 4 * size.intermediate + size.vocab
    working = width * max(recipe.batch_tokens, longest) * widest
    working += 12 * LOGITS + 4 * SLICE * (members + 4)
    return Work(
        f"bases.{artifact.base}: evaluating a merge",
        tokens=tokens,
        flops=size.forward_flops(tokens, length),
        dtype=recipe.dtype,
        moved=stored + members * vector,
        streamed=merges * stored + sum(row[0] for row in artifact.rows) * vector,
        vectors=4 * size.total * (members + 3),  # as merging.engine decides
        kept=2 * merges * (len(artifact.names("corpora")) * ROW + 24 * count),
        host=PROCESS + width * size.total,
        counts=tuple(range(1, size.layers + 1)),
        shared=width * size.total,
        each=max(working, 2 * width * size.largest) + width * size.non_embedding / size.layers,
        remedy="set evaluation.dtype: bfloat16 or a smaller batch_tokens",
    )
