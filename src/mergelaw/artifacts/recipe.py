"""Base class of recipes: the settings that define an artifact.

Every package keeps its recipes in a module named ``recipe``; a configuration is composed of them.
Recipes are read by every job, so these modules import neither torch nor numpy.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

# Names become parts of paths, so they hold nothing that a path or a shell treats specially.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=64)]


class Model(BaseModel):
    """Strict, immutable settings: unknown keys, infinity and NaN are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
