"""Average: theta_0 + mean of the task vectors ("model soup", Wortsman et al. 2022).

This is mergekit's ``linear`` over the experts with normalised weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from mergelaw.merging.methods.base import Method, normalized

if TYPE_CHECKING:
    from mergelaw.merging.kernels import Rule


class Average(Method):
    """theta = theta_0 + sum_i w_i v_i / sum_i w_i."""

    method: Literal["average"] = "average"

    def rule(self, weights: Sequence[float]) -> Rule:
        from mergelaw.merging.kernels import Rule

        return Rule("", normalized(weights))

    def mergekit(self) -> dict[str, Any]:
        return {"merge_method": "linear", "parameters": {"normalize": True}}
