"""Regret of `mergelaw select` against greedy addition, random search and CMA-ES.

    python benchmarks/selection.py measure STUDY BASE TRUTH.npz    measure all subsets by every rule
    python benchmarks/selection.py score TRUTH.npz [GRADIENTS]  search them, for 20 objectives

The study must be made up to its task vectors. Regret is the best loss that a search has measured,
above the best of all, as a share of that one's gain over the base. CMA-ES: `pip install cma`.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np

from mergelaw import config
from mergelaw.decide import Measured, Objective
from mergelaw.decide.measured import Model
from mergelaw.decide.predict import predictor
from mergelaw.decide.select import select
from mergelaw.workflow.study import Study

BUDGETS = (40, 80, 120)
OBJECTIVES = 20
BATCH = 8
JOBS = 3  # processes
# Experts in the merges of each rule that `select` begins with, without and with gradients.
START = {False: (2, 3, 5, 7, 9), True: (4, 4, 4, 7)}
Place = tuple[int, tuple[int, ...]]  # rule, experts


def measure(file: str, base: str, output: str) -> None:
    """Measure every subset under every rule that does not learn."""
    from mergelaw.cli.process import prepare_torch
    from mergelaw.evaluation import cross_entropy
    from mergelaw.evaluation.shard import counts_of, encode, load_model
    from mergelaw.merging.engine import Merger
    from mergelaw.merging.methods.learned import Learned
    from mergelaw.merging.task_vector import TaskVector

    study = Study(config.load(file))
    prepare_torch(1)
    pool, settings = study.config.pool(base), study.config.evaluation.model_dump()
    folder = study.results / study.bases[base].path
    corpora = {name: study.results / a.path for name, a in study.corpora["eval"].items()}
    sets, rows = encode(settings, folder, corpora), []
    vectors = {n: TaskVector(study.results / study.task_vectors[base, n, 0].path) for n in pool}
    methods = {n: m for n, m in study.config.methods.items() if not isinstance(m, Learned)}
    subsets = [s for k in range(len(pool) + 1) for s in combinations(pool, k)]
    for name, method in methods.items():
        model = load_model(folder, settings["dtype"])
        batches = {
            d: cross_entropy.batches(s.windows, settings["batch_tokens"], model.device)
            for d, s in sets.items()
        }
        with Merger(model, folder, vectors, method, 1 << 33) as merger:
            for members in subsets if not rows else subsets[1:]:
                merger.merge(members)
                nll = [cross_entropy.nll(model, batches[d], s.documents) for d, s in sets.items()]
                counts = [sum(counts_of(s)["document_tokens"]) for s in sets.values()]
                rows.append([part.sum() / count for part, count in zip(nll, counts, strict=True)])
        print(name, flush=True)
    recipes = [
        json.dumps(m.model_dump(by_alias=True), separators=(",", ":")) for m in methods.values()
    ]
    np.savez(
        output, losses=rows, domains=list(sets), experts=pool, methods=list(methods),
        recipes=recipes, base=base,
    )  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """Losses, (1 + rules x subsets, domains), of the base and of all merges of a pool."""

    losses: Any
    domains: list[str]
    experts: list[str]
    methods: list[str]
    recipes: list[str]
    base: str

    @classmethod
    def read(cls, path: str) -> "Truth":
        file = np.load(path)
        lists = {n: file[n].tolist() for n in ("domains", "experts", "methods", "recipes", "base")}
        return cls(file["losses"], **lists)

    @property
    def places(self) -> list[Place]:
        """All merges, in the order of the losses."""
        M = len(self.experts)
        subsets = [s for k in range(1, M + 1) for s in combinations(range(M), k)]
        return [(rule, s) for rule in range(len(self.methods)) for s in subsets]

    def measured(self, places: list[Place]) -> Measured:
        """These merges as if nothing else were measured."""
        row = {place: 1 + i for i, place in enumerate(self.places)}

        def model(role: str, place: Place, losses: Any) -> Model:
            rule, members = place
            names = tuple(self.experts[i] for i in members)
            return Model(
                str(place), role, self.methods[rule], self.recipes[rule], 0, names,
                (1.0,) * len(names), losses,
            )  # fmt: skip

        models = [model("base", (0, ()), self.losses[0])] + [
            model("merge", place, self.losses[row[place]]) for place in places
        ]
        by_name = {one.identity: one for one in models}
        return Measured(self.base, tuple(self.domains), frozenset(), by_name, lambda _: None)  # type: ignore[arg-type, return-value]


def objectives(domains: list[str]) -> list[Objective]:
    """The macro loss, the worst domain, and random weights of domains."""
    random = np.random.default_rng(1)
    every = [Objective(), Objective("worst")]
    while len(every) < OBJECTIVES:
        weights = random.dirichlet(np.full(len(domains), 0.5)).round(3)
        every.append(Objective(weights=dict(zip(domains, weights.tolist(), strict=True))))
    return every


# Each search yields the places that it measures, in order; `values` has the objective by place.


def by_random(truth: Truth, values: dict[Place, float], seed: int) -> Iterator[Place]:
    places = truth.places
    for i in np.random.default_rng(seed).permutation(len(places)):
        yield places[i]


def by_greedy(truth: Truth, values: dict[Place, float], seed: int) -> Iterator[Place]:
    """Add the expert that lowers the loss most, rule by rule, until none does."""
    M = len(truth.experts)
    for rule in np.random.default_rng(seed).permutation(len(truth.methods)).tolist():
        current: Place | None = None
        while True:
            members = current[1] if current else ()
            more = [(rule, tuple(sorted({*members, i}))) for i in range(M) if i not in members]
            yield from more
            best = min(more, key=values.__getitem__, default=None)
            if best is None or (current and values[best] >= values[current]):
                break
            current = best


def by_cma(truth: Truth, values: dict[Place, float], seed: int) -> Iterator[Place]:
    """CMA-ES over a number for each expert, positive where it is merged, and one for each rule."""
    import cma

    M, rules = len(truth.experts), len(truth.methods)
    options = {"seed": seed + 1, "verbose": -9}
    for again in range(100):
        search = cma.CMAEvolutionStrategy(
            np.full(M + rules, 0.2), 0.6, options | {"seed": 100 * seed + again + 1}
        )
        while not search.stop():
            points, losses = search.ask(), []
            for x in points:
                members = tuple(np.flatnonzero(x[:M] > 0).tolist()) or (int(x[:M].argmax()),)
                place = int(x[M:].argmax()), members
                yield place
                losses.append(values[place])
            search.tell(points, losses)


def by_select(
    truth: Truth,
    objective: Objective,
    values: dict[Place, float],
    seed: int,
    held: list[Any],
    gradients: Path | None,
) -> Iterator[Place]:
    """The product's batches, after the single experts and a few random merges of every rule."""
    random, M = np.random.default_rng(seed), len(truth.experts)
    done: list[Place] = [(0, (i,)) for i in range(M)]
    for rule in range(len(truth.methods)):
        for k in START[gradients is not None]:
            members = tuple(sorted(random.choice(M, k, replace=False).tolist()))
            done.append((rule, members))
    yield from done
    earlier: list[Any] = []
    while True:
        one = truth.measured(done)
        answer = select(one, predictor(one, gradients), objective, BATCH, earlier=earlier)
        if not answer.proposals:
            return
        for p in answer.proposals:
            place = (
                truth.methods.index(p.method),
                tuple(sorted(map(truth.experts.index, p.experts))),
            )
            held.append((len(done), values[place], p.value, p.low, p.high, p.usable))
            earlier.append(p)
            done.append(place)
            yield place


