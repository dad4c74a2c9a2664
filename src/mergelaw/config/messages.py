"""Errors of pydantic as one line: where, what is wrong, what to do."""

from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

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


def describe(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """Format the errors of ``model``, whose settings stand at ``where``, as one line."""
    problems = list(dict.fromkeys(_describe(item, model, where) for item in error.errors()))
    more = len(problems) - MAX_PROBLEMS
    return "; ".join(problems[:MAX_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")


def _describe(item: Any, model: type[BaseModel], where: str) -> str:
    kind, place = item["type"], [part for part in item["loc"] if part != "[key]"]
    if kind == "extra_forbidden":
        message = f"unknown key{nearest(str(place[-1]), _keys_at(model, place[:-1]))}"
    elif kind == "union_tag_invalid":
        tag = str(item["ctx"]["tag"])
        message = f"no merge method {tag!r}{nearest(tag, registry())}"
    else:
        message = item["msg"].removeprefix("Value error, ")
        if place != ["results"]:  # a path, not a name
            message = PLAIN_WORDS.get(kind, message)
        if kind not in ("missing", "value_error"):
            message += f" (got {clip(repr(item['input']))})"
    if place[:1] == ["methods"]:
        place[2:3] = []  # pydantic's name for the member of the union
    parts = filter(None, [where, *(clip(str(part)) for part in place)])
    return ": ".join(filter(None, [".".join(parts), message]))


def clip(text: str, length: int = 60) -> str:
    """Shorten a text to a number of characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _keys_at(model: type[BaseModel], place: Sequence[Any]) -> list[str]:
    """The keys that a configuration may have at a place."""
    parts = iter(place)
    for part in parts:
        types = list(_types_in(model.model_fields[part].annotation))
        if any(get_origin(annotation) in (dict, list) for annotation in types):
            next(parts)  # a name or an index
        models = [t for t in types if isinstance(t, type) and issubclass(t, BaseModel)]
        model = models[0] if len(models) == 1 else registry()[next(parts)]
    return [field.alias or name for name, field in model.model_fields.items()]


def _types_in(annotation: Any) -> Iterator[Any]:
    """The annotation and all types inside it."""
    yield annotation
    for argument in get_args(annotation):
        yield from _types_in(argument)
