"""Corpora: from a domain's source to the documents to train on and those to evaluate on.

A source is a dict of one of three forms; ``where`` keeps the records whose columns have the values:

    {"synthetic": "algebra"}
    {"files": ["a.json", "b.jsonl", "c.parquet"], "where": {"classification": "algebra"}}
    {"dataset": "org/name", "revision": "<sha>", "config": None, "split": "train", "where": {}}

A document is known by its content, not by its place: files may be reordered, split or joined and
the corpus stays the same. Nothing heavy is imported before a record has to be read, for
``source_identity`` runs whenever the workflow is parsed.
"""

import hashlib
import json
import os
import re
import reprlib
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelaw.artifacts.keys import canonical_json, digest
from mergelaw.demo import synthetic
from mergelaw.errors import MergelawError

DOCUMENT_DIGITS = 16

ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's names for the speakers.
SPEAKERS = {"human": "user", "gpt": "assistant"}
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("problem", "solution"),
    ("question", "answer"),
    ("message_1", "message_2"),  # CAMEL's
)

# A synthetic source that needs more draws than this for one new document has run dry.
DRAWS_PER_DOCUMENT = 16

Message = dict[str, str]


@dataclass(frozen=True)
class Document:
    """One document: its content digest, the prompt's messages (None: plain text), the response."""

    document: str
    messages: list[Message] | None
    response: str


# From records to documents


def _document(record: dict[str, Any]) -> Document:
    """The document that a record of any known form holds; ValueError says why it holds none."""
    # Parquet and datasets fill the columns that a record lacks with nulls.
    record = {column: value for column, value in record.items() if value is not None}
    for column in ("messages", "conversations"):
        if column in record:
            return _known_by_content(*_last_answer(_turns(record[column], column)))
    for prompt, response in PAIRS:
        if prompt in record and response in record:
            turns = _turns(record[prompt], prompt, role="user")
            given = record.get("input", "")
            # Alpaca's records without an input have an empty one.
            if prompt == "instruction" and not (isinstance(given, str) and not given.strip()):
                turns[-1]["content"] += "\n\n" + _text(given, "input")
            answer = _turns(record[response], response, role="assistant")
            if not any(turn["role"] == "assistant" for turn in answer):
                raise ValueError(f"{response!r} holds no assistant turn")
            return _known_by_content(*_last_answer(turns + answer))
    if "text" in record:
        return _known_by_content(None, _text(record["text"], "text"))
    known = ", ".join("/".join(pair) for pair in PAIRS)
    raise ValueError(
        f"no response among its columns {reprlib.repr(sorted(record))}:"
        f" a record needs {known}, messages, conversations or text"
    )


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be text, not {reprlib.repr(value)}")
    if not value.strip():
        raise ValueError(f"{name!r} is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name!r} holds half of a surrogate pair, which no UTF-8 text can")
    return value


def _turns(value: Any, column: str, role: str | None = None) -> list[Message]:
    """A column's turns; a text is one turn of ``role``, where the column may be a text."""
    if role is not None and not isinstance(value, list):
        return [{"role": role, "content": _text(value, column)}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"{column!r} must be a list of messages, not {reprlib.repr(value)}")
    if not value:
        raise ValueError(f"{column!r} is empty")
    turns = []
    for turn in value:
        speaker = turn.get("role", turn.get("from"))
        known = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else None
        if known not in ROLES:
            raise ValueError(
                f"{column!r} has a message with role {reprlib.repr(speaker)}:"
                f" use one of {', '.join([*ROLES, *SPEAKERS])}"
            )
        content = _text(turn.get("content", turn.get("value")), "content")
        turns.append({"role": str(known), "content": content})
    return turns


def _last_answer(turns: list[Message]) -> tuple[list[Message], str]:
    """The last assistant turn is the response, and what comes before it the prompt."""
    answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise ValueError("its messages hold no assistant turn, so it has no response")
    if answers[-1] == 0:
        raise ValueError("its messages begin with the response, so it has no prompt")
    return turns[: answers[-1]], turns[answers[-1]]["content"]


