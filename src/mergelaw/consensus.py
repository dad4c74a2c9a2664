"""TIES' consensus: per element, elect a sign, then average the values that have it.

An expression of torch's passes through memory once for each of its six operations a vector. On a
processor the same arithmetic, compiled, goes block by block through the first cache, so that memory
is read once. Both round each addition and product by itself, in the order of the vectors: the bits
are the same, whatever the block, the device or the number of threads.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

ZERO, ONE = np.float32(0), np.float32(1)
BLOCK = 512  # elements of the three running sums, that they stay in the first cache
SHARE = 1 << 14  # elements that are worth another thread


def consensus(
    vectors: Sequence[Tensor], weights: Sequence[float], elect: str, scale: float
) -> Tensor:
    """scale * weighted mean, per element, of the values that have the elected sign.

    ``vectors``: fp32, all of one shape, as is the result. ``elect: sum`` takes the sign of
    sum_i w_i v_i, ``count`` that of sum_i w_i sign(v_i); zero counts as plus. Where nobody agrees
    the result is zero.
    """
    if len(set(weights)) == 1:  # whatever it is, and products with one are exact
        weights = [1.0] * len(vectors)
    combine = _compiled if vectors[0].device.type == "cpu" else _by_torch
    return combine(vectors, weights, elect == "count", scale)


def _by_torch(
    vectors: Sequence[Tensor], weights: Sequence[float], count: bool, scale: float
) -> Tensor:
    # Signs as -1, 0, 1 in fp32: comparisons and masks cost torch more, and a product with a sign
    # is exact.
    sign, work = torch.zeros_like(vectors[0]), torch.empty_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        vote = torch.sign(vector, out=work) if count else vector
        sign += vote if weight == 1 else torch.mul(vote, weight, out=work)
    sign.sign_().add_(0.5).sign_()
    total, mass = torch.zeros_like(sign), torch.zeros_like(sign)
    for vector, weight in zip(vectors, weights, strict=True):
        agreeing = torch.mul(vector, sign, out=work).relu_()  # their magnitude, else zero
        total += agreeing if weight == 1 else agreeing * weight
        mass += agreeing.sign_().mul_(weight)
    # The mass of anybody is at least the smallest weight; the total of nobody is zero.
    least = min(weight for weight in weights if weight)
    return total.div_(mass.clamp_min_(least)).mul_(sign).mul_(scale)


def _compiled(
    vectors: Sequence[Tensor], weights: Sequence[float], count: bool, scale: float
) -> Tensor:
    vectors = [vector.contiguous() for vector in vectors]
    out = torch.empty_like(vectors[0])
    size, factors = out.numel(), list(weights)
    where = [vector.data_ptr() for vector in vectors]
    if len(where) % 2:  # they go in pairs; what has weight zero adds zero
        where, factors = [*where, where[0]], [*factors, 0.0]
    arguments = (
        np.array(where, np.uint64),
        np.array(factors, np.float32),
        count,
        np.float32(scale),
        out.view(-1).numpy(),
    )
    threads = min(torch.get_num_threads(), size // SHARE)
    if threads < 2:
        _range(*arguments, 0, size)
    else:
        step = -(-size // threads)
        starts = range(0, size, step)
        list(_pool(threads).map(lambda a: _range(*arguments, a, min(a + step, size)), starts))
    return out


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="consensus")


@intrinsic
def _pointer(context, address):
    """The address of fp32 values, as numba's carray wants it."""

    def code(target, builder, signature, arguments):
        return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.uint64), code


@njit(nogil=True, error_model="numpy")
def _part(where, vector, size, start, stop):
    return carray(_pointer(where[vector]), (size,))[start:stop]  # type: ignore[call-arg]


@njit(nogil=True, error_model="numpy")
def _sum(sign, u, v, x, y):
    for i in range(sign.size):
        sign[i] = (sign[i] + x[i] * u) + y[i] * v


@njit(nogil=True, error_model="numpy")
def _count(sign, u, v, x, y):
    for i in range(sign.size):
        a = ONE if x[i] > ZERO else (-ONE if x[i] < ZERO else ZERO)
        b = ONE if y[i] > ZERO else (-ONE if y[i] < ZERO else ZERO)
        sign[i] = (sign[i] + a * u) + b * v


@njit(nogil=True, error_model="numpy")
def _agree(total, mass, sign, u, v, x, y):
    for i in range(sign.size):
        a, b = x[i] * sign[i], y[i] * sign[i]
        total[i] = (total[i] + max(a, ZERO) * u) + max(b, ZERO) * v
        mass[i] = (mass[i] + (u if a > ZERO else ZERO)) + (v if b > ZERO else ZERO)


@njit(nogil=True, error_model="numpy", cache=True)
def _range(where, weights, count, scale, out, first, last):
    """Elements ``first`` to ``last`` of the consensus of the vectors at the addresses ``where``."""
    signs, totals, masses = (
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
    )
    size = out.size
    for start in range(first, last, BLOCK):
        stop = min(start + BLOCK, last)
        sign, total, mass = (
            signs[: stop - start],
            totals[: stop - start],
            masses[: stop - start],
        )
        sign[:], total[:], mass[:] = ZERO, ZERO, ZERO
        for i in range(0, where.size, 2):
            x, y = _part(where, i, size, start, stop), _part(where, i + 1, size, start, stop)
            if count:
                _count(sign, weights[i], weights[i + 1], x, y)
            else:
                _sum(sign, weights[i], weights[i + 1], x, y)
        for i in range(sign.size):
            sign[i] = ONE if sign[i] >= ZERO else -ONE
        for i in range(0, where.size, 2):
            x, y = _part(where, i, size, start, stop), _part(where, i + 1, size, start, stop)
            _agree(total, mass, sign, weights[i], weights[i + 1], x, y)
        part = out[start:stop]
        for i in range(sign.size):
            share = mass[i] if mass[i] > ZERO else ONE
            part[i] = ((total[i] / share) * sign[i]) * scale
