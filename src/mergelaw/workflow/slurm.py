"""Checks of a profile against SLURM, before anything is submitted.

Without them a wrong partition fails every job, and an impossible request waits for ever.
"""

import getpass
import re
import shutil
import subprocess

from mergelaw.errors import MergelawError
from mergelaw.workflow.resources import Hardware


def check(hardware: Hardware | None, gpu_jobs: bool) -> None:
    """Raise MergelawError if SLURM lacks what a profile needs.

    This checks commands, account, partitions, time limits and, with ``gpu_jobs``, the GPUs.
    """
    for name in ("sbatch", "sinfo"):
        if shutil.which(name) is None:
            raise MergelawError(
                f"{name}: no such command, so there is no SLURM here; start this on the login node "
                "of a cluster, or without one use --profile profiles/local"
            )
    profile = hardware or Hardware(gpus_per_node=0)
    query = ("sacctmgr", "-n", "-s", "list", "user", getpass.getuser(), "format=account%256")
    accounts, account = (output_of(*query) or "").split(), profile.slurm_account
    if account and accounts and account.lower() not in (name.lower() for name in accounts):
        raise MergelawError(
            f"profile: slurm_account is {account!r}, yours are {', '.join(sorted(set(accounts)))}; "
            "give one of them"
        )
    text = output_of("sinfo", "-a", "-h", "-o", "%P|%l|%G")
    if text is None:
        raise MergelawError("sinfo: SLURM does not answer; wait, or ask its administrator")
    nodes = [line.split("|", 2) for line in text.splitlines()]  # one line per kind of node
    check_partition("slurm_partition", profile, nodes, gpus=0)
    if gpu_jobs:
        key = "gpu_partition" if profile.gpu_partition else "slurm_partition"
        check_partition(key, profile, nodes, profile.gpus_per_node)


def check_partition(key: str, profile: Hardware, nodes: list[list[str]], gpus: int) -> None:
    """Raise MergelawError if the partition of a profile's ``key`` does not accept its jobs.

    ``nodes`` are partition (a star marks the default), time limit and generic resources.
    """
    default = next((name.rstrip("*") for name, *_ in nodes if name.endswith("*")), "not set")
    name = getattr(profile, key) or default
    mine = [(limit, gres) for partition, limit, gres in nodes if partition.rstrip("*") == name]
    if not mine:
        names = ", ".join(dict.fromkeys(partition.rstrip("*") for partition, *_ in nodes))
        raise MergelawError(
            f"profile: {key} is {name!r}, which SLURM does not have; give one of {names}"
        )
    limit = minutes(mine[0][0])
    if limit is not None and profile.max_runtime > limit:
        raise MergelawError(
            f"profile: max_runtime is {profile.max_runtime} minutes, partition {name} allows "
            f"{limit}; lower it"
        )
    most = max(gpus_of(gres) for _, gres in mine)
    if most < gpus:
        has = f"at most {most} GPUs in a node" if most else "no GPUs"
        raise MergelawError(
            f"profile: partition {name} has {has}, gpus_per_node is {gpus}; name another as "
            "gpu_partition, or lower gpus_per_node (0: run on processors)"
        )


def output_of(*command: str) -> str | None:
    """Output of a command; None if it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout


def minutes(limit: str) -> int | None:
    """Minutes of a time limit such as ``2-12:00:00`` or ``30:00``; None for ``infinite``."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):\d+", limit)
    if match is None:
        return None
    days, hours, whole = (int(part or 0) for part in match.groups())
    return (24 * days + hours) * 60 + whole


def gpus_of(gres: str) -> int:
    """Number of GPUs in generic resources such as ``gpu:h100:8(S:0-1),nvme:2``."""
    return sum(map(int, re.findall(r"(?:^|,)gpu:(?:[^:,(]+:)?(\d+)", gres)))
