"""What becomes of several experts' values, element by element: a weighted sum, or TIES' consensus.

An expression of torch's passes through memory once for each of its operations. On a processor the
same arithmetic, compiled, goes block by block through the first cache, dropped values included, so
that memory is read once. Both round each addition and product by itself, in the order of the
vectors: the bits are the same, whatever the block, the device or the number of threads.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

ZERO, ONE = np.float32(0), np.float32(1)
NONE = np.float32(-0.0)  # changes no bit of what it is added to
BLOCK = 512  # elements worked on at a time, that all of them stay in the first cache
AHEAD = 8192  # elements of a vector that are read in one go, as memory likes it
LANES = BLOCK // 8  # bytes of a block's mask
LINE = 64  # bytes that memory gives at a time
SHARE = 1 << 14  # elements that are worth another thread
RULES = ("", "sum", "count")
WEIGHTED, SUM, COUNT = range(3)  # places there


class Sparse(NamedTuple):
    """One expert's values, and which of them are dropped: read together, never written out."""

    values: Tensor  # fp32, flat
    least: float = 0.0  # smaller magnitudes are dropped
    mask: Tensor | None = None  # uint8, as `pack` makes it of what is kept
    scale: float = 1.0  # of what a mask keeps

    def dense(self) -> Tensor:
        """The values with zeros for those that are dropped."""
        if self.mask is not None:
            kept = unpack(self.mask.to(self.values.device), self.values.numel())
            return torch.where(kept, self.values * self.scale, 0.0)
        if self.least:
            return torch.where(self.values.abs() >= self.least, self.values, 0.0)
        return self.values


