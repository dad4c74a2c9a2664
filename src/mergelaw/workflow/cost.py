"""Cost of one job: tokens, FLOPs, bytes and memory, from its recipe and the model's size.

Cluster requests (``resources``) and the estimate of a study (``estimate``) use it. Nothing here
imports torch, because every job of the workflow evaluates it.
"""

import math
from dataclasses import dataclass, replace

from mergelaw.evaluation.cross_entropy import LOGITS
from mergelaw.evaluation.recipe import Evaluation
from mergelaw.merging.engine import GPU_SLICE
from mergelaw.models.checkpoint import ADAPTER_CONFIG
from mergelaw.models.recipe import OpenRLHF, Optimisation, Pretraining, Training
from mergelaw.models.size import Size
from mergelaw.workflow.artifact import Artifact
from mergelaw.workflow.study import Study

WIDTH = {"float32": 4, "bfloat16": 2}  # bytes
PROCESS = 3e9  # bytes of host memory: Python, torch, transformers, a cluster job's two Snakemakes
BACKWARD = 3  # forward passes that a gradient costs
LEARNING_PASSES = 60  # about the most forward passes over the calibration documents
BUCKET = 500_000_000  # gradients that ZeRO reduces at a time
STATES = 10  # training states that OpenRLHF saves in a training
BYTES_PER_TOKEN = 4  # of text
ROW = 400  # bytes of a cell and its row, plus 24 for each document


@dataclass(frozen=True)
class Work:
    """Cost of one job. Sizes are in bytes."""

    what: str  # names the job in messages
    tokens: float = 0
    flops: float = 0
    dtype: str = "bfloat16"
    moved: float = 0  # read from storage, or written to it
    streamed: float = 0  # read in addition, unless the task vectors stay in GPU memory
    vectors: float = 0  # bytes of the task vectors in GPU memory
    kept: float = 0  # in the results when the job is done
    host: float = PROCESS  # host memory
    counts: tuple[int, ...] = ()  # numbers of GPUs that the job can use; (): a processor's job
    shared: float = 0  # GPU memory, on all of its GPUs together
    each: float = 0  # GPU memory, on every GPU
    parallel: bool = False  # its GPUs compute at the same time
    remedy: str = ""  # what to change if no node holds it


@dataclass(frozen=True)
class Documents:
    """Assumptions about documents that are not on this machine, or not tokenised yet."""

    train: float = math.inf  # of a domain without a number; infinite: unknown
    tokens: float = math.inf  # per document; infinite: the maximum length
    bytes_per_token: float = BYTES_PER_TOKEN  # where local files give a document's bytes

    def of(self, artifact: Artifact) -> tuple[float, float]:
        """Number of documents in an artifact's corpora, and mean tokens of one."""
        corpora = [artifact] if artifact.stage == "corpus" else artifact.of_role("corpora")
        count = tokens = 0.0
        for corpus in corpora:
            number = corpus.sources["recipe"][f"{corpus.split}_documents"]
            number, length = number or self.train, self.tokens
            if corpus.size is not None:
                number, length = corpus.size[0], corpus.size[1] / corpus.size[0]
                length /= self.bytes_per_token
            count, tokens = count + number, tokens + number * length
        return count, math.inf if tokens == math.inf else tokens / count


UNKNOWN = Documents()


def work_of(study: Study, artifact: Artifact, documents: Documents = UNKNOWN) -> Work:
    """Cost of an artifact's job. Raises MergelawError if the base's size is not yet known."""
    if artifact.stage == "corpus":
        count, length = documents.of(artifact)
        return Work(artifact.folder, tokens=count * length, kept=BYTES_PER_TOKEN * count * length)
    if artifact.base is None or artifact.stage == "design":
        return Work(artifact.folder)
    size, name = study.size(artifact.base), f"bases.{artifact.base}"
    stored = WIDTH["float32" if study.bases[artifact.base].trains else "bfloat16"] * size.total
    derived = study.config.storage == "derived"
    vector = stored if derived else 4 * size.total
    if artifact.stage == "task_vector":
        return subtraction(artifact, size, stored, derived)
    if artifact.stage == "merge":
        moved = 2 * stored + len(artifact.names("task_vectors")) * vector
        host = PROCESS + 24 * size.largest
        return Work(f"{name}: writing a merge", moved=moved, kept=stored, host=host)
    if artifact.stage in ("evaluate", "learn", "gradients"):
        return evaluation(artifact, size, stored, vector, documents)
    if artifact.trains:
        return training(artifact, size, stored, documents)
    return Work(f"{name}: fetching a model", moved=stored, kept=stored)


def subtraction(artifact: Artifact, size: Size, stored: float, derived: bool) -> Work:
    """Cost of a task vector: one tensor at a time, as stored and in fp32.

    An adapter's task vector is always kept, and its job holds the base in fp32. A hub id may be an
    adapter, so its job requests as much memory.
    """
    checkpoint = artifact.of_role("expert")[0].recipe.get("checkpoint", {})
    adapter = ADAPTER_CONFIG in checkpoint.get("files", {})
    loaded = 4 * size.total if adapter or "hub" in checkpoint else 0
    kept = 0 if derived and not adapter else 4 * size.total
    host = PROCESS + 24 * size.largest + loaded
    what = f"bases.{artifact.base}: a task vector"
    return Work(what, moved=2 * stored + kept, kept=kept, host=host)


