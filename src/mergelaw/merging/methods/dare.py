"""DARE (Yu et al. 2024): drop values at random, rescale the rest by 1/(1-p), then merge.

A mask is a function of (seed, expert, tensor, position in the tensor), equal in every subset,
process and device. mergekit's ``dare_*`` instead rescale to the tensor's own L1 norm and draw masks
from one global generator, so an expert's mask depends on the other experts merged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mergelaw.merging.methods.base import Masks, Method, normalized

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mergelaw.merging.kernels import Rule

# Philox4x64-10 (Salmon et al. 2011): multipliers, and what the key grows by each round.
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
ROUNDS = 10
LOW = (1 << 32) - 1
STEP = 1 << 22  # elements drawn at a time on a GPU: each takes some forty bytes meanwhile


def stream_key(seed: int, expert: str, name: str) -> np.ndarray:
    """Philox's key, (2,), of one expert's tensor: SHA-256 of (seed, expert, tensor name)."""
    import numpy as np

    key = hashlib.sha256(f"{seed}\n{expert}\n{name}".encode()).digest()[:16]
    return np.frombuffer(key, dtype=np.uint64)


def keep_mask(
    seed: int, expert: str, name: str, start: int, size: int, drop_rate: float
) -> np.ndarray:
    """Draw a mask of elements ``start`` to ``start + size`` of a tensor, True if kept: (size,).

    Element i is dropped if u_i < drop_rate; u_i is the fp32 uniform made of the upper 24 bits of
    the i-th 32-bit word of the tensor's Philox stream.
    """
    import numpy as np

    stream = np.random.Philox(key=stream_key(seed, expert, name))
    block, skip = divmod(start, 8)  # one step of the counter gives four 64-bit words
    stream.advance(block)
    words = stream.random_raw((skip + size + 1) // 2).astype("<u8", copy=False).view("<u4")
    uniform = (words[skip : skip + size] >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
    return uniform >= np.float32(drop_rate)


def keep_mask_by_torch(
    seed: int, expert: str, name: str, start: int, size: int, drop_rate: float, device: Any
) -> Tensor:
    """``keep_mask`` drawn on a device, where numpy's stream and a copy would take longer."""
    import torch

    block, skip = divmod(start, 8)
    # numpy's stream begins with counter 1. Products of int64 wrap as those of uint64 do.
    counter = torch.arange(block + 1, block + 1 - (-(skip + size) // 8), device=device)
    words = [counter, *(torch.zeros_like(counter) for _ in range(3))]
    keys = [int(part) for part in stream_key(seed, expert, name)]
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = (
            _product(words[2 * i], multiplier) for i, multiplier in enumerate(MULTIPLIERS)
        )
        key0, key1 = map(_signed, keys)
        words = [high1 ^ words[1] ^ key0, low1, high0 ^ words[3] ^ key1, low0]
        keys = [key + step for key, step in zip(keys, WEYL, strict=True)]
    halves = torch.stack([half for w in words for half in (w & LOW, (w >> 32) & LOW)], dim=1)
    uniform = (halves.view(-1)[skip : skip + size] >> 8).float() * 2**-24
    return uniform >= torch.tensor(drop_rate, device=device)


def _signed(value: int) -> int:
    """The int64 with the bits of a number modulo 2^64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _product(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 64 bits of unsigned products, from products of 32-bit halves."""
    low, high = words & LOW, (words >> 32) & LOW
    first, second = low * (factor & LOW), high * (factor & LOW)
    third = low * (factor >> 32)
    carry = ((first >> 32) & LOW) + (second & LOW) + (third & LOW)
    upper = high * (factor >> 32) + ((second >> 32) & LOW) + ((third >> 32) & LOW) + (carry >> 32)
    return upper, words * _signed(factor)


class _Dare(Method):
    drop_rate: float = Field(0.5, ge=0, lt=1, description="probability that a value is dropped")
    lambda_: float = Field(1.0, alias="lambda", gt=0, description="scale of the merged difference")
    seed: int = Field(0, ge=0, description="seed of the masks")

    def masks(self) -> Masks | None:
        if not self.drop_rate:
            return None
        identity = {"seed": self.seed, "drop_rate": self.drop_rate}
        return Masks(identity, 1 / (1 - self.drop_rate), self._bits)

    def _bits(self, expert: str, name: str, start: int, size: int, device: Any = None) -> Tensor:
        import torch

        from mergelaw.merging.kernels import pack, pack_by_torch

        which = self.seed, expert, name
        if device is None or device.type == "cpu":
            return pack(keep_mask(*which, start, size, self.drop_rate))
        bits = [
            pack_by_torch(
                keep_mask_by_torch(*which, a, min(STEP, start + size - a), self.drop_rate, device)
            )
            for a in range(start, start + max(size, 1), STEP)
        ]
        return torch.cat(bits)


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