def regrets(
    truth: Truth, objective: Objective, values: dict[Place, float], search: Any
) -> list[float]:
    """Regret after each budget. Repeated merges are free; a search may end early."""
    base = truth.losses[0]
    shares = objective.shares(truth.measured([truth.places[0]]))
    level = float(objective.values(base[None], base, shares)[0])
    least, best, seen, result = min(values.values()), level, set(), []
    for place in search:
        if place not in seen:
            if len(seen) in BUDGETS and len(result) < BUDGETS.index(len(seen)) + 1:
                result.append((best - least) / (level - least))
            if len(seen) == BUDGETS[-1]:
                break
            seen.add(place)
        best = min(best, values[place])
    return (result + [(best - least) / (level - least)] * len(BUDGETS))[: len(BUDGETS)]


def search(task: tuple[str, Path | None, int]) -> tuple[dict[str, list[float]], list[Any]]:
    """Regrets of all searches for one objective, and what `select` predicted."""
    truth, held = Truth.read(task[0]), []
    gradients, seed = task[1:]
    objective = objectives(truth.domains)[seed]
    shares = objective.shares(truth.measured(truth.places[:1]))
    every = objective.values(truth.losses[1:], truth.losses[0], shares)
    values = dict(zip(truth.places, every.tolist(), strict=True))
    searches = {
        "select": by_select(truth, objective, values, seed, held, gradients),
        "greedy": by_greedy(truth, values, seed),
        "random": by_random(truth, values, seed),
        "CMA-ES": by_cma(truth, values, seed),
    }
    result = {name: regrets(truth, objective, values, one) for name, one in searches.items()}
    print(seed, result, file=sys.stderr, flush=True)
    return result, held


def score(path: str, gradients: str | None = None) -> None:
    """Print tables of regrets and of intervals' hold rates."""
    folder = Path(gradients) if gradients else None
    with Pool(JOBS) as jobs:
        results = jobs.map(search, [(path, folder, n) for n in range(OBJECTIVES)], chunksize=1)
    table = {name: np.array([one[name] for one, _ in results]) for name in results[0][0]}
    print(f"\n### {Truth.read(path).base}\n\n| search | " + " | ".join(map(str, BUDGETS)) + " |")
    print("|---|" + "---|" * len(BUDGETS))
    for name, rows in table.items():
        gap = rows - table["select"]
        error = gap.std(axis=0, ddof=1) / np.sqrt(len(gap))
        cells = [f"{100 * m:.2f}%" for m in rows.mean(axis=0)]
        if name != "select":
            cells = [
                f"{c} ({100 * g:+.2f} ± {100 * e:.2f})"
                for c, g, e in zip(cells, gap.mean(axis=0), error, strict=True)
            ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    numbers = np.array([row for _, held in results for row in held], dtype=float)
    for name, rows in (("usable", numbers[:, 5] > 0), ("trial", numbers[:, 5] == 0)):
        value, predicted, low, high = numbers[rows, 1:5].T
        if len(value):
            z = (value - predicted) / (high - low) * 2 * 1.645
            print(
                f"\n{len(value)} proposals with {name} predictions: 90% intervals hold in "
                f"{100 * (abs(z) <= 1.645).mean():.0f}%; measured minus predicted is "
                f"{z.mean():+.2f} standard errors in the mean, {np.sqrt((z**2).mean()):.2f} "
                "root mean square."
            )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    command, *words = sys.argv[1:] or ["-h"]
    if command == "measure" and len(words) == 3 and Path(words[0]).is_file():
        measure(*words)
    elif command == "score" and len(words) in (1, 2):
        score(*words)
    else:
        sys.exit(__doc__)
