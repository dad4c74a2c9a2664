"""What a study will cost before anything of it runs: jobs, GPU hours, tokens, bytes, longest chain.

A job takes a start, and then FLOPs and bytes over the rates of its stage. The FLOPs are counted
from the model's configuration and the tokens; the rates are a file's (``Rates``), or are found in
the lineage of a study that has run (:func:`measured`), so that a small study tells what a large one
will take.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from mergelaw import config as configuration
from mergelaw.artifacts import lineage
from mergelaw.artifacts.recipe import Model
from mergelaw.errors import MergelawError, nearest
from mergelaw.merging.methods import method_of
from mergelaw.models.size import Size
from mergelaw.workflow.resources import Hardware, Need, check, documents_of, need_of
from mergelaw.workflow.study import Artifact, Study

STAGES = {
    "corpus": "corpora",
    "overlap": "overlap check",
    "base": "bases",
    "expert": "experts",
    "task_vector": "task vectors",
    "design": "designs",
    "evaluate": "evaluations",
    "fit": "law fits",
    "report": "report",
    "merge": "merges",
}
BYTES_A_TOKEN = 4  # of text
ROW = 400  # bytes of a cell and of its row, beside 24 for each document


class StageRate(Model):
    """What differs from the other rates in one stage's jobs."""

    start_seconds: float | None = Field(None, ge=0, description="before its work begins")
    teraflops: float | None = Field(None, gt=0, description="of one device, in bfloat16, sustained")
    gigabytes_per_second: float | None = Field(None, gt=0, description="read or written")


class Rates(Model):
    """What a cluster does, and what documents are like where that is not known yet."""

    start_seconds: float = Field(60, ge=0, description="of a job, before its work begins")
    teraflops: float = Field(
        400, gt=0, description="of one device, in bfloat16, sustained (an H100: about 400)"
    )
    float32_share: float = Field(0.1, gt=0, description="of that in float32")
    gigabytes_per_second: float = Field(1, gt=0, description="read or written by one job")
    gpus_per_node: int = Field(8, ge=0, description="0: everything runs on processors")
    gpu_memory_gb: int = Field(80, gt=0, description="of one GPU")
    train_documents: int = Field(
        20_000, gt=0, description="of a domain whose configuration leaves the number open"
    )
    tokens_per_document: float = Field(1_000, gt=0, description="prompt and response together")
    stages: dict[str, StageRate] = Field({}, description="what differs in a stage's jobs")


@dataclass(frozen=True)
class Work:
    """What one job does, whatever does it."""

    tokens: float = 0
    flops: float = 0
    moved: float = 0  # bytes read and written
    kept: float = 0  # bytes on disk when it is done
    dtype: str = "bfloat16"
    gpus: int = 0
    parallel: bool = False  # its GPUs compute at the same time


class Row(NamedTuple):
    """A stage, or all of them."""

    stage: str
    jobs: int
    gpu_hours: float
    hours: float  # of all jobs, one after the other
    tokens: float
    bytes: float


@dataclass(frozen=True)
class Estimate:
    rows: list[Row]  # stages in the pipeline's order, then all of them
    chain: list[tuple[str, float]]  # the longest chain of jobs that wait for one another, hours
    problems: list[str]  # what does not fit the GPUs, a line each
    there: int  # jobs whose results exist already


# -- rates -------------------------------------------------------------------------------------


def read_rates(path: Path | None) -> Rates:
    """The rates of a YAML file; the defaults without one. Raises MergelawError, one line."""
    if path is None:
        return Rates()
    data = configuration.read(path)
    try:
        rates = Rates.model_validate(data or {})
    except ValidationError as error:
        raise MergelawError(f"{path}: {configuration.describe(error, Rates)}") from None
    for name in rates.stages:
        if name not in STAGES:
            known = nearest(name, STAGES)
            raise MergelawError(f"{path}: stages: no stage {name!r}{known}")
    return rates


