"""What a merge method has to say about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

# A task vector's tensors, to be walked through as often as needed: (name, flat fp32 values).
Tensors = Callable[[], Iterable[tuple[str, "Tensor"]]]


class Method(BaseModel):
    """A merge rule: theta = theta_0 + combine(transform(v_1), ..., transform(v_k)).

    ``prepare`` looks at one expert's whole task vector once; ``transform`` and ``combine`` work
    element by element, so the engine may call them on any slice of any tensor and gets the same
    bits. To keep that so on every device they use no fused operation: additions and
    multiplications are rounded one by one, experts in the configuration's order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    def prepare(self, tensors: Tensors) -> dict[str, float]:
        """What depends on one expert alone, by tensor name (a TIES threshold); JSON-able."""
        return {}

    def transform(
        self, values: Tensor, prepared: dict[str, float], expert: str, name: str, start: int
    ) -> Tensor:
        """One expert's values as ``combine`` wants them.

        ``values``: fp32, elements ``start`` onwards of the flattened tensor ``name`` of the expert
        with digest ``expert``; never written to.
        """
        return values

    def combine(self, vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The merged difference from the base: fp32, of the shape of each of ``vectors``."""
        raise NotImplementedError

    def keeps_single(self, weight: float) -> bool:
        """Whether a merge of one expert, with this weight, is that expert, bit for bit."""
        return False

    def mergekit(self) -> dict[str, Any] | None:
        """The same rule in mergekit's words ({merge_method, parameters}), or None without one."""
        return None


def weighted_sum(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i v_i in the given order; equal weights are multiplied in once, at the end."""
    import torch

    if len(vectors) == 1:
        return vectors[0] if weights[0] == 1 else vectors[0] * weights[0]
    if len(set(weights)) == 1:
        total = torch.add(vectors[0], vectors[1])
        for vector in vectors[2:]:
            total += vector
        return total if weights[0] == 1 else total.mul_(weights[0])
    total = vectors[0] * weights[0]
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        total += vector * weight
    return total


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights scaled to sum to one (exactly 1/k each where they are equal)."""
    if len(set(weights)) == 1:
        return [1 / len(weights)] * len(weights)
    total = sum(weights)
    return [weight / total for weight in weights]
