"""Records of a domain's source: local files, or a dataset that the `datasets` library loads.

This module reads JSON and CSV itself because `datasets` guesses types from values: the answer
"2024-01-01" becomes a date, "007" in CSV the number 7, "NA" a null; a column that first appears
after some megabytes is an error; and errors name no line.
"""

import csv
import glob
import io
import json
import os
import re
import reprlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from mergelaw.artifacts.keys import canonical_json
from mergelaw.data.recipe import Source
from mergelaw.errors import MergelawError, first_line

Records = Iterator[tuple[str, Any]]  # (place for messages, record)

COMMIT = "[0-9a-f]{40}"
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


def local_files(source: Source) -> list[Path]:
    """The files of a local source, sorted; MergelawError for a folder or a glob without any.

    A folder stands for the visible files in and below it of known formats (of a `dataset`: any).
    """
    if source.dataset is not None:
        if not Path(source.dataset).is_dir():
            raise MergelawError(f"{source.dataset}: no such folder; correct the domain's source")
        return _visible_files(Path(source.dataset))
    paths: set[Path] = set()
    for name in source.files or []:
        path = Path(name)
        if path.is_dir():
            matches = [file for file in _visible_files(path) if _kind(file) in READERS]
            if len({_kind(file) == ".txt" for file in matches}) == 2:
                raise MergelawError(
                    f"{name}: holds files of plain text and of records; name those to read by a"
                    f" glob, such as {path / '*.txt'}"
                )
        elif glob.has_magic(name) and not path.exists():
            named = map(Path, glob.glob(name, recursive=True))  # noqa: PTH207, skips hidden files
            matches = [match for match in named if match.is_file()]
        else:
            matches = [path]
        if not matches:
            raise MergelawError(f"{name}: holds no file to read; {KINDS}")
        paths.update(matches)
    return sorted(paths)


def _visible_files(folder: Path) -> list[Path]:
    """The files in and below a folder, also behind links; a link to nothing is among them."""
    files: list[Path] = []
    seen: set[str] = set()  # a link may lead back
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in files if path.is_file() or path.is_symlink())


def kept_records(source: Source) -> Records:
    """The records of files or a dataset that pass the filter ``where``, with their places.

    Raises MergelawError for unreadable input, for an item that is no record, or if none pass.
    """
    where = source.where or {}
    columns: set[str] = set()
    examples: dict[str, None] = {}
    kept = False
    files = local_files(source) if source.files else [None]
    for place, record in chain.from_iterable(_records(source, file) for file in files):
        columns.update(record)
        if _keeps(source, record):
            kept = True
            yield place, record
        elif not kept and len(examples) < 6:
            examples[", ".join(reprlib.repr(record.get(column)) for column in where)] = None
    named = [("columns", column) for column in source.used_columns()]
    for key, column in [("where", column) for column in where] + named:
        if column not in columns:
            raise MergelawError(
                f"{source}: {key} names the column {column!r}, which no record has;"
                f" use one of {reprlib.repr(sorted(columns))}"
            )
    if not kept:
        raise MergelawError(
            f"{source}: where = {canonical_json(where)} keeps no record;"
            f" the records have, for example, {'; '.join(examples)}"
        )


def _keeps(source: Source, record: dict[str, Any]) -> bool:
    where = source.where or {}
    return all(column in record and record[column] == where[column] for column in where)


def file_records(source: Source, file: Path | None) -> Records:
    """The records of one file of a source (None: of its dataset) that pass ``where``."""
    return (pair for pair in _records(source, file) if _keeps(source, pair[1]))


def _records(source: Source, file: Path | None) -> Records:
    for place, record in _dataset_records(source) if file is None else _file_records(file):
        if not isinstance(record, dict):
            raise MergelawError(
                f"{place}: a record must be an object, not {reprlib.repr(record)};"
                " correct or remove it"
            )
        yield place, record


