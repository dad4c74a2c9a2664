"""Sampling design: which subsets of the experts are merged and measured.

The design is a pure function of the configuration, known when the workflow is parsed, so this
module needs nothing but the standard library.

Designs, for the sizes k whose subsets are too many to measure all:

- ``ring`` and ``difference`` are *circular*. A circle puts the M experts in an order given by a
  hash; all M rotations of one pattern of k places are measured. Each expert is then in exactly k of
  the M subsets, so a loss that adds up over experts has no sampling error; only pairs have one.
  ``ring`` takes k neighbours: subsets are nested in k, and a new expert changes the fewest of them.
  ``difference`` leaves a few holes, which balances pairs too.
- ``exhaustive`` measures every subset of every level.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb

from mergelaw.artifacts.keys import canonical_json
from mergelaw.errors import MergelawError

DESIGNS = ("exhaustive", "ring", "difference")
MAX_EXHAUSTIVE = 100_000  # more merges than this are a mistake in the configuration

# The most holes in a difference pattern. Over pools of up to 24 experts, ring's V[k, k] is about 2,
# 3, 6 and 10 times that of the best pattern with 1, 2, 3 and 4 holes. But each hole makes one more
# of the M + 1 subsets change when an expert is added, and with a fourth k = M - 3 would not fit.
MAX_HOLES = 3


@dataclass(frozen=True)
class Subset:
    """The experts of one merge and its place in the design."""

    k: int  # number of experts; 0 is the base itself
    experts: tuple[str, ...]  # in the order of the configuration
    replicate: int  # circle; -1 for exhaustive levels and the base
    place: int  # rotation on the circle: the place of the pattern's 0; -1 without a circle


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

    First the base itself; then the exhaustive levels, by the bitmask of the experts' positions
    (colexicographic), so that an appended expert only appends while the same levels are exhaustive;
    then circle by circle, k ascending, place ascending. A subset may stand on two circles: it is
    one cell, measured once, with two rows in the statistics.

    Args:
        experts: the pool, M distinct names in the order of the configuration.
        design: one of ``DESIGNS``.
        k: the levels to measure; None is 1..M.
        circles: number of circles; standard errors need at least 3.
        exhaustive_up_to: see :func:`exhaustive_levels`.
        seed: seed of the places on the circles.
        base: the base's name. Circles depend on it, or errors at different N would be correlated,
            and on the experts' names, not their digests, or a retrained expert would move.

    Raises:
        MergelawError: unknown design, repeated expert, a k that is repeated or not in 1..M, or more
            than ``MAX_EXHAUSTIVE`` subsets in the exhaustive sizes.
    """
    if design not in DESIGNS:
        raise MergelawError(f"sampling: no design {design!r}; use one of {', '.join(DESIGNS)}")
    pool = len(experts)
    if len(set(experts)) < pool:
        raise MergelawError(
            "sampling: an expert is listed twice; list each expert of the pool once"
        )
    sizes = _sizes(k, pool)
    exhaustive = exhaustive_levels(design, sizes, pool, exhaustive_up_to)
    rows = [Subset(k=0, experts=(), replicate=-1, place=-1)]
    for subset in _colexicographic(pool, exhaustive):
        rows.append(Subset(len(subset), tuple(experts[i] for i in subset), -1, -1))
    sampled = [size for size in sizes if size not in exhaustive]
    for circle in range(circles):
        placed = _shuffled(experts, seed, base, circle)
        for size in sampled:
            for place, subset in enumerate(rotations(placed, pattern(design, size, pool))):
                rows.append(Subset(size, tuple(experts[i] for i in subset), circle, place))
    return rows


def exhaustive_levels(
    design: str, levels: Iterable[int], pool: int, exhaustive_up_to: int
) -> list[int]:
    """The levels k of which all C(M, k) subsets are measured.

    These are the levels with at most ``exhaustive_up_to`` subsets, and those that one circle
    exhausts: k = 1, M - 1 and M. Under ``design: exhaustive`` these are all levels.
    """
    limit = max(exhaustive_up_to, pool)
    return [k for k in levels if design == "exhaustive" or comb(pool, k) <= limit]


