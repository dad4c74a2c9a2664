"""Base class of recipes: the settings that define an artifact.

Every package has its recipes in a module named ``recipe``; a configuration consists of them. Every
job reads recipes, so these modules import neither torch nor numpy.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from mergelaw.errors import nearest

# Names become parts of paths, so they have no character with a meaning in paths or shells.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=64)]
Seed = Annotated[int, Field(ge=0)]
T = TypeVar("T")


def _distinct(values: list[T]) -> list[T]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} is given twice; remove one")
    return values


def _expanded(path: str) -> str:
    if path.startswith("~"):
        try:
            path = str(Path(path).expanduser())
        except RuntimeError:
            raise ValueError("begins with '~' but names no user's home folder") from None
    if "\0" in path:
        raise ValueError("holds a NUL character, which no path can; remove it")
    return path


LocalPath = Annotated[str, AfterValidator(_expanded)]
Distinct = Annotated[list[T], Field(min_length=1), AfterValidator(_distinct)]


class Model(BaseModel):
    """Strict, immutable settings: unknown keys, infinity and NaN are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        names: list[Any] = []
        for name, field in cls.model_fields.items():
            alias = field.validation_alias or name
            names += getattr(alias, "choices", [alias])
        for key in data if isinstance(data, dict) else ():
            if key not in names:
                raise ValueError(f"unknown key {key!r}{nearest(str(key), names)}")
        return data
