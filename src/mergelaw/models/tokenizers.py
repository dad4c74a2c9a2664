"""Tokenizers of base and expert: what a merge needs them to have in common."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergelaw.errors import MergelawError
from mergelaw.models import causal_lm

# Added tokens that a fine-tune may put to use under another name.
RESERVED = re.compile(r"reserved|unused|extra|dummy|placeholder|control|special", re.IGNORECASE)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def read_tokenizer(folder: Path) -> dict[str, Any] | None:
    """The content of tokenizer.json, or what transformers makes of older files; None without any.

    Raises MergelawError for a damaged tokenizer.
    """
    path = folder / "tokenizer.json"
    if not any((folder / name).exists() for name in VOCABULARIES):
        return None
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
        else:
            tokenizer = causal_lm.load_tokenizer(folder)
            fast = getattr(tokenizer, "backend_tokenizer", None)
            plain = {"model": {"vocab": tokenizer.get_vocab()}}
            content = json.loads(fast.to_str()) if fast else plain
        if isinstance(content["model"], dict):
            return dict(content)
    raise MergelawError(f"{path}: not a tokenizer; copy the checkpoint again")


def tokens_of(content: Mapping[str, Any]) -> dict[int, Any]:
    """The vocabulary by row: tokens, or pairs of token and score of a unigram model."""
    vocabulary = content["model"].get("vocab") or {}
    if isinstance(vocabulary, dict):
        return {row: token for token, row in vocabulary.items()}
    return dict(enumerate(vocabulary))


def added_of(content: Mapping[str, Any]) -> dict[int, str]:
    """The added tokens by row."""
    return {token["id"]: token["content"] for token in content.get("added_tokens") or []}


def merges_of(content: Mapping[str, Any]) -> list[str]:
    """The merges of a byte-pair encoding, in order."""
    merges = content["model"].get("merges") or []
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def template_of(folder: Path) -> Any:
    """The chat template; None without one."""
    path, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.exists():
        return path.read_text(encoding="utf-8")
    try:
        return json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None


def compare_tokenizers(base: Path, expert: Path, rows: tuple[int | None, int | None]) -> list[str]:
    """Refuse an expert whose tokenizer gives other tokens; returns notes on smaller differences.

    ``rows``: the two vocabulary sizes, the base's first; only their common rows are compared. A
    tokenizer is compared only if the expert has one. Raises MergelawError.
    """
    notes = []
    if (template := template_of(expert)) is not None and template != template_of(base):
        notes.append(f"{expert}: has another chat template than the base, whose template is used")
    ours, theirs = read_tokenizer(base), read_tokenizer(expert)
    if ours is None or theirs is None or ours == theirs:
        return notes
    common = min(filter(None, rows), default=1 << 60)
    refusal = "rows of other tokens cannot be merged"
    both = tokens_of(ours), tokens_of(theirs)
    for row in sorted(row for row in both[0].keys() & both[1].keys() if row < common):
        if both[0][row] != both[1][row]:
            raise MergelawError(
                f"{expert}: token {row} is {both[1][row]!r}, the base's is {both[0][row]!r}; "
                f"{refusal}"
            )
    merges = merges_of(ours), merges_of(theirs)
    shared = min(map(len, merges))
    if merges[0][:shared] != merges[1][:shared] or (
        rows[0] == rows[1] and len({*map(len, merges)}) > 1
    ):
        raise MergelawError(
            f"{expert}: its tokenizer has other merges ({len(merges[1])}) than the base's "
            f"({len(merges[0])}), so it splits text otherwise; give an expert that kept the "
            "tokenizer"
        )
    added = added_of(ours), added_of(theirs)
    for row in sorted(added[0].keys() & added[1].keys()):
        if added[0][row] != added[1][row]:
            if row < common and not RESERVED.search(added[0][row]):
                raise MergelawError(
                    f"{expert}: added token {row} is {added[1][row]!r}, the base's is "
                    f"{added[0][row]!r}; {refusal}"
                )
            notes.append(
                f"{expert}: calls token {row} {added[1][row]!r}, the base {added[0][row]!r}"
            )
    if more := sorted(added[1].keys() - added[0].keys() - both[0].keys()):
        shown = ", ".join(repr(added[1][row]) for row in more[:3])
        notes.append(
            f"{expert}: its tokenizer adds {len(more)} tokens ({shown}); the base's is used, "
            "without them"
        )
    for part in ("normalizer", "pre_tokenizer"):
        if ours.get(part) != theirs.get(part):
            notes.append(
                f"{expert}: its tokenizer has another {part} than the base's, which is used; texts "
                "may have other tokens than in the expert's training"
            )
    return notes
