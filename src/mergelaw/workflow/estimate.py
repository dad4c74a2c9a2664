"""Estimate of a study's remaining cost: jobs, GPU hours, tokens, bytes, longest chain, requests.

A job's time is its start-up time plus its FLOPs and bytes divided by its stage's rates. Rates come
from a file, from a profile, or from the lineage of a finished study (:func:`measured`), so that a
small study predicts the time of a large one.
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
from mergelaw.workflow.cost import BYTES_PER_TOKEN, PROCESS, Documents, work_of
from mergelaw.workflow.progress import TITLES
from mergelaw.workflow.resources import CORE, Hardware, ask, problems
from mergelaw.workflow.study import Study

KNOWN = 0.1  # least share of a job's time that its work takes, to say how fast it is
COLUMNS = ("jobs", "left", "GPU hours", "hours", "tokens", "bytes")


class StageRate(Model):
    """Rates of one stage's jobs where they differ from the others."""

    start_seconds: float | None = Field(None, ge=0)
    teraflops: float | None = Field(None, gt=0)
    gigabytes_per_second: float | None = Field(None, gt=0)


class Rates(Hardware):
    """Speed of a cluster, and assumptions about documents."""

    start_seconds: float = Field(60, ge=0)  # of a job, before its work begins
    train_documents: int = Field(20_000, gt=0)  # of a domain without a number
    tokens_per_document: float = Field(1_000, gt=0)  # prompt and response together
    bytes_per_token: float = Field(BYTES_PER_TOKEN, gt=0)  # of documents in local files
    stages: dict[str, StageRate] = Field({})

    @property
    def documents(self) -> Documents:
        """Assumptions about documents that are not yet counted."""
        return Documents(self.train_documents, self.tokens_per_document, self.bytes_per_token)

    def of_stage(self, stage: str) -> "Rates":
        """Rates of one stage's jobs."""
        rate = self.stages.get(stage) or StageRate()
        return self.model_copy(update=rate.model_dump(exclude_none=True))

    def working(self, study: Study, artifact: Artifact) -> float:
        """Seconds of a job without its start."""
        work = work_of(study, artifact, self.documents)
        return self.of_stage(artifact.stage).seconds(work, self.gpus(work))


@dataclass(frozen=True)
class Estimate:
    """Remaining cost of a study."""

    stages: dict[Any, dict[Any, float]]  # :data:`COLUMNS` by stage, and of all as "in all"
    chain: list[tuple[str, float]]  # longest chain of dependent jobs: name, hours
    requests: dict[str, list[dict[str, Any]]]  # requests of the jobs, by stage
    problems: list[str]  # jobs that no node can run, one line each


def read_rates(path: Path | None, hardware: Hardware | None = None) -> Rates:
    """Rates of a YAML file, of a profile's hardware, or the defaults.

    Raises MergelawError for a file without valid rates.
    """
    if path is None:
        return Rates.model_validate(hardware.model_dump() if hardware else {})
    try:
        rates = Rates.model_validate(config.read(path))
    except ValidationError as error:
        raise MergelawError(f"{path}: {config.describe(error)}") from None
    for name in rates.stages:
        if name not in TITLES:
            raise MergelawError(f"{path}: stages: no stage {name!r}{nearest(name, TITLES)}")
    return rates


def measured(study: Study) -> Rates:
    """Rates of a study, measured from the lineage of its artifacts.

    They are each stage's start-up time, and the ratio of its speed to the default rates. On
    processors, processor time counts, because wall time includes waiting for other jobs. Raises
    MergelawError without any expert or evaluation.
    """
    import numpy as np
    from scipy.optimize import nnls

    jobs = [
        (artifact, lineage.read(study.results / artifact.path))
        for artifact in study.by_path.values()
        if study.made(artifact)
    ]
    if not any(artifact.stage in ("expert", "evaluate") for artifact, _ in jobs):
        raise MergelawError(
            f"{study.results}: holds no expert and no evaluation of {study.config.name} to take "
            "rates from; run the study first"
        )
    gpus = any("cuda" in str(entry["facts"].get("device")) for _, entry in jobs)
    rates = (
        Rates(float32_share=1) if gpus else Rates(float32_share=1, gpus_per_node=0, teraflops=CORE)
    )
    rates = rates.model_copy(update=_lengths(rates, jobs))
    clock = "wall_seconds" if gpus else "cpu_seconds"
    for stage in TITLES:
        finished = [pair for pair in jobs if pair[0].stage == stage and measured_share(pair[1])]
        # Linking a ready-made model does not tell how long a training takes.
        computing = [pair for pair in finished if pair[0].on_gpu]
        pairs = [
            (measured_share(entry) * rates.working(study, artifact), entry[clock])
            for artifact, entry in computing or finished
        ]
        if pairs:
            # Relative errors: a job of a second counts as much as one of an hour.
            work, spent = np.array(pairs).T
            columns = np.column_stack([1 / spent, work / spent])
            start, slow = nnls(columns, np.ones(len(spent)))[0].tolist()
            # Jobs that hardly differ in their work do not tell how fast it is done.
            measurable = slow * work.max() > KNOWN * spent.max()
            rates.stages[stage] = StageRate(
                start_seconds=start,
                teraflops=rates.teraflops / slow if measurable and computing else None,
                gigabytes_per_second=rates.gigabytes_per_second / slow if measurable else None,
            )
    return rates


