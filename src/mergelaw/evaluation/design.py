"""Sampling design: which subsets of the experts are merged and measured.

The plan is a pure function of the configuration, known when the workflow is parsed, so this module
needs nothing but the standard library (numpy only where a variance is asked for).

Designs, for the levels k that are not measured exhaustively:

- ``ring`` and ``difference`` are *circular*: a replicate puts the M experts on a circle, each at a
  place given by a hash, and measures all M rotations of one pattern of k places. Every expert is
  then in exactly k of the M subsets, so whatever adds up over experts has no sampling error at all;
  what is left comes from pairs. ``ring`` takes k neighbours: nested in k, and a new expert changes
  the fewest subsets. ``difference`` leaves a few holes, which balances the pairs too.
- ``iid`` draws subsets independently and is there for comparison.
- ``exhaustive`` measures every subset of every level.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING

from mergelaw.artifacts.keys import canonical_json
from mergelaw.errors import MergelawError

if TYPE_CHECKING:
    import numpy as np

DESIGNS = ("exhaustive", "ring", "difference", "iid")

# More merges than this is a mistake in the configuration, not a plan.
MAX_EXHAUSTIVE = 100_000

# The most holes in a difference pattern. Over pools of up to 24 experts, ring's V[k, k] is about 2,
# 3, 6 and 10 times that of the best pattern with 1, 2, 3 and 4 holes. But each hole makes one more
# of the M + 1 subsets change when an expert is added, and with a fourth k = M - 3 would not fit.
MAX_HOLES = 3


@dataclass(frozen=True)
class Subset:
    """The experts of one merge, and where in the design it stands."""

    k: int  # number of experts; 0 is the base itself
    experts: tuple[str, ...]  # in canonical order: the order of the configuration
    replicate: int  # circle (or iid draw); -1 where all C(M, k) subsets are measured, and the base
    place: int  # rotation on the circle: the place of the pattern's 0; -1 where there is no circle


def sample(
    experts: Sequence[str],
    *,
    design: str,
    k: Sequence[int] | None,
    circles: int,
    exhaustive_up_to: int,
    subsets_per_k: int,
    seed: int,
    base: str,
) -> list[Subset]:
    """The plan of one base: the subsets to merge and measure, in the order of their ranks.

    First the base itself; then the exhaustive levels together, by the bitmask of the experts'
    positions (colexicographic), so that, as long as the same levels are exhaustive, an expert
    appended to the configuration only appends; then replicate by replicate, k ascending, place
    ascending. A subset can be in two replicates: one cell, measured once, that the statistics need
    twice.

    Args:
        experts: the pool, M distinct names in the order of the configuration.
        design: one of ``DESIGNS``.
        k: the sizes to measure; None is 1..M.
        circles: replicates of a circular design; at least 3 for honest standard errors.
        exhaustive_up_to: a level with at most so many subsets is measured exhaustively. So is,
            whatever this says, a level that one replicate exhausts: k = 1, M - 1 and M on a circle,
            C(M, k) <= ``subsets_per_k`` under iid.
        subsets_per_k: uniform draws, with replacement among subsets, for each k under iid.
        seed: of the places on the circles and of the draws.
        base: the base's name. Places depend on it, or errors at different N would be correlated;
            and on the experts' names, not on their digests, or a retrained expert would move.

    Raises:
        MergelawError: unknown design, repeated expert, a k that is repeated or not in 1..M, or more
            than ``MAX_EXHAUSTIVE`` subsets in the exhaustive levels.
    """
    if design not in DESIGNS:
        raise MergelawError(f"sampling: no design {design!r}; use one of {', '.join(DESIGNS)}")
    pool = len(experts)
    if len(set(experts)) < pool:
        raise MergelawError(
            "sampling: an expert is listed twice; name each expert of the pool once"
        )
    sizes = _sizes(k, pool)
    if design == "exhaustive":
        exhausted = sizes
    else:
        replicate_size = subsets_per_k if design == "iid" else pool
        limit = max(exhaustive_up_to, replicate_size)
        exhausted = [size for size in sizes if comb(pool, size) <= limit]
    sampled = [size for size in sizes if size not in exhausted]

    rows = [Subset(k=0, experts=(), replicate=-1, place=-1)]
    for subset in _colexicographic(pool, exhausted):
        rows.append(Subset(len(subset), tuple(experts[i] for i in subset), -1, -1))
    if design == "iid":
        for draw in range(subsets_per_k):
            for size in sampled:
                drawn = sorted(_shuffled(experts, seed, base, size, draw)[:size])
                rows.append(Subset(size, tuple(experts[i] for i in drawn), draw, -1))
    else:
        for circle in range(circles):
            placed = _shuffled(experts, seed, base, circle)
            for size in sampled:
                for place, subset in enumerate(rotations(placed, pattern(design, size, pool))):
                    rows.append(Subset(size, tuple(experts[i] for i in subset), circle, place))
    return rows


def rotations(circle: Sequence[int], pattern: Sequence[int]) -> list[tuple[int, ...]]:
    """The M subsets, each ascending, that a pattern picks from a circle when turned place by place.

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
    """The places, ascending from 0, that a circular design picks for subsets of k experts.

    ``ring``: k neighbours. ``difference``: of all patterns that span k places and at most
    ``MAX_HOLES`` holes, the one whose pairs are balanced best, i.e. with the least sum of squares
    of ``pair_counts`` over pools of 3k/2, 2k and 3k experts (fewest holes, then the first in
    lexicographic order, where that is equal): (0, 1, 3) for k = 3, (0, 1, 4, 6) for k = 4.

    A pattern depends on k alone, or one expert more would change every subset; with one exception:
    where ``pool`` (M) is too small for the difference pattern's span, it is ring's. That happens
    at k >= M - 2 only, where a subset leaves out a pair at most, and nothing is lost: all pairs
    balance alike, but for M/2 places apart. Without ``pool`` it is taken to be large enough.

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
    """c_k(d), d = 1..M-1: ordered pairs of the pattern's places that differ by d modulo M.

    It is also the number of rotations that hold both of two experts d places apart.

    Args:
        pattern: k distinct places in 0..M-1.
        pool: M, the number of places on the circle.
    """
    places = sum(1 << place for place in pattern)
    twice = places | places << pool
    return [(places & twice >> d).bit_count() for d in range(1, pool)]


def design_variance(
    patterns: Sequence[Sequence[int]], pool: int, circles: int, tau2: float = 1.0
) -> "np.ndarray":
    """Covariance over random circles of a circular design's estimates of E[L|k].

    For a loss that is quadratic along equal-weight means, L = w.H.w / 2 plus linear terms, with
    one estimate per pattern, each the mean over the same circles' rotations, it is exact:

        V[k, k'] = tau2/circles * sum_d x_k(d) x_k'(d) / M,
        x_k(d) = (c_k(d) - k(k-1)/(M-1)) / k^2,   d = 1..M-1,   c_k = pair_counts.

    The additive part of the loss gives nothing, for each expert is in exactly k of M rotations;
    random placements spread the pair part B of H evenly over the representation (M-2, 2) of the
    permutations, of dimension M(M-3)/2, whence tau2 = |B|_F^2 / (2M(M-3)), where, for i != j,
    B_ij = H_ij - a_i - a_j, a_i = (r_i - sum(r) / (2(M-1))) / (M-2), r_i = sum of H_ij over j != i.
    V is singular, of rank floor(M/2) - 1 at most, and zero at k = 1, M-1 and M.

    Args:
        patterns: one per estimate, k its length; leave out levels that are measured exhaustively.
        pool: M.
        circles: number of independent circles that an estimate is the mean of.
        tau2: scale of the pair part, in units of the loss squared.

    Returns:
        (len(patterns), len(patterns)), in the unit of tau2.
    """
    import numpy as np

    sizes = np.array([len(places) for places in patterns], dtype=float)[:, None]
    counts = np.array([pair_counts(places, pool) for places in patterns], dtype=float)
    excess = (counts - sizes * (sizes - 1) / (pool - 1)) / sizes**2
    return tau2 / (circles * pool) * excess @ excess.T


def _sizes(k: Sequence[int] | None, pool: int) -> list[int]:
    """The sizes to measure, ascending and checked."""
    sizes = list(range(1, pool + 1)) if k is None else sorted(k)
    if len(set(sizes)) < len(sizes):
        raise MergelawError(f"sampling: k = {sizes} names a size twice; list each k once")
    outside = [size for size in sizes if not 1 <= size <= pool]
    if outside:
        raise MergelawError(
            f"sampling: k = {outside[0]} is not in 1..{pool}, the sizes a pool of {pool} experts"
            " has; correct k or add experts"
        )
    return sizes


def _colexicographic(pool: int, sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """All subsets of these sizes, ascending positions, by the bitmask of the positions."""
    total = sum(comb(pool, size) for size in sizes)
    if total > MAX_EXHAUSTIVE:
        raise MergelawError(
            f"sampling: all subsets of {pool} experts would be {total} merges, over"
            f" {MAX_EXHAUSTIVE}; set design to ring or difference, with a smaller exhaustive_up_to"
        )
    subsets = [subset for size in sizes for subset in combinations(range(pool), size)]
    return sorted(subsets, key=lambda subset: sum(1 << position for position in subset))


def _shuffled(experts: Sequence[str], *stream: str | int) -> list[int]:
    """Positions of the experts in the order of a hash of the stream and their names.

    The order of the others stays the same when an expert comes or goes, and is the same on every
    machine and for every Python (neither ``hash`` nor ``random.shuffle`` promises that).
    """
    # JSON text has no line break, so stream and name cannot run into each other.
    prefix = canonical_json(stream).encode() + b"\n"
    ranks = [hashlib.sha256(prefix + name.encode()).digest() for name in experts]
    return sorted(range(len(experts)), key=ranks.__getitem__)