def rotations(circle: Sequence[int], pattern: Sequence[int]) -> list[tuple[int, ...]]:
    """The M subsets, each ascending, that the rotations of a pattern pick from a circle.

    Args:
        circle: the experts' positions in the configuration, in their order on the circle; (M,).
        pattern: k distinct places in 0..M-1.
    """
    pool = len(circle)
    return [
        tuple(sorted(circle[(place + offset) % pool] for offset in pattern))
        for place in range(pool)
    ]


@cache
def pattern(design: str, k: int, pool: int | None = None) -> tuple[int, ...]:
    """Places, ascending from 0, of a circular design's subsets of k experts.

    ``ring``: k neighbours. ``difference``: among the patterns with at most ``MAX_HOLES`` holes, the
    one whose pairs are balanced best, by the sum of squares of ``pair_counts`` over pools of 3k/2,
    2k and 3k experts; ties go to fewer holes, then to lexicographic order. Examples: (0, 1, 3) for
    k = 3, (0, 1, 4, 6) for k = 4.

    A pattern depends on k alone, or a new expert would change every subset. The exception: where
    ``pool`` (M) is smaller than the difference pattern's span, ring's is used. That happens only at
    k >= M - 2, where all pairs balance alike, except those M/2 places apart. None: large enough.

    Raises:
        MergelawError: the design is not circular.
    """
    ring = tuple(range(k))
    if design not in ("ring", "difference"):
        raise MergelawError(f"sampling: design {design!r} has no pattern; use ring or difference")
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

    This is also the number of rotations that contain both of two experts d places apart.

    Args:
        pattern: k distinct places in 0..M-1.
        pool: M, the number of places on the circle.
    """
    places = sum(1 << place for place in pattern)
    twice = places | places << pool
    return [(places & twice >> d).bit_count() for d in range(1, pool)]


def _sizes(k: Sequence[int] | None, pool: int) -> list[int]:
    """The levels to measure, ascending; MergelawError for one that is repeated or impossible."""
    sizes = list(range(1, pool + 1)) if k is None else sorted(k)
    if len(set(sizes)) < len(sizes):
        raise MergelawError(f"sampling: k = {sizes} repeats a level; list each k once")
    outside = [size for size in sizes if not 1 <= size <= pool]
    if outside:
        raise MergelawError(
            f"sampling: k = {outside[0]} is not in 1..{pool}, the levels of a pool of {pool}"
            " experts; correct k or add experts"
        )
    return sizes


def _colexicographic(pool: int, sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """All subsets of these sizes as sorted positions, ordered by the bitmask of the positions."""
    total = sum(comb(pool, size) for size in sizes)
    if total > MAX_EXHAUSTIVE:
        raise MergelawError(
            f"sampling: all subsets of {pool} experts are {total} merges, over {MAX_EXHAUSTIVE};"
            " set design to ring or difference, with a smaller exhaustive_up_to"
        )
    subsets = [subset for size in sizes for subset in combinations(range(pool), size)]
    return sorted(subsets, key=lambda subset: sum(1 << position for position in subset))


def _shuffled(experts: Sequence[str], *stream: str | int) -> list[int]:
    """Positions of the experts, ordered by a hash of the stream and their names.

    A new or removed expert leaves the order of the others unchanged. The order is the same on every
    machine and Python, which neither ``hash`` nor ``random.shuffle`` promises.
    """
    # JSON text has no line break, so different streams and names give different texts.
    prefix = canonical_json(stream).encode() + b"\n"
    ranks = [hashlib.sha256(prefix + name.encode()).digest() for name in experts]
    return sorted(range(len(experts)), key=ranks.__getitem__)
