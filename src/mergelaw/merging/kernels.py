"""Elementwise merge kernels: weighted sums, and the consensus of TIES.

An expression of torch's reads and writes memory once for each of its operations. On a processor
compiled loops do the same arithmetic block by block in the cache, so that memory is read once. Both
round each product and each sum by itself, in the order of the vectors: the bits are the same on
every device, for any block size and any number of threads.
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
BLOCK = 512  # elements of a packed mask's block
CHUNK = 4 * BLOCK  # elements of each vector that the compiled loops hold in the cache
LANES = BLOCK // 8  # bytes of a mask's block
SHARE = 1 << 14  # elements that are worth another thread
RULES = ("", "sum", "count")
WEIGHTED, SUM, COUNT = range(3)  # positions in RULES


class Sparse(NamedTuple):
    """One expert's values with a lazily applied mask."""

    values: Tensor  # fp32, flat
    least: float = 0.0  # smaller magnitudes are dropped
    mask: Tensor | None = None  # uint8, the values that are kept, packed by :func:`pack`
    scale: float = 1.0  # factor of the values that a mask keeps

    def dense(self) -> Tensor:
        """The values, with zeros in the place of dropped ones."""
        if self.mask is not None:
            kept = unpack(self.mask.to(self.values.device), self.values.numel())
            return torch.where(kept, self.values * self.scale, 0.0)
        if self.least:
            return torch.where(self.values.abs() >= self.least, self.values, 0.0)
        return self.values


