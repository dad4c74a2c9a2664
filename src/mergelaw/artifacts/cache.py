"""Cache of values computed from files, valid as long as the files do not change."""

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergelaw.artifacts.files import checksum, file_digest
from mergelaw.artifacts.keys import canonical_json


class FileCache:
    """JSON values by name, each with the path, size and times of its files.

    The times are those of the last change of content, which programs can set, and of status, which
    they cannot.

    ``path`` is the file of the cache; None keeps the values in memory. All jobs of the workflow
    append to it: a line is a checksum and a name with its files and value, the last one of a name
    is valid, and a damaged line only means reading the files again.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self._entries: dict[str, Any] | None = None

    def value(self, name: str, files: Iterable[Path], compute: Callable[[], Any]) -> Any:
        """The cached value of ``name``; computed again if one of ``files`` has changed.

        ``compute`` returns a JSON value. Raises OSError for a missing file.
        """
        status = [(str(path.absolute()), path.stat()) for path in files]
        stamps = [[path, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for path, s in status]
        if self._entries is None:
            self._entries = dict(self._read())
        match self._entries.get(name):
            case [before, value] if before == stamps:
                return value
        self._entries[name] = [stamps, compute()]
        if self.path is not None:
            line = canonical_json([name, self._entries[name]])
            with suppress(OSError):  # a folder that cannot be written is no reason to fail
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(f"\n{checksum(line)} {line}\n")  # the line before may be torn
        return self._entries[name][1]

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file. Raises OSError if it cannot be read."""
        return str(self.value(f"sha256 {path.absolute()}", [path], lambda: file_digest(path)))

    def _read(self) -> Iterable[list[Any]]:
        with suppress(OSError):
            lines = self.path.read_text("utf-8", "replace").split("\n") if self.path else []
            for mark, _, text in (line.partition(" ") for line in lines):
                if text and mark == checksum(text):
                    yield json.loads(text)
