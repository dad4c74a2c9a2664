"""The run lock: only one run at a time works on a results folder."""

import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from mergelaw.artifacts.files import write_json
from mergelaw.errors import MergelawError

if TYPE_CHECKING:
    from filelock import BaseFileLock

LAYOUT = 1  # of a results folder, written into its mark
MARK = ".mergelaw.json"


def lock_results(results: Path) -> "BaseFileLock":
    """Lock a results folder until the lock is released or the process ends.

    The storage must support file locks across all hosts that may start a run. Raises MergelawError
    if another run holds the lock, or if another version of mergelaw wrote the folder.
    """
    from filelock import FileLock, Timeout

    results.mkdir(parents=True, exist_ok=True)
    check_layout(results)
    if not (results / MARK).exists():
        write_json(results / MARK, {"layout": LAYOUT})
    lock, holder = FileLock(results / ".run.lock"), results / ".run.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise MergelawError(
            f"{results}: another run is working on this folder{_described(holder)}; wait for it, "
            "or stop it"
        ) from None
    write_json(holder, {"host": socket.gethostname(), "process": os.getpid()})
    return lock


def _described(holder: Path) -> str:
    try:
        entry = json.loads(holder.read_text(encoding="utf-8"))
        return f" (process {entry['process']} on {entry['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def check_layout(results: Path) -> None:
    """Raise MergelawError for a results folder of another layout; one without a mark passes."""
    mark = results / MARK
    try:
        layout = json.loads(mark.read_text(encoding="utf-8"))["layout"] if mark.exists() else LAYOUT
    except (ValueError, KeyError, TypeError):
        layout = "unknown"
    if layout != LAYOUT:
        raise MergelawError(
            f"{results}: laid out by another version of mergelaw (layout {layout}, this one has "
            f"{LAYOUT}); use another results folder or that version"
        )
