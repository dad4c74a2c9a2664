"""Estimate of what a study still costs: jobs, GPU hours, tokens, bytes, longest chain, requests.

A job takes some time to start, then its FLOPs and bytes over the rates of its stage. Rates come
from a file, from a profile, or from the lineage of a study that has run (:func:`measured`), so that
a small study predicts what a large one takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from mergelaw import config
from mergelaw.artifacts import lineage
from mergelaw.artifacts.recipe import Model
from mergelaw.errors import MergelawError, nearest
from mergelaw.workflow.artifact import Artifact
from mergelaw.workflow.cost import PROCESS, Documents, work_of
from mergelaw.workflow.progress import TITLES
from mergelaw.workflow.resources import Hardware, ask, check
from mergelaw.workflow.study import Study

COLUMNS = ("jobs", "left", "GPU hours", "hours", "tokens", "bytes")


class StageRate(Model):
    """What differs from the other rates in one stage's jobs."""

    start_seconds: float | None = Field(None, ge=0, description="before its work begins")
    teraflops: float | None = Field(None, gt=0, description="of one device, in bfloat16, sustained")
    gigabytes_per_second: float | None = Field(None, gt=0, description="read or written")


class Rates(Hardware):
    """Speed of a cluster, and what is assumed of documents that are not counted yet."""

    start_seconds: float = Field(60, ge=0, description="of a job, before its work begins")
    train_documents: int = Field(
        20_000, gt=0, description="of a domain whose configuration leaves the number open"
    )
    tokens_per_document: float = Field(1_000, gt=0, description="prompt and response together")
    stages: dict[str, StageRate] = Field({}, description="what differs in a stage's jobs")

    @property
    def documents(self) -> Documents:
        """What is assumed of documents."""
        return Documents(self.train_documents, self.tokens_per_document)

    def of_stage(self, stage: str) -> "Rates":
        """Rates of one stage's jobs."""
        rate = self.stages.get(stage, StageRate())
        return self.model_copy(update=rate.model_dump(exclude_none=True))

    def working(self, study: Study, artifact: Artifact) -> float:
        """Seconds of a job without its start."""
        work = work_of(study, artifact, self.documents)
        return self.of_stage(artifact.stage).seconds(work, self.gpus(work))


@dataclass(frozen=True)
class Estimate:
    """What a study still costs."""

    stages: dict[str, dict[str, float]]  # :data:`COLUMNS` by stage, and of all as "in all"
    chain: list[tuple[str, float]]  # longest chain of jobs that wait for one another: name, hours
    requests: dict[str, list[dict[str, Any]]]  # what each job asks a cluster for, by stage
    problems: list[str]  # what does not fit the nodes, a line each


def read_rates(path: Path | None, hardware: Hardware | None = None) -> Rates:
    """Rates of a YAML file. Without one, those of a profile's hardware, or the defaults.

    Raises MergelawError, one line, for a file that does not hold rates.
    """
    if path is None:
        return Rates.model_validate(hardware.model_dump() if hardware else {})
    try:
        rates = Rates.model_validate(config.read(path) or {})
    except ValidationError as error:
        raise MergelawError(f"{path}: {config.describe(error)}") from None
    for name in rates.stages:
        if name not in TITLES:
            raise MergelawError(f"{path}: stages: no stage {name!r}{nearest(name, TITLES)}")
    return rates


def measured(study: Study, bases: Sequence[str] | None = None) -> Rates:
    """Rates that a study's results show, from the lineage of its artifacts.

    For each stage: the time a job takes to start, and how much slower or faster than the default
    rates its work is. On processors their own time counts, not the time they waited for others.
    ``bases`` leaves out the jobs of all other bases. Raises MergelawError if there is no expert and
    no evaluation.
    """
    import numpy as np
    from scipy.optimize import nnls

    jobs: dict[str, list[tuple[Artifact, dict[str, Any]]]] = {stage: [] for stage in TITLES}
    for artifact in study.by_path.values():
        if study.made(artifact) and (bases is None or artifact.base in (None, *bases)):
            jobs[artifact.stage].append((artifact, lineage.read(study.results / artifact.path)))
    if not jobs["expert"] and not jobs["evaluate"]:
        raise MergelawError(
            f"{study.results}: holds no expert and no evaluation of {study.config.name} to take "
            "rates from; run the study first"
        )
    models = [entry["facts"] for _, entry in jobs["base"] + jobs["expert"]]
    gpus = any("cuda" in str(facts.get("device")) for facts in models)
    rates = Rates(float32_share=1, gpus_per_node=8 if gpus else 0)
    lengths = [
        entry["facts"]["tokens"]
        / entry["facts"]["cells"]
        * len(artifact.names("corpora"))
        / (rates.documents.count(artifact) or 1)
        for artifact, entry in jobs["evaluate"]
    ]
    if lengths:
        rates = rates.model_copy(update={"tokens_per_document": float(np.median(lengths))})
    for stage, entries in jobs.items():
        shares = [(artifact, entry, measured_share(entry)) for artifact, entry in entries]
        work = [share * rates.working(study, artifact) for artifact, _, share in shares if share]
        clock = "wall_seconds" if gpus else "cpu_seconds"
        spent = np.array([entry[clock] for _, entry, share in shares if share])
        if work:
            # Relative errors: a job of a second counts as much as one of an hour.
            columns = np.stack([np.ones(len(work)), work], axis=1) / spent[:, None]
            start, slow = map(float, nnls(columns, np.ones(len(work)))[0])
            rates.stages[stage] = StageRate(
                start_seconds=start,
                teraflops=rates.teraflops / slow if slow else None,
                gigabytes_per_second=rates.gigabytes_per_second / slow if slow else None,
            )
    return rates


