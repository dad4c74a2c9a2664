"""What SLURM itself says of a profile, asked once before anything is submitted.

Without these questions a wrong partition fails every job by itself, and a request that no node can
serve waits in the queue for ever.
"""

import getpass
import re
import shutil
import subprocess

from mergelaw.errors import MergelawError
from mergelaw.workflow.resources import Hardware

LONGEST_WAIT = 180  # seconds between two looks of Snakemake's executor at its jobs


def check(hardware: Hardware | None, status_command: str | None, gpu_jobs: bool) -> None:
    """Raise MergelawError, one line, for what is not there: SLURM itself, its accounts where
    ``status_command`` is sacct, the profile's account and partitions, their GPUs and time."""
    missing = [name for name in ("sbatch", "sinfo") if shutil.which(name) is None]
    if missing:
        raise MergelawError(
            f"{missing[0]}: no such command, so there is no SLURM here; start this on the login "
            "node of a cluster, or without one use --profile profiles/local"
        )
    partitions = read_partitions()
    if status_command == "sacct" and answers("sacct", "-n", "-X", "-j", "1") is None:
        raise MergelawError(
            "sacct: SLURM keeps no accounts here, jobs could not be followed; set "
            "slurm-status-command: squeue in the profile"
        )
    kept = re.search(r"MinJobAge\s*=\s*(\d+)", answers("scontrol", "show", "config") or "")
    if status_command == "squeue" and kept and int(kept[1]) < LONGEST_WAIT:
        raise MergelawError(
            f"squeue: SLURM forgets a job {kept[1]} s after its end, jobs are looked after every "
            f"{LONGEST_WAIT} s; set slurm-status-command: sacct in the profile"
        )
    own = hardware or Hardware(0)
    account = own.slurm_account
    accounts = ("sacctmgr", "-n", "-s", "list", "user", getpass.getuser(), "format=account%256")
    known = (answers(*accounts) or "").split()
    if account and known and account.lower() not in (name.lower() for name in known):
        raise MergelawError(
            f"profile: slurm_account is {account!r}, yours are {', '.join(sorted(set(known)))}; "
            "give one of them"
        )
    default = next((name for name, entry in partitions.items() if entry["default"]), None)
    wanted = {"slurm_partition": own.slurm_partition}
    gpu_key = "gpu_partition" if own.gpu_partition else "slurm_partition"
    if gpu_jobs:
        wanted[gpu_key] = own.gpu_partition or own.slurm_partition
    for key, name in wanted.items():
        name = name or default
        if name is None:
            raise MergelawError(
                f"profile: SLURM has no default partition; set {key} to one of "
                f"{', '.join(partitions)}"
            )
        if name not in partitions:
            raise MergelawError(
                f"profile: {key} is {name!r}, which SLURM does not have; give one of "
                f"{', '.join(partitions)}"
            )
        entry = partitions[name]
        if entry["minutes"] is not None and own.max_runtime > entry["minutes"]:
            raise MergelawError(
                f"profile: max_runtime is {own.max_runtime} minutes, partition {name} allows "
                f"{entry['minutes']}; lower it"
            )
        if gpu_jobs and own.gpus_per_node and key == gpu_key and entry["gpus"] < own.gpus_per_node:
            has = f"at most {entry['gpus']} GPUs in a node" if entry["gpus"] else "no GPUs"
            raise MergelawError(
                f"profile: partition {name} has {has}, gpus_per_node is {own.gpus_per_node}; name "
                "another as gpu_partition, or lower gpus_per_node (0: run on processors)"
            )


def answers(*command: str) -> str | None:
    """What a command prints; None if it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout if run.returncode == 0 else None


def read_partitions() -> dict[str, dict]:
    """By name: whether it is the default, its time limit (None: none), the most GPUs of a node."""
    text = answers("sinfo", "-a", "-h", "-o", "%P|%l|%G")
    if text is None:
        raise MergelawError("sinfo: SLURM does not answer; wait, or ask its administrator")
    found: dict[str, dict] = {}
    for line in text.splitlines():
        name, limit, gres = line.split("|", 2)
        entry = found.setdefault(
            name.rstrip("*"),
            {"default": name.endswith("*"), "minutes": minutes(limit), "gpus": 0},
        )
        entry["gpus"] = max(entry["gpus"], gpus(gres))
    return found


def minutes(limit: str) -> int | None:
    """Of a time limit as SLURM writes it: ``2-12:00:00``, ``30:00``, ``infinite``."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if match is None:
        return None
    days, hours, whole, _ = (int(part or 0) for part in match.groups())
    return (24 * days + hours) * 60 + whole


def gpus(gres: str) -> int:
    """Of a node's generic resources as SLURM writes them: ``gpu:h100:8(S:0-1),nvme:2``."""
    plain = re.sub(r"\([^)]*\)", "", gres)
    return sum(
        int(part.rpartition(":")[2]) for part in plain.split(",") if re.match(r"gpu:.*\d$", part)
    )
