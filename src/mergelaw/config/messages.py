"""Errors of pydantic as one line: where, what is wrong, what to do."""

from typing import Any

from pydantic import ValidationError

from mergelaw.errors import nearest
from mergelaw.merging.methods import registry

MAX_PROBLEMS = 5
NAME_RULE = "a name has up to 64 letters, digits, '.', '_' and '-'; the first is a letter or digit"
NO_MAPPING = "is not a mapping of keys to values"
PLAIN_WORDS = {
    "missing": "is required",
    "string_pattern_mismatch": NAME_RULE,
    "string_too_long": NAME_RULE,
    "string_type": "is not text; put it in quotes",
    "dict_type": NO_MAPPING,
    "model_type": NO_MAPPING,
    "model_attributes_type": NO_MAPPING,
    "list_type": "is not a list",
    "too_short": "is empty",
}


def describe(error: ValidationError, where: str = "") -> str:
    """Format validation errors of settings at ``where`` as one line."""
    problems = list(dict.fromkeys(_describe(item, where) for item in error.errors()))
    more = len(problems) - MAX_PROBLEMS
    return "; ".join(problems[:MAX_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")


def _describe(item: Any, where: str) -> str:
    kind, place = item["type"], [part for part in item["loc"] if part != "[key]"]
    message = item["msg"].removeprefix("Value error, ")
    if kind == "union_tag_invalid":
        tag = str(item["ctx"]["tag"])
        message = f"no merge method {tag!r}{nearest(tag, registry())}"
    elif place != ["results"]:  # a path, not a name
        message = PLAIN_WORDS.get(kind, message)
    if kind not in ("union_tag_invalid", "missing", "value_error"):
        message += f" (got {clip(repr(item['input']))})"
    if place[:1] == ["methods"]:
        place[2:3] = []  # pydantic's name for the member of the union
    parts = filter(None, [where, *(clip(str(part)) for part in place)])
    return ": ".join(filter(None, [".".join(parts), message]))


def clip(text: str, length: int = 60) -> str:
    """Shorten a text to a number of characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."
