"""Tokens of documents: which are scored, and windows of at most ``max_tokens``.

Chat documents go through the tokenizer's chat template. The response and its end-of-turn token are
scored; the prompt is context. Plain text is scored whole, after a beginning-of-sequence token if
the tokenizer has one; otherwise its first token is context. Training and evaluation share this
code. The ``merging_eval`` protocol is that of the law paper's evaluation script, for comparison
with the paper's numbers: see ``merging_eval_parts``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergelaw.data.documents import Document
from mergelaw.errors import MergelawError

# For tokenizers without a chat template.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
)
# A template that prints the date would make a loss depend on the day of its measurement.
DATE = {"date_string": "26 Jul 2024"}
# The merging_eval protocol's system message for documents without one, and its template for
# tokenizers without one: Llama 3's.
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
MERGING_EVAL_TEMPLATE = (
    "{{ bos_token or '' }}"
    + HEADER.format("system")
    + "Cutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n"
    "{{ messages[0]['content'] }}<|eot_id|>{% for message in messages[1:] %}"
    + HEADER.format("{{ message['role'] }}")
    + "{{ message['content'] }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    + HEADER.format("assistant")
    + "{% endif %}"
)


Parts = tuple[list[int], list[int], int]
"""Token ids of the prompt and of the response, and how many of the latter are scored."""


@dataclass(frozen=True)
class Window:
    """Token ids of one document; those from ``start`` to ``stop`` are scored."""

    document: int
    ids: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Encoded:
    """The windows of a set of documents, and counts of what was cut from long ones."""

    windows: list[Window]
    documents: int
    long_documents: int
    dropped_tokens: int
    scored_bytes: int  # UTF-8 bytes of the scored text


def _render(
    tokenizer: Any, document: Document, turns: list[Any], answer: str, default_template: str
) -> tuple[str, str]:
    """The chat without and with its answer, by the tokenizer's template or the default one."""
    settings = {
        "chat_template": None if tokenizer.chat_template else default_template,
        "tokenize": False,
        **DATE,
    }
    whole = [*turns, {"role": "assistant", "content": answer}]
    try:
        return (
            tokenizer.apply_chat_template(turns, add_generation_prompt=True, **settings),
            tokenizer.apply_chat_template(whole, **settings),
        )
    except Exception as error:  # a template raises whatever it likes
        raise MergelawError(
            f"document {document.document}: the chat template refuses it ({error}); fix the"
            " document's roles or the template"
        ) from None


def texts(tokenizer: Any, document: Document) -> tuple[str, str]:
    """A document's prompt and response as text, with control tokens."""
    if document.messages is None:
        return tokenizer.bos_token or "", document.response
    prompt, whole = _render(
        tokenizer, document, document.messages, document.response, PLAIN_TEMPLATE
    )
    if not whole.startswith(prompt):
        raise MergelawError(
            f"document {document.document}: the chat template writes the prompt differently when"
            " the answer follows; use a template that does not"
        )
    return prompt, whole[len(prompt) :]


def parts(tokenizer: Any, documents: Sequence[Document]) -> list[Parts]:
    """The token ids of each document's prompt and response.

    Tokens of a chat's response after its last special token, the end of turn, are not scored.
    """
    if not documents:
        return []
    both = [text for document in documents for text in texts(tokenizer, document)]
    ids = tokenizer(both, add_special_tokens=False, verbose=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    encoded = []
    for document, prompt, response in zip(documents, ids[::2], ids[1::2], strict=True):
        scored = len(response)
        if document.messages is not None:
            ends = [place for place, token in enumerate(response) if token in special]
            scored = ends[-1] + 1 if ends else scored
        elif not prompt:  # nothing predicts the first token, so it is context
            prompt, response = response[:1], response[1:]
            scored = len(response)
        encoded.append((prompt, response, scored))
    return encoded


def too_long(where: str, document: Document, size: int, max_tokens: int) -> MergelawError:
    """The error for a document longer than ``max_tokens`` under ``long_documents: refuse``."""
    return MergelawError(
        f"{where}: document {document.document} has {size} tokens, max_tokens is {max_tokens};"
        " raise it, or set long_documents to split or truncate"
    )


def merging_eval_parts(tokenizer: Any, documents: Sequence[Document]) -> list[Parts]:
    """Token ids of prompts and responses, like ``parts``, by the protocol of the law's paper.

    A document without a system message gets one, contents are stripped, and the tokenizer's special
    tokens precede those of the template. Prompt and whole chat are tokenised separately; all tokens
    of the chat after the prompt's number of tokens are scored, to the last.
    """
    encoded = []
    for document in documents:
        if document.messages is None:
            raise MergelawError(
                f"document {document.document}: is plain text, which protocol merging_eval lacks;"
                " give a prompt and a response, or use protocol mergelaw"
            )
        turns = [{**turn, "content": turn["content"].strip()} for turn in document.messages]
        if not turns or turns[0]["role"] != "system":
            turns.insert(0, SYSTEM)
        answer = document.response.strip()
        prompt, whole = _render(tokenizer, document, turns, answer, MERGING_EVAL_TEMPLATE)
        size = len(tokenizer(prompt, verbose=False)["input_ids"])
        ids = tokenizer(whole, verbose=False)["input_ids"]
        encoded.append((ids[:size], ids[size:], max(len(ids) - size, 0)))
    return encoded


def encode(
    tokenizer: Any,
    documents: Sequence[Document],
    max_tokens: int,
    long_documents: str,
    where: str,
    protocol: str = "mergelaw",
) -> Encoded:
    """The windows of ``documents``, each of at most ``max_tokens`` tokens.

    A longer document is an error (``refuse``), loses the tokens beyond the limit (``truncate``), or
    becomes several windows (``split``): each token is scored once, and a window begins with the
    last token of the previous one. Raises MergelawError also if no token is left to score.
    """
    windows: list[Window] = []
    long = dropped = scored_bytes = 0
    encoded = (merging_eval_parts if protocol == "merging_eval" else parts)(tokenizer, documents)
    for number, (document, (prompt, response, scored)) in enumerate(
        zip(documents, encoded, strict=True)
    ):
        ids = prompt + response
        if len(ids) > max_tokens:
            long += 1
            if long_documents == "refuse":
                raise too_long(where, document, len(ids), max_tokens)
        # Nothing predicts the very first token, even if the template writes no prompt.
        start, stop = max(len(prompt), 1), len(prompt) + scored
        kept = ids if long_documents == "split" else ids[:max_tokens]
        end = max(start, min(stop, len(kept)))
        dropped += max(stop - end, 0)
        whole = (document.messages is not None or tokenizer.bos_token) and (
            protocol != "merging_eval" and start == len(prompt) and stop <= len(kept)
        )
        text = document.response
        if not whole:
            text = tokenizer.decode(ids[start:end], skip_special_tokens=True)
        scored_bytes += len(text.encode())
        for first in range(0, len(kept) - 1, max_tokens - 1):
            last = min(first + max_tokens, len(kept))
            window = max(start, first + 1), min(stop, last)
            if window[0] < window[1]:
                begin, finish = (place - first for place in window)
                windows.append(Window(number, tuple(kept[first:last]), begin, finish))
    if not windows:
        raise MergelawError(
            f"{where}: no token to score in {len(documents)} documents; check the data"
        )
    return Encoded(windows, len(documents), long, dropped, scored_bytes)