def pack(kept: np.ndarray) -> Tensor:
    """A mask of bools as bits, 64 bytes for each 512 elements: bit b of byte i is of 64 b + i."""
    blocks = np.zeros((-(-len(kept) // BLOCK), 8, LANES), bool)
    blocks.reshape(-1)[: len(kept)] = kept
    return torch.from_numpy(np.packbits(blocks, axis=1, bitorder="little").reshape(-1))


def packed_size(elements: int) -> int:
    return -(-elements // BLOCK) * LANES


def unpack(mask: Tensor, elements: int) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=mask.device).view(1, 8, 1)
    bits = mask.view(-1, 1, LANES).bitwise_right_shift(places).bitwise_and_(1)
    return bits.bool().view(-1)[:elements]


class Rule(NamedTuple):
    """How values of several experts become one: ``combine`` says it element by element."""

    elect: str  # "": a weighted sum; else whose sign counts, that of the "sum" or by "count"
    weights: Sequence[float]
    scale: float = 1.0


def combine(vectors: Sequence[Sparse], rule: Rule) -> Tensor:
    """What is to be added to the base: fp32, of the vectors' shape.

    Without ``elect`` scale * sum_i w_i v_i, in the given order, equal weights multiplied in once at
    the end. Else scale * weighted mean, per element, of the values that have the elected sign:
    ``sum`` elects that of sum_i w_i v_i, ``count`` that of sum_i w_i sign(v_i); zero counts as
    plus. Where nobody agrees the result is zero.
    """
    if vectors[0].values.device.type == "cpu":
        out = torch.empty_like(vectors[0].values)
        _compiled(vectors, rule, None, out)
        return out
    return _by_torch(vectors, rule)


def merge(base: Tensor, vectors: Sequence[Sparse], rule: Rule, out: Tensor) -> None:
    """base + combine(vectors) into ``out``, in one pass; all flat, on the processor.

    ``base``: fp32, bf16 or fp16; ``out``: fp32.
    """
    if base.dtype == torch.float16:
        base = base.float()
    _compiled(vectors, rule, base, out)


def _plain(rule: Rule) -> Rule:
    """Equal weights, whatever they are, as ones: products with one are exact."""
    if len(set(rule.weights)) > 1:
        return rule
    ones = [1.0] * len(rule.weights)
    return Rule(rule.elect, ones, rule.scale if rule.elect else rule.scale * rule.weights[0])


def _by_torch(vectors: Sequence[Sparse], rule: Rule) -> Tensor:
    elect, weights, scale = _plain(rule)
    values = [vector.dense() for vector in vectors]
    if not elect:
        total = torch.full_like(values[0], -0.0)  # which changes nothing that is added to it
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
        agreeing = torch.mul(vector, sign, out=work).relu_()  # their magnitude, else zero
        total += agreeing if weight == 1 else agreeing * weight
        mass += agreeing.sign_().mul_(weight)
    # The mass of anybody is at least the smallest weight; the total of nobody is zero.
    least = min(weight for weight in weights if weight)
    return total.div_(mass.clamp_min_(least)).mul_(sign).mul_(scale)


def _compiled(vectors: Sequence[Sparse], rule: Rule, base: Tensor | None, out: Tensor) -> None:
    elect, weights, scale = _plain(rule)
    values = [vector.values.contiguous() for vector in vectors]
    masks = [None if v.mask is None else v.mask.contiguous() for v in vectors]
    size = out.numel()
    assert out.is_contiguous() and (base is None or base.is_contiguous())
    arguments = (
        (
            np.array([v.data_ptr() for v in values], np.uint64),
            np.array([v.least for v in vectors], np.float32),
            np.array([0 if mask is None else mask.data_ptr() for mask in masks], np.uint64),
            np.array([v.scale for v in vectors], np.float32),
            np.array([*weights, *[0.0] * (len(weights) % 2)], np.float32),
        ),
        RULES.index(elect),
        np.float32(scale),
        np.uint64(base.data_ptr() if base is not None else 0),
        0 if base is None else base.dtype.itemsize,
        out.view(-1).numpy(),
    )
    threads = min(torch.get_num_threads(), size // SHARE)
    if threads < 2:
        _range(*arguments, 0, size)
    else:
        step = -(-size // (threads * BLOCK)) * BLOCK
        starts = range(0, size, step)
        list(_pool(threads).map(lambda a: _range(*arguments, a, min(a + step, size)), starts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")


def _pointer(kind):
    """An address as numba's carray wants it: of values of this type."""

    @intrinsic
    def pointer(context, address):
        def code(target, builder, signature, arguments):
            return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.uint64), code

    return pointer


_floats, _bytes = _pointer(types.float32), _pointer(types.uint8)
_halves = _pointer(types.uint16)


@intrinsic
def _prefetch(context, address):
    """Ask memory for the line at an address, into the second cache; any address will do."""

    def code(target, builder, signature, arguments):
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        to_read, second, data = number(0), number(2), number(1)
        builder.call(fetch, [builder.inttoptr(arguments[0], byte), to_read, second, data])
        return target.get_dummy_value()

    return types.void(types.uint64), code


@njit(nogil=True, error_model="numpy")
def _masked(y, x, mask, scale):
    """One block's."""
    for bit in range(8):
        first = bit * LANES
        for i in range(min(LANES, y.size - first)):
            y[first + i] = x[first + i] * scale if (mask[i] >> bit) & 1 else ZERO


@njit(nogil=True, error_model="numpy")
def _read(y, nothing, given, vector, size, start):
    """Elements ``start`` onwards of a vector, with zeros for what is dropped.

    Where they lie if nothing is dropped, else in ``y``; ``nothing``, if there is no such vector.
    """
    where, least, masks, scales, _ = given
    if vector == where.size:
        return nothing[: y.size]
    x, smallest = carray(_floats(where[vector]), (size,))[start : start + y.size], least[vector]
    if masks[vector]:
        mask = carray(_bytes(masks[vector]), ((size + BLOCK - 1) // BLOCK * LANES,))
        for a in range(0, y.size, BLOCK):
            b, place = min(a + BLOCK, y.size), (start + a) // 8
            _masked(y[a:b], x[a:b], mask[place : place + LANES], scales[vector])
        return y
    if smallest > ZERO:
        for i in range(y.size):
            y[i] = x[i] if abs(x[i]) >= smallest else ZERO
        return y
    return x


@njit(nogil=True, error_model="numpy")
def _read_base(y, nothing, base, width, size, start):
    """The same of the base: where it lies, or in ``y`` if it is bf16."""
    if width == 4:
        return carray(_floats(base), (size,))[start : start + y.size]
    if width == 2:
        half, bits = carray(_halves(base), (size,))[start : start + y.size], y.view(np.uint32)
        for i in range(y.size):
            bits[i] = np.uint32(half[i]) << np.uint32(16)
        return y
    return nothing[: y.size]


@njit(nogil=True, error_model="numpy")
def _add_two(first, total, u, v, x, y):
    for i in range(total.size):
        sum_ = NONE if first else total[i]
        total[i] = (sum_ + x[i] * u) + y[i] * v


@njit(nogil=True, error_model="numpy")
def _count_two(first, total, u, v, x, y):
    for i in range(total.size):
        sum_ = NONE if first else total[i]
        a = ONE if x[i] > ZERO else (-ONE if x[i] < ZERO else ZERO)
        b = ONE if y[i] > ZERO else (-ONE if y[i] < ZERO else ZERO)
        total[i] = (sum_ + a * u) + b * v


@njit(nogil=True, error_model="numpy")
def _agree(total, mass, sign, u, v, x, y):
    for i in range(sign.size):
        a, b = x[i] * sign[i], y[i] * sign[i]
        total[i] = (total[i] + max(a, ZERO) * u) + max(b, ZERO) * v
        mass[i] = (mass[i] + (u if a > ZERO else ZERO)) + (v if b > ZERO else ZERO)


@njit(nogil=True, error_model="numpy")
def _finish(first, part, before, total, u, v, x, y, scale):
    for i in range(part.size):
        sum_ = NONE if first else total[i]
        part[i] = before[i] + ((sum_ + x[i] * u) + y[i] * v) * scale


@njit(nogil=True, error_model="numpy")
def _weighted(part, before, total, work, nothing, given, scale, size, start):
    weights = given[-1]
    for i in range(0, weights.size, 2):
        a = _read(work[0, : part.size], nothing, given, i, size, start)
        b = _read(work[1, : part.size], nothing, given, i + 1, size, start)
        if i + 2 < weights.size:
            _add_two(i == 0, total, weights[i], weights[i + 1], a, b)
        else:
            _finish(i == 0, part, before, total, weights[i], weights[i + 1], a, b, scale)


@njit(nogil=True, error_model="numpy")
def _elect(signs, at, work, nothing, given, count, size, start):
    """The elected signs; into ``at`` the addresses of the values, which are in the caches now."""
    weights = given[-1]
    for i in range(0, weights.size, 2):
        a = _read(work[i, : signs.size], nothing, given, i, size, start)
        b = _read(work[i + 1, : signs.size], nothing, given, i + 1, size, start)
        at[i], at[i + 1] = a.ctypes.data, b.ctypes.data
        if count:
            _count_two(i == 0, signs, weights[i], weights[i + 1], a, b)
        else:
            _add_two(i == 0, signs, weights[i], weights[i + 1], a, b)
    for i in range(signs.size):
        signs[i] = ONE if signs[i] >= ZERO else -ONE


@njit(nogil=True, error_model="numpy")
def _mean(part, before, signs, pair, at, place, weights, scale):
    """Of one block at ``place``: base and mean of the values that have the sign."""
    total, mass = pair[0, : part.size], pair[1, : part.size]
    total[:], mass[:] = ZERO, ZERO
    end = place + part.size
    for i in range(0, weights.size, 2):
        a, b = carray(_floats(at[i]), (end,))[place:], carray(_floats(at[i + 1]), (end,))[place:]
        _agree(total, mass, signs, weights[i], weights[i + 1], a, b)
    for i in range(part.size):
        mean = (total[i] / (mass[i] if mass[i] > ZERO else ONE)) * signs[i]
        part[i] = before[i] + mean * scale


@njit(nogil=True, error_model="numpy")
def _ask(streams, start, block):
    """Ask for this block's share of elements ``start`` onwards: as many lines, stream by stream."""
    lines = AHEAD * 4 // LINE
    share = streams.size * BLOCK * 4 // LINE
    for i in range(block * share, (block + 1) * share):
        _prefetch(streams[i // lines] + np.uint64(start * 4 + i % lines * LINE))  # type: ignore[call-arg]


@njit(nogil=True, error_model="numpy", cache=True)
def _range(given, rule, scale, base, width, out, first, last):
    """Elements ``first`` to ``last`` of the base and the sum of the vectors, into ``out``.

    ``given``: of each vector its address, its least magnitude, the address of its mask or 0, the
    mask's scale and its weight, of which there is an even number: the last of an odd number of
    vectors goes with nothing. A plain tuple, for numba's cache outlives the names of classes.
    ``first`` is a multiple of BLOCK, where masks begin anew; ``width``: the bytes of one of the
    base's elements, or 0 for no base.
    """
    where, weights, size = given[0], given[-1], out.size
    work, at = np.empty((weights.size, AHEAD), np.float32), np.zeros(weights.size, np.uint64)
    nothing = np.full(AHEAD, NONE)
    wide, totals = np.empty(AHEAD, np.float32), np.empty(AHEAD, np.float32)
    pair = np.empty((2, BLOCK), np.float32)
    streams = np.append(where, np.array([out.ctypes.data, base], np.uint64))
    if width != 4:
        streams = streams[:-1]
    for start in range(first, last, AHEAD):
        part = out[start : min(start + AHEAD, last)]
        before = _read_base(wide[: part.size], nothing, base, width, size, start)
        total = totals[: part.size]
        if rule == WEIGHTED:
            _weighted(part, before, total, work, nothing, given, scale, size, start)
            continue
        _elect(total, at, work, nothing, given, rule == COUNT, size, start)
        for a in range(0, part.size, BLOCK):
            b = min(a + BLOCK, part.size)
            # Memory would rest meanwhile: what is to be done next comes nearer.
            _ask(streams, start + AHEAD, a // BLOCK)
            _mean(part[a:b], before[a:b], total[a:b], pair, at, a, weights, scale)
