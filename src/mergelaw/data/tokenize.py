"""From documents to token windows: what is scored, what is only read.

Instruction data goes through the tokenizer's chat template; the response with its end-of-turn token
is scored. Plain text is scored as a whole, after a beginning-of-sequence token where the tokenizer
has one (otherwise its first token is only read). Training and evaluation share this.

The ``merging_eval`` protocol is that of the law's paper (its released evaluation script), to
compare numbers with: see :func:`merging_eval_parts`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergelaw.data.documents import Document
from mergelaw.errors import MergelawError

# For tokenizers without a chat template of their own.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
)
# Templates that print the day would make a loss depend on when it was measured.
DATE = {"date_string": "26 Jul 2024"}
# What the merging_eval protocol says where nobody else does.
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
# And the template it gives to a tokenizer without one: Llama 3's.
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
    scored_bytes: int  # UTF-8 bytes of the text that is scored


def rendered(
    tokenizer: Any, document: Document, turns: list[Any], answer: str, template: str | None
) -> tuple[str, str]:
    """The chat up to the answer, and with it. ``template``: for a tokenizer without its own."""
    settings = {
        "chat_template": None if tokenizer.chat_template else template,
        "tokenize": False,
        **DATE,
    }
    whole = [*turns, {"role": "assistant", "content": answer}]
    try:
        return (
            tokenizer.apply_chat_template(turns, add_generation_prompt=True, **settings),
            tokenizer.apply_chat_template(whole, **settings),
        )
    except Exception as error:  # whatever a foreign template raises
        raise MergelawError(
            f"document {document.document}: the chat template refuses it ({error}); "
            "mend the document's roles or the template"
        ) from None


def texts(tokenizer: Any, document: Document) -> tuple[str, str]:
    """(what is read, what follows it) of a document, as text with its control tokens."""
    if document.messages is None:
        return tokenizer.bos_token or "", document.response
    prompt, whole = rendered(
        tokenizer, document, document.messages, document.response, PLAIN_TEMPLATE
    )
    if not whole.startswith(prompt):
        raise MergelawError(
            f"document {document.document}: the chat template writes the prompt differently once "
            "there is an answer; use a template that does not"
        )
    return prompt, whole[len(prompt) :]


def parts(tokenizer: Any, documents: Sequence[Document]) -> list[tuple[list[int], list[int], int]]:
    """(prompt's ids, response's ids, how many of the response's ids are scored) of each."""
    if not documents:
        return []
    pairs = [texts(tokenizer, document) for document in documents]
    both = [text for pair in pairs for text in pair]
    ids = tokenizer(both, add_special_tokens=False, verbose=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    made = []
    for document, prompt, rest in zip(documents, ids[::2], ids[1::2], strict=True):
        if document.messages is None:
            # Without a beginning, the first token can only be read.
            begin, text = (prompt, rest) if prompt else (rest[:1], rest[1:])
            made.append((begin, text, len(text)))
            continue
        ends = [place for place, token in enumerate(rest) if token in special]
        made.append((prompt, rest, ends[-1] + 1 if ends else len(rest)))
    return made


def too_long(where: str, document: Document, size: int, max_tokens: int) -> MergelawError:
    return MergelawError(
        f"{where}: document {document.document} has {size} tokens, max_tokens is "
        f"{max_tokens}; raise it, or set long_documents to split or truncate"
    )


def merging_eval_parts(
    tokenizer: Any, documents: Sequence[Document]
) -> list[tuple[list[int], list[int], int]]:
    """What ``parts`` gives, by the protocol of the law's paper.

    A system message where there is none, contents stripped, the tokenizer's own special tokens put
    in front of the template's; prompt and whole tokenised apart, and everything scored behind as
    many tokens as the prompt has: the tokens after the end of the turn too.
    """
    made = []
    for document in documents:
        if document.messages is None:
            raise MergelawError(
                f"document {document.document}: plain text, which protocol merging_eval does not "
                "know; give a prompt and a response, or use protocol mergelaw"
            )
        turns = [{**turn, "content": turn["content"].strip()} for turn in document.messages]
        if not turns or turns[0]["role"] != "system":
            turns.insert(0, SYSTEM)
        answer = document.response.strip()
        prompt, whole = rendered(tokenizer, document, turns, answer, MERGING_EVAL_TEMPLATE)
        start, ids = (tokenizer(text, verbose=False)["input_ids"] for text in (prompt, whole))
        made.append((ids[: len(start)], ids[len(start) :], max(len(ids) - len(start), 0)))
    return made


def encode(
    tokenizer: Any,
    documents: Sequence[Document],
    max_tokens: int,
    long_documents: str,
    where: str,
    protocol: str = "mergelaw",
) -> Encoded:
    """The windows of ``documents``, none longer than ``max_tokens``.

    A longer document is refused, cut (``truncate``: the tokens behind the cut are not scored) or
    spread over windows (``split``: each scored token once, a window beginning with the last token
    of the one before). Raises MergelawError for a refused one, and where nothing is left to score.
    """
    windows: list[Window] = []
    long = dropped = 0
    scored_bytes = []
    split = merging_eval_parts if protocol == "merging_eval" else parts
    encoded = zip(documents, split(tokenizer, documents), strict=True)
    for number, (document, (prompt, response, scored)) in enumerate(encoded):
        # Nothing predicts the very first token, where no prompt and no beginning stands before it.
        ids, start, stop = prompt + response, max(len(prompt), 1), len(prompt) + scored
        scored_bytes.append(len(document.response.encode()))
        cut = min(stop, max_tokens) if long_documents == "truncate" else stop
        whole = document.messages is not None or tokenizer.bos_token
        whole = whole and protocol != "merging_eval"
        if not whole or (start, cut) != (len(prompt), stop):
            seen = tokenizer.decode(ids[start : max(start, cut)], skip_special_tokens=True)
            scored_bytes[-1] = len(seen.encode())
        if len(ids) > max_tokens:
            long += 1
            if long_documents == "refuse":
                raise too_long(where, document, len(ids), max_tokens)
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
        raise MergelawError(
            f"{where}: no token to score in {len(documents)} documents; check the data"
        )
    return Encoded(windows, len(documents), long, dropped, sum(scored_bytes))
