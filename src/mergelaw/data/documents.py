"""Documents of a domain: read from its source, deduplicated, split by content, kept as Parquet.

The content of a document identifies it: splits do not change when files are reordered, split or
joined. Only reading a file imports heavy libraries, since every job asks for split identities.
"""

import hashlib
import itertools
import json
import re
import reprlib
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelaw.artifacts.cache import FileCache
from mergelaw.artifacts.keys import STAGES, canonical_json, digest
from mergelaw.data.recipe import PLACE, Source, SplitRecipe
from mergelaw.data.sources import kept_records, local_files, unreadable
from mergelaw.demo import GENERATOR_VERSION, draw
from mergelaw.errors import MergelawError, first_line

DOCUMENTS = "documents.parquet"
DOCUMENT_DIGITS = 16

ROLES = ("system", "developer", "user", "assistant", "tool")
# Names of the speakers in ShareGPT's and Gemma's formats.
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
CHATS = ("messages", "conversations", "conversation")
# Columns of a prompt and its response; message_1 and message_2 are CAMEL's.
FORMS = (
    "prompt/response, prompt/completion, prompt/answer, prompt/output, instruction/output,"
    " instruction/response, instruction/completion, problem/solution, question/answer,"
    " question/response, query/response, query/answer, inputs/targets, user/assistant,"
    " message_1/message_2, input/output"
)
BEFORE = ("system", "system_prompt", "history")
CONTEXTS = ("context", "input")
# Columns that a chat template writes somewhere, but no document holds.
LOST = ("tools", "functions", "documents")
# Keys of a turn, beside role and content, that distinguish documents.
REASONING = ("reasoning_content", "reasoning", "thinking")
TURN_KEYS = (*REASONING, "tool_calls", "function_call", "tool_call_id", "name")

FEW = 10  # documents, below which an evaluation says little
DRAWS = 16  # from a generator for each document wanted, before it counts as exhausted

Message = dict[str, Any]  # role, content (text) and what else the turn has


@dataclass(frozen=True)
class Document:
    """A document: its content digest, the prompt's messages (None: plain text), the response."""

    document: str
    messages: list[Message] | None
    response: str


# From records to documents


def document_of(record: Mapping[str, Any], columns: Mapping[Any, str] | None = None) -> Document:
    """The document of a record in any known form; ValueError for a record without one.

    ``columns`` gives names or templates of columns for the columns of the forms.
    """
    if columns:
        record = {name: _chosen(record, column) for name, column in columns.items()}
    # Parquet and datasets fill the columns that a record lacks with nulls.
    record = {column: value for column, value in record.items() if value is not None}
    blank = {column for column, value in record.items() if not value or not str(value).strip()}
    extra = [name for name in (*BEFORE, *CONTEXTS, *LOST) if name in {*record} - blank]
    documents: dict[str, Document] = {}

    def add(form: str, turns: list[Message]) -> None:
        unused = LOST if "/" in form else (*LOST, *CONTEXTS)
        if lost := [name for name in extra if name in unused]:
            raise ValueError(f"{lost[0]!r} beside {form!r} would be lost; name one in 'columns'")
        documents[form] = _identified(*_last_answer(_before(record, extra, turns) + turns))

    for column in CHATS:
        if column in record:
            add(column, _turns(record[column], column))
    for form in FORMS.split(", "):
        prompt, response = form.split("/")
        # Beside another prompt, the column `input` is its context.
        if prompt in record and response in record and not (prompt == "input" and documents):
            turns = _turns(record[prompt], prompt, role="user")
            for name in extra:
                if name in CONTEXTS and name != prompt:
                    turns[-1]["content"] += "\n\n" + _text(record[name], name)
            answer = _turns(record[response], response, role="assistant")
            if not any(turn["role"] == "assistant" for turn in answer):
                raise ValueError(f"{response!r} holds no assistant turn")
            add(form, turns + answer)
    # A `text` beside these is the same once more, formatted, as in Alpaca's records.
    if "text" in record and not any(
        one.response in str(record["text"]) for one in documents.values()
    ):
        if documents or extra:
            raise ValueError(f"'text' beside {[*documents, *extra][0]!r}; name one in 'columns'")
        return _identified(None, _text(record["text"], "text"))
    if not documents:
        raise ValueError(
            f"no response among its columns {reprlib.repr(sorted(record))}; a record needs {FORMS},"
            f" {', '.join(CHATS)} or text; name other columns in 'columns'"
        )
    document, *others = documents.values()
    if any(other.document != document.document for other in others):
        raise ValueError(
            f"{' and '.join(documents)} are different documents; name one of them in 'columns'"
        )
    return document


