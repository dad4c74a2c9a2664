"""Cache of values computed from files, valid as long as the files do not change."""

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergelaw.artifacts.files import file_digest, write_json


class FileCache:
    """JSON values by name, each with the path, size and times of its files.

    The times are those of the last change of content, which programs can set, and of status, which
    they cannot.

    ``path`` is the JSON file of the cache; None keeps the values in memory. All jobs of the
    workflow write this file: the last one wins, and missing values are computed again.
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
            self._entries = self._read()
        match self._entries.get(name):
            case [before, value] if before == stamps:
                return value
        self._entries[name] = [stamps, compute()]
        if self.path is not None:
            with suppress(OSError):  # a folder that cannot be written is no reason to fail
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path, self._entries)
        return self._entries[name][1]

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file. Raises OSError if it cannot be read."""
        return str(self.value(f"sha256 {path.absolute()}", [path], lambda: file_digest(path)))

    def _read(self) -> dict[str, Any]:
        # A damaged cache only means reading the files again.
        try:
            entries = json.loads(self.path.read_bytes()) if self.path else {}
        except (OSError, ValueError, RecursionError):
            return {}
        return entries if isinstance(entries, dict) else {}