def _known_by_content(messages: list[Message] | None, response: str) -> Document:
    content = [
        None
        if messages is None
        else [[turn["role"], _normalised(turn["content"])] for turn in messages],
        _normalised(response),
    ]
    return Document(digest(content)[:DOCUMENT_DIGITS], messages, response)


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


# From sources to records


def _records(source: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every record of files or a dataset, with its place in words for error messages."""
    if "files" in source:
        for name in source["files"]:
            yield from _file_records(Path(name))
    else:
        yield from _dataset_records(source)


def _file_records(path: Path) -> Iterator[tuple[str, Any]]:
    readers = {".json": _json_records, ".jsonl": _jsonl_records, ".parquet": _parquet_records}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise MergelawError(f"{path}: unknown kind of file: use {', '.join(readers)}")
    try:
        if not path.stat().st_size:
            raise MergelawError(f"{path}: the file is empty: give one with records")
        empty = True
        for place, record in reader(path):
            empty = False
            yield f"{path}, {place}", record
    except OSError as error:
        raise _unreadable(path, error) from error
    if empty:
        raise MergelawError(f"{path}: the file holds no records: give one with records")


def _unreadable(path: Path, error: OSError) -> MergelawError:
    if isinstance(error, FileNotFoundError):
        return MergelawError(f"{path}: no such file: correct the path in the domain's source")
    return MergelawError(f"{path}: the file cannot be read: {error.strerror or _line(error)}")


def _line(error: BaseException) -> str:
    """The first line of what a library says, which may go on for a page."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    records = _parsed(path.read_bytes(), path, line=1)
    if not isinstance(records, list):
        raise MergelawError(
            f"{path}: must be a list of records, not {reprlib.repr(records)}:"
            " write [record, ...], or one record a line in a .jsonl file"
        )
    for number, record in enumerate(records, start=1):
        yield f"record {number}", record


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"line {number}", _parsed(line, path, line=number)


def _parsed(content: bytes, path: Path, line: int) -> Any:
    """The value of JSON text that begins at ``line`` of the file ``path``."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise MergelawError(f"{path}, line {line}: not UTF-8: convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise MergelawError(
            f"{path}, line {line}, column {error.colno}: not JSON: {error.msg}: correct it there"
        ) from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or brackets nested as deep.
        raise MergelawError(
            f"{path}, line {line}: JSON that Python cannot hold: {_line(error)}: remove it"
        ) from error


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    # Damaged pages surface as any of these, whichever layer meets them first.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise MergelawError(
            f"{path}, after row {number}: not a readable Parquet file: {_line(error)}:"
            " write it again"
        ) from error


def _dataset_records(source: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    import datasets

    name = _source_name(source)
    number = 0
    try:
        rows = datasets.load_dataset(
            source["dataset"],
            name=source.get("config"),
            split=source["split"],
            revision=source.get("revision"),
        )
        check_revision(name, source.get("revision"), [f["filename"] for f in rows.cache_files])
        for record in rows:
            number += 1
            yield f"{name}, row {number}", record
        if not number:
            raise MergelawError(f"{name}: the dataset holds no records: choose another split")
    # Loaders, file systems and the hub's client have no exception in common.
    except Exception as error:
        if isinstance(error, MergelawError):
            raise
        wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = _line(error.__cause__ if wrapped and error.__cause__ else error)
        raise MergelawError(
            f"{name}: the dataset cannot be loaded: {reason}:"
            " check its id, revision, config and split, and that this machine is online or has"
            " it in its cache"
        ) from error


def check_revision(name: str, revision: str | None, files: list[str]) -> None:
    """Without network `datasets` takes whatever version its cache holds; its folder tells which."""
    cached = {Path(file).parent.name for file in files}
    if revision and is_commit(revision) and any(is_commit(c) and c != revision for c in cached):
        raise MergelawError(
            f"{name}: revision {revision} is not in the cache, {', '.join(cached)} is:"
            " go online once, or pin that one"
        )


def is_commit(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{40}", text) is not None


def _source_name(source: Mapping[str, Any]) -> str:
    if "synthetic" in source:
        return f"the synthetic domain {source['synthetic']}"
    if "files" in source:
        first, *others = map(str, source["files"])
        return f"{first} and others ({1 + len(others)} files)" if others else first
    return f"{source['dataset']} [{source['split']}]"


def _kept(source: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The source's records that ``where`` keeps; all of them where there is none."""
    where = source.get("where") or {}
    columns: set[str] = set()
    others: dict[str, None] = {}
    kept = False
    for place, record in _records(source):
        if not isinstance(record, dict):
            raise MergelawError(
                f"{place}: a record must be an object, not {reprlib.repr(record)}:"
                " correct or remove it"
            )
        columns.update(record)
        if all(column in record and record[column] == where[column] for column in where):
            kept = True
            yield place, record
        elif not kept and len(others) < 6:
            others[", ".join(reprlib.repr(record.get(column)) for column in where)] = None
    name = _source_name(source)
    for column in where:
        if column not in columns:
            raise MergelawError(
                f"{name}: where names the column {column!r}, which no record has:"
                f" use one of {reprlib.repr(sorted(columns))}"
            )
    if not kept:
        raise MergelawError(
            f"{name}: where = {canonical_json(where)} keeps no record:"
            f" the records have, for example, {'; '.join(others)}"
        )


# From documents to splits


@dataclass(frozen=True)
class _Pool:
    """A source's distinct documents, in the order in which splits take them."""

    documents: list[Document]
    records: int
    invalid: int = 0  # records that hold no document


def _pool(source: Mapping[str, Any], needed: int, seed: int) -> _Pool:
    if "synthetic" in source:
        return _synthetic_pool(source, needed, seed)
    distinct: dict[str, Document] = {}
    invalid: list[str] = []
    records = 0
    for place, record in _kept(source):
        records += 1
        try:
            document = _document(record)
        except ValueError as error:
            invalid.append(f"{place}: {error}")
            continue
        _add(distinct, document)
    if invalid and source.get("invalid_records") != "skip":
        more = f" (and {len(invalid) - 1} more like it)" if invalid[1:] else ""
        raise MergelawError(
            f"{invalid[0]}: correct or remove the record{more}, or set invalid_records: skip"
        )
    if invalid:
        print(
            f"mergelaw: {_source_name(source)}: {len(invalid)} of {records} records skipped, the "
            f"first is {invalid[0]}",
            file=sys.stderr,
        )
    order = sorted(distinct, key=lambda document: digest([seed, document]))
    return _Pool([distinct[document] for document in order], records, len(invalid))


def _synthetic_pool(source: Mapping[str, Any], needed: int, seed: int) -> _Pool:
    distinct: dict[str, Document] = {}
    records = 0
    draws = needed
    # The draws come in random order already. Sorting them by digest would let the evaluation
    # documents depend on how many were drawn, that is, on the number of training documents.
    while len(distinct) < needed and draws <= DRAWS_PER_DOCUMENT * needed:
        texts = synthetic.documents(source["synthetic"], draws, seed)
        for text in texts[records:]:
            records += 1
            _add(distinct, _document(text))
            if len(distinct) == needed:
                break
        draws *= 2
    return _Pool(list(distinct.values()), records)


def _add(distinct: dict[str, Document], document: Document) -> None:
    known = distinct.setdefault(document.document, document)
    # Documents that differ in white space only are one document. The smaller text stands for
    # them, so that it does not matter which of them is read first.
    if known != document:
        distinct[document.document] = min(
            known, document, key=lambda one: canonical_json(_row(one))
        )


def _split(recipe: Mapping[str, Any]) -> tuple[list[Document], list[Document], dict[str, int]]:
    """Training and evaluation documents, and the counts of what was read."""
    source, eval_source = recipe["source"], recipe.get("eval_source")
    train_documents, eval_documents = recipe["train_documents"], recipe["eval_documents"]
    seed = recipe["seed"]
    if train_documents is None and "synthetic" in source:
        raise MergelawError(
            f"{_source_name(source)} has no end, so train_documents cannot be all that is left:"
            " give train_documents a number"
        )
    asked_of_source = train_documents or 0
    if eval_source:
        eval_pool = _pool(eval_source, eval_documents, seed)
        _check_enough(eval_source, eval_pool, 0, eval_documents)
        pool = _pool(source, asked_of_source, seed)
        pools = [pool, eval_pool]
        left, evaluated = pool.documents, eval_pool.documents[:eval_documents]
        _check_enough(source, pool, train_documents, 0)
    else:
        pool = _pool(source, asked_of_source + eval_documents, seed)
        pools = [pool]
        left, evaluated = pool.documents[eval_documents:], pool.documents[:eval_documents]
        _check_enough(source, pool, train_documents, eval_documents)
    trained = left if train_documents is None else left[:train_documents]
    counts = {
        "records": sum(pool.records for pool in pools),
        "duplicates": sum(p.records - p.invalid - len(p.documents) for p in pools),
        "invalid_records": sum(pool.invalid for pool in pools),
    }
    return trained, evaluated, counts


def _check_enough(
    source: Mapping[str, Any], pool: _Pool, train_documents: int | None, eval_documents: int
) -> None:
    # Asking for all that is left is asking for one at least.
    train_needed = 1 if train_documents is None else train_documents
    if len(pool.documents) < train_needed + eval_documents:
        raise MergelawError(
            f"{_source_name(source)}: {len(pool.documents)} distinct documents"
            f"{f' ({pool.invalid} records are invalid)' if pool.invalid else ''}, but"
            f" {eval_documents} were asked for evaluation and"
            f" {'the rest' if train_documents is None else train_documents} for training:"
            " lower eval_documents or train_documents, or give more records"
        )


def build(recipe: Mapping[str, Any], output: Path) -> dict[str, int]:
    """Write ``output/train.parquet`` and ``output/eval.parquet``; return what was counted.

    The recipe has ``source``, ``eval_source`` (None: evaluation documents come from the source),
    ``train_documents`` (None: all that is left), ``eval_documents`` and ``seed``. The files have
    the columns document, messages (JSON text, null for plain text) and response, and the same
    bytes whenever the recipe and the contents are the same. Counts are of records, duplicates,
    invalid records (an error unless the source has ``invalid_records: skip``) and documents, and of
    the UTF-8 bytes of prompts and responses together. Raises MergelawError for input
    that does not make a corpus; then nothing is written.
    """
    trained, evaluated, counts = _split(recipe)
    shared = _shared({document.document for document in trained}, evaluated)
    if shared:
        raise MergelawError(
            f"{_source_name(recipe['source'])} holds documents of eval_source:"
            f" {len(shared)} of them, the first is {shared[0].document} ({_beginning(shared[0])}):"
            " remove them from one of the two"
        )
    output.mkdir(parents=True, exist_ok=True)
    _write(trained, output / "train.parquet")
    _write(evaluated, output / "eval.parquet")
    return {
        **counts,
        "train_documents": len(trained),
        "eval_documents": len(evaluated),
        "train_bytes": sum(map(_bytes, trained)),
        "eval_bytes": sum(map(_bytes, evaluated)),
    }


def _bytes(document: Document) -> int:
    texts = [turn["content"] for turn in document.messages or []]
    return sum(len(text.encode()) for text in [*texts, document.response])


def _row(document: Document) -> dict[str, str | None]:
    messages = None if document.messages is None else canonical_json(document.messages)
    return {
        "document": document.document,
        "messages": messages,
        "response": document.response,
    }


def _write(documents: list[Document], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            pa.field("document", pa.string(), nullable=False),
            pa.field("messages", pa.string()),
            pa.field("response", pa.string(), nullable=False),
        ]
    )
    pq.write_table(
        pa.Table.from_pylist([_row(document) for document in documents], schema=schema), path
    )