def training(artifact: Artifact, size: Size, stored: float, documents: Documents) -> Work:
    """Cost of a training: 3 forward passes a token, 4 if activations are computed twice.

    bfloat16 weights and gradients are 2 + 2 bytes a parameter, AdamW's fp32 weights and moments 12;
    in fp32, weights, gradients and moments are also 16. Mixed precision with the Trainer of
    transformers or TRL adds a bfloat16 copy of the weights.
    """
    tuning = artifact.recipe.get("training")
    recipe: Optimisation = (
        Training.model_validate(tuning)
        if tuning
        else Pretraining.model_validate(artifact.recipe["pretraining"])
    )
    checkpointing = getattr(recipe, "gradient_checkpointing", False)
    count, length = documents.of(artifact)
    length = min(recipe.max_tokens, length)
    if recipe.steps is not None:
        full = getattr(recipe, "packing", True)  # as a pre-training's sequences always are
        tokens = recipe.steps * recipe.batch_size * (recipe.max_tokens if full else length)
    else:
        tokens = (recipe.epochs or 0) * count * length
    work = Work(
        f"bases.{artifact.base}: {'training an expert' if tuning else 'pre-training'}",
        tokens=tokens,
        flops=(4 if checkpointing else 3) * size.forward_flops(tokens, length),
        dtype=recipe.dtype,
        moved=2 * stored,
        kept=stored,
        host=PROCESS + 4 * size.total,
    )
    if isinstance(recipe, Training) and recipe.trainer == "openrlhf":
        return sharded(work, size, recipe)
    batch = (recipe.micro_batch_size or recipe.batch_size) * recipe.max_tokens
    copy = WIDTH["bfloat16"] if recipe.dtype == "bfloat16" else 0
    each = (16 + copy) * size.total + size.activations(batch, recipe.dtype, checkpointing)
    remedy = "set a smaller micro_batch_size, gradient_checkpointing: true, or trainer: openrlhf"
    return replace(work, counts=(1,), each=each, remedy=f"{remedy} (several GPUs)")


def sharded(work: Work, size: Size, recipe: Training) -> Work:
    """Cost of a training by OpenRLHF, on several GPUs of a node by DeepSpeed's ZeRO.

    GPUs share the optimiser's 12 bytes a parameter from stage 1 on, the gradients from 2, the
    weights from 3 (Rajbhandari et al. 2020, section 3). Offloaded optimiser states are in host
    memory. With LoRA only the adapter's parameters have gradients and optimiser states.
    """
    options, micro = recipe.openrlhf or OpenRLHF(), recipe.micro_batch_size or 1
    trained, ring, offload = size.total, options.ring_attn_size, options.adam_offload
    if options.lora:
        ends = 2 * (size.hidden + size.query) + 2 * (size.hidden + size.key_value)
        trained = options.lora.rank * size.layers * (ends + 3 * (size.hidden + size.intermediate))
    parts = [0 if offload else 12 * trained, 2 * trained, 2 * size.total]
    shared = sum(parts[: options.zero_stage])
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
        each=sum(parts) - shared + gathered + activations,
        parallel=True,
        remedy="set openrlhf.zero_stage, adam_offload or lora, gradient_checkpointing: true, or a "
        "smaller micro_batch_size",
    )


def evaluation(
    artifact: Artifact, size: Size, stored: float, vector: float, documents: Documents
) -> Work:
    """Cost of merging and evaluating: one resident model, its layers spread over the GPUs.

    Gradients cost as much as several evaluations, and keep activations.

    Besides its share of the weights a GPU holds one layer's activations, the logits, the slices of
    a merge and, while loading, a second copy of the largest tensor. The GPUs work one after
    another. Documents of unknown length are assumed to have half the maximum length.
    """
    recipe = Evaluation.model_validate(artifact.recipe["evaluation"])
    members, learns = len(artifact.names("task_vectors")), artifact.stage == "learn"
    what, passes = {
        "learn": ("learning coefficients", LEARNING_PASSES),
        "gradients": ("gradients", BACKWARD * (members + 1)),
    }.get(artifact.stage, ("evaluating a merge", 0))
    subsets = [len(subset) for subset in artifact.rows] if learns else [members]
    sizes = subsets * passes if passes else [row[0] for row in artifact.rows]
    merges = len(sizes)
    longest, width = recipe.max_tokens, WIDTH[recipe.dtype]
    count, length = documents.of(artifact)
    length = longest / 2 if length == math.inf else min(longest, length)
    tokens = merges * count * length
    widest = 4 * size.hidden + 4 * size.intermediate + size.vocab
    working = width * max(recipe.batch_tokens, longest) * widest
    working += 12 * LOGITS + 4 * GPU_SLICE * (members + 4)
    # Where memory is short, learning computes activations again.
    longest_batch = max(recipe.batch_tokens, longest)
    kept = size.activations(longest_batch, recipe.dtype, learns) if passes else 0
    return Work(
        f"bases.{artifact.base}: {what}",
        tokens=tokens,
        flops=size.forward_flops(tokens, length),
        dtype=recipe.dtype,
        moved=stored + members * vector,
        streamed=merges * stored + sum(sizes) * vector,
        vectors=4 * size.total * (members + 3),  # as merging.engine decides
        kept=0 if passes else 2 * merges * (len(artifact.names("corpora")) * ROW + 24 * count),
        host=PROCESS + width * size.total,
        counts=tuple(range(1, size.layers + 1)),
        shared=width * size.total * (2 if passes else 1),  # weights, and gradients
        each=max(working + kept, 2 * width * size.largest)
        + width * size.non_embedding / size.layers,
        remedy="set evaluation.dtype: bfloat16 or a smaller batch_tokens",
    )