def _lengths(rates: Rates, jobs: Sequence[tuple[Artifact, dict[str, Any]]]) -> dict[str, float]:
    """Tokens of a document, and bytes of a token, from the tokens that evaluations measured."""
    import numpy as np

    ratios: dict[bool, list[float]] = {True: [], False: []}
    for artifact, entry in jobs:
        if artifact.stage == "evaluate":
            count, length = rates.documents.of(artifact)
            ratio = entry["facts"]["tokens"] / (len(artifact.rows) * count * length)
            ratios[all(corpus.size for corpus in artifact.of_role("corpora"))].append(ratio)
    lengths = {}
    if ratios[False]:
        lengths["tokens_per_document"] = rates.tokens_per_document * float(np.median(ratios[False]))
    if ratios[True]:
        lengths["bytes_per_token"] = rates.bytes_per_token / float(np.median(ratios[True]))
    return lengths


def measured_share(entry: dict[str, Any]) -> float:
    """Share of a shard's cells that its job measured, from its lineage; otherwise 1."""
    facts = entry["facts"]
    return facts["measured"] / facts["cells"] if entry["stage"] == "evaluate" else 1.0


def estimate(
    study: Study, rates: Rates, hardware: Hardware | None = None, threads: int = 1
) -> Estimate:
    """Cost of a study's remaining jobs, and their requests to a cluster.

    ``hardware`` and ``threads`` of a job are a profile's; without a profile, ``rates`` has them.
    Raises MergelawError if a base's size is not yet known.
    """
    import pandas as pd

    hardware, rows = hardware or rates, []
    chains: dict[str, tuple[float, list[tuple[str, float]]]] = {}
    requests: dict[str, list[dict[str, Any]]] = {}
    misfits: dict[str, None] = {}
    for artifact in study.by_path.values():
        stage, left = artifact.stage, not study.made(artifact)
        work = work_of(study, artifact, rates.documents)
        start = rates.of_stage(stage).start_seconds
        hours = left * (start + rates.working(study, artifact)) / 3600
        amounts = rates.gpus(work) * hours, hours, left * work.tokens, left * work.kept
        rows.append((stage, 1, int(left), *amounts))
        before = [chains[other.path] for other in artifact.dependencies()]
        end, chain = max(before, default=(0.0, []))
        chains[artifact.path] = end + hours, chain + [(artifact.folder, hours)] * left
        request = work_of(study, artifact)
        if left and request.host > PROCESS:  # the others ask for what the profile says
            requests.setdefault(stage, []).append(ask(request, hardware, threads))
            misfits |= dict.fromkeys(problems(request, hardware))
    totals = pd.DataFrame(rows, columns=["stage", *COLUMNS]).groupby("stage", sort=False).sum()
    totals.loc["in all"] = totals.sum()
    stages = totals.to_dict("index")
    return Estimate(stages, max(chains.values())[1], requests, list(misfits))


def text(result: Estimate, rates: Rates) -> str:
    """The estimate as tables and sentences."""
    import pandas as pd

    count, hour = "{:,.0f}".format, "{:,.2f}".format
    table = pd.DataFrame.from_dict(result.stages, "index").rename(TITLES)
    lines = [table.to_string(formatters=[count, count, hour, hour, short, short])]
    jobs, left, *_ = result.stages["in all"].values()
    if left < jobs:
        lines.append(f"{jobs - left:.0f} of {jobs:.0f} results are there already and cost nothing")
    ranges = {
        TITLES[stage]: {
            "GPUs": span([request["gpu"] for request in requests]),
            "memory, GB": span([request["mem_mb"] / 1000 for request in requests]),
            "hours": span([request["runtime"] / 60 for request in requests]),
        }
        for stage, requests in result.requests.items()
    }
    if ranges:
        lines.append("\na job asks for\n" + pd.DataFrame.from_dict(ranges, "index").to_string())
    hours = sum(spent for _, spent in result.chain)
    long = [f"{name} ({spent:.2f} h)" for name, spent in result.chain if spent >= hours / 100]
    lines.append(
        f"\nlongest chain: {hours:,.2f} hours of {len(result.chain)} jobs: {' > '.join(long)}"
    )
    lines += [f"does not fit: {problem}" for problem in result.problems]
    shown = rates.model_dump(exclude={"stages"}, exclude_none=True)
    lines.append("rates: " + ", ".join(f"{name} {value}" for name, value in shown.items()))
    lines += [f"other rates for: {', '.join(rates.stages)}"] if rates.stages else []
    return "\n".join(lines)


def span(values: Sequence[float]) -> str:
    """A range as ``0.5 to 12``, or a single number."""
    low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def short(value: float) -> str:
    """A number for a table, such as ``12.3 T``."""
    power = max(int(f"{value:.2e}".split("e")[1]) // 3, 0)
    return f"{value / 1000**power:.3g} {' kMGTPE'[power]}"