def read(path: Path) -> list[Document]:
    """The documents of a split that ``build`` wrote, in its order. MergelawError if it is none."""
    return [
        Document(
            row["document"],
            None if row["messages"] is None else json.loads(row["messages"]),
            row["response"],
        )
        for row in _rows(path, ["document", "messages", "response"])
    ]


def _rows(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            return table.read(columns=columns).select(columns).to_pylist()
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise MergelawError(
            f"{path}: not a split of a corpus: {_line(error)}: make the corpus again"
        ) from error


def check_overlap(corpora: Mapping[str, Path]) -> None:
    """Refuse corpora ({domain: folder}) of which one trains on what another, or it, evaluates.

    Such a document would make an expert look better than it is. Documents that several domains
    train on are fine. Raises MergelawError for the first pair of domains, in the given order.
    """
    trained = {
        domain: {row["document"] for row in _rows(folder / "train.parquet", ["document"])}
        for domain, folder in corpora.items()
    }
    for eval_domain, folder in corpora.items():
        evaluated = read(folder / "eval.parquet")
        for train_domain, known in trained.items():
            shared = _shared(known, evaluated)
            if shared:
                raise MergelawError(
                    f"{train_domain} trains on documents that {eval_domain} evaluates on:"
                    f" {len(shared)} of them, the first is {shared[0].document}"
                    f" ({_beginning(shared[0])}):"
                    " remove them from one of the two sources, or give the domains sources that"
                    " have nothing in common"
                )


def _shared(known: set[str], evaluated: list[Document]) -> list[Document]:
    return [document for document in evaluated if document.document in known]


def _beginning(document: Document) -> str:
    text = document.messages[-1]["content"] if document.messages else document.response
    return repr(_normalised(text)[:60])


# What a source is


def source_identity(source: Mapping[str, Any], cache: Path | None = None) -> dict[str, Any]:
    """What a source is, as it enters the key of what is made of it.

    Files, and a local folder's, are [path, SHA-256 digest] with the path as given. A digest is
    remembered in the JSON file ``cache`` for as long as the file keeps its size and time of
    modification (ns). A dataset of the hub is its id, revision, config and split. Raises
    MergelawError for a file that cannot be read.
    """
    if "synthetic" in source:
        return {"synthetic": source["synthetic"]}
    if "files" in source:
        named = {str(name): Path(name) for name in source["files"]}
        return {"files": _digests(named, cache)}
    identity = {
        "dataset": source["dataset"],
        "revision": source.get("revision"),
        "config": source.get("config"),
        "split": source["split"],
    }
    folder = Path(source["dataset"])
    if folder.is_dir():
        # Hidden files are what tools leave behind; `datasets` does not read them either.
        named = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        }
        identity["files"] = _digests(named, cache)
    elif source["dataset"].startswith((".", "/")):
        raise MergelawError(f"{folder}: no such folder: correct the path in the domain's source")
    return identity


