"""Sampling design: which subsets of the experts are merged and measured.

A pure function of the configuration, which ``config`` has checked. The workflow evaluates it when
it is parsed, so this module needs only the standard library.

``exhaustive`` measures every subset of every level k. The other designs are *circular* at levels
with too many subsets to measure all: a circle puts the M experts in an order given by a hash, and
all M rotations of one pattern of k places are measured. Each expert is then in exactly k of the M
subsets, so a loss that is a sum over experts has no sampling error; only pairs have one. ``ring``
takes k neighbours: subsets are nested in k, and a new expert changes the fewest of them.
``difference`` leaves a few holes, which balances pairs too.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import combinations
from math import comb
from typing import NamedTuple

from mergelaw.artifacts.keys import canonical_json

MAX_EXHAUSTIVE = 100_000  # more merges than this are a mistake in the configuration

# The most holes in a difference pattern. Over pools of up to 24 experts, ring's V[k, k] is about 2,
# 3, 6 and 10 times that of the best pattern with 1, 2, 3 and 4 holes. But each hole makes one more
# of the M + 1 subsets change when an expert is added, and with a fourth k = M - 3 would not fit.
MAX_HOLES = 3


class Subset(NamedTuple):
    """The experts of one merge and its place in the design."""

    k: int  # number of experts; 0 is the base itself
    replicate: int  # circle; -1 for exhaustive levels and the base
    place: int  # rotation on the circle: the place of the pattern's 0; -1 without a circle
    experts: tuple[str, ...]  # in the order of the configuration


class Weighted(NamedTuple):
    """A merge that the configuration names, outside of the design."""

    k: int
    replicate: int
    place: int
    experts: tuple[str, ...]
    weights: tuple[float, ...]


def sample(
    experts: Sequence[str],
    *,
    design: str,
    k: Sequence[int] | None,
    circles: int,
    exhaustive_up_to: int,
    seed: int,
    base: str,
) -> list[Subset]:
    """The subsets of one base to merge and measure, in a fixed order.

    The base itself comes first; then the exhaustive levels, by the bitmask of the experts'
    positions, so that a new last expert only appends while the same levels are exhaustive; then
    circle by circle, k ascending, place ascending. A subset on two circles is one cell, measured
    once, with two rows in the statistics. Circles depend on the base's name, because shared circles
    would correlate errors across N. They depend on the experts' names, not their digests, because a
    retrained expert must not move. ``k`` None is 1..M.
    """
    pool = len(experts)
    levels = range(1, pool + 1) if k is None else sorted(k)
    exhaustive = exhaustive_levels(design, levels, pool, exhaustive_up_to)
    subsets = [subset for size in exhaustive for subset in combinations(range(pool), size)]
    subsets.sort(key=lambda subset: sum(1 << position for position in subset))
    places = [(-1, -1, subset) for subset in [(), *subsets]]
    for circle in range(circles):
        # A new expert leaves the order of the others unchanged, on every machine and Python. JSON
        # text has no line break, so different streams and names give different texts.
        stream = canonical_json([seed, base, circle]) + "\n"
        ranks = [hashlib.sha256((stream + name).encode()).digest() for name in experts]
        order = sorted(range(pool), key=ranks.__getitem__)
        for size in levels:
            if size not in exhaustive:
                turned = rotations(order, pattern(design, size, pool))
                places += [(circle, place, subset) for place, subset in enumerate(turned)]
    return [
        Subset(len(subset), circle, place, tuple(experts[i] for i in subset))
        for circle, place, subset in places
    ]


def exhaustive_levels(
    design: str, levels: Iterable[int], pool: int, exhaustive_up_to: int
) -> list[int]:
    """The levels k of which all C(M, k) subsets are measured; M is ``pool``.

    These are the levels with at most ``exhaustive_up_to`` subsets, and those that one circle
    exhausts: k = 1, M - 1 and M. ``design: exhaustive`` measures all levels.
    """
    limit = max(exhaustive_up_to, pool)
    return [k for k in levels if design == "exhaustive" or comb(pool, k) <= limit]


def rotations(circle: Sequence[int], pattern: Sequence[int]) -> list[tuple[int, ...]]:
    """The M subsets, each ascending, that the rotations of a pattern pick from a circle.

    ``circle``: positions of the experts, (M,), in circle order; ``pattern``: k places in 0..M-1.
    """
    pool = len(circle)
    return [
        tuple(sorted(circle[(place + offset) % pool] for offset in pattern))
        for place in range(pool)
    ]


@cache
def pattern(design: str, k: int, pool: int | None = None) -> tuple[int, ...]:
    """Places, ascending from 0, of a circular design's subsets of k experts.

    ``ring``: k neighbours. ``difference``: the pattern with at most ``MAX_HOLES`` holes that
    balances pairs best, by the sum of squares of ``pair_counts`` over pools of 3k/2, 2k and 3k
    experts; ties go to fewer holes, then to lexicographic order: (0, 1, 4, 6) for k = 4. A pattern
    depends on k alone, because otherwise a new expert would change every subset. If ``pool`` (M;
    None: large enough) is smaller than the difference pattern's span, ring's pattern is used. Then
    k >= M - 2, and all pairs balance alike, except those M/2 places apart.
    """
    ring = tuple(range(k))
    if design == "ring" or k < 3:
        return ring
    # Where k is two thirds, half and a third of the pool; k + MAX_HOLES is the least that fits.
    pools = (max(3 * k // 2, k + MAX_HOLES), 2 * k, 3 * k)
    candidates = [
        tuple(place for place in range(k + holes) if place not in empty)
        for holes in range(1, MAX_HOLES + 1)
        for empty in combinations(range(k + holes - 2, 0, -1), holes)
    ]
    best = min(candidates, key=lambda p: sum(c * c for M in pools for c in pair_counts(p, M)))
    return ring if pool is not None and best[-1] >= pool else best


def pair_counts(pattern: Sequence[int], pool: int) -> list[int]:
    """Number of ordered pairs of the pattern's places that differ by d modulo M, for d = 1..M-1.

    This many of the M = ``pool`` rotations contain both of two experts that are d places apart.
    """
    places = sum(1 << place for place in pattern)
    twice = places | places << pool
    return [(places & twice >> d).bit_count() for d in range(1, pool)]
