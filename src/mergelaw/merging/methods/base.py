"""The interface of a merge method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mergelaw.artifacts.recipe import Model

if TYPE_CHECKING:
    from torch import Tensor

    from mergelaw.merging.kernels import Rule

# A task vector's tensors, iterable as often as needed: (name, flat fp32 values).
Tensors = Callable[[], Iterable[tuple[str, "Tensor"]]]


class Masks(NamedTuple):
    """Random masks of an expert's values, and the factor of the values they keep."""

    identity: dict[str, Any]  # the parameters that the masks depend on
    scale: float
    # (expert's digest, tensor, start, size, device or None) -> packed bits of the elements from
    # ``start`` onwards that are kept
    bits: Callable[..., Tensor]


class Method(Model):
    """A merge rule: theta = theta_0 + rule(kept(v_1), ..., kept(v_k)).

    ``thresholds`` and ``masks`` decide which values of one expert are dropped, ``rule`` combines
    the values of several experts. All three are elementwise: any slice of a tensor gives the same
    bits on every device, because :mod:`mergelaw.merging.kernels` rounds additions and
    multiplications one by one, with experts in the configuration's order.
    """

    def recipe(self) -> dict[str, Any]:
        """The settings that define merges by this method, as JSON values."""
        return self.model_dump(by_alias=True)

    def thresholds(self, tensors: Tensors) -> dict[str, float]:
        """The smallest kept magnitude of one expert, by tensor; an empty dict keeps all values."""
        return {}

    def masks(self) -> Masks | None:
        """The random masks of experts; None if the method drops no value at random."""
        return None

    def rule(self, weights: Sequence[float]) -> Rule:
        """The combination of the experts' values with these weights."""
        raise NotImplementedError

    def mergekit(self) -> dict[str, Any] | None:
        """Rule in mergekit's terms ({merge_method, parameters}); None if mergekit has none."""
        return None


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights scaled to sum to one (exactly 1/k each where they are equal)."""
    if len(set(weights)) == 1:
        return [1 / len(weights)] * len(weights)
    total = sum(weights)
    return [weight / total for weight in weights]