def check_unchanged(recipe: Mapping[str, Any], source: Mapping[str, Any]) -> None:
    """Raise MergelawError where a source's files are not those whose digests the recipe has."""
    if "files" not in recipe:
        return
    found = [value for _, value in source_identity(source)["files"]]
    known = [value if isinstance(value, str) else value[1] for value in recipe["files"]]
    if found != known:
        raise MergelawError(f"{_source_name(source)}: changed since the run began; run again")


def _digests(named: Mapping[str, Path], cache: Path | None) -> list[list[str]]:
    remembered = _read_cache(cache) if cache else {}
    found = dict(remembered)
    digests = []
    for name, path in named.items():
        try:
            status = path.stat()
            key, stamp = str(path.absolute()), [status.st_size, status.st_mtime_ns]
            match found.get(key):
                case [size, time, str(value)] if [size, time] == stamp:
                    pass
                case _:
                    with path.open("rb") as content:
                        value = hashlib.file_digest(content, "sha256").hexdigest()
                    found[key] = [*stamp, value]
        except OSError as error:
            raise _unreadable(path, error) from error
        digests.append([name, value])
    if cache and found != remembered:
        _write_cache(cache, found)
    return digests


def _read_cache(cache: Path) -> dict[str, Any]:
    # Whatever is wrong with the cache, it only costs reading the files again.
    try:
        found = json.loads(cache.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_cache(cache: Path, found: Mapping[str, Any]) -> None:
    # Many jobs parse the workflow at once: each writes a file of its own and renames it. The
    # last one wins, and what it did not know is found again. A folder that cannot be written
    # is no reason to fail.
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=cache.parent, prefix=f".{cache.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as content:
                json.dump(found, content)
            Path(name).replace(cache)
        finally:
            Path(name).unlink(missing_ok=True)
