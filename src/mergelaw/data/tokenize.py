"""Tokens of documents: which are scored, and windows of at most ``max_tokens``.

A chat is rendered by the tokenizer's chat template and tokenised as a whole, with the ids that
transformers' ``apply_chat_template`` gives. The tokens with characters of the answer are scored,
and the first end of turn behind them; the others are context. Plain text is scored whole, after a
beginning-of-sequence token if the tokenizer has one; otherwise its first token is context. Training
and evaluation share this code. The ``merging_eval`` protocol is that of the law paper's evaluation
script, for comparison with the paper's numbers: see ``merging_eval_parts``.
"""

import re
import reprlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, tzinfo
from functools import lru_cache
from typing import Any, Self
from unittest.mock import patch

from mergelaw.data.documents import Document
from mergelaw.errors import MergelawError, first_line

# For tokenizers without a chat template.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + (eos_token or '') }}{% else %}{{ message['content'] + '\n\n' }}"
    "{% endif %}{% endfor %}"
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


CHUNK = 1000  # documents that are tokenised at a time


class Clock(datetime):
    """The clock of chat templates: it stands still at midnight of :data:`DATE`."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        """The day of :data:`DATE`."""
        return cls(2024, 7, 26, tzinfo=tz)


@dataclass(frozen=True)
class Parts:
    """Token ids of one document; those from ``start`` to ``stop`` are scored."""

    ids: list[int]
    start: int
    stop: int
    prompt: str = ""  # text of the chat before its answer
    answer: str = ""  # text of the answer, as the template writes it
    end: str = ""  # text behind the answer, to its end of turn


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
    changes: dict[str, int]  # what chat templates changed, and in how many documents


@lru_cache(maxsize=8)
def _takes_parts(tokenizer: Any, template: str) -> bool:
    """True for a chat template that writes contents as lists of parts alone, not as text.

    Such templates come with multimodal models. Text goes first, as in transformers and vLLM.
    """
    word = "probe"
    for content in (word, [{"type": "text", "text": word}]):
        turns = [{"role": role, "content": content} for role in ("user", "assistant")]
        with suppress(Exception):  # a template raises whatever it likes
            if tokenizer.apply_chat_template(turns, tokenize=False).count(word) == len(turns):
                return content != word
    return False


def _render(
    tokenizer: Any, document: Document, turns: list[Any], default: str, generate: bool = False
) -> str:
    """The text of a chat, by the tokenizer's template or the default one."""
    from transformers.utils import chat_template_utils

    if tokenizer.chat_template and _takes_parts(tokenizer, str(tokenizer.chat_template)):
        turns = [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in turns]
    try:
        with patch.object(chat_template_utils, "datetime", Clock):
            text: str = tokenizer.apply_chat_template(
                turns,
                chat_template=None if tokenizer.chat_template else default,
                add_generation_prompt=generate,
                tokenize=False,
                **DATE,
            )
    except Exception as error:  # a template raises whatever it likes
        raise MergelawError(
            f"document {document.document}: the chat template refuses it ({first_line(error)}); fix"
            " the document's roles or the template"
        ) from None
    return text


