"""What a merge method has to say about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from mergelaw.merging.kernels import Rule, Sparse

# A task vector's tensors, to be walked through as often as needed: (name, flat fp32 values).
Tensors = Callable[[], Iterable[tuple[str, "Tensor"]]]


class Method(BaseModel):
    """A merge rule: theta = theta_0 + combine(transform(v_1), ..., transform(v_k)).

    ``prepare`` looks at one expert's whole task vector once; ``transform`` says which of its values
    are dropped, ``rule`` how those of several experts are combined. Both work element by element,
    so the engine may take any slice of any tensor and gets the same bits: in
    :mod:`merging.kernels` additions and multiplications are rounded one by one, experts in the
    configuration's order, on every device.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    def prepare(self, tensors: Tensors) -> dict[str, float]:
        """The smallest magnitude of one expert that is kept, by tensor name; none: all are."""
        return {}

    def drawn(self) -> dict[str, Any] | None:
        """The parameters that masks depend on; None: there are no masks."""
        return None

    def mask(self, expert: str, name: str, start: int, size: int) -> Tensor | None:
        """What is kept, whatever its value, packed (:func:`kernels.pack`); None: all.

        Of elements ``start`` onwards of the flattened tensor ``name`` of the expert with digest
        ``expert``.
        """
        return None

    @property
    def scale(self) -> float:
        """What the values that a mask keeps are multiplied by."""
        return 1.0

    def transform(
        self,
        values: Tensor,
        prepared: dict[str, float],
        expert: str,
        name: str,
        start: int,
        mask: Tensor | None = None,
    ) -> Sparse:
        """One expert's values with what is dropped of them.

        ``values``: fp32, elements ``start`` onwards of the flattened tensor ``name`` of the expert
        with digest ``expert``; never written to. ``mask``: what :meth:`mask` says of them, where it
        is at hand.
        """
        from mergelaw.merging.kernels import Sparse

        if mask is None:
            mask = self.mask(expert, name, start, values.numel())
        return Sparse(values, prepared.get(name, 0.0), mask, self.scale)

    def rule(self, weights: Sequence[float]) -> Rule:
        """How the prepared values of experts with these weights become one."""
        raise NotImplementedError

    def keeps_single(self, weight: float) -> bool:
        """Whether a merge of one expert, with this weight, is that expert, bit for bit."""
        return False

    def mergekit(self) -> dict[str, Any] | None:
        """The same rule in mergekit's words ({merge_method, parameters}), or None without one."""
        return None


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights scaled to sum to one (exactly 1/k each where they are equal)."""
    if len(set(weights)) == 1:
        return [1 / len(weights)] * len(weights)
    total = sum(weights)
    return [weight / total for weight in weights]
