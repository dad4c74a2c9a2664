"""DARE (Yu et al. 2024): drop values at random, rescale the rest by 1/(1-p), then merge.

A mask is a function of (seed, expert, tensor, position in the tensor), equal in every subset,
process and device. mergekit's ``dare_*`` instead rescale to the tensor's own L1 norm and draw masks
from one global generator, so an expert's mask depends on the other experts merged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mergelaw.merging.methods.base import Masks, Method, normalized

if TYPE_CHECKING:
    import numpy as np

    from mergelaw.merging.kernels import Rule


def keep_mask(
    seed: int, expert: str, name: str, start: int, size: int, drop_rate: float
) -> np.ndarray:
    """Draw a mask of elements ``start`` to ``start + size`` of a tensor, True if kept: (size,).

    Element i is dropped if u_i < drop_rate; u_i is the fp32 uniform made of the upper 24 bits of
    the i-th 32-bit word of a Philox stream keyed by SHA-256 of (seed, expert, tensor name).
    """
    import numpy as np

    key = hashlib.sha256(f"{seed}\n{expert}\n{name}".encode()).digest()[:16]
    stream = np.random.Philox(key=np.frombuffer(key, dtype=np.uint64))
    block, skip = divmod(start, 8)  # one step of the counter gives four 64-bit words
    stream.advance(block)
    words = stream.random_raw((skip + size + 1) // 2).astype("<u8", copy=False).view("<u4")
    uniform = (words[skip : skip + size] >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
    return uniform >= np.float32(drop_rate)


class _Dare(Method):
    drop_rate: float = Field(0.5, ge=0, lt=1, description="probability that a value is dropped")
    lambda_: float = Field(1.0, alias="lambda", gt=0, description="scale of the merged difference")
    seed: int = Field(0, ge=0, description="seed of the masks")

    def masks(self) -> Masks | None:
        if not self.drop_rate:
            return None
        identity = {"seed": self.seed, "drop_rate": self.drop_rate}
        return Masks(
            identity,
            1 / (1 - self.drop_rate),
            lambda expert, name, start, size: keep_mask(
                self.seed, expert, name, start, size, self.drop_rate
            ),
        )


class DareLinear(_Dare):
    """theta = theta_0 + lambda * mean (or sum) of the masked and rescaled v_i."""

    method: Literal["dare_linear"] = "dare_linear"
    normalize: bool = Field(True, description="scale the mean (true) or the sum (false)")

    def rule(self, weights: Sequence[float]) -> Rule:
        from mergelaw.merging.kernels import Rule

        if self.normalize:
            weights = normalized(weights)
        return Rule("", [self.lambda_ * weight for weight in weights])


class DareTies(_Dare):
    """theta = theta_0 + lambda * mean of the masked, rescaled v_i that agree in sign."""

    method: Literal["dare_ties"] = "dare_ties"
    elect: Literal["sum", "count"] = Field(
        "sum", description="sign of the summed values, or of the majority"
    )

    def rule(self, weights: Sequence[float]) -> Rule:
        from mergelaw.merging.kernels import Rule

        return Rule(self.elect, weights, self.lambda_)
