"""Base class of recipes: the settings that define an artifact.

Every package keeps its recipes in a module named ``recipe``; a configuration is composed of them.
Recipes are read by every job, so these modules import neither torch nor numpy.
"""

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

# Names become parts of paths, so they hold nothing that a path or a shell treats specially.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=64)]
Seed = Annotated[int, Field(ge=0)]
T = TypeVar("T")


def _distinct(values: list[T]) -> list[T]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} is given twice; remove one")
    return values


Distinct = Annotated[list[T], Field(min_length=1), AfterValidator(_distinct)]


class Model(BaseModel):
    """Strict, immutable settings: unknown keys, infinity and NaN are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        known: list[Any] = []
        for name, field in cls.model_fields.items():
            alias = field.validation_alias or name
            known += getattr(alias, "choices", [alias])
        for key in data if isinstance(data, dict) else ():
            if key not in known:
                raise ValueError(f"unknown key {key!r}{nearest(str(key), known)}")
        return data
