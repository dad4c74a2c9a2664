"""The cell store: every cross-entropy ever measured, append-only, by identity.

A cell is what was measured: (base, task vectors, weights, method, evaluation set, recipe), all by
digest; its identity is the hash of that. A line is a cell's JSON and a checksum. Each process
appends to a file of its own, created exclusively and synced after every merge, so a kill costs at
most the merge in flight, and a torn line is ignored.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from mergelaw.lineage import sync, unique


def checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """All cells of a folder by identity; a damaged line is named on stderr and left out."""
    cells: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                mark, text = line.decode().split(" ", 1)
                if mark != checksum(text):
                    raise ValueError
                cell = json.loads(text)
                if not isinstance(cell["cell"], str):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                if number < len(lines):  # a torn last line is what a kill leaves
                    print(
                        f"mergelaw: {path}:{number}: damaged cell, measured again if needed",
                        file=sys.stderr,
                    )
                continue
            cells[cell["cell"]] = cell
    return cells


class Writer:
    """Appends cells to a new file of ``folder``; the file appears with the first cell."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / f"{name}-{unique()}.jsonl"
        self._file: Any = None

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

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()
