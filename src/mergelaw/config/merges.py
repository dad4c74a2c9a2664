"""Configuration of merges: the methods, and the merges to write out."""

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Field

from mergelaw.artifacts.recipe import Distinct, Model, Name, Seed
from mergelaw.merging.methods import Method, registry


def _fill_methods(methods: Any) -> Any:
    """Read ``average:`` and ``ties: {density: 0.1}`` as the methods of these names."""
    if not isinstance(methods, dict):
        return methods
    return {
        name: {"method": name, **(method or {})} if isinstance(method, dict | None) else method
        for name, method in methods.items()
    }


if TYPE_CHECKING:
    Methods = dict[Name, Method]
else:
    _union = Union[*registry().values()]
    Methods = Annotated[
        dict[Name, Annotated[_union, Field(discriminator="method")]],
        BeforeValidator(_fill_methods, json_schema_input_type=dict[Name, _union | None]),
    ]


class Prediction(Model):
    """The value of an objective that was predicted for a merge before it was measured."""

    objective: str = Field(description="the options of the objective")
    value: float = Field(description="predicted value, in nats per token")
    low: float = Field(description="lower end of its 90% interval")
    high: float = Field(description="upper end")


class Merge(Model):
    """A merge to measure and to write out as a checkpoint."""

    base: Name = Field(description="name of the base")
    method: Name = Field(description="name of one of `methods`")
    experts: Distinct[Name] = Field(description="names of the experts")
    weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, description="one weight for each expert; null: equal weights"
    )
    seed: Seed | None = Field(None, description="training seed; null: the first one")
    write: bool = Field(True, description="write it out as a checkpoint; false: measure it only")
    predicted: Prediction | None = Field(
        None, description="what `mergelaw select` predicted; changes no result"
    )
