"""From documents to token windows: what is scored, what is only read.

Instruction data goes through the tokenizer's chat template; the response with its end-of-turn token
is scored. Plain text is scored as a whole, after a beginning-of-sequence token where the tokenizer
has one (otherwise its first token is only read). Training and evaluation share this.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mergelaw.corpus import Document
from mergelaw.errors import MergelawError

# For tokenizers without a chat template of their own.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class Window:
    """Tokens of one document; those from ``start`` to ``stop`` are scored."""

    document: int
    ids: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Encoded:
    """The windows of a set of documents, and what happened to the long ones."""

    windows: list[Window]
    documents: int
    long_documents: int
    dropped_tokens: int


def parts(tokenizer: Any, document: Document) -> tuple[list[int], list[int], int]:
    """(prompt's ids, response's ids, how many of the response's ids are scored)."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    if document.messages is None:
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        text = ids(document.response)
        return (begin, text, len(text)) if begin else (text[:1], text[1:], len(text[1:]))
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    answer = {"role": "assistant", "content": document.response}
    try:
        prompt = tokenizer.apply_chat_template(
            document.messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(
            [*document.messages, answer], chat_template=template, tokenize=False
        )
    except Exception as error:  # whatever a foreign template raises
        raise MergelawError(
            f"document {document.document}: the chat template refuses it ({error}); "
            "mend the document's roles or the template"
        ) from None
    if not whole.startswith(prompt):
        raise MergelawError(
            f"document {document.document}: the chat template writes the prompt differently once "
            "there is an answer; use a template that does not"
        )
    rest = ids(whole[len(prompt) :])
    special = set(tokenizer.all_special_ids)
    ends = [place for place, token in enumerate(rest) if token in special]
    return ids(prompt), rest, ends[-1] + 1 if ends else len(rest)


def encode(
    tokenizer: Any,
    documents: Iterable[Document],
    max_tokens: int,
    long_documents: str,
    where: str,
) -> Encoded:
    """The windows of ``documents``, none longer than ``max_tokens``.

    A longer document is refused, cut (``truncate``: the tokens behind the cut are not scored) or
    spread over windows (``split``: each scored token once, a window beginning with the last token
    of the one before). Raises MergelawError for a refused one, and where nothing is left to score.
    """
    windows: list[Window] = []
    count = long = dropped = 0
    for number, document in enumerate(documents):
        count += 1
        prompt, response, scored = parts(tokenizer, document)
        # Nothing predicts the very first token, should a template write no prompt.
        ids, start, stop = prompt + response, max(len(prompt), 1), len(prompt) + scored
        if len(ids) > max_tokens:
            long += 1
            if long_documents == "refuse":
                raise MergelawError(
                    f"{where}: document {document.document} has {len(ids)} tokens, max_tokens is "
                    f"{max_tokens}; raise it, or set long_documents to split or truncate"
                )
        if long_documents == "split" and len(ids) > max_tokens:
            for first in range(0, len(ids) - 1, max_tokens - 1):
                last = min(first + max_tokens, len(ids))
                begin, end = max(start, first + 1), min(stop, last)
                if begin < end:
                    window = tuple(ids[first:last])
                    windows.append(Window(number, window, begin - first, end - first))
            continue
        end = min(stop, max_tokens)
        dropped += max(stop - max(end, start), 0)
        if start < end:
            windows.append(Window(number, tuple(ids[:max_tokens]), start, end))
    if not windows:
        raise MergelawError(f"{where}: no token to score in {count} documents; check the data")
    return Encoded(windows, count, long, dropped)