def _chosen(record: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or the text of a template such as ``{title}: {question}``."""
    if "{" not in column:
        return record.get(column)
    return PLACE.sub(lambda name: _text(record.get(name[1]), name[1]), column)


def _before(record: Mapping[str, Any], extra: Sequence[str], turns: list[Message]) -> list[Message]:
    """The turns before a record's ``turns``: its system prompt and history."""
    first = [
        {"role": "system", "content": _text(record[name], name)}
        for name in extra
        if name in BEFORE[:2]
    ]
    if first and first[0] in turns:
        first = []
    if first and sum(turn["role"] == "system" for turn in [*first, *turns]) > 1:
        raise ValueError("it has two system prompts; name the columns to use in 'columns'")
    history = record["history"] if "history" in extra else []
    if not history or not isinstance(history, list) or not isinstance(history[0], list):
        return first + (_turns(history, "history") if history else [])
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"'history' must hold pairs, not {reprlib.repr(pair)}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            first += _turns(text, "history", role=role)
    return first


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be text, not {reprlib.repr(value)}")
    if not value.strip():
        raise ValueError(f"{name!r} is empty")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name!r} holds half of a surrogate pair, which no UTF-8 text can")
    return value


def _turns(value: Any, column: str, role: str | None = None) -> list[Message]:
    """The turns of a column. Plain text is a single turn of ``role``."""
    if role is not None and not isinstance(value, list):
        return [{"role": role, "content": _text(value, column)}]
    if isinstance(value, str) and value.lstrip().startswith("["):  # in CSV, a list is its JSON text
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"{column!r} must be a list of messages, not {reprlib.repr(value)}")
    if not value:
        raise ValueError(f"{column!r} is empty")
    turns = []
    for turn in value:
        turn = {key: value for key, value in turn.items() if value is not None}
        speaker = turn.pop("role", turn.pop("from", None))
        turn_role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else None
        if turn_role not in ROLES:
            raise ValueError(
                f"{column!r} has a message with role {reprlib.repr(speaker)};"
                f" use one of {', '.join([*ROLES, *SPEAKERS])}"
            )
        content = turn.pop("content", turn.pop("value", None))
        turns.append({"role": turn_role, "content": _content(content, turn), **turn})
    try:
        return list(json.loads(canonical_json(turns)))  # a copy, as JSON keeps it
    except (TypeError, ValueError) as error:
        raise ValueError(f"{column!r} holds what JSON cannot: {error}") from None


def _content(content: Any, turn: Mapping[str, Any]) -> str:
    """The text of a turn: text, parts of text, or nothing beside calls of tools."""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        parts = [{key: part[key] for key in part if part[key] is not None} for part in content]
        if all(part.keys() == {"type", "text"} for part in parts):
            content = "".join(_text(part["text"], "content") for part in parts)
    return "" if not content and turn.get("tool_calls") else _text(content, "content")


def _last_answer(turns: list[Message]) -> tuple[list[Message], str]:
    """(prompt, response): the response is the last assistant turn, the prompt all before it."""
    answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise ValueError("its messages hold no assistant turn, so it has no response")
    if answers[-1] == 0:
        raise ValueError("its messages begin with the response, so it has no prompt")
    *prompt, answer = turns[: answers[-1] + 1]
    for key in (*REASONING, "tool_calls", "function_call"):
        if answer.get(key):
            raise ValueError(f"its answer has {key!r}, which no one scores; write all as 'content'")
    if answer.get("weight", 1) != 1:
        raise ValueError(f"its answer has weight {answer['weight']!r}, but would be scored")
    for turn in prompt:
        turn.pop("weight", None)  # only the answer is scored
    return prompt, answer["content"]