def _file_records(path: Path) -> Records:
    if _kind(path) not in READERS:
        raise MergelawError(f"{path}: unknown kind of file; {KINDS}")
    empty = True
    try:
        if is_pointer(path):
            raise MergelawError(f"{path}: is a pointer of Git LFS; run git lfs pull")
        for place, record in READERS[_kind(path)](path):
            empty = False
            yield f"{path}, {place}", record
    except OSError as error:
        raise unreadable(path, error) from error
    if empty:
        raise MergelawError(f"{path}: the file holds no records; give one with records")


def is_pointer(path: Path) -> bool:
    """True for the small file that stands for a large one that Git LFS has not fetched."""
    with path.open("rb") as file:
        return file.read(24) == b"version https://git-lfs."


def unreadable(path: Path, error: OSError) -> MergelawError:
    """An OSError of a source's file as one line for users."""
    if isinstance(error, FileNotFoundError):
        return MergelawError(f"{path}: no such file; correct the path in the domain's source")
    return MergelawError(f"{path}: the file cannot be read: {error.strerror or first_line(error)}")


# Files


def _kind(path: Path) -> str:
    """The suffix that names a file's format, without the suffix of a compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def _open(path: Path) -> io.BufferedReader:
    codec = COMPRESSED.get(path.suffix.lower())
    if codec is None:
        return path.open("rb")
    import pyarrow as pa

    return io.BufferedReader(_Limited(path, pa.input_stream(str(path), compression=codec)))


# Records may take a gigabyte, or a thousand times their file's bytes. Text compresses by less,
# and a few bytes could otherwise fill any memory.
ROOM, TIMES = 1 << 30, 1000


def _check_size(path: Path, size: int) -> None:
    """Raise MergelawError if a file's records take ``size`` bytes, more than it can hold."""
    if size > max(ROOM, TIMES * path.stat().st_size):
        raise MergelawError(
            f"{path}: expands from {path.stat().st_size:,} bytes to more than {size:,}; remove what"
            " is repeated in it, or give it without compression"
        )


class _Limited(io.RawIOBase):
    """A decompressed file that is no larger than ``_check_size`` allows."""

    def __init__(self, path: Path, stream: Any):
        self._path, self._stream, self._size = path, stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        self._size += len(content)
        _check_size(self._path, self._size)
        buffer[: len(content)] = content
        return len(content)


def _json_records(path: Path) -> Records:
    """A list of records, or a record on each line: files have either under any of the names."""
    with _open(path) as file:
        if file.peek().lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            for number, record in enumerate(_parsed(file.read(), path, line=1), start=1):
                yield f"record {number}", record
            return
        for number, line in enumerate(file, start=1):
            if line.strip() == b"{":
                raise MergelawError(
                    f"{path}, line {number}: a record goes over several lines; write a list of "
                    "records, or each on one line"
                )
            if line.strip():
                yield f"line {number}", _parsed(line, path, line=number)


def _decoded(content: bytes, path: Path, line: int) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise MergelawError(f"{path}, line {line}: not UTF-8; convert the file to UTF-8") from error


def _parsed(content: bytes, path: Path, line: int) -> Any:
    """The value of JSON text that begins at ``line`` of a file."""
    text = _decoded(content, path, line)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise MergelawError(
            f"{path}, line {line}, column {error.colno}: not JSON: {error.msg}; correct it there"
        ) from error
    except (ValueError, RecursionError) as error:
        # A number with thousands of digits, or thousands of nested brackets.
        raise MergelawError(
            f"{path}, line {line}: JSON that Python cannot hold: {first_line(error)}; remove it"
        ) from error


def _csv_records(path: Path) -> Records:
    """Rows below a header. All cells are text; an empty cell is no value."""
    csv.field_size_limit(sys.maxsize)  # its default refuses cells of more than 128 KiB
    delimiter = "\t" if ".tsv" in path.suffixes[-2:] else ","
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            header = rows.fieldnames or []
            if len({*header}) < len(header):
                raise csv.Error("the header names a column twice")
            for row in rows:
                if None in row:
                    raise csv.Error("more cells than the header has")
                yield f"line {rows.line_num}", {name: cell or None for name, cell in row.items()}
        except (csv.Error, UnicodeDecodeError) as error:
            raise MergelawError(
                f"{path}, at or after line {rows.line_num}: not CSV in UTF-8: {first_line(error)};"
                " correct it there"
            ) from error


