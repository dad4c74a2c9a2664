"""Gradients of the evaluation loss at the mean of all experts, as inner products with merges.

The loss and its gradient are computed by domain at the base plus the mean task vector, and a step
away from it towards each expert. What is kept of a gradient are its inner products with columns:
the task vectors, the prepared vectors of methods that combine them linearly, and the merged
differences of candidate subsets under methods that elect signs. So no gradient is stored, and any
merge that is a combination of columns can be predicted (``decide.predict``).
"""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mergelaw.decide.calibration import BACKWARD, Documents
from mergelaw.decide.measured import Array
from mergelaw.errors import MergelawError
from mergelaw.evaluation.shard import encode, load_model, memory_for_vectors
from mergelaw.merging.engine import Merger, Prepared, prepare, slices
from mergelaw.merging.methods import Method, method_of
from mergelaw.merging.methods.task_arithmetic import TaskArithmetic
from mergelaw.merging.task_vector import TaskVector
from mergelaw.models.causal_lm import check_windows

if TYPE_CHECKING:
    from torch import Tensor

PRODUCTS = "products.npz"
STEP = 0.2  # of the median norm of the task vectors
ALL_SUBSETS = 10  # experts of whose subsets all are candidates
CANDIDATES = 2000  # about the most candidates of a larger pool
COLUMNS = 1 << 24  # elements of columns at a time
PLAIN = "experts"  # the name of the task vectors' block of columns

Subsets = NDArray[np.bool_]


def candidates(M: int) -> Subsets:
    """Candidate subsets of M experts, (C, M), the same every time.

    All of ten experts or fewer. Otherwise singles, pairs, all but one, all, and a random sample
    with every other number of experts alike, about 2,000 in all.
    """
    if M <= ALL_SUBSETS:
        sets = {s for k in range(1, M + 1) for s in combinations(range(M), k)}
    else:
        sets = {s for k in (1, 2, M - 1, M) for s in combinations(range(M), k)}
        random, each = np.random.default_rng(0), max(CANDIDATES - len(sets), 0) // (M - 4)
        for k in range(3, M - 1):
            for _ in range(each):
                sets.add(tuple(sorted(random.choice(M, k, replace=False).tolist())))
    subsets = np.zeros((len(sets), M), dtype=bool)
    for row, members in zip(subsets, sorted(sets, key=lambda s: (len(s), s)), strict=True):
        row[list(members)] = True
    return subsets


