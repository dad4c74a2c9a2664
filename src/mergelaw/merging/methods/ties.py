"""TIES (Yadav et al. 2023): trim small values, elect a sign per element, average what agrees.

With ``trim: tensor`` and ``elect: sum`` the rule is mergekit's ``ties``, except for elements whose
magnitude equals the threshold: mergelaw keeps all of them, mergekit an arbitrary part. The authors'
code trims over the whole expert (``trim: global``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mergelaw.merging.methods.base import Method, Tensors

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

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

    def thresholds(self, tensors: Tensors) -> dict[str, float]:
        """The smallest kept magnitude by tensor; ``trim: global`` has one for all tensors."""
        if self.density == 1:
            return {}
        if self.trim == "tensor":
            return {
                name: magnitude_threshold(partial(iter, [v]), kept(v.numel(), self.density))
                for name, v in tensors()
            }
        size = sum(values.numel() for _, values in tensors())
        threshold = magnitude_threshold(
            lambda: (values for _, values in tensors()), kept(size, self.density)
        )
        return {name: threshold for name, _ in tensors()}

    def rule(self, weights: Sequence[float]) -> Rule:
        from mergelaw.merging.kernels import Rule

        return Rule(self.elect, weights, self.lambda_)

    def mergekit(self) -> dict[str, Any] | None:
        if self.trim == "global" or self.elect == "count":
            return None
        return {
            "merge_method": "ties",
            "parameters": {"density": self.density, "lambda": self.lambda_, "normalize": True},
        }


def kept(size: int, density: float) -> int:
    """Number of kept values out of ``size``: int(density * size), at least one (as in mergekit)."""
    return min(max(int(density * size), 1), size)


def magnitude_threshold(chunks: Callable[[], Iterable[Tensor]], keep: int) -> float:
    """The ``keep``-th largest magnitude of all chunks, exactly.

    ``chunks`` is called twice and yields flat fp32 tensors. Non-negative floats have the order of
    their bit patterns, so two histograms, of the upper and then of the lower 16 bits, find the
    value without a sort.
    """
    import numpy as np

    if keep == 0:  # a tensor without elements
        return 0.0

    def histogram(high: int | None) -> np.ndarray:
        """Counts of the upper 16 bits, or of the lower 16 bits of values with these upper bits."""
        counts = np.zeros(1 << 16, dtype=np.int64)
        for values in chunks():
            bits = values.detach().cpu().contiguous().view(-1).numpy().view(np.uint32)
            for start in range(0, len(bits), 1 << 20):
                part = bits[start : start + (1 << 20)] & np.uint32(0x7FFFFFFF)
                digits = part >> 16 if high is None else part[(part >> 16) == high] & 0xFFFF
                counts += np.bincount(digits.astype(np.uint16), minlength=1 << 16)
        return counts

    def locate(counts: np.ndarray, rank: int) -> tuple[int, int]:
        """The bin of the ``rank``-th largest value, and its rank within the bin."""
        above = np.cumsum(counts[::-1])
        index = int(np.searchsorted(above, rank))
        return len(counts) - 1 - index, rank - (int(above[index - 1]) if index else 0)

    high, rest = locate(histogram(None), keep)
    low, _ = locate(histogram(high), rest)
    threshold = float(np.array([(high << 16) | low], dtype=np.uint32).view(np.float32)[0])
    assert math.isfinite(threshold), "task vectors are checked for NaN and Inf when written"
    return threshold
