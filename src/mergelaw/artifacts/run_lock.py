"""The run lock: one run at a time works on a results folder."""

import atexit
import json
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergelaw.artifacts.files import write_json
from mergelaw.errors import MergelawError

LAYOUT = 1  # of a results folder, written into its mark
MARK = ".mergelaw.json"
BEAT = 20  # seconds between a run's signs of life
SILENCE = 120  # seconds without a sign of life after which a run on another host counts as dead


def lock_results(results: Path) -> "RunLock":
    """Lock a results folder until the process ends or the lock is released.

    Raises MergelawError if another run holds it, or if another version laid the folder out.
    """
    results.mkdir(parents=True, exist_ok=True)
    check_layout(results)
    mark = results / MARK
    if not mark.exists():
        write_json(mark, {"layout": LAYOUT})
    return RunLock(results)


def check_layout(results: Path) -> None:
    """Raise MergelawError for a results folder of another layout; an unmarked one passes."""
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


class RunLock:
    """A lock of the file system, released by a kill, with a sign of life for other hosts.

    Not every shared file system carries locks from host to host. So a run also touches a file that
    names its host, every 20 seconds; one older than two minutes, by the file system's own clock,
    belongs to a dead run.
    """

    def __init__(self, results: Path):
        from filelock import FileLock, Timeout

        self._sign, self._ended = results / ".run.json", threading.Event()
        self._process = os.getpid()  # a fork does not release the lock
        lock = results / ".run.lock"
        self._lock = FileLock(lock)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise MergelawError(f"{results}: {self._holder()}; wait for it, or stop it") from None
        os.utime(lock)
        holder = self._read()
        elsewhere = holder is not None and holder["host"] != socket.gethostname()
        if elsewhere and lock.stat().st_mtime - self._sign.stat().st_mtime < SILENCE:
            self._lock.release()
            raise MergelawError(
                f"{results}: {self._holder()}; wait for it, or if it was killed, rerun in "
                f"{SILENCE} s"
            )
        write_json(self._sign, {"host": socket.gethostname(), "process": self._process})
        threading.Thread(target=self._show_life, daemon=True).start()
        atexit.register(self.release)

    def _read(self) -> dict[str, Any] | None:
        try:
            entry = json.loads(self._sign.read_text(encoding="utf-8"))
            return entry if {"host", "process"} <= entry.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    def _holder(self) -> str:
        entry = self._read()
        who = f" (process {entry['process']} on {entry['host']})" if entry else ""
        return f"another run is working on this folder{who}"

    def _show_life(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):
                os.utime(self._sign)

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if not self._ended.is_set() and os.getpid() == self._process:
            self._ended.set()
            atexit.unregister(self.release)
            self._sign.unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()