def _identified(messages: list[Message] | None, response: str) -> Document:
    turns = None
    if messages is not None:
        turns = [
            [turn["role"], _normalised(turn["content"])]
            + [{key: turn[key]} for key in TURN_KEYS if key in turn]
            for turn in messages
        ]
    return Document(digest([turns, _normalised(response)])[:DOCUMENT_DIGITS], messages, response)


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


# From sources to splits


@dataclass(frozen=True)
class Pool:
    """The distinct documents of a source, in the order in which splits take them, with counts."""

    documents: list[Document]
    records: int  # that were read
    invalid: int = 0  # records that hold no document


def _pool(part: SplitRecipe) -> Pool:
    """Read a source whole. Raises MergelawError for a bad record or too few documents."""
    name, rest = part.source.synthetic, part.train_documents is None
    if name and rest:
        raise MergelawError(
            f"{part.source} has no end, so there is no rest to train on;"
            " give train_documents a number"
        )
    wanted = part.eval_documents + (part.train_documents or 0) + part.calibration_documents
    wanted += part.confirm_documents
    records: Iterable[tuple[Any, Any]] = kept_records(part.source)
    if name:
        records = enumerate(itertools.islice(draw(name, part.seed), DRAWS * wanted))
    distinct: dict[str, Document] = {}
    invalid: list[str] = []
    read = 0
    for place, record in records:
        if name and len(distinct) == wanted:
            break
        read += 1
        try:
            document = document_of(record, part.source.columns)
        except ValueError as error:
            invalid.append(f"{place}: {error}")
            continue
        # Documents that differ only in white space are one document, whose text is the smaller one,
        # whichever of them is read first.
        same = distinct.setdefault(document.document, document)
        if same != document:
            distinct[document.document] = min(same, document, key=_line)
    _check_invalid(part.source, invalid, read)
    if len(distinct) < sum(part.counts(len(distinct)).values()):
        skipped = f" ({len(invalid)} records are invalid)" if invalid else ""
        raise MergelawError(
            f"{part.source}: {len(distinct)} distinct documents{skipped}, but {part.eval_documents}"
            f" were asked for evaluation, {'the rest' if rest else part.train_documents} for"
            f" training, {part.calibration_documents} for calibration and"
            f" {part.confirm_documents} to confirm; lower eval_documents, train_documents,"
            " calibration_documents or confirm_documents, or give more records"
        )
    documents = list(distinct.values())
    # Synthetic documents are already in random order. Sorting by digest would make the evaluation
    # documents depend on the number of documents drawn.
    if not name:
        documents.sort(key=lambda document: digest([part.seed, document.document]))
    return Pool(documents, read, len(invalid))


def _check_invalid(source: Source, invalid: Sequence[str], records: int) -> None:
    if invalid and source.invalid_records == "refuse":
        more = f" (and {len(invalid) - 1} more like it)" if invalid[1:] else ""
        raise MergelawError(
            f"{invalid[0]}; correct or remove the record{more}, or set invalid_records: skip"
        )
    if invalid:
        counts = f"{len(invalid)} of {records} records skipped, the first is {invalid[0]}"
        print(f"mergelaw: {source}: {counts}", file=sys.stderr)


def _divided(pool: Pool, part: SplitRecipe) -> dict[str, list[Document]]:
    # Evaluation takes the first documents, training the next and calibration the last, behind those
    # that confirm, so that a new document in a source moves as few others as possible.
    counts = part.counts(len(pool.documents))
    evaluation, last = counts["eval"], len(pool.documents) - counts["calibration"]
    before = last - counts["confirm"]
    return {
        "eval": pool.documents[:evaluation],
        "train": pool.documents[evaluation:before][: part.train_documents],
        "confirm": pool.documents[before:last],
        "calibration": pool.documents[last:],
    }


# Splits as artifacts


