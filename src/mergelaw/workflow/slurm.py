"""Checks of a profile against SLURM itself, made once before anything is submitted.

Without them a wrong partition fails every job one by one, and a request that no node can serve
waits in the queue for ever.
"""

import getpass
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from mergelaw.errors import MergelawError
from mergelaw.workflow.resources import Hardware

LONGEST_WAIT = 180  # seconds between two checks of its jobs by Snakemake's executor


class Partition(NamedTuple):
    """A partition of SLURM."""

    default: bool
    minutes: int | None  # its time limit; None: none
    gpus: int  # the most in a node


def check(hardware: Hardware | None, status_command: str | None, gpu_jobs: bool) -> None:
    """Raise MergelawError, one line, for what SLURM lacks of a profile.

    Checked are SLURM's commands, what ``status_command`` (sacct or squeue) needs, the account, and
    the partitions with their GPUs (if ``gpu_jobs``: the study needs some) and time limits.
    """
    missing = [name for name in ("sbatch", "sinfo") if shutil.which(name) is None]
    if missing:
        raise MergelawError(
            f"{missing[0]}: no such command, so there is no SLURM here; start this on the login "
            "node of a cluster, or without one use --profile profiles/local"
        )
    partitions, profile = read_partitions(), hardware or Hardware(gpus_per_node=0)
    if status_command == "sacct" and output_of("sacct", "-n", "-X", "-j", "1") is None:
        raise MergelawError(
            "sacct: SLURM keeps no accounts here, so jobs cannot be followed; set "
            "slurm-status-command: squeue in the profile"
        )
    kept = re.search(r"MinJobAge\s*=\s*(\d+)", output_of("scontrol", "show", "config") or "")
    if status_command == "squeue" and kept and int(kept[1]) < LONGEST_WAIT:
        raise MergelawError(
            f"squeue: SLURM forgets a job {kept[1]} s after its end, but jobs are checked every "
            f"{LONGEST_WAIT} s; set slurm-status-command: sacct in the profile"
        )
    query = ("sacctmgr", "-n", "-s", "list", "user", getpass.getuser(), "format=account%256")
    accounts, account = (output_of(*query) or "").split(), profile.slurm_account
    if account and accounts and account.lower() not in (name.lower() for name in accounts):
        raise MergelawError(
            f"profile: slurm_account is {account!r}, yours are {', '.join(sorted(set(accounts)))}; "
            "give one of them"
        )
    _check_partition("slurm_partition", profile, partitions, gpus=0)
    if gpu_jobs:
        key = "gpu_partition" if profile.gpu_partition else "slurm_partition"
        _check_partition(key, profile, partitions, profile.gpus_per_node)


def _check_partition(
    key: str, profile: Hardware, partitions: Mapping[str, Partition], gpus: int
) -> None:
    default = next((name for name, partition in partitions.items() if partition.default), None)
    name, names = getattr(profile, key) or default, ", ".join(partitions)
    if name is None:
        raise MergelawError(f"profile: SLURM has no default partition; set {key} to one of {names}")
    if name not in partitions:
        raise MergelawError(
            f"profile: {key} is {name!r}, which SLURM does not have; give one of {names}"
        )
    limit, most = partitions[name].minutes, partitions[name].gpus
    if limit is not None and profile.max_runtime > limit:
        raise MergelawError(
            f"profile: max_runtime is {profile.max_runtime} minutes, partition {name} allows "
            f"{limit}; lower it"
        )
    if most < gpus:
        has = f"at most {most} GPUs in a node" if most else "no GPUs"
        raise MergelawError(
            f"profile: partition {name} has {has}, gpus_per_node is {gpus}; name another as "
            "gpu_partition, or lower gpus_per_node (0: run on processors)"
        )


def output_of(*command: str) -> str | None:
    """Output of a command; None if it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout if run.returncode == 0 else None


def read_partitions() -> dict[str, Partition]:
    """SLURM's partitions by name."""
    text = output_of("sinfo", "-a", "-h", "-o", "%P|%l|%G")
    if text is None:
        raise MergelawError("sinfo: SLURM does not answer; wait, or ask its administrator")
    partitions: dict[str, Partition] = {}
    for line in text.splitlines():
        name, limit, gres = line.split("|", 2)
        before = partitions.get(name.rstrip("*"))
        most = max(gpus(gres), before.gpus if before else 0)
        partitions[name.rstrip("*")] = Partition(name.endswith("*"), minutes(limit), most)
    return partitions


def minutes(limit: str) -> int | None:
    """Minutes of a time limit such as ``2-12:00:00`` or ``30:00``; None for ``infinite``."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if match is None:
        return None
    days, hours, whole, _ = (int(part or 0) for part in match.groups())
    return (24 * days + hours) * 60 + whole


def gpus(gres: str) -> int:
    """GPUs of generic resources such as ``gpu:h100:8(S:0-1),nvme:2``."""
    plain = re.sub(r"\([^)]*\)", "", gres).split(",")
    return sum(int(part.rpartition(":")[2]) for part in plain if re.match(r"gpu:.*\d$", part))
