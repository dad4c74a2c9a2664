"""Task arithmetic (Ilharco et al. 2023): the base plus a multiple of the task vectors.

``normalize: true`` scales the mean of the task vectors (the merging law's paper), ``false`` their
plain sum (Ilharco; mergekit's ``task_arithmetic``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mergelaw.merging.methods.base import Method, normalized

if TYPE_CHECKING:
    from mergelaw.merging.kernels import Rule


class TaskArithmetic(Method):
    """theta = theta_0 + lambda * sum_i w_i v_i, divided by sum_i w_i if normalised."""

    method: Literal["task_arithmetic"] = "task_arithmetic"
    lambda_: float = Field(1.0, alias="lambda", gt=0, description="scale of the merged difference")
    normalize: bool = Field(True, description="scale the mean (true) or the sum (false)")

    def rule(self, weights: Sequence[float]) -> Rule:
        from mergelaw.merging.kernels import Rule

        if self.normalize:
            weights = normalized(weights)
        return Rule("", [self.lambda_ * weight for weight in weights])

    def mergekit(self) -> dict[str, Any]:
        parameters = {"lambda": self.lambda_, "normalize": self.normalize}
        return {"merge_method": "task_arithmetic", "parameters": parameters}