class _Chat:
    """A chat as its template writes it, and what the template changed.

    Contents are rendered a second time between marks, which show where and how they are written.
    """

    def __init__(self, tokenizer: Any, document: Document) -> None:
        self.document, self.changes = document, set[str]()
        *prompt, answer = turns = [
            *(document.messages or []),
            {"role": "assistant", "content": document.response},
        ]

        def render(turns: list[Any]) -> str:
            return _render(tokenizer, document, turns, PLAIN_TEMPLATE)

        self.text = render(turns)
        marked = render([self._marked(turn, place) for place, turn in enumerate(turns)])
        for place, turn in enumerate(prompt):
            self._check_turn(turn, place, marked)
        for key in sorted({key for turn in prompt for key in turn} - {"role", "content"}):
            rest = [{name: turn[name] for name in turn if name != key} for turn in turns]
            with suppress(MergelawError):  # a template that refuses turns without a key uses it
                if render(rest) == self.text:
                    self.changes.add(f"ignores {key!r} of turns")
        plain = self._unmarked(marked)
        if plain != self.text:  # the template looks at contents, so marks changed the prompt too
            if _letters(plain) == _letters(self.text):
                self.changes.add("changes white space")
            marked = render([*prompt, self._marked(answer, len(prompt))])
        self.begin, self.end = self._answer(marked, *self._marks(len(prompt)))

    def _marks(self, place: int) -> tuple[str, str]:
        mark = f"mark{self.document.document}"
        return f"{mark}b{place}x", f"{mark}c{place}x"

    def _marked(self, turn: dict[str, Any], place: int) -> dict[str, Any]:
        opening, closing = self._marks(place)
        content = turn["content"]
        return {**turn, "content": opening + content + closing} if content else turn

    def _unmarked(self, text: str) -> str:
        return re.sub(rf"mark{re.escape(self.document.document)}[bc]\d+x", "", text)

    def _check_turn(self, turn: dict[str, Any], place: int, marked: str) -> None:
        """Refuse a turn that the template drops; record one that it shortens or rewrites."""
        opening, closing = self._marks(place)
        if not turn["content"]:
            return
        if opening not in marked and closing not in marked:
            raise self._refusal(f"leaves out its {turn['role']} turn", turn["content"])
        inside = marked.partition(opening)[2].partition(closing)[0]
        if inside != turn["content"]:
            self.changes.add("rewrites turns before the answer, or leaves out parts of them")

    def _answer(self, marked: str, opening: str, closing: str) -> tuple[int, int]:
        """The range of the answer's characters in the text."""
        answer = self.document.response
        before, opened, inside = marked.rpartition(opening)
        _, closed, behind = inside.partition(closing)
        before, behind = self._unmarked(before), self._unmarked(behind)
        if not (closed and self.text.endswith(behind)):
            raise self._refusal("writes its answer differently or not at all", answer)
        # An answer whose opening mark is gone begins with something that the template rewrites.
        is_begin = bool(opened) and self.text.startswith(before)
        begin, end = len(before) if is_begin else 0, len(self.text) - len(behind)
        text = self.text[begin:end]
        if text == answer if is_begin else text.endswith(answer):
            return end - len(answer), end
        letters, places = _letters(answer), [n for n, c in enumerate(text) if not c.isspace()]
        if not _letters(text).endswith(letters) or (is_begin and len(letters) < len(places)):
            raise self._refusal("writes its answer differently", answer)
        self.changes.add("changes white space")
        return (begin if is_begin else places[-len(letters)]), end

    def _refusal(self, what: str, content: str) -> MergelawError:
        return MergelawError(
            f"document {self.document.document}: the chat template {what}"
            f" ({reprlib.repr(content)}); change the document to what the template writes, or use"
            " another template"
        )


def _letters(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())


def _chat_parts(chat: _Chat, ids: list[int], offsets: Sequence[Any], added: set[int]) -> Parts:
    """The tokens of a chat: those with characters of its answer, and the end of turn, are scored.

    An added token is the template's if it reaches beyond the answer: it may swallow white space.
    """
    begin, end = chat.begin, chat.end
    inside = [
        place
        for place, (first, last) in enumerate(offsets)
        if last > begin
        and (first < end or last <= end)
        and not (ids[place] in added and (first < begin or last > end))
    ]
    if not inside:
        chat.changes.add("gives answers without a token")
        return Parts(ids, len(ids), len(ids))
    start, stop = inside[0], inside[-1] + 1
    for place in range(stop, len(ids)):
        if chat.text[end : offsets[place][0]].strip():
            break
        if ids[place] in added:
            stop = place + 1
            break
    if stop == inside[-1] + 1:
        chat.changes.add("writes no end of turn behind answers, so that none is scored,")
    tail = chat.text[end : max(end, offsets[stop - 1][1])]
    return Parts(ids, start, stop, chat.text[:begin], chat.text[begin:end], tail)


