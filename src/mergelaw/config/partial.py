"""Partial recipes: settings of one recipe that several places of a configuration give."""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

from pydantic import Field, create_model, model_validator

from mergelaw.artifacts.recipe import Model

Recipe = TypeVar("Recipe")
Whole = TypeVar("Whole", bound=Model)


class _Partial(Model):
    @model_validator(mode="after")
    def _one_duration(self) -> Self:
        if getattr(self, "steps", None) is not None and getattr(self, "epochs", None) is not None:
            raise ValueError("give exactly one of 'steps' and 'epochs'")
        return self


@cache
def _partial(recipe: type[Model]) -> type[Model]:
    """Model with the recipe's fields, all optional, and without its other checks."""
    fields: dict[str, Any] = {}
    for name, field in recipe.model_fields.items():
        default: dict[str, Any] = {"default": field.default}
        if field.is_required():  # the JSON schema does not show the result of a function
            default = {"default_factory": lambda: None}
        setting = Field(description=field.description, **default)
        fields[name] = Annotated[field.annotation, setting, *field.metadata]
    doc = f"{recipe.__doc__} Several places may give parts; one gives settings without default."
    return create_model(recipe.__name__, __base__=_Partial, __doc__=doc, **fields)


if TYPE_CHECKING:
    Partial = Annotated[Recipe, "partial"]
else:

    class Partial:
        """``Partial[Recipe]``: the type of a part of a recipe."""

        def __class_getitem__(cls, recipe: type[Model]) -> type[Model]:
            return _partial(recipe)


def complete(recipe: type[Whole], *parts: Model | None) -> Whole:
    """The whole recipe from partial settings; later parts win.

    Raises:
        pydantic.ValidationError: a setting is missing, or settings of different parts disagree.
    """
    settings = (part.model_dump(exclude_unset=True) for part in parts if part is not None)
    return recipe.model_validate(override(*settings))


def override(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Merge settings; later parts win. `steps` and `epochs` replace each other.

    Settings that are mappings (`openrlhf`, `architecture`) are merged key by key.
    """
    merged: dict[str, Any] = {}
    for part in parts:
        for key, other in (("steps", "epochs"), ("epochs", "steps")):
            if part.get(key) is not None:
                merged.pop(other, None)
        for key, value in part.items():
            before = merged.get(key)
            if isinstance(before, Mapping) and isinstance(value, Mapping):
                value = {**before, **value}
            merged[key] = value
    return merged
