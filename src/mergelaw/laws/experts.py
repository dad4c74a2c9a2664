"""Effects of single experts on the losses of merges, and experts that are unlike the others.

The loss of a merge of the subset S of size k is a mean of its level plus the mean effect of its
members, and what pairs of experts add; merging without replacement gives both for nothing.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

from mergelaw.laws.law import Array

# An expert is unlike the others if chance makes one so with a lower probability than this.
UNLIKELY = 0.05


@dataclass(frozen=True)
class Effects:
    """Additive effects of experts on the loss of a merge of one (nats per token), mean 0.

    Attributes:
        errors: standard errors of the effects.
        pairs: scale P of the variance that pairs of experts add over subsets (nats^2).
    """

    experts: tuple[str, ...]
    values: Array
    errors: Array
    pairs: float


def effects(merges: pd.DataFrame) -> Effects | None:
    """Effects from the merges of one method, base and domain; None if they are not determined.

    Args:
        merges: a row for each merge, with its experts and loss ``ce`` (nats per token).
    """
    merges = merges.drop_duplicates("merge")
    names = sorted(set(itertools.chain.from_iterable(merges["experts"])))
    pool, places = len(names), {name: i for i, name in enumerate(names)}
    k, loss = merges["k"].to_numpy(dtype=float), merges["ce"].to_numpy(dtype=float)
    levels = np.unique(k)
    if pool < 3 or len(merges) < len(levels) + pool or not np.isfinite(loss).all():
        return None
    member = np.zeros((len(merges), pool))
    for row, experts in zip(member, merges["experts"], strict=True):
        row[[places[name] for name in experts]] = 1 / len(experts)
    # The last effect is minus the sum of the others.
    columns = np.hstack([k[:, None] == levels, member[:, :-1] - member[:, -1:]])
    solved, _, rank, _ = np.linalg.lstsq(columns, loss, rcond=None)
    if rank < columns.shape[1]:
        return None
    residuals, freedom = loss - columns @ solved, max(len(loss) - rank, 1)
    values = np.append(solved[len(levels) :], -solved[len(levels) :].sum())
    inverse = np.linalg.pinv(columns.T @ columns)[len(levels) :, len(levels) :]
    widened = np.vstack([np.eye(pool - 1), -np.ones(pool - 1)])
    variance = float(residuals @ residuals) / freedom
    errors = np.sqrt(np.diag(widened @ inverse @ widened.T) * variance)
    share = (k - 1) * (pool - k) * (pool - k - 1) / k**3
    share /= (pool - 1) * (pool - 2) * max(pool - 3, 1)
    pairs = float(residuals @ residuals) * len(loss) / freedom / max(float(share.sum()), 1e-300)
    return Effects(tuple(names), values, errors, pairs if share.any() else 0.0)


def pair_scale(merges: pd.DataFrame) -> float | None:
    """Scale tau^2 (nats^2) of a circle's sampling variance, from its merges; None if unknown.

    tau^2 = ||B||_F^2 / (2M (M - 3)) for effects B of pairs. What else the merges show beside
    additive effects is counted as pairs, so it is rather too large.
    """
    estimate = effects(merges)
    return (
        None
        if estimate is None or len(estimate.experts) < 4
        else estimate.pairs / (len(estimate.experts) - 3)
    )


def outlying(merges: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Experts whose effect is unlike those of the others, for each family and base.

    The test leaves the expert out (externally studentised, Bonferroni over experts and bases) and
    takes the mean over methods.

    Args:
        merges: macro losses of merges, a row each.

    Yields:
        family, base, expert; effect (nats per token): its effect on a merge of one, relative to the
        mean of the others, and its 90% interval.
    """
    for family, group in merges.groupby("family"):
        bases = list(group.groupby("base"))
        for base, rows in bases:
            estimates = [effects(one) for _, one in rows.groupby("method")]
            methods = [one for one in estimates if one is not None]
            if not methods or len({one.experts for one in methods}) > 1:
                continue
            values = np.mean([one.values for one in methods], axis=0)
            error = np.sqrt(np.mean([one.errors**2 for one in methods], axis=0))
            pool = len(values)
            for i in range(pool):
                others = np.delete(values, i)
                effect = float(values[i] - others.mean())
                spread = max(float(others.std(ddof=1)), 1e-12) * math.sqrt(1 + 1 / (pool - 1))
                chance = 2 * stdtr(pool - 2, -abs(effect) / spread) * pool * len(bases)
                if chance < UNLIKELY:
                    # The other experts' mean has a small error beside it.
                    reach = stdtrit(pool - 2, 0.95) * float(error[i]) * pool / (pool - 1)
                    yield {
                        "family": family,
                        "base": base,
                        "expert": methods[0].experts[i],
                        "effect": effect,
                        "interval": [effect - reach, effect + reach],
                    }