def parts(tokenizer: Any, documents: Sequence[Document]) -> tuple[list[Parts], Counter[str]]:
    """The tokens of each document, and what the chat template changed in how many documents.

    Raises MergelawError for a document that the template refuses, a turn that it leaves out, an
    answer that it changes beyond white space, and for a tokenizer without offsets of characters.
    """
    parts: list[Parts] = []
    changes: Counter[str] = Counter()
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for first in range(0, len(documents), CHUNK):
        chunk = documents[first : first + CHUNK]
        chats = [None if d.messages is None else _Chat(tokenizer, d) for d in chunk]
        texts = [c.text if c else d.response for c, d in zip(chats, chunk, strict=True)]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
        for place, chat in enumerate(chats):
            ids = encoded["input_ids"][place]
            if chat is None:  # nothing predicts a first token, so it is context
                ids = begin + ids
                parts.append(Parts(ids, min(1, len(ids)), len(ids), answer=texts[place]))
                continue
            if encoded.encodings is None:
                raise MergelawError(
                    f"the base's tokenizer, a {type(tokenizer).__name__}, does not tell which"
                    " characters a token stands for; save it as a tokenizer.json of `tokenizers`"
                )
            parts.append(_chat_parts(chat, ids, encoded.encodings[place].offsets, added))
            changes.update(chat.changes)
    return parts, changes


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
        chat = [*turns, {"role": "assistant", "content": answer}]
        prompt = _render(tokenizer, document, turns, MERGING_EVAL_TEMPLATE, generate=True)
        whole = _render(tokenizer, document, chat, MERGING_EVAL_TEMPLATE)
        size = len(tokenizer(prompt, verbose=False)["input_ids"])
        ids = tokenizer(whole, verbose=False)["input_ids"]
        encoded.append(Parts(ids, min(size, len(ids)), len(ids)))
    return encoded


def encode(
    tokenizer: Any,
    documents: Sequence[Document],
    max_tokens: int,
    long_documents: str,
    where: str,
    protocol: str = "mergelaw",
    rows: int | None = None,
    quiet: bool = False,
) -> Encoded:
    """The windows of ``documents``, each of at most ``max_tokens`` tokens.

    A longer document is an error (``refuse``), loses the tokens beyond the limit (``truncate``), or
    becomes several windows (``split``): each token is scored once, and a window begins with the
    last token of the previous one. Raises MergelawError also if no token is left to score, and for
    a token that the base's embedding of ``rows`` rows lacks. Prints what the chat template changed,
    unless ``quiet``.
    """
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        raise MergelawError(
            f"{where}: the base's tokenizer has no vocabulary, since the base's folder lacks its"
            " files; copy tokenizer.json and tokenizer_config.json into it"
        )
    windows: list[Window] = []
    long = dropped = scored_bytes = 0
    changes: Counter[str] = Counter()
    if protocol == "merging_eval":
        encoded = merging_eval_parts(tokenizer, documents)
    else:
        encoded, changes = parts(tokenizer, documents)
    for number, (document, one) in enumerate(zip(documents, encoded, strict=True)):
        ids = one.ids
        if len(ids) > max_tokens:
            long += 1
            if long_documents == "refuse":
                raise too_long(where, document, len(ids), max_tokens)
        # Nothing predicts the very first token, even if the template writes no prompt.
        start, stop = max(one.start, 1), one.stop
        kept = ids if long_documents == "split" else ids[:max_tokens]
        end = max(start, min(stop, len(kept)))
        dropped += max(stop - end, 0)
        whole = (document.messages is not None or tokenizer.bos_token) and (
            protocol != "merging_eval" and start == one.start and stop <= len(kept)
        )
        text = one.answer
        if not whole:
            text = tokenizer.decode(ids[start:end], skip_special_tokens=True)
        scored_bytes += len(text.encode())
        windows += _windows(number, kept, start, stop, max_tokens)
    if not windows:
        raise MergelawError(
            f"{where}: no token to score in {len(documents)} documents; check the data"
        )
    if rows is not None:
        _check_ids(tokenizer, windows, rows, where)
    for change, count in ({} if quiet else changes).items():
        text = f"the chat template {change} in {count} of {len(documents)} documents"
        print(f"mergelaw: {where}: {text}", file=sys.stderr)
    return Encoded(windows, len(documents), long, dropped, scored_bytes, dict(changes))


def _windows(
    document: int, ids: list[int], start: int, stop: int, max_tokens: int
) -> Iterator[Window]:
    """Windows of one document that score its tokens from ``start`` to ``stop``."""
    for first in range(0, len(ids) - 1, max_tokens - 1):
        last = min(first + max_tokens, len(ids))
        begin, end = max(start, first + 1), min(stop, last)
        if begin < end:
            yield Window(document, tuple(ids[first:last]), begin - first, end - first)


def _check_ids(tokenizer: Any, windows: Sequence[Window], rows: int, where: str) -> None:
    """Refuse a token that an embedding of ``rows`` rows lacks."""
    highest = max(max(window.ids) for window in windows)
    if highest >= rows:
        raise MergelawError(
            f"{where}: the documents have the token {tokenizer.convert_ids_to_tokens(highest)!r}"
            f" ({highest}), but the base's embedding has {rows} rows; use the base's own tokenizer,"
            " or resize its embedding"
        )
