"""Learned coefficients: theta_0 + sum_i c_ib v_ib with the least loss on calibration documents.

The loss is smooth in the coefficients c of expert i in part b, so L-BFGS needs few gradients. A
part of the documents is held out to choose how fine the parts are and when to stop; then the chosen
steps are repeated on all documents.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mergelaw.errors import MergelawError

GRANULARITIES = ("scale", "expert", "block", "tensor")  # from coarse to fine
PATIENCE = 2  # steps without a better held-out loss before a search ends
MEMORY = 10  # pairs that L-BFGS keeps
SCALES = 3  # most gradients of the search by scale, which has one unknown

Array = NDArray[np.float64]
Gradient = Callable[[Array], tuple[float, Array]]
Pairs = deque[tuple[Array, Array]]
"""Steps of L-BFGS, and the changes of the gradient along them."""
Kind = Literal["fit", "held", "all"]
"""Calibration documents: those of the searches, those held out, or both."""


class Objective(Protocol):
    """The macro loss of calibration documents as a function of the coefficients, (M, T)."""

    def loss(self, coefficients: Array, kind: Kind) -> float:
        """Loss in nats per token; infinite where it is not finite."""

    def gradient(self, coefficients: Array, kind: Kind) -> tuple[float, Array]:
        """Loss and its gradient, (M, T). The loss is infinite where one of them is not finite."""


def block(tensor: str) -> str:
    """Block of the model that a tensor belongs to: embedding, ``0.attention``, head, ..."""
    layer = re.search(r"\.(\d+)\.", tensor)
    kinds = {
        "norm": r"norm|\bln_",
        "attention": r"attn|attention",
        "mlp": r"mlp|feed_forward|moe",
        "embedding": r"embed|\bwte\b|\bwpe\b",
        "head": r"lm_head",
    }
    kind = next((kind for kind, pattern in kinds.items() if re.search(pattern, tensor)), "other")
    return f"{layer[1]}.{kind}" if layer else kind


class Parts:
    """The parts that have a coefficient each: ``group``, (M, T), is the part's number.

    A coefficient is x times the unit of its part: the median norm of the experts' vectors in that
    part over its own. So experts of unequal norm start alike and learn at the same rate.
    """

    def __init__(self, by: str, tensors: Sequence[str], norms: Array):
        labels = {"block": list(map(block, tensors)), "tensor": tensors}
        names, column = np.unique(labels.get(by, [""] * len(tensors)), return_inverse=True)
        squares = np.zeros((len(norms), len(names)))
        np.add.at(squares.T, column, norms.T**2)
        lengths = np.sqrt(squares)
        with np.errstate(divide="ignore", invalid="ignore"):
            unit = np.median(lengths, axis=0) / lengths
        # A vector without values in a part, or with values where most have none, keeps its size.
        self.unit = np.where(np.isfinite(unit) & (unit > 0), unit, 1.0)[:, column]
        row = np.zeros(len(norms), int) if by == "scale" else np.arange(len(norms))
        self.group = row[:, None] * len(names) + column
        self.count = int(self.group.max()) + 1

    def spread(self, x: Array) -> Array:
        """The coefficients, (M, T), of the parts' x."""
        return np.asarray(x[self.group] * self.unit)

    def gather(self, gradient: Array) -> Array:
        """The gradient in x of a gradient in the coefficients."""
        return np.bincount(self.group.ravel(), (gradient * self.unit).ravel()).astype(float)

    def mean(self, coefficients: Array) -> Array:
        """The parts' mean x of coefficients."""
        return self.gather(coefficients / self.unit**2) / np.bincount(self.group.ravel())


def add(pairs: Pairs, step: Array, change: Array) -> None:
    """Append a pair that shows positive curvature; leave out others."""
    if step @ change > 1e-10 * np.linalg.norm(step) * np.linalg.norm(change):
        pairs.append((step, change))


def newton(slope: Array, pairs: Pairs) -> Array:
    """L-BFGS's direction (Nocedal and Wright 2006, algorithm 7.4) from at least one pair."""
    direction, shares = -slope, []
    for step, change in reversed(pairs):
        shares.append(step @ direction / (step @ change))
        direction = direction - shares[-1] * change
    step, change = pairs[-1]
    direction = direction * (step @ change) / (change @ change)
    for (step, change), share in zip(pairs, reversed(shares), strict=True):
        direction = direction + step * (share - change @ direction / (step @ change))
    return direction


