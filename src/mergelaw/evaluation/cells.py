"""The cell store: every cross-entropy ever measured, append-only, by identity.

A cell is what was measured: (base, task vectors, weights, method, evaluation set, recipe), all by
digest; its identity is the hash of that. A line is a cell's JSON and a checksum. Each process
appends to a file of its own, created exclusively and synced after every merge, so a kill costs at
most the merge in flight, and a torn line is ignored. A process claims a merge before it measures
it, by a lock that ends with the process, so that two of them never measure the same one.
"""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergelaw.artifacts.lineage import sync, unique


def checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse(line: bytes, wanted: Container[str] | None) -> dict[str, Any] | None:
    """The cell of a line, None where it is not wanted; raises ValueError where it is damaged."""
    mark, _, text = line.decode().partition(" ")
    if mark != checksum(text):
        raise ValueError("checksum")
    # Most lines of a large store are other shards' cells: they are told by a look at the text.
    if wanted is not None and text.partition('"cell":"')[2].partition('"')[0] not in wanted:
        return None
    cell = json.loads(text)
    if not isinstance(cell, dict) or not isinstance(cell.get("cell"), str):
        raise ValueError("no cell")
    return cell


class Store:
    """The cells of a folder, and one process's file in it, which appears with its first cell.

    ``known``: by identity, as of the last ``refresh``; all of them, or those that are ``wanted``.
    A damaged line is named on stderr and left out.
    """

    def __init__(self, folder: Path, name: str = "", wanted: Container[str] | None = None):
        self.folder = folder
        self.path = folder / f"{name}-{unique()}.jsonl"
        self.wanted = wanted
        self.known: dict[str, dict[str, Any]] = {}
        self._read: dict[Path, tuple[int, int]] = {}  # bytes and lines, by file
        self._file: Any = None
        self._locks: Any = None
        self.refresh()

    def refresh(self) -> None:
        """Read what was appended to any file since the last time."""
        for path in sorted(self.folder.glob("*.jsonl")):
            size, count = self._read.get(path, (0, 0))
            if path == self.path or path.stat().st_size == size:
                continue
            with path.open("rb") as file:
                file.seek(size)
                *lines, last = file.read().split(b"\n")
            for number, line in enumerate(lines, count + 1):
                try:
                    cell = parse(line, self.wanted) if line else None
                except ValueError:
                    print(
                        f"mergelaw: {path}:{number}: damaged cell, measured again if needed",
                        file=sys.stderr,
                    )
                    continue
                if cell:
                    self.known[cell["cell"]] = cell
            self._read[path] = size + sum(len(line) + 1 for line in lines), count + len(lines)
            try:  # a torn last line is what a kill leaves, or a writer at work
                cell = parse(last, self.wanted) if last else None
            except ValueError:
                continue
            if cell:
                self.known[cell["cell"]] = cell

    @contextmanager
    def claim(self, merge: str, wait: bool) -> Iterator[bool]:
        """Whether the merge (hexadecimal digits) is this process's to measure, for the time being.

        The claim is a lock on one byte of an empty file. While another process has it, waits, or
        says no. Refreshes what is known, for the one who had it may have measured it.
        """
        if self._locks is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._locks = (self.folder / ".claims").open("ab")
        place = int(merge[:15], 16)
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except (BlockingIOError, PermissionError):  # what the system calls it is its choice
            yield False
            return
        try:
            self.refresh()
            yield True
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, place)

    def append(self, cells: list[dict[str, Any]]) -> None:
        """Write cells and sync; they are kept when this returns."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("xb")
            sync(self.path.parent)
        for cell in cells:
            text = json.dumps(cell, sort_keys=True, separators=(",", ":"))
            self._file.write(f"{checksum(text)} {text}\n".encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.known |= {cell["cell"]: cell for cell in cells}

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exc: object) -> None:
        for file in (self._file, self._locks):
            if file is not None:
                file.close()