def pack(kept: np.ndarray) -> Tensor:
    """Pack bools into bits, 64 bytes for each 512 elements: bit b of byte i is element 64 b + i."""
    blocks = np.zeros((-(-len(kept) // BLOCK), 8, LANES), bool)
    blocks.reshape(-1)[: len(kept)] = kept
    return torch.from_numpy(np.packbits(blocks, axis=1, bitorder="little").reshape(-1))


def packed_size(elements: int) -> int:
    """Bytes of a packed mask."""
    return -(-elements // BLOCK) * LANES


def unpack(mask: Tensor, elements: int) -> Tensor:
    """The bools of a packed mask."""
    places = torch.arange(8, dtype=torch.uint8, device=mask.device).view(1, 8, 1)
    bits = mask.view(-1, 1, LANES).bitwise_right_shift(places).bitwise_and_(1)
    return bits.bool().view(-1)[:elements]


class Rule(NamedTuple):
    """How the values of several experts become one, element by element.

    Without ``elect``: scale * sum_i w_i v_i, in the order of the vectors. Else scale * weighted
    mean of the values that have the elected sign: ``sum`` elects that of sum_i w_i v_i, ``count``
    that of sum_i w_i sign(v_i), zero counts as plus; zero where no value has the sign.
    """

    elect: str
    weights: Sequence[float]
    scale: float = 1.0

    def plain(self) -> "Rule":
        """The same rule; equal weights become ones, since products with one are exact."""
        if len(set(self.weights)) > 1:
            return self
        ones = [1.0] * len(self.weights)
        return Rule(self.elect, ones, self.scale if self.elect else self.scale * self.weights[0])


def combine(vectors: Sequence[Sparse], rule: Rule) -> Tensor:
    """Combine vectors by a rule: what is added to the base, fp32, of the vectors' shape."""
    if vectors[0].values.device.type == "cpu":
        out = torch.empty_like(vectors[0].values)
        _compiled(vectors, rule, torch.full_like(out, NOTHING), out)
        return out
    return _by_torch(vectors, rule)


def merge(base: Tensor, vectors: Sequence[Sparse], rule: Rule, out: Tensor) -> None:
    """Write base + combine(vectors), rounded once, into ``out``; all flat, of any float dtype."""
    if out.device.type == "cpu" and out.dtype == torch.float32:
        _compiled(vectors, rule, base.float(), out)
    else:
        out.copy_(base.float() + combine(vectors, rule))


def _by_torch(vectors: Sequence[Sparse], rule: Rule) -> Tensor:
    elect, weights, scale = rule.plain()
    values = [vector.dense() for vector in vectors]
    if not elect:
        total = torch.full_like(values[0], NOTHING)
        for vector, weight in zip(values, weights, strict=True):
            total += vector if weight == 1 else vector * weight
        return total.mul_(scale)
    # Signs as -1, 0, 1 in fp32: comparisons and masks cost torch more, and a product with a sign
    # is exact.
    sign, work = torch.zeros_like(values[0]), torch.empty_like(values[0])
    for vector, weight in zip(values, weights, strict=True):
        vote = torch.sign(vector, out=work) if elect == "count" else vector
        sign += vote if weight == 1 else torch.mul(vote, weight, out=work)
    sign.sign_().add_(0.5).sign_()
    total, mass = torch.zeros_like(sign), torch.zeros_like(sign)
    for vector, weight in zip(values, weights, strict=True):
        agreeing = torch.mul(vector, sign, out=work).relu_()  # magnitudes of those that agree
        total += agreeing if weight == 1 else agreeing * weight
        mass += agreeing.sign_().mul_(weight)
    # A mass is zero, and its total too, or at least the smallest weight.
    least = min(weight for weight in weights if weight)
    return total.div_(mass.clamp_min_(least)).mul_(sign).mul_(scale)


def _compiled(vectors: Sequence[Sparse], rule: Rule, base: Tensor, out: Tensor) -> None:
    """base + combine(vectors) into ``out`` by the compiled loops; checks every length first."""
    elect, weights, scale = rule.plain()
    size = out.numel()
    # Kept here by name: the loops get addresses only.
    values = [vector.values.contiguous() for vector in vectors]
    masks = [None if vector.mask is None else vector.mask.contiguous() for vector in vectors]
    if len(vectors) != len(weights):
        raise ValueError(f"{len(vectors)} vectors but {len(weights)} weights")
    for tensor in (base, *values):
        if tensor.numel() != size or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(f"{size} fp32 values on the processor are needed, not {tensor.shape}")
    for mask in masks:
        if mask is not None and (mask.numel(), mask.dtype) != (packed_size(size), torch.uint8):
            raise ValueError(f"a mask of {size} values has {packed_size(size)} bytes")
    described = (
        np.array([tensor.data_ptr() for tensor in values], np.uint64),
        np.array([vector.least for vector in vectors], np.float32),
        np.array([0 if mask is None else mask.data_ptr() for mask in masks], np.uint64),
        np.array([vector.scale for vector in vectors], np.float32),
        np.array(weights, np.float32),
    )
    before, after = base.contiguous().view(-1).numpy(), out.view(-1).numpy()
    arguments = described, RULES.index(elect), np.float32(scale), before, after
    threads = max(min(torch.get_num_threads(), size // SHARE), 1)
    step = -(-size // (threads * BLOCK)) * BLOCK
    starts = range(0, size, step or 1)
    if threads == 1:
        _merge(*arguments, 0, size)
    else:
        list(_pool(threads).map(lambda a: _merge(*arguments, a, min(a + step, size)), starts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")


def _pointer(kind: Any) -> Any:
    """A compiled function that makes an address a pointer to values of this numba type."""

    @intrinsic
    def pointer(context, address):
        def code(target, builder, signature, arguments):
            return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.uint64), code

    return pointer


_floats, _bytes = _pointer(types.float32), _pointer(types.uint8)
compiled = njit(nogil=True, error_model="numpy", cache=True)


@compiled
def _read(vectors: Any, v: int, size: int, start: int, work: Any) -> Any:
    """Elements ``start`` onwards of a vector, in ``work`` with zeros for those that are dropped."""
    addresses, least, masks, scales, _ = vectors
    values = carray(_floats(addresses[v]), (size,))[start : start + work.size]
    if masks[v]:
        mask = carray(_bytes(masks[v]), ((size + BLOCK - 1) // BLOCK * LANES,))[start // 8 :]
        for first in range(0, work.size, LANES):
            bit, byte = first // LANES % 8, first // BLOCK * LANES
            x, y, bits = values[first:], work[first : first + LANES], mask[byte : byte + LANES]
            for i in range(y.size):
                y[i] = x[i] * scales[v] if (bits[i] >> bit) & 1 else ZERO
        return work
    if least[v] > ZERO:
        for i in range(work.size):
            work[i] = values[i] if abs(values[i]) >= least[v] else ZERO
        return work
    return values


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
def _merge(vectors: Any, rule: int, scale: Any, base: Any, out: Any, first: int, last: int) -> None:
    """Merge elements ``first`` (a multiple of BLOCK) to ``last`` of the base and the vectors.

    ``vectors``: of each vector its address, least magnitude, mask's address (0: none), mask's
    scale, and weight.
    """
    weights, rows = vectors[-1], np.empty((4, CHUNK), np.float32)
    for start in range(first, last, CHUNK):
        size = min(CHUNK, last - start)
        work, total, sign, mass = rows[0, :size], rows[1, :size], rows[2, :size], rows[3, :size]
        total[:] = NOTHING
        for v in range(weights.size):
            x = _read(vectors, v, out.size, start, work)
            if rule == COUNT:
                _add_signs(total, x, weights[v])
            else:
                _add(total, x, weights[v])
        if rule != WEIGHTED:
            for i in range(size):
                sign[i] = ONE if total[i] >= ZERO else -ONE
            total[:], mass[:] = ZERO, ZERO
            for v in range(weights.size):
                x = _read(vectors, v, out.size, start, work)
                _add_agreeing(total, mass, sign, x, weights[v])
            for i in range(size):
                total[i] = (total[i] / (mass[i] if mass[i] > ZERO else ONE)) * sign[i]
        for i in range(size):
            out[start + i] = base[start + i] + total[i] * scale