def descend(gradient: Gradient, x: Array, pairs: Pairs, least: float) -> Iterator[Array]:
    """Points of L-BFGS from x. Each takes one gradient: that of the point before.

    A point with a higher loss than its predecessor is followed by one between the two. No step is
    longer than x, or than ``least`` if x is near 0; without ``pairs`` the first is that long.
    """
    loss, slope = gradient(x)
    if not math.isfinite(loss):
        raise MergelawError(
            "calibration: the loss or its gradient is not finite at the average of the experts; "
            "set `evaluation.dtype: float32`, or leave out the expert that overflows"
        )
    while slope.any():
        step = newton(slope, pairs) if pairs else -slope
        longest = max(float(np.linalg.norm(x)), least) / float(np.linalg.norm(step))
        step = step * (min(longest, 1.0) if pairs else longest)
        while True:
            yield x + step
            new_loss, new_slope = gradient(x + step)
            if new_loss <= loss:
                break
            drop = slope @ step  # the parabola through both losses and the slope has its least here
            back = -drop / (2 * (new_loss - loss - drop)) if math.isfinite(new_loss) else 0.0
            step = step * min(max(float(back), 0.1), 0.5)
        add(pairs, step, new_slope - slope)
        x, loss, slope = x + step, new_loss, new_slope


@dataclass(frozen=True)
class Search:
    """A search: points tried, (M, T), from its start on, and their held-out losses."""

    by: str
    parts: Parts
    points: Sequence[Array]
    losses: Sequence[float]

    @property
    def steps(self) -> int:
        """Steps to the best point."""
        return int(np.argmin(self.losses))


@dataclass(frozen=True)
class Learned:
    """Learned coefficients, (M, T), and the searches that chose their parts and steps."""

    coefficients: Array
    chosen: Search
    searches: Sequence[Search]


def learn(
    objective: Objective, tensors: Sequence[str], norms: Array, by: str, gradients: int
) -> Learned:
    """Learn the coefficients of M experts in T tensors.

    The search by scale starts at the average, the others start at its best point. ``norms``,
    (M, T), are those of the task vectors. ``by`` is a granularity, or ``auto`` for the one with the
    lowest held-out loss; a search computes at most so many ``gradients``. Raises MergelawError if
    the average's loss is not finite.
    """

    def path(
        parts: Parts, start: Array, other: Array | None, kind: Kind, steps: int
    ) -> Iterator[Array]:
        begin = parts.mean(start)

        def gradient(x: Array) -> tuple[float, Array]:
            # The searches share the gradient at their start, which rounding must not move.
            loss, slope = objective.gradient(start if x is begin else parts.spread(x), kind)
            return loss, parts.gather(slope)

        pairs: Pairs = deque(maxlen=MEMORY)
        if other is not None:  # curvature along the scale gives the first step its length
            change = objective.gradient(start, "fit")[1] - objective.gradient(other, "fit")[1]
            add(pairs, begin - parts.mean(other), parts.gather(change))
        least = float(np.linalg.norm(parts.mean(average)))
        return map(parts.spread, islice(descend(gradient, begin, pairs, least), steps))

    def search(name: str, start: Array, other: Array | None = None) -> Search:
        parts = Parts(name, tensors, norms)
        points, losses = [start], [objective.loss(start, "held")]
        most = min(gradients, SCALES) if name == "scale" else gradients
        for point in path(parts, start, other, "fit", most):
            points.append(point)
            losses.append(objective.loss(point, "held"))
            if len(losses) - 1 - int(np.argmin(losses)) >= PATIENCE:
                break
        return Search(name, parts, points, losses)

    average = Parts("scale", tensors, norms).spread(np.full(1, 1 / len(norms)))
    scale = search("scale", average)
    start = scale.points[scale.steps]
    finer = GRANULARITIES[1:] if by == "auto" else [by][: by != "scale"]
    other = next((point for point in scale.points if (point != start).any()), None)
    searches = [scale, *(search(name, start, other) for name in finer)]
    chosen = min(searches, key=lambda s: min(s.losses)) if by == "auto" else searches[-1]
    start, other = chosen.points[0], None if chosen is scale else other
    *_, last = start, *path(chosen.parts, start, other, "all", chosen.steps)
    # The way on all documents differs; it counts only if it does not end higher.
    candidates = [last, chosen.points[chosen.steps]]
    losses = [objective.loss(point, "all") for point in candidates]
    return Learned(candidates[int(np.argmin(losses))], chosen, searches)