def measured(study: Study, bases: Sequence[str] | None = None) -> Rates:
    """The rates that a study's results show, by the lineage of what it made.

    Of each stage: what a job takes to start, and how much slower or faster than the default rates
    its work then goes. Where processors did the work their own time counts, not what they waited
    for others. ``bases`` leaves out the jobs of all others. Raises MergelawError where there is no
    expert and no evaluation.
    """
    import numpy as np
    from scipy.optimize import nnls

    found: dict[str, list[tuple[Artifact, dict[str, Any]]]] = {}
    for artifact in study.by_path.values():
        other = bases is not None and artifact.base is not None and artifact.base not in bases
        if study.made(artifact) and not other:
            known = lineage.read(study.results / artifact.path)
            found.setdefault(artifact.stage, []).append((artifact, known))
    if not found.keys() & {"expert", "evaluate"}:
        raise MergelawError(
            f"{study.results}: holds no expert and no evaluation of {study.config.name} to take "
            "rates from; run the study first"
        )
    models = [known for stage in ("base", "expert") for _, known in found.get(stage, [])]
    gpus = any("cuda" in str(known["facts"].get("device")) for known in models)
    lengths = [
        known["facts"]["tokens"]
        / known["facts"]["cells"]
        * len(domains_of(artifact))
        / documents_of(study, domains_of(artifact), "eval_documents")
        for artifact, known in found.get("evaluate", [])
    ]
    rates = Rates(float32_share=1, gpus_per_node=8 if gpus else 0)
    if lengths:
        rates = rates.model_copy(update={"tokens_per_document": float(np.median(lengths))})
    stages = {}
    for stage, jobs in found.items():
        spent, expected = [], []
        for artifact, known in jobs:
            facts = known["facts"]
            share = facts["measured"] / facts["cells"] if stage == "evaluate" else 1.0
            if share:  # else everything had been measured before
                spent.append(known["wall_seconds" if gpus else "cpu_seconds"])
                expected.append(share * working(work_of(study, artifact, rates), stage, rates))
        if not spent:
            continue
        # Relative errors: a job of a second counts as much as one of an hour.
        columns = np.stack([np.ones(len(spent)), expected], axis=1) / np.array(spent)[:, None]
        start, slow = map(float, nnls(columns, np.ones(len(spent)))[0])
        stages[stage] = StageRate(
            start_seconds=start,
            teraflops=rates.teraflops / slow if slow else None,
            gigabytes_per_second=rates.gigabytes_per_second / slow if slow else None,
        )
    return rates.model_copy(update={"stages": stages})


# -- work --------------------------------------------------------------------------------------


def domains_of(artifact: Artifact) -> list[str]:
    return artifact.names("corpora")


def forward_flops(size: Size, tokens: float, context: float) -> float:
    """Of a forward pass: two per token and weight that multiplies it, and attention's, which sees
    half of the context on average (Kaplan et al. 2020, appendix B)."""
    weights = size.non_embedding + size.vocab * size.hidden
    return tokens * (2 * weights + 2 * size.layers * size.query * context)


def work_of(study: Study, artifact: Artifact, rates: Rates) -> Work:
    """What the job of an artifact does. MergelawError where a base's size cannot be known yet."""
    stage, recipe = artifact.stage, artifact.recipe
    length = rates.tokens_per_document
    if stage == "corpus":
        name = str(artifact.name)
        documents = sum(_documents(study, [name], kind, rates) for kind in KINDS)
        return Work(tokens=documents * length, kept=documents * length * BYTES_A_TOKEN)
    if stage not in ("base", "expert", "task_vector", "evaluate", "merge"):
        return Work()
    base = str(artifact.base)
    size, need = study.size(base), need_of(study, artifact)
    stored = 4 if study.config.bases[base].pretraining is not None else 2  # bytes a parameter
    whole = stored * size.total
    if stage in ("base", "expert"):
        own = recipe.get("pretraining") or recipe.get("training")
        if own is None:  # fetched
            return Work(moved=whole, kept=whole)
        context = min(own["max_tokens"], length)
        if own["steps"] is None:
            documents = _documents(study, domains_of(artifact), "train_documents", rates)
            tokens = own["epochs"] * documents * context
        else:
            full = stage == "base" or own["packing"]
            tokens = own["steps"] * own["batch_size"] * (own["max_tokens"] if full else context)
        passes = 4 if own.get("gradient_checkpointing") else 3  # the backward pass costs two
        flops = passes * forward_flops(size, tokens, context)
        return Work(tokens, flops, 2 * whole, whole, own["dtype"], *_gpus(need, rates))
    members = len(artifact.names("task_vectors"))
    derived = study.config.storage == "derived"
    vector = whole if derived else 4 * size.total
    if stage == "task_vector":
        return Work(moved=2 * whole, kept=0 if derived else vector)
    if stage == "merge":
        return Work(moved=(members + 1) * vector, kept=whole)
    rows = artifact.rows
    domains, own = domains_of(artifact), recipe["evaluation"]
    context = min(own["max_tokens"], length)
    documents = _documents(study, domains, "eval_documents", rates)
    tokens = len(rows) * documents * context
    gpus, parallel = _gpus(need, rates)
    resident = 4 * size.total * (members + 3) <= gpus * rates.gpu_memory_gb * 1e9 / 2 or not gpus
    passed = members if resident else sum(row[0] for row in rows)
    # Masks, a bit a value, are made by the first shard for all.
    drawn = not resident and method_of(recipe["method"]).masks() is not None
    masks = members * size.total / 8 if drawn and artifact.shard == 0 else 0
    return Work(
        tokens,
        forward_flops(size, tokens, context),
        whole + passed * vector,
        2 * len(rows) * (len(domains) * ROW + 24 * documents) + masks,
        own["dtype"],
        gpus,
        parallel,
    )


KINDS = ("train_documents", "eval_documents")


def _documents(study: Study, domains: Iterable[str], kind: str, rates: Rates) -> float:
    counts = []
    for name in domains:
        held_out = study.config.domains[name].held_out and kind == "train_documents"
        count = 0 if held_out else documents_of(study, [name], kind)
        counts.append(rates.train_documents if count is None else count)
    return sum(counts)


