"""TIES (Yadav et al. 2023): trim small values, elect a sign per element, average who agrees.

As mergekit's ``ties`` where ``trim: tensor`` and ``elect: sum``, but for elements whose magnitude
equals the threshold: all of them are kept here, an arbitrary part of them there. The authors'
code trims over the whole expert (``trim: global``) and so do some of its descendants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mergelaw.merging.methods.base import Method, Tensors

if TYPE_CHECKING:
    from mergelaw.merging.kernels import Rule


class Ties(Method):
    """theta = theta_0 + lambda * mean of the trimmed v_i that agree with the elected sign."""

    method: Literal["ties"] = "ties"
    density: float = Field(0.2, gt=0, le=1, description="share of each expert's values kept")
    lambda_: float = Field(1.0, alias="lambda", gt=0, description="scale of the merged difference")
    trim: Literal["tensor", "global"] = Field(
        "tensor", description="threshold per tensor, or one for the whole expert"
    )
    elect: Literal["sum", "count"] = Field(
        "sum", description="sign of the summed values, or of the majority"
    )

    def prepare(self, tensors: Tensors) -> dict[str, float]:
        """The smallest magnitude kept, per tensor; a ``global`` one repeated for each."""
        if self.density == 1:
            return {}
        if self.trim == "tensor":
            return {
                name: magnitude_threshold(lambda v=values: [v], kept(values.numel(), self.density))
                for name, values in tensors()
            }
        size = sum(values.numel() for _, values in tensors())
        threshold = magnitude_threshold(
            lambda: (values for _, values in tensors()), kept(size, self.density)
        )
        return {name: threshold for name, _ in tensors()}

    def rule(self, weights: Sequence[float]) -> Rule:
        from mergelaw.merging.kernels import Rule

        return Rule(self.elect, weights, self.lambda_)

    def keeps_single(self, weight: float) -> bool:
        return self.density == 1 and self.lambda_ == 1

    def mergekit(self) -> dict[str, Any] | None:
        if self.trim == "global" or self.elect == "count":
            return None
        return {
            "merge_method": "ties",
            "parameters": {"density": self.density, "lambda": self.lambda_, "normalize": True},
        }


def kept(size: int, density: float) -> int:
    """How many of ``size`` values are kept: int(density * size), one at least (as mergekit)."""
    return min(max(int(density * size), 1), size)


def magnitude_threshold(chunks, keep: int) -> float:
    """The ``keep``-th largest magnitude of all chunks, exactly.

    ``chunks`` is called twice and gives flat fp32 tensors. Non-negative floats are ordered as their
    bit patterns are, so two histograms, of the upper and then of the lower 16 bits, find the value
    without sorting anything.
    """
    import numpy as np

    if keep == 0:  # a tensor without elements
        return 0.0

    def histogram(pick):
        counts = np.zeros(1 << 16, dtype=np.int64)
        for values in chunks():
            bits = values.detach().cpu().contiguous().view(-1).numpy().view(np.uint32)
            for start in range(0, len(bits), 1 << 20):
                part = bits[start : start + (1 << 20)] & np.uint32(0x7FFFFFFF)
                counts += np.bincount(pick(part), minlength=1 << 16)
        return counts

    def locate(counts, rank):
        above = np.cumsum(counts[::-1])
        index = int(np.searchsorted(above, rank))
        return len(counts) - 1 - index, rank - (int(above[index - 1]) if index else 0)

    high, rest = locate(histogram(lambda part: (part >> 16).astype(np.uint16)), keep)
    low, _ = locate(
        histogram(lambda part: (part[(part >> 16) == high] & 0xFFFF).astype(np.uint16)), rest
    )
    threshold = float(np.array([(high << 16) | low], dtype=np.uint32).view(np.float32)[0])
    assert math.isfinite(threshold), "task vectors are checked for NaN and Inf when they are made"
    return threshold