class Block:
    """Columns of one kind: the pool's prepared vectors, or candidate merges of them.

    ``gradients``, (M + 1, domains, columns), are inner products with the gradients, ``vectors``,
    (M, columns), with the task vectors, ``squares`` with each other, (columns, columns), or of each
    candidate with itself, (columns,). ``merges`` is the number of candidates. With ``keep``
    columns are made once and stay in memory.
    """

    def __init__(self, method: Method, vectors: Sequence[Prepared], subsets: Subsets, domains: int):
        self._method, self._vectors, M = method, vectors, len(vectors)
        elects = bool(method.rule([1.0] * M).elect)
        self._members = [np.flatnonzero(row) for row in subsets] if elects else None
        size = len(subsets) if elects else M
        self.gradients = np.zeros((M + 1, domains, size))
        self.vectors = np.zeros((M, size))
        self.squares = np.zeros(size if elects else (size, size))
        self.keep, self.merges, self.columns = False, len(self._members or ()), size
        self._kept: dict[tuple[str, int], list[tuple[slice, Tensor]]] = {}

    def parts(self, name: str, part: slice, device: Any) -> Iterable[tuple[slice, "Tensor"]]:
        """Rows of columns' elements, some columns at a time, and which columns these are."""
        if not self.keep:
            return self._make(name, part, device)
        place = name, part.start
        if place not in self._kept:
            self._kept[place] = list(self._make(name, part, device))
        return self._kept[place]

    def _make(self, name: str, part: slice, device: Any) -> Iterator[tuple[slice, "Tensor"]]:
        import torch

        from mergelaw.merging import kernels

        vectors = [v.part(name, part.start, part.stop, device) for v in self._vectors]
        if self._members is None:
            yield slice(0, len(vectors)), torch.stack(vectors)
            return
        step = max(COLUMNS // max(len(vectors[0]), 1), 1)
        for start in range(0, len(self._members), step):
            chosen = self._members[start : start + step]
            rows = [
                kernels.combine([vectors[i] for i in m], self._method.rule([1.0] * len(m)))
                for m in chosen
            ]
            yield slice(start, start + len(rows)), torch.stack(rows)

    def add_norms(self, columns: slice, rows: "Tensor", vectors: "Tensor") -> None:
        """Add a slice's products of columns with the task vectors and with themselves."""
        self.vectors[:, columns] += (vectors @ rows.T).double().cpu().numpy()
        squares = rows @ rows.T if self._members is None else (rows**2).sum(dim=1)
        self.squares[columns] += squares.double().cpu().numpy()


class Gradients(ExitStack):
    """The gradients of some domains in turn, in fp32 by tensor; leaving removes the hooks."""

    def __init__(self, model: Any, merger: Merger):
        super().__init__()
        self._model, self.merger = model, merger
        self.by_tensor: dict[str, Tensor] = {}
        self._row = 0
        model.requires_grad_(False)
        for name, parameter in merger.parameters.items():
            parameter.requires_grad_(True)
            self.callback(parameter.requires_grad_, False)
            hook: Any = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(self._take, name)
            )
            self.callback(hook.remove)

    def _take(self, name: str, parameter: Any) -> None:
        """Add a batch's gradient of a tensor to the domain's, and free it."""
        self.by_tensor[name][self._row] += parameter.grad.view(-1).float()
        parameter.grad = None

    def compute(self, domains: Sequence[Documents]) -> list[float]:
        """Losses of the domains at the present merge; ``by_tensor`` then has their gradients."""
        import torch

        for name, parameter in self.merger.parameters.items():
            shape = len(domains), parameter.numel()
            self.by_tensor[name] = torch.zeros(shape, device=parameter.device)
        losses = []
        for self._row, documents in enumerate(domains):
            losses.append(documents.backward(self._model))
        return losses


def write(
    recipe: Mapping[str, Any],
    base: Path,
    vectors: Mapping[str, Path],
    corpora: Mapping[str, Path],
    cache: Path,
    folder: Path,
) -> dict[str, Any]:
    """Compute the gradients and write ``products.npz``.

    ``recipe`` holds the methods by name, the experts in canonical order and the evaluation's
    settings; the folders are the base, task vectors by expert, evaluation documents by domain, and
    a cache of thresholds and masks. Returns facts for the lineage. Raises MergelawError for a loss
    or gradient that is not finite.
    """
    settings, experts = recipe["evaluation"], recipe["experts"]
    model = load_model(base, settings["dtype"])
    sets = encode(settings, base, corpora)
    for domain, encoded in sets.items():
        check_windows(model, encoded.windows, f"evaluation documents of {domain}")
    documents = {
        domain: Documents([encoded.windows], settings["batch_tokens"], model.device)
        for domain, encoded in sets.items()
    }
    pool = {expert: TaskVector(vectors[expert]) for expert in experts}
    room, plain = memory_for_vectors(model.device), TaskArithmetic(normalize=False)
    with Merger(model, base, pool, plain, room) as merger, Gradients(model, merger) as gradients:
        blocks = _blocks(recipe["methods"], pool, len(sets), cache, gradients)
        left = memory_for_vectors(model.device)
        losses, steps, facts = _measure(gradients, documents, pool, blocks, left)
    about = {"experts": experts, "domains": list(sets), "methods": recipe["methods"]}
    arrays = {"losses": losses, "steps": steps, "subsets": candidates(len(experts))}
    for name, block in blocks.items():
        arrays |= {f"{name}/{a}": getattr(block, a) for a in ("gradients", "vectors", "squares")}
    np.savez(folder / PRODUCTS, allow_pickle=False, about=json.dumps(about), **arrays)
    return facts


