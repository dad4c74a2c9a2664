"""Cells: single measurements of cross-entropy, their identities and their append-only store.

A cell is the cross-entropy of one merge on one evaluation set. Its identity is a digest of all that
defines it. A store is a folder of files; each line holds a checksum and a cell as JSON. Every
process appends to its own file, which it creates exclusively and syncs after every merge. A kill
therefore loses at most the merge in progress, and readers ignore an incomplete last line. A process
locks a merge before it measures it, so that no two processes measure the same merge. Beside each
file is an index of its lines, so that a shard reads its own cells and not all of the store.

A loss cannot be checked without measuring it. What can be checked is: a cell's form, the digests of
what it was measured from, and the tokens and bytes of its documents.
"""

import base64
import fcntl
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mergelaw.artifacts.files import checksum, sync, unique
from mergelaw.artifacts.keys import digest
from mergelaw.evaluation.table import read_rows
from mergelaw.merging.engine import Weights

# Part of every cell's identity. If the same merge on the same documents would now give another
# number, raise it together with the stage `evaluate` in keys.py. A raised stage alone writes its
# tables again from the stored cells.
CELL_VERSION = 1

INDEX = ".index"  # suffix of an index: a line for each cell, with its identity and bytes
COUNTS = (
    "tokens",
    "bytes",
    "long_documents",
    "dropped_tokens",
    "parameters",
    "non_embedding",
    "threads",
)
ORIGIN = ("merge", "base_digest", "set")  # digests that cells before 0.3 do not carry
ROUNDING = -1e-3  # nats; a document's loss is zero at least, but for rounding

Cell = dict[str, Any]


def identities(
    base: str,
    vectors: Sequence[str],
    method: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any],
    sets: Mapping[str, str],
    weights: Weights | None = None,
) -> tuple[str, dict[str, str]]:
    """Identity of a merge, and of its cells by domain: 16 and 32 hexadecimal digits.

    ``vectors`` are digests in the order of the pool. ``weights`` are those of the vectors, or of
    each tensor of them; None: equal ones. ``sets`` are digests of the evaluation sets by domain.
    ``method`` and ``evaluation`` are recipes; the base itself has no method.
    """
    shares = [1.0] * len(vectors) if weights is None else weights
    merge = {"base": base, "vectors": [*vectors], "weights": shares, "method": method}
    cell = {"version": CELL_VERSION, "evaluation": evaluation, **merge}
    return digest(merge)[:16], {name: digest(cell | {"set": sets[name]})[:32] for name in sets}