def _text_records(path: Path) -> Records:
    """A file of plain text as one record."""
    with _open(path) as file:
        content = file.read()
    yield "the text", {"text": _decoded(content, path, line=1)}


def _parquet_records(path: Path) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = size = 0
    try:
        with pq.ParquetFile(path) as table:
            groups = range(table.num_row_groups)
            stored = sum(table.metadata.row_group(n).total_byte_size for n in groups)
            _check_size(path, max(stored, 8 * table.metadata.num_rows))  # a record takes 8 at least
            columns = map(table.schema.column, range(len(table.schema)))
            plain = [c for c in columns if c.logical_type.type in ("STRING", "NONE")]
            texts = [c.path for c in plain if c.physical_type == "BYTE_ARRAY"]
        # A value that a file holds once is held once, until it is known how often it is repeated.
        with pq.ParquetFile(path, read_dictionary=texts) as table:
            for batch in table.iter_batches(batch_size=1024):
                size += sum(map(_expanded, batch.columns))
                _check_size(path, size)
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    # Damaged pages raise any of these, depending on the layer that reads them first.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError):
            raise
        raise MergelawError(
            f"{path}, after row {number}: not a readable Parquet file: {first_line(error)};"
            " write it again"
        ) from error


def _expanded(array: Any) -> int:
    """Bytes of an Arrow array with each value written out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary).cast("int64")
        return pc.sum(lengths.take(array.indices)).as_py() or 0
    if pa.types.is_struct(kind):
        return sum(_expanded(array.field(number)) for number in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _expanded(array.flatten())
    if pa.types.is_map(kind):
        start, stop = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return sum(_expanded(side.slice(start, stop - start)) for side in (array.keys, array.items))
    return int(array.nbytes)


READERS: dict[str, Callable[[Path], Records]] = {
    ".json": _json_records,
    ".jsonl": _json_records,
    ".ndjson": _json_records,
    ".csv": _csv_records,
    ".tsv": _csv_records,
    ".parquet": _parquet_records,
    ".txt": _text_records,
}


KINDS = f"use {', '.join(READERS)}, all but Parquet also with {', '.join(COMPRESSED)}"


# Datasets


def _dataset_records(source: Source) -> Records:
    import datasets

    number = 0
    # A local folder is streamed, so that nothing is left in the user's cache.
    with tempfile.TemporaryDirectory() as scratch:
        local: dict[str, Any] = {"streaming": True, "cache_dir": scratch} if source.is_local else {}
        options = {"split": source.split, "revision": source.revision} | local
        try:
            rows = datasets.load_dataset(source.dataset, source.config, **options)
            if not source.is_local:
                check_revision(source, [file["filename"] for file in rows.cache_files])
            for record in rows:
                number += 1
                yield f"{source}, row {number}", record
            if not number:
                raise MergelawError(f"{source}: the dataset holds no records; choose another split")
        except MergelawError:
            raise
        # Loaders, file systems and the hub's client have no exception in common.
        except Exception as error:
            wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError)
            reason = first_line(error.__cause__ if wrapped and error.__cause__ else error)
            raise MergelawError(
                f"{source}: the dataset cannot be loaded: {reason}; check its id, revision, config"
                " and split, and that this machine is online or has it in its cache"
            ) from error


def check_revision(source: Source, files: Iterable[str]) -> None:
    """Refuse a dataset of another commit: offline, `datasets` accepts any cached one.

    ``files`` are those of the loaded dataset; the commit is the name of their folder.
    """
    folders = {Path(file).parent.name for file in files}
    cached = sorted(folder for folder in folders if re.fullmatch(COMMIT, folder))
    if re.fullmatch(COMMIT, source.revision or "") and cached not in ([], [source.revision]):
        raise MergelawError(
            f"{source}: revision {source.revision} is not in the cache, {', '.join(cached)} is;"
            " go online once, or pin that one"
        )
