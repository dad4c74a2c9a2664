"""Merge methods, one small file each, registered by name.

A method is a frozen pydantic model: its fields are its parameters, its ``method`` literal is its
name. To add one, add a file with a subclass of :class:`Method` to this folder, or name such a
module of another package as an entry point of the group ``mergelaw.methods``. Configurations are
read without torch, so a method imports torch inside the functions that need it.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from mergelaw.merging.methods.base import Method as Method


@cache
def registry() -> dict[str, type[Method]]:
    """Every method by name, in alphabetical order."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group="mergelaw.methods"):
        entry.load()
    methods: dict[str, type[Method]] = {}
    pending = list(Method.__subclasses__())
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        if "method" in cls.model_fields:
            methods[cls.model_fields["method"].default] = cls
    return dict(sorted(methods.items()))


def method_of(recipe: Mapping[str, Any]) -> Method:
    """The method that a recipe (``{"method": name, parameter: value, ...}``) describes."""
    return registry()[recipe["method"]].model_validate(recipe)