def split_sizes(recipe: SplitRecipe, split: str, cache: FileCache) -> tuple[int, int] | None:
    """Documents of a split of local files and their UTF-8 bytes; None for another source."""
    part = recipe.part(split)
    return tuple(_contents(part, cache)[split][1:]) if part.source.is_local else None


def evaluated(recipe: SplitRecipe, cache: FileCache) -> list[str]:
    """The evaluation documents of local files; empty for another source."""
    part = recipe.part("eval")
    return _contents(part, cache)["evaluated"] if part.source.is_local else []


def _contents(part: SplitRecipe, cache: FileCache) -> dict[str, list[Any]]:
    """Digest, number and bytes of each split of local files, and what it evaluates, cached."""

    def contents() -> dict[str, list[Any]]:
        splits = _divided(_pool(part), part)
        return {
            name: [content_digest(documents), len(documents), sum(map(_bytes, documents))]
            for name, documents in splits.items()
        } | {"evaluated": [document.document for document in splits["eval"]]}

    name = f"split contents 2 {STAGES['corpus']} {part.model_dump_json(exclude_defaults=True)}"
    try:
        values: dict[str, list[Any]] = cache.value(name, local_files(part.source), contents)
    except OSError as error:
        raise unreadable(Path(error.filename), error) from error
    return values


def split_identity(recipe: SplitRecipe, split: str, cache: FileCache) -> dict[str, Any]:
    """Identity of a split, for its key.

    The identity of a split of local files is the digest of its documents, cached in ``cache``. The
    identity of a split of a hub dataset or a synthetic domain is its source, the seed and the
    counts that decide which documents it takes.
    """
    part = recipe.part(split)
    if part.source.is_local:
        return {"documents": _contents(part, cache)[split][0]}
    counts = {"eval_documents"}
    if split != "eval":
        counts |= {"train_documents"}
    if split == "calibration" or (split == "train" and part.train_documents is None):
        counts |= {"calibration_documents"}
    if split == "confirm" or (part.confirm_documents and "calibration_documents" in counts):
        counts |= {"calibration_documents", "confirm_documents"}
    identity = part.model_dump(include={"seed", *counts})
    if part.source.synthetic is not None:
        identity |= {"generator_version": GENERATOR_VERSION}
    return identity | {"source": part.source.model_dump(exclude_defaults=True)}


def content_digest(documents: Iterable[Document]) -> str:
    """SHA-256 of documents in their order."""
    content = hashlib.sha256()
    for document in documents:
        content.update(_line(document).encode() + b"\n")
    return content.hexdigest()


