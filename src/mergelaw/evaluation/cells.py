"""Cells: single measurements of cross-entropy, their identities and their append-only store.

A cell is the cross-entropy of one merge on one evaluation set. Its identity is a digest of all that
defines it. A store is a folder of files; each line holds a checksum and a cell as JSON. Every
process appends to its own file, which it creates exclusively and syncs after every merge. A kill
therefore loses at most the merge in progress, and readers ignore an incomplete last line. A process
locks a merge before it measures it, so that no two processes measure the same merge.
"""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from mergelaw.artifacts.files import sync, unique
from mergelaw.artifacts.keys import digest

# Part of every cell's identity. If the same merge on the same documents would now give another
# number, raise it together with the stage `evaluate` in keys.py. A raised stage alone writes its
# tables again from the stored cells.
CELL_VERSION = 1

Cell = dict[str, Any]


def identities(
    base: str,
    vectors: Sequence[str],
    method: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any],
    sets: Mapping[str, str],
    weights: Sequence[float] | None = None,
) -> tuple[str, dict[str, str]]:
    """Identity of a merge, and of its cells by domain: 16 and 32 hexadecimal digits.

    ``vectors`` are digests in the order of the pool, ``weights`` theirs (None: equal ones).
    ``sets`` are digests of the evaluation sets by domain. ``method`` and ``evaluation`` are
    recipes; the base itself has no method.
    """
    shares = [1.0] * len(vectors) if weights is None else [*weights]
    merge = {"base": base, "vectors": [*vectors], "weights": shares, "method": method}
    cell = {"version": CELL_VERSION, "evaluation": evaluation, **merge}
    return digest(merge)[:16], {name: digest(cell | {"set": sets[name]})[:32] for name in sets}


def checksum(text: str) -> str:
    """Checksum of a cell's JSON text: 16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store(ExitStack):
    """Cell store of a folder, with one file of this process, created with its first cell.

    ``known`` maps identities to cells, as of the last ``refresh``. ``wanted`` restricts it to the
    identities that a shard needs. A damaged line is skipped with a message on stderr. Leaving the
    context closes the store's files.
    """

    def __init__(self, folder: Path, name: str = "", wanted: Container[str] | None = None):
        super().__init__()
        self.folder = folder
        self.path = folder / f"{name}-{unique()}.jsonl"
        self.wanted = wanted
        self.known: dict[str, Cell] = {}
        self._read: dict[Path, tuple[int, int]] = {}  # bytes and lines read, by file
        self._file: IO[bytes] | None = None
        self._locks: IO[bytes] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read the lines that any process has appended since the last call."""
        for path in sorted(self.folder.glob("*.jsonl")):
            size, count = self._read.get(path, (0, 0))
            if path == self.path or path.stat().st_size == size:
                continue
            with path.open("rb") as file:
                file.seek(size)
                *lines, last = file.read().split(b"\n")
            for number, line in enumerate(lines, count + 1):
                if not self._add(line):
                    print(
                        f"mergelaw: {path}:{number}: damaged cell; it is measured again if needed",
                        file=sys.stderr,
                    )
            self._read[path] = size + sum(len(line) + 1 for line in lines), count + len(lines)
            self._add(last)  # may be torn, by a kill or because its writer is still at work

    def _add(self, line: bytes) -> bool:
        """Add the cell of a line to ``known``; return False if the line is damaged."""
        mark, _, text = line.decode(errors="replace").partition(" ")
        identity = text.partition('"cell":"')[2].partition('"')[0]
        if mark != checksum(text) or not identity:
            return False
        # Most lines of a large store belong to other shards and need not be parsed.
        if self.wanted is None or identity in self.wanted:
            self.known[identity] = json.loads(text)
        return True

    @contextmanager
    def claim(self, merge: str, wait: bool) -> Iterator[bool]:
        """Lock a merge (its identity) while this process measures it; yield whether that succeeded.

        The lock is on one byte of an empty file and ends with the process. ``wait`` waits for
        another process, which may have measured the merge meanwhile, so ``known`` is refreshed.
        """
        if self._locks is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._locks = self.enter_context((self.folder / ".claims").open("ab"))
        byte = int(merge[:15], 16)
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except (BlockingIOError, PermissionError):  # systems differ in which of the two they raise
            yield False
            return
        try:
            self.refresh()
            yield True
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, byte)

    def append(self, cells: Sequence[Cell]) -> None:
        """Write cells and sync them to disk before returning."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.enter_context(self.path.open("xb"))
            sync(self.path.parent)
        for cell in cells:
            text = json.dumps(cell, sort_keys=True, separators=(",", ":"))
            self._file.write(f"{checksum(text)} {text}\n".encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.known |= {cell["cell"]: cell for cell in cells}