def _blocks(
    methods: Mapping[str, Any],
    pool: Mapping[str, TaskVector],
    domains: int,
    cache: Path,
    stack: ExitStack,
) -> dict[str, Block]:
    """Blocks of columns: the task vectors, and those of methods that need more."""
    subsets = candidates(len(pool))
    plain = TaskArithmetic()
    blocks = {PLAIN: Block(plain, list(prepare(plain, pool).values()), subsets, domains)}
    for name, recipe in methods.items():
        method = method_of(recipe)
        prepared = list(prepare(method, pool, cache).values())
        if method.rule([1.0] * len(pool)).elect or not all(p.whole for p in prepared):
            for one in prepared:
                one.store_masks(cache, stack)
            blocks[f"method {name}"] = Block(method, prepared, subsets, domains)
    return blocks


def _measure(
    gradients: Gradients,
    documents: Mapping[str, Documents],
    pool: Mapping[str, TaskVector],
    blocks: Mapping[str, Block],
    room: int,
) -> tuple[Array, Array, dict[str, Any]]:
    """Losses, (M + 1, domains), step lengths, (M,), and facts; fills the blocks' products."""
    merger, experts, M = gradients.merger, list(pool), len(pool)
    statistics = [vector.statistics()["tensors"] for vector in pool.values()]
    norms = np.array([math.hypot(*(s[t]["norm"] for t in merger.parameters)) for s in statistics])
    with np.errstate(divide="ignore"):
        steps = STEP * np.median(norms) / norms
    steps = np.where(np.isfinite(steps) & (steps > 0), steps, STEP)
    size = sum(parameter.numel() for parameter in merger.parameters.values())
    domains, losses = list(documents), np.zeros((M + 1, len(documents)))
    together = max(min(len(domains), room // (8 * size)), 1)  # domains whose gradients are held
    left = room // 2
    for block in blocks.values():
        block.keep = 4 * size * block.columns <= left
        left -= 4 * size * block.columns * block.keep
    seconds, passes = {"gradients": 0.0, "columns": 0.0}, 0
    for point in range(M + 1):
        weights = np.full(M, 1 / M)
        weights[point - 1] += steps[point - 1] if point else 0.0
        merger.merge(experts, weights.tolist())
        for start in range(0, len(domains), together):
            part = slice(start, start + together)
            started = time.perf_counter()
            losses[point, part] = gradients.compute([documents[d] for d in domains[part]])
            middle = time.perf_counter()
            _add_products(gradients, blocks, point, part, with_norms=point == start == 0)
            seconds["gradients"] += middle - started
            seconds["columns"] += time.perf_counter() - middle
            passes += 1
            where = (
                "the mean of all experts" if not point else f"a step towards {experts[point - 1]}"
            )
            _check_finite(losses[point], blocks, point, domains[part], part, where)
    facts = {
        "forward_passes": BACKWARD * (M + 1),
        "merged_differences": sum(b.merges * (1 if b.keep else passes) for b in blocks.values()),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    return losses, steps, facts


def _add_products(
    gradients: Gradients, blocks: Mapping[str, Block], point: int, part: slice, with_norms: bool
) -> None:
    """Add the products of the present gradients with all columns, slice by slice."""
    for name, values in gradients.by_tensor.items():
        for start, stop in slices(values[0]):
            vectors = None
            for block in blocks.values():
                for columns, rows in block.parts(name, slice(start, stop), values.device):
                    vectors = rows if vectors is None else vectors  # the first block's are plain
                    products = (values[:, start:stop] @ rows.T).double().cpu().numpy()
                    block.gradients[point, part, columns] += products
                    if with_norms:
                        block.add_norms(columns, rows, vectors)


def _check_finite(
    losses: Array,
    blocks: Mapping[str, Block],
    point: int,
    domains: Sequence[str],
    part: slice,
    where: str,
) -> None:
    for row, domain in enumerate(domains, part.start):
        products = [block.gradients[point, row] for block in blocks.values()]
        if not all(np.isfinite(values).all() for values in [losses[row], *products]):
            raise MergelawError(
                f"gradients: the loss of {domain} or its gradient is not finite at {where}; set "
                "`evaluation.dtype: float32`, or leave out the expert that overflows"
            )


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """The names and recipes in the artifact's folder, and its arrays."""
    with np.load(folder / PRODUCTS) as arrays:
        return json.loads(str(arrays["about"])), {n: arrays[n] for n in arrays if n != "about"}
