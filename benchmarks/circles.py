"""Sampling variance of circular designs, for losses that are quadratic in the merging weights."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from mergelaw.evaluation.design import pair_counts


def finite_pool(k: ArrayLike, first: float, last: float, M: int) -> np.ndarray:
    """E[L|k] of an exactly quadratic loss over all k-subsets of M experts (nats per token).

    Args:
        k: sizes, 1..M.
        first: L_1, the mean over single experts.
        last: L_M, the merge of all.
    """
    return last + (first - last) * (M / np.asarray(k, dtype=float) - 1) / max(M - 1, 1)


def design_variance(
    patterns: Sequence[Sequence[int]], pool: int, circles: int, tau2: float = 1.0
) -> np.ndarray:
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
    sizes = np.array([len(places) for places in patterns], dtype=float)[:, None]
    counts = np.array([pair_counts(places, pool) for places in patterns], dtype=float)
    excess = (counts - sizes * (sizes - 1) / (pool - 1)) / sizes**2
    return tau2 / (circles * pool) * excess @ excess.T