def measured_share(entry: dict[str, Any]) -> float:
    """Share of a shard's cells that its job measured itself, from its lineage; else 1."""
    facts = entry["facts"]
    return facts["measured"] / facts["cells"] if entry["stage"] == "evaluate" else 1.0


def estimate(
    study: Study, rates: Rates, hardware: Hardware | None = None, threads: int = 1
) -> Estimate:
    """What a study's jobs that are left take, and what they ask a cluster for.

    ``hardware`` and ``threads`` of a job are those of a profile; without one, the rates'. Raises
    MergelawError if a base's size cannot be known yet.
    """
    hardware = hardware or rates
    totals: dict[str, dict[str, float]] = {}
    chains: dict[str, tuple[float, list[tuple[str, float]]]] = {"": (0.0, [])}
    requests: dict[str, list[dict[str, Any]]] = {}
    problems: dict[str, None] = {}
    for artifact in study.by_path.values():
        stage, left = artifact.stage, not study.made(artifact)
        work = work_of(study, artifact, rates.documents)
        start = rates.of_stage(stage).start_seconds
        hours = left * (start + rates.working(study, artifact)) / 3600
        row = (1, left, rates.gpus(work) * hours, hours, left * work.tokens, left * work.kept)
        for name in (stage, "in all"):
            total = totals.setdefault(name, dict.fromkeys(COLUMNS, 0))
            for column, value in zip(COLUMNS, row, strict=True):
                total[column] += value
        before = [chains[other.path] for other in artifact.dependencies()]
        end, chain = max(before, default=chains[""])
        chains[artifact.path] = end + hours, chain + [(artifact.folder, hours)] * left
        request = work_of(study, artifact)
        if left and request.host > PROCESS:  # the others ask for what the profile says
            requests.setdefault(stage, []).append(ask(request, hardware, threads))
            try:
                check([request], hardware)
            except MergelawError as error:
                problems[str(error)] = None
    stages = {name: totals[name] for name in (*TITLES, "in all") if name in totals}
    return Estimate(stages, max(chains.values())[1], requests, list(problems))


def text(found: Estimate, rates: Rates) -> str:
    """The estimate as tables and sentences."""
    titles = TITLES | {"in all": "in all"}
    widths = (6, 6, 12, 12, 10, 10)
    lines = [" " * 14 + "".join(f"{c:>{w}}" for c, w in zip(COLUMNS, widths, strict=True))]
    for stage, row in found.stages.items():
        jobs, left, gpu_hours, hours, tokens, kept = (row[column] for column in COLUMNS)
        lines.append(
            f"{titles[stage]:<14}{jobs:>6}{left:>6}{gpu_hours:>12,.1f}{hours:>12,.2f}"
            f"{short(tokens):>10}{short(kept):>10}"
        )
    jobs, left = (round(found.stages["in all"][column]) for column in ("jobs", "left"))
    if left < jobs:
        lines.append(f"{jobs - left} of {jobs} results are there already and cost nothing")
    if found.requests:
        lines.append(f"\n{'a job asks for':<14}{'GPUs':>12}{'memory, GB':>16}{'hours':>16}")
    for stage, asked in found.requests.items():
        units = (("gpu", 1, 12), ("mem_mb", 1000, 16), ("runtime", 60, 16))
        spans = (f"{span([one[name] / unit for one in asked]):>{w}}" for name, unit, w in units)
        lines.append(f"{titles[stage]:<14}{''.join(spans)}")
    hours = sum(spent for _, spent in found.chain)
    long = [f"{name} ({spent:.2f} h)" for name, spent in found.chain if spent >= hours / 100]
    lines.append(
        f"\nlongest chain: {hours:,.2f} hours of {len(found.chain)} jobs: {' > '.join(long)}"
    )
    lines += [f"does not fit: {problem}" for problem in found.problems]
    gpus = f"GPUs of {rates.gpu_memory_gb} GB, {rates.gpus_per_node} a node"
    lines.append(
        f"rates: {gpus if rates.gpus_per_node else 'processors'}; unless a stage differs, "
        f"{rates.teraflops:g} TFLOP/s, {rates.gigabytes_per_second:g} GB/s, "
        f"{rates.start_seconds:g} s to start; {rates.tokens_per_document:g} tokens a document, "
        f"{rates.train_documents:,} documents to train on where their number is open"
    )
    return "\n".join(lines)


def span(values: Sequence[float]) -> str:
    """``0.5 to 12``, or one number."""
    low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def short(value: float) -> str:
    """``12.3 T``, for a table."""
    units = iter(("", " k", " M", " G", " T", " P"))
    unit = next(units)
    while value >= 999.5 and unit != " P":
        value, unit = value / 1000, next(units)
    return f"{value:.3g}{unit}"
