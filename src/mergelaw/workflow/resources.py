"""Requests to a cluster: GPUs, memory and time of a job, from its cost and the nodes' hardware."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, Field, ValidationError

from mergelaw import config
from mergelaw.artifacts.recipe import Model
from mergelaw.errors import MergelawError
from mergelaw.workflow.cost import Work

USABLE = 0.9  # share of a GPU's memory, without its context and fragmentation
GPU_PROCESS = 5e9  # bytes of host memory: the CUDA libraries
CORE = 0.01  # TFLOP/s of a core
DAY = 24 * 60  # minutes
START = 15  # minutes for imports, loading and other fixed work
ASKED = ("gpu", "nodes", "mem_mb", "runtime", "slurm_partition")


class Hardware(Model):
    """Nodes of a cluster: their devices, memory and speed."""

    gpus_per_node: int = Field(8, ge=0)  # 0: everything runs on processors
    gpu_memory_gb: int = Field(80, gt=0)  # of one GPU
    # One device, sustained, in bfloat16 (an H100: about 400), and the share reached in float32.
    teraflops: float = Field(400, gt=0, validation_alias=AliasChoices("teraflops", "gpu_tflops"))
    float32_share: float = Field(0.1, gt=0)
    gigabytes_per_second: float = Field(0.5, gt=0)  # read or written by one job, digests included
    node_memory_gb: int = Field(0, ge=0)  # 0: unknown
    max_runtime: int = Field(0, ge=0)  # minutes that a job may take; 0: unknown
    slurm_partition: str | None = None
    gpu_partition: str | None = None
    slurm_account: str | None = None

    @staticmethod
    def of(settings: Any) -> "Hardware | None":
        """Hardware in a profile's `default-resources`; None if they name none, as for a laptop."""
        if not isinstance(settings, dict) or "gpus_per_node" not in settings:
            return None
        names = {*Hardware.model_fields, "gpu_tflops"} & settings.keys()
        values = {n: v.strip("'\"") if isinstance(v := settings[n], str) else v for n in names}
        try:
            return Hardware.model_validate(values)
        except ValidationError as error:
            raise MergelawError(config.describe(error, "profile")) from None

    def gpus(self, work: Work, factor: float = 1) -> int:
        """Number of GPUs of a job: the fewest that hold it, otherwise the most that it can use."""
        if not (work.counts and self.gpus_per_node):
            return 0
        usable = [n for n in work.counts if n <= self.gpus_per_node] or [min(work.counts)]
        return next((n for n in usable if self.holds(work, n, factor)), max(usable))

    def holds(self, work: Work, gpus: int, factor: float = 1) -> bool:
        """True if this many GPUs of one node hold a job with ``factor`` times its memory."""
        room = USABLE * self.gpu_memory_gb * 1e9 / factor
        return not gpus or (gpus <= self.gpus_per_node and work.shared / gpus + work.each <= room)

    def seconds(self, work: Work, gpus: int) -> float:
        """Seconds of a job's work.

        Task vectors stay in memory on processors, and on a single GPU if they fit into half of the
        memory that the model leaves free, as ``merging.engine`` decides.
        """
        rate = 1e12 * self.teraflops * (self.float32_share if work.dtype == "float32" else 1)
        rate *= gpus if gpus and work.parallel else 1
        free = self.gpu_memory_gb * 1e9 - work.shared
        stay = gpus == 0 or (gpus == 1 and work.vectors <= free / 2)
        moved = work.moved + (0 if stay else work.streamed)
        return work.flops / rate + moved / (1e9 * self.gigabytes_per_second)


def read_profile(path: Path) -> tuple[Hardware, int]:
    """Hardware of a Snakemake profile (folder, file, or name), and the maximum cores of a job.

    Raises MergelawError for an unreadable file or one without hardware.
    """
    if not path.exists() and (named := Path("profiles", path)).exists():
        path = named
    files = sorted(path.glob("*.yaml"), reverse=True) if path.is_dir() else [path]
    profile = config.read(files[0]) if files else {}
    hardware = Hardware.of(profile.get("default-resources"))
    if hardware is None:
        raise MergelawError(
            f"{path}: is no profile that names hardware; give one with gpus_per_node among its "
            "default-resources, such as profiles/slurm, or no profile"
        )
    return hardware, max(profile.get("set-threads", {}).values(), default=1)


def ask(work: Work, hardware: Hardware, threads: int = 1, attempt: int = 1) -> dict[str, Any]:
    """A job's request, by the names in :data:`ASKED`; ``runtime`` is in minutes.

    The first request is for twice the expected time. Each further attempt adds half as much memory
    and the same time again, up to the limits of nodes and jobs, because a job that ran out of time
    resumes.
    """
    factor, longest = (1 + attempt) / 2, hardware.max_runtime or DAY
    gpus = hardware.gpus(work, factor)
    memory = math.ceil(factor / 1e6 * host_memory(work, gpus))
    core = {"teraflops": CORE * threads, "float32_share": 1}
    machine = hardware if gpus else hardware.model_copy(update=core)
    minutes = math.ceil(min(START + machine.seconds(work, gpus) / 30, longest))
    return {
        "gpu": gpus,
        "nodes": 1,
        "mem_mb": min(memory, hardware.node_memory_gb * 1000 or memory),
        "runtime": min(minutes * attempt, longest),
        "slurm_partition": (gpus and hardware.gpu_partition) or hardware.slurm_partition,
    }


def host_memory(work: Work, gpus: int) -> float:
    """Bytes of host memory; without a GPU it holds what a GPU would."""
    return work.host + (GPU_PROCESS if gpus else work.shared + work.each)


def problems(work: Work, hardware: Hardware) -> Iterator[str]:
    """Reasons why no node can run a job, one line each."""
    gpus = hardware.gpus(work)
    if not hardware.holds(work, gpus):
        memory = (work.shared / gpus + work.each) / USABLE / 1e9
        yield (
            f"{work.what} takes {gpus} GPU{'s' * (gpus > 1)} of about {memory:,.0f} GB, but the "
            f"profile's nodes have {hardware.gpus_per_node} of {hardware.gpu_memory_gb} GB "
            f"(gpus_per_node, gpu_memory_gb); {work.remedy}"
        )
    memory = host_memory(work, gpus) / 1e9
    if 0 < hardware.node_memory_gb < memory:
        yield (
            f"{work.what} takes about {memory:,.0f} GB of host memory, but the profile's nodes "
            f"have {hardware.node_memory_gb} GB (node_memory_gb); use larger nodes"
        )