def _gpus(need: Need, rates: Rates) -> tuple[int, bool]:
    """(GPUs of a job, whether they compute at the same time)."""
    if not rates.gpus_per_node or not need.counts:
        return 0, False
    hardware = Hardware(gpus_per_node=rates.gpus_per_node, gpu_memory_gb=rates.gpu_memory_gb)
    usable = [count for count in need.counts if count <= rates.gpus_per_node]
    return need.gpus(hardware) or max(usable, default=1), need.parallel


def working(work: Work, stage: str, rates: Rates) -> float:
    """Seconds of a job without its start."""
    own = rates.stages.get(stage, StageRate())
    flops = 1e12 * (own.teraflops or rates.teraflops)
    flops *= rates.float32_share if work.dtype == "float32" else 1
    flops *= work.gpus if work.parallel else 1
    moved = 1e9 * (own.gigabytes_per_second or rates.gigabytes_per_second)
    return work.flops / flops + work.moved / moved


# -- the estimate ------------------------------------------------------------------------------


def estimate(study: Study, rates: Rates) -> Estimate:
    """What all of a study's artifacts take, those that are there already included.

    Raises MergelawError where a base's size cannot be known yet.
    """
    jobs = dict.fromkeys(STAGES, 0)
    totals = {stage: [0.0] * 4 for stage in STAGES}  # GPU hours, hours, tokens, bytes
    ends: dict[str, tuple[float, Artifact, float]] = {}  # by path: when, what, how long
    problems: dict[str, None] = {}
    hardware = Hardware(gpus_per_node=rates.gpus_per_node, gpu_memory_gb=rates.gpu_memory_gb)
    before: dict[str, str | None] = {}
    for artifact in study.by_path.values():
        stage = artifact.stage
        work = work_of(study, artifact, rates)
        start = rates.stages.get(stage, StageRate()).start_seconds
        seconds = (rates.start_seconds if start is None else start) + working(work, stage, rates)
        hours = seconds / 3600
        jobs[stage] += 1
        for index, value in enumerate((work.gpus * hours, hours, work.tokens, work.kept)):
            totals[stage][index] += value
        inputs = [a.path for a in artifact.dependencies()]
        last = max(inputs, key=lambda path: ends[path][0], default=None)
        before[artifact.path] = last
        ends[artifact.path] = (ends[last][0] if last else 0) + seconds, artifact, seconds
        try:
            if rates.gpus_per_node:
                check([need_of(study, artifact)], hardware)
        except MergelawError as error:
            problems[str(error)] = None
    rows = [Row(STAGES[s], jobs[s], *values) for s, values in totals.items() if jobs[s]]
    sums = (sum(values[i] for values in totals.values()) for i in range(4))
    rows.append(Row("in all", sum(jobs.values()), *sums))
    chain, path = [], max(ends, key=lambda path: ends[path][0], default=None)
    while path:
        _, artifact, seconds = ends[path]
        chain.append((artifact.folder, seconds / 3600))
        path = before[path]
    there = sum(map(study.made, study.by_path.values()))
    return Estimate(rows, chain[::-1], list(problems), there)


def text(found: Estimate, rates: Rates) -> str:
    """The estimate for people."""
    lines = [f"{'':<14}{'jobs':>6}{'GPU hours':>12}{'hours':>12}{'tokens':>10}{'bytes':>10}"]
    for row in found.rows:
        lines.append(
            f"{row.stage:<14}{row.jobs:>6}{row.gpu_hours:>12,.1f}{row.hours:>12,.2f}"
            f"{short(row.tokens):>10}{short(row.bytes):>10}"
        )
    hours = sum(spent for _, spent in found.chain)
    long = [f"{name} ({spent:.2f} h)" for name, spent in found.chain if spent >= hours / 100]
    lines.append(
        f"\nlongest chain: {hours:,.2f} hours of {len(found.chain)} jobs: {' > '.join(long)}"
    )
    if found.there:
        lines.append(f"{found.there} of {found.rows[-1].jobs} results are there already")
    lines += [f"does not fit: {problem}" for problem in found.problems]
    on = (
        f"GPUs of {rates.gpu_memory_gb} GB, {rates.gpus_per_node} a node"
        if rates.gpus_per_node
        else "processors"
    )
    lines.append(
        f"rates: {on}; where no stage says otherwise {rates.teraflops:g} TFLOP/s, "
        f"{rates.gigabytes_per_second:g} GB/s, {rates.start_seconds:g} s to start; "
        f"{rates.tokens_per_document:g} tokens a document, {rates.train_documents:,} documents to "
        "train on where their number is open"
    )
    return "\n".join(lines)


def short(value: float) -> str:
    """12.3 T, for a table."""
    units = iter(("", " k", " M", " G", " T", " P"))
    unit = next(units)
    while value >= 999.5 and unit != " P":
        value, unit = value / 1000, next(units)
    return f"{value:.3g}{unit}"
