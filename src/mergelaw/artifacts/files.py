"""Files that are whole or absent: digests, atomic JSON, fsync."""

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any


def file_digest(path: Path) -> str:
    """SHA-256 of a file (64 hexadecimal digits)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(text: str) -> str:
    """Checksum of a line of text: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def json_text(value: Any, sort_keys: bool = True) -> str:
    """Indented JSON, with sorted keys unless their order matters; NaN is refused."""
    text = json.dumps(value, indent=1, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def write_json(path: Path, value: Any, sort_keys: bool = True) -> None:
    """Write a JSON file whole or not at all, even if the process is killed or the disk is full."""
    scratch = path.with_name(f"{path.name}.{unique()}")
    try:
        scratch.write_text(json_text(value, sort_keys), encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        scratch.unlink(missing_ok=True)


def unique() -> str:
    """Unique suffix for a file name: time and process id."""
    return f"{time.time_ns():x}-{os.getpid():x}"


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(folder: Path, error: Exception) -> OSError | None:
    """The OSError behind a library's error, found by writing to ``folder``; None if it is writable.

    Libraries often hide "no space left on device" behind their own errors.
    """
    code = re.search(r"\(os error (\d+)\)", str(error))
    if code:
        return OSError(int(code[1]), os.strerror(int(code[1])), str(folder.parent))
    probe = folder / f"probe-{unique()}"
    try:
        probe.write_bytes(bytes(1 << 20))
    except OSError as reason:
        return OSError(reason.errno, os.strerror(reason.errno or 0), str(folder.parent))
    finally:
        probe.unlink(missing_ok=True)
    return None
