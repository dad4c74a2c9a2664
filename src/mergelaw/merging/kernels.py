"""Elementwise merge kernels: weighted sums, and the consensus of TIES.

Torch reads and writes memory once for each operation of an expression. On a processor, compiled
loops do the same arithmetic block by block in the cache, so they read memory once. Both round each
product and each sum separately, in the order of the vectors, so the bits are equal on every device,
for any block size and any number of threads.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

ZERO, ONE = np.float32(0), np.float32(1)
NOTHING = -0.0  # adding it changes no bit
BLOCK = 2048  # elements of each vector that the compiled loops hold in the cache
SHARE = 1 << 14  # elements that are worth another thread
RULES = ("", "sum", "count")
WEIGHTED, SUM, COUNT = range(3)  # positions in RULES
NO_MASK = np.empty(0, np.uint8)


class Rule(NamedTuple):
    """Elementwise combination of several experts' values.

    Without ``elect``: scale * sum_i w_i v_i, in the order of the vectors. Otherwise scale *
    weighted mean of the values with the elected sign, or zero if no value has it: ``sum`` elects
    the sign of sum_i w_i v_i, ``count`` that of sum_i w_i sign(v_i); zero counts as plus.
    """

    elect: str
    weights: Sequence[float]
    scale: float = 1.0

    def plain(self) -> "Rule":
        """Replace equal weights by ones, since products with one are exact."""
        if len(set(self.weights)) > 1:
            return self
        ones = [1.0] * len(self.weights)
        return Rule(self.elect, ones, self.scale if self.elect else self.scale * self.weights[0])


def combine(vectors: Sequence[Tensor], rule: Rule) -> Tensor:
    """Combine flat fp32 vectors by a rule: the fp32 change of the base.

    Raises ValueError unless there is a vector for each weight, all of one length.
    """
    _check(vectors, rule)
    if vectors[0].device.type == "cpu":
        out = torch.empty_like(vectors[0])
        _compiled(torch.full_like(out, NOTHING), vectors, rule, out)
        return out
    return _by_torch(vectors, rule)


def merge(base: Tensor, vectors: Sequence[Tensor], rule: Rule, out: Tensor) -> None:
    """Write base + combine(vectors), rounded once, into ``out``; base and out of any float dtype.

    Raises ValueError unless there is a vector for each weight, all as long as ``base`` and ``out``.
    """
    _check(vectors, rule, base, out)
    if out.device.type == "cpu" and out.dtype == torch.float32:
        _compiled(base.float(), vectors, rule, out)
    else:
        out.copy_(base.float() + combine(vectors, rule))


def _check(vectors: Sequence[Tensor], rule: Rule, *others: Tensor) -> None:
    """Check what compiled loops, which receive only addresses, and broadcasting would not."""
    if not vectors or len(vectors) != len(rule.weights):
        raise ValueError(f"{len(vectors)} vectors but {len(rule.weights)} weights")
    shapes = {tuple(tensor.shape) for tensor in (*vectors, *others)}
    if len(shapes) > 1 or any(vector.dtype != torch.float32 for vector in vectors):
        raise ValueError(f"fp32 vectors of one length are needed, not of shapes {sorted(shapes)}")
    if rule.elect not in RULES:
        raise ValueError(f"there is no rule {rule.elect!r}, only {', '.join(RULES[1:])} or none")


def _by_torch(vectors: Sequence[Tensor], rule: Rule) -> Tensor:
    elect, weights, scale = rule.plain()
    if not elect:
        total = torch.full_like(vectors[0], NOTHING)
        for vector, weight in zip(vectors, weights, strict=True):
            total += vector if weight == 1 else vector * weight
        return total.mul_(scale)
    # Signs as -1, 0, 1 in fp32: comparisons and masks cost torch more, and a product with a sign
    # is exact.
    sign, work = torch.zeros_like(vectors[0]), torch.empty_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        vote = torch.sign(vector, out=work) if elect == "count" else vector
        sign += vote if weight == 1 else torch.mul(vote, weight, out=work)
    sign.sign_().add_(0.5).sign_()
    total, mass = torch.zeros_like(sign), torch.zeros_like(sign)
    for vector, weight in zip(vectors, weights, strict=True):
        agreeing = torch.mul(vector, sign, out=work).relu_()  # magnitudes of those that agree
        total += agreeing if weight == 1 else agreeing * weight
        mass += agreeing.sign_().mul_(weight)
    # A mass is zero, and its total too, or at least the smallest weight.
    least = min(weight for weight in weights if weight)
    return total.div_(mass.clamp_min_(least)).mul_(sign).mul_(scale)


def _compiled(base: Tensor, vectors: Sequence[Tensor], rule: Rule, out: Tensor) -> None:
    """``merge`` by compiled loops, on the processor."""
    elect, weights, scale = rule.plain()
    if any(tensor.device != base.device for tensor in (*vectors, out)):
        raise ValueError("all tensors must be on the processor")
    kept = [vector.contiguous() for vector in vectors]  # alive while their addresses are used
    addresses = np.array([vector.data_ptr() for vector in kept], np.uint64)
    before, after = base.contiguous().view(-1).numpy(), out.view(-1).numpy()
    shares = np.array(weights, np.float32)
    _share(
        _merge,
        (addresses, shares, RULES.index(elect), np.float32(scale), before, after),
        out.numel(),
    )


def pack(kept: np.ndarray) -> Tensor:
    """Pack bools into bits: bit b of byte i is element 8 i + b."""
    return torch.from_numpy(np.packbits(kept, bitorder="little"))


def pack_by_torch(kept: Tensor) -> Tensor:
    """``pack`` on the device of ``kept``."""
    whole = torch.zeros(-(-len(kept) // 8) * 8, dtype=torch.uint8, device=kept.device)
    whole[: len(kept)] = kept
    places = torch.arange(8, dtype=torch.uint8, device=kept.device)
    return whole.view(-1, 8).bitwise_left_shift(places).sum(dim=1, dtype=torch.uint8)


def drop(
    values: Tensor, least: float = 0.0, bits: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Set magnitudes below ``least``, or those that a packed mask drops, to zero; scale the others.

    ``values``: flat fp32. Raises ValueError for others, or for a mask of another length.
    """
    size = values.numel()
    if values.dim() != 1 or values.dtype != torch.float32:
        raise ValueError(f"a flat fp32 vector is needed, not {values.dtype} {list(values.shape)}")
    if bits is None and not least:
        return values
    if bits is not None and bits.numel() != -(-size // 8):
        raise ValueError(f"a mask of {size} values has {-(-size // 8)} bytes, not {bits.numel()}")
    if values.device.type == "cpu":
        out, mask = torch.empty_like(values), NO_MASK if bits is None else bits.numpy()
        arrays = out.numpy(), values.contiguous().numpy(), np.float32(least), mask
        _share(_drop, (*arrays, np.float32(scale)), size)
        return out
    return _drop_by_torch(values, least, bits, scale)


def _drop_by_torch(values: Tensor, least: float, bits: Tensor | None, scale: float) -> Tensor:
    if bits is None:
        return torch.where(values.abs() >= least, values, 0.0)
    places = torch.arange(8, dtype=torch.uint8, device=values.device)
    kept = bits.to(values.device).unsqueeze(1).bitwise_right_shift(places).bitwise_and_(1)
    return torch.where(kept.view(-1)[: values.numel()].bool(), values * scale, 0.0)


def _share(loop: Any, arguments: tuple[Any, ...], size: int) -> None:
    """Run a compiled loop over all elements; threads share them in ranges of whole blocks."""
    threads = max(min(torch.get_num_threads(), size // SHARE), 1)
    if threads == 1:
        loop(*arguments, 0, size)
    else:
        step = -(-size // (threads * BLOCK)) * BLOCK
        starts = range(0, size, step)
        list(_pool(threads).map(lambda a: loop(*arguments, a, min(a + step, size)), starts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")


def _typed(context: Any, address: Any) -> Any:
    """A memory address as a pointer to fp32 values."""

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.uint64), code


_pointer: Any = intrinsic(_typed)
compiled = njit(nogil=True, error_model="numpy", cache=True)


@compiled
def _drop(out: Any, values: Any, least: Any, mask: Any, scale: Any, first: int, last: int) -> None:
    """Copy elements ``first`` (a multiple of 8) to ``last``; dropped ones become zero."""
    x, y, bytes_ = values[first:last], out[first:last], mask[first // 8 :]
    if not mask.size:
        for i in range(x.size):
            y[i] = x[i] if abs(x[i]) >= least else ZERO
        return
    for byte in range(x.size // 8):  # constant shifts of a byte, which compile to vectors
        bits = np.uint32(bytes_[byte])
        for b in range(8):
            kept = (bits >> np.uint32(b)) & np.uint32(1)
            y[8 * byte + b] = x[8 * byte + b] * scale if kept else ZERO
    for i in range(x.size // 8 * 8, x.size):
        y[i] = x[i] * scale if (bytes_[i // 8] >> (i % 8)) & 1 else ZERO


@compiled
def _add(total: Any, x: Any, weight: Any) -> None:
    for i in range(total.size):
        total[i] += x[i] * weight


@compiled
def _add_signs(total: Any, x: Any, weight: Any) -> None:
    for i in range(total.size):
        sign = ONE if x[i] > ZERO else (-ONE if x[i] < ZERO else ZERO)
        total[i] += sign * weight


@compiled
def _add_agreeing(total: Any, mass: Any, sign: Any, x: Any, weight: Any) -> None:
    """Add the values that have the elected sign, and their weights."""
    for i in range(total.size):
        agreeing = x[i] * sign[i]
        total[i] += max(agreeing, ZERO) * weight
        mass[i] += weight if agreeing > ZERO else ZERO


@compiled
def _merge(
    addresses: Any, weights: Any, rule: int, scale: Any, base: Any, out: Any, first: int, last: int
) -> None:
    """Merge elements ``first`` to ``last`` of the base and the vectors at these addresses."""
    rows = np.empty((3, BLOCK), np.float32)
    for start in range(first, last, BLOCK):
        size = min(BLOCK, last - start)
        total, sign, mass = rows[0, :size], rows[1, :size], rows[2, :size]
        total[:] = NOTHING
        for v in range(weights.size):
            x = carray(_pointer(addresses[v]), (out.size,))[start : start + size]
            if rule == COUNT:
                _add_signs(total, x, weights[v])
            else:
                _add(total, x, weights[v])
        if rule != WEIGHTED:
            for i in range(size):
                sign[i] = ONE if total[i] >= ZERO else -ONE
            total[:], mass[:] = ZERO, ZERO
            for v in range(weights.size):
                x = carray(_pointer(addresses[v]), (out.size,))[start : start + size]
                _add_agreeing(total, mass, sign, x, weights[v])
            for i in range(size):
                total[i] = (total[i] / (mass[i] if mass[i] > ZERO else ONE)) * sign[i]
        for i in range(size):
            out[start + i] = base[start + i] + total[i] * scale
