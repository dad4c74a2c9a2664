"""A look at the first records of a source's files, before a study runs."""

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mergelaw.data.documents import Document, document_of
from mergelaw.data.recipe import Source
from mergelaw.data.sources import file_records, local_files
from mergelaw.data.tokenize import encode
from mergelaw.errors import MergelawError


@dataclass
class Inspection:
    """The documents of the records looked at, and their tokens where a tokenizer was given."""

    documents: list[Document] = field(default_factory=list)
    longest: int = 0  # tokens of the longest document
    earlier_answers: int = 0  # of chats, which are context: only the last answer is scored
    changes: Counter[str] = field(default_factory=Counter)  # by the chat template, in documents


def inspect(
    source: Source,
    tokenizer: Any = None,
    rows: int | None = None,
    records: int | None = 4,
    protocol: str = "mergelaw",
) -> Inspection:
    """Read the first ``records`` (None: all) of each file of a source, and tokenise them.

    ``rows`` is the number of rows of the base's embedding. A dataset of the hub and a generator are
    not looked at. Raises MergelawError with the place for a file that cannot be read, a record
    without a document, a document that the chat template refuses or changes, and a token without a
    row in the embedding.
    """
    inspection = Inspection()
    if not source.is_local:
        return inspection
    files = local_files(source) if source.files else [None]
    for file in files:
        documents: list[Document] = []
        for place, record in itertools.islice(file_records(source, file), records):
            try:
                documents.append(document_of(record, source.columns))
            except ValueError as error:
                if source.invalid_records == "refuse":
                    raise MergelawError(f"{place}: {error}; correct or remove the record") from None
        inspection.documents += documents
        roles = (turn["role"] for one in documents for turn in one.messages or [])
        inspection.earlier_answers += list(roles).count("assistant")
        if tokenizer is None or not documents:
            continue
        where = str(file or source)
        try:
            encoded = encode(tokenizer, documents, 1 << 62, "truncate", where, protocol, rows, True)
        except MergelawError as error:
            text = str(error)
            raise MergelawError(text if text.startswith(where) else f"{where}: {text}") from None
        inspection.changes.update(encoded.changes)
        inspection.longest = max(
            inspection.longest, *(len(window.ids) for window in encoded.windows)
        )
    return inspection