def write_split(
    recipe: SplitRecipe, split: str, identity: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Write a split to ``folder/documents.parquet``; return facts for its lineage.

    The columns are document, messages (JSON text, null for plain text) and response; equal
    documents give equal bytes. Facts count the records, duplicates and invalid records of the
    source, the split's documents and the UTF-8 bytes of their prompts and responses, and name the
    source with the SHA-256 of its files. Raises MergelawError, before it writes, for documents that
    do not fill the split or differ from ``identity``.
    """
    part = recipe.part(split)
    pool = _pool(part)
    documents = _divided(pool, part)[split]
    if identity.get("documents", content := content_digest(documents)) != content:
        raise MergelawError(f"{part.source}: changed since the run began; rerun")
    folder.mkdir(parents=True, exist_ok=True)
    _write(documents, folder / DOCUMENTS)
    files = local_files(part.source) if part.source.is_local else []
    digests = [f"{file} sha256:{FileCache().sha256(file)}" for file in files]
    return {
        "records": pool.records,
        "duplicates": pool.records - pool.invalid - len(pool.documents),
        "invalid_records": pool.invalid,
        "documents": len(documents),
        "bytes": sum(map(_bytes, documents)),
        "sources": [canonical_json(part.source.model_dump(exclude_defaults=True)), *digests],
    }


def _bytes(document: Document) -> int:
    texts = [turn["content"] for turn in document.messages or []]
    return sum(len(text.encode()) for text in [*texts, document.response])


def _row(document: Document) -> dict[str, str | None]:
    messages = None if document.messages is None else canonical_json(document.messages)
    return {"document": document.document, "messages": messages, "response": document.response}


def _line(document: Document) -> str:
    return canonical_json(_row(document))


def _write(documents: Sequence[Document], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            pa.field("document", pa.string(), nullable=False),
            pa.field("messages", pa.string()),
            pa.field("response", pa.string(), nullable=False),
        ]
    )
    pq.write_table(pa.Table.from_pylist(list(map(_row, documents)), schema=schema), path)


def read_split(folder: Path) -> list[Document]:
    """The documents of a split that ``write_split`` wrote, in its order."""
    return [
        Document(
            row["document"],
            None if row["messages"] is None else json.loads(row["messages"]),
            row["response"],
        )
        for row in _rows(folder, ["document", "messages", "response"])
    ]


def _rows(folder: Path, columns: list[str]) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(folder / DOCUMENTS) as table:
            rows: list[dict[str, Any]] = table.read(columns=columns).select(columns).to_pylist()
            return rows
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise MergelawError(
            f"{folder}: not a split of a corpus: {first_line(error)}; delete the folder and rerun"
        ) from error


def check_overlap(
    train: Mapping[str, Path],
    evaluation: Mapping[str, Path],
    calibration: Mapping[str, Path],
    confirm: Mapping[str, Path] | None = None,
) -> list[str]:
    """Refuse splits ({domain: folder}) that share documents, also across domains.

    No domain may train or calibrate on an evaluation document, which would make a merge look better
    than it is, nor calibrate on a training document. Documents that confirm a choice have no other
    use. Several domains may train on the same document, or evaluate some. Returns notes
    (:func:`shared_documents`). Raises MergelawError for the first pair of domains that share
    documents.
    """
    splits = {"trains": train, "evaluates": evaluation, "calibrates": calibration}
    splits["confirms"] = confirm or {}
    digests = {
        use: {name: {row["document"] for row in _rows(path, ["document"])} for name, path in all_of}
        for use, all_of in ((use, folders.items()) for use, folders in splits.items())
    }
    for first_use, second_use in (
        ("trains", "evaluates"),
        ("calibrates", "evaluates"),
        ("trains", "calibrates"),
        ("trains", "confirms"),
        ("evaluates", "confirms"),
        ("calibrates", "confirms"),
    ):
        for (second, theirs), (first, ours) in itertools.product(
            digests[second_use].items(), digests[first_use].items()
        ):
            if not (shared := ours & theirs):
                continue
            split = read_split(splits[second_use][second])
            document = next(one for one in split if one.document in shared)
            turns = document.messages
            text = _normalised(turns[-1]["content"] if turns else document.response)
            raise MergelawError(
                f"{first} {first_use} on documents that {second} {second_use} on:"
                f" {len(shared)} of them, the first is {document.document} ({text[:60]!r});"
                " remove them from one of the two sources, or give the domains sources that"
                " have nothing in common"
            )
    return shared_documents(digests["evaluates"])


def shared_documents(evaluation: Mapping[str, Iterable[str]]) -> list[str]:
    """Notes on domains that evaluate some of the same documents, by pair.

    Raises MergelawError for two domains that evaluate the same documents and no others.
    """
    notes = []
    for (first, ours), (second, theirs) in itertools.combinations(evaluation.items(), 2):
        ours, theirs = {*ours}, {*theirs}
        if ours and ours == theirs:
            raise MergelawError(
                f"domains {first} and {second}: evaluate the same {len(ours)} documents, so one of"
                " them says nothing new and the macro loss counts them twice; remove one"
            )
        if shared := len(ours & theirs):
            notes.append(
                f"domains {first} ({len(ours)}) and {second} ({len(theirs)}): {shared} evaluation"
                " documents are in both, and count twice in the macro loss"
            )
    return notes


def few_documents(domain: str, count: int) -> list[str]:
    """A note on a domain that evaluates fewer than :data:`FEW` documents."""
    if count >= FEW:
        return []
    return [
        f"domain {domain}: evaluates {count} documents, too few to know the error of its losses;"
        f" give at least {FEW}, better 100"
    ]
