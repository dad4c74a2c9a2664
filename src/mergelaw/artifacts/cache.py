"""Values computed from files, remembered for as long as the files stay as they are."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


class FileCache:
    """JSON values by name, each with the path, size and modification time of its files.

    ``path`` is the JSON file that keeps them; None keeps them in memory only. Parsing the workflow
    uses this, in every job: so nothing heavy is imported here.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self._entries: dict[str, Any] | None = None

    def value(self, name: str, files: Iterable[Path], compute: Callable[[], Any]) -> Any:
        """The remembered value of ``name``; computed anew where one of ``files`` has changed.

        ``compute`` returns a value that JSON can hold. Raises OSError for a file that is missing.
        """
        status = [(str(path.absolute()), path.stat()) for path in files]
        stamps = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in status]
        if self._entries is None:
            self._entries = self._read()
        match self._entries.get(name):
            case [before, value] if before == stamps:
                return value
        value = compute()
        self._entries[name] = [stamps, value]
        self._write(self._entries)
        return value

    def sha256(self, path: Path) -> str:
        """The SHA-256 digest of a file. Raises OSError where it cannot be read."""

        def compute() -> str:
            with path.open("rb") as content:
                return hashlib.file_digest(content, "sha256").hexdigest()

        return str(self.value(f"sha256 {path.absolute()}", [path], compute))

    def _read(self) -> dict[str, Any]:
        # A damaged cache costs reading the files again, nothing else.
        try:
            entries = json.loads(self.path.read_bytes()) if self.path else {}
        except (OSError, ValueError, RecursionError):
            return {}
        return entries if isinstance(entries, dict) else {}

    def _write(self, entries: Mapping[str, Any]) -> None:
        # Many jobs parse the workflow at once. Each writes a file of its own and renames it; the
        # last one wins, and values that it lacks are computed again. A folder that cannot be
        # written is no reason to fail.
        if self.path is None:
            return
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as content:
                    json.dump(entries, content)
                Path(name).replace(self.path)
            finally:
                Path(name).unlink(missing_ok=True)