def is_sound(cell: Any) -> bool:
    """True for a cell with values that a measurement can give."""
    import numpy as np

    try:
        nll = np.frombuffer(base64.b64decode(cell["document_nll"], validate=True), "<f8")
        counts, seconds = cell["document_tokens"], [cell["merge_seconds"], cell["eval_seconds"]]
        numbers = [*counts, *seconds, *(cell[name] for name in COUNTS)]
        return (
            isinstance(cell["cell"], str)
            and isinstance(cell["device"], str)
            and all(type(number) in (int, float) for number in numbers)
            and len(nll) == len(counts)
            and sum(counts) == cell["tokens"] > 0
            and all(math.isfinite(number) and number >= 0 for number in numbers)
            and min(cell["bytes"], cell["parameters"], cell["non_embedding"]) > 0
            and not (nll < ROUNDING).any()
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def parse(line: bytes) -> Cell | None:
    """The cell of a store's line; None for a damaged line or an impossible cell."""
    mark, _, text = line.decode(errors="replace").partition(" ")
    cell: Any = None
    with suppress(ValueError, RecursionError):
        cell = json.loads(text) if mark == checksum(text) else None
    return cell if is_sound(cell) else None


def verify(folder: Path, shards: Sequence[Path]) -> Iterator[str]:
    """Problems of a store: damaged cells, cells with two losses, other losses in shards' tables.

    ``shards`` are folders of evaluations of the store's base.
    """
    losses: dict[str, bytes] = {}  # digests, by identity and tokens
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                cell = parse(line.rstrip(b"\n"))
                if cell is None:
                    if line.endswith(b"\n"):
                        yield f"{path}:{number}: damaged cell; delete the line"
                    continue
                name = f"{cell['cell']} {cell['document_tokens']}"
                loss = hashlib.sha256(base64.b64decode(cell["document_nll"])).digest()
                if losses.setdefault(name, loss) != loss:
                    yield f"{path}:{number}: another loss of this cell comes before; delete one"
    for shard in shards:
        rows = read_rows([shard], documents=True)
        for cell, nll, counts in rows[["cell", "document_nll", "document_tokens"]].values:
            loss = hashlib.sha256(nll.astype("<f8").tobytes()).digest()
            if losses.get(f"{cell} {counts.tolist()}", loss) != loss:
                yield f"{shard}: cell {cell} has another loss in {folder}; delete that line"


class Store(ExitStack):
    """Cell store of a folder, with one file of this process, created with its first cell.

    ``known`` maps identities to cells, as of the last ``refresh``. ``wanted`` restricts it to the
    identities that a shard needs, each with values that its cell must have. A line that is damaged
    or has other values is skipped with a message on stderr. Leaving the context closes the store's
    files.
    """

    def __init__(
        self, folder: Path, name: str = "", wanted: Mapping[str, Mapping[str, Any]] | None = None
    ):
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
            start, count = self._read.get(path, (0, 0))
            if path == self.path or path.stat().st_size == start:
                continue
            with path.open("rb") as file:
                if start == 0 and self.wanted is not None:
                    start, count = self._by_index(file, path)
                file.seek(start)
                *lines, last = file.read().split(b"\n")
            for number, line in enumerate(lines, count + 1):
                if problem := self._add(line):
                    print(
                        f"mergelaw: {path}:{number}: {problem}; it is measured again if needed",
                        file=sys.stderr,
                    )
            self._read[path] = start + sum(len(line) + 1 for line in lines), count + len(lines)
            if last:
                self._add(last)  # may be torn, by a kill or because its writer is still at work

    def _by_index(self, file: IO[bytes], path: Path) -> tuple[int, int]:
        """Add the wanted cells that an index names; return its bytes and lines of the file.

        An index that does not fit its file is as good as none, and its file is read whole.
        """
        end = count = 0
        try:
            for row in path.with_suffix(INDEX).read_text("ascii").split("\n")[:-1]:
                identity, size = row.split(" ")
                if identity in (self.wanted or ()):
                    file.seek(end)
                    if self._add(file.read(int(size) - 1)) or identity not in self.known:
                        return 0, 0
                end, count = end + int(size), count + 1
            file.seek(max(end - 1, 0))
        except (OSError, ValueError):
            return 0, 0
        return (end, count) if file.read(1) == b"\n" else (0, 0)

    def _add(self, line: bytes) -> str:
        """Add the cell of a line to ``known``, or say why the line cannot be used."""
        identity = line.partition(b'"cell":"')[2].partition(b'"')[0].decode(errors="replace")
        if self.wanted is not None and identity and identity not in self.wanted:
            return ""  # most lines of a large store belong to other shards
        cell = parse(line)
        if cell is None or not identity or cell["cell"] != identity:
            return "damaged cell"
        expected = self.wanted[identity] if self.wanted else {}
        for name in sorted(name for name in expected if cell.get(name) != expected[name]):
            if name in cell or name not in ORIGIN:
                return f"cell with another {name} than would be measured today"
        self.known[identity] = cell
        return ""

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
        rows = []
        for cell in cells:
            text = json.dumps(cell, sort_keys=True, separators=(",", ":"))
            size = self._file.write(f"{checksum(text)} {text}\n".encode())
            rows.append(f"{cell['cell']} {size}\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        with self.path.with_suffix(INDEX).open("a", encoding="ascii") as index:
            index.writelines(rows)
        self.known |= {cell["cell"]: cell for cell in cells}
