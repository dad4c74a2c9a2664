"""Learned coefficients against rules and rivals, on the bases and calibration documents of a study.

The study must be measured (`snakemake --profile profiles/local`); any study with `learned` will do:

    python benchmarks/learned.py config/config.yaml

For a study that learns its design (`make learned-law`) the laws of its methods:

    python benchmarks/learned.py config/learned_law.yaml --figure benchmarks/learned_law.svg

All losses are macro averages over evaluation documents, in nats per token. A pass is a forward pass
over all calibration documents; a gradient counts as three.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import scores
from mergelaw import config
from mergelaw.artifacts import store
from mergelaw.cli.process import prepare_torch
from mergelaw.data import documents as corpus
from mergelaw.data.recipe import SplitRecipe
from mergelaw.decide import calibration
from mergelaw.decide.calibration import BACKWARD, Calibration, Documents, divide
from mergelaw.decide.learned import GRANULARITIES, Parts, learn
from mergelaw.evaluation import read_cells, read_rows
from mergelaw.evaluation.shard import load_model
from mergelaw.laws import LAWS, fit_study
from mergelaw.laws.points import MACRO
from mergelaw.merging import task_vector
from mergelaw.merging.engine import Merger
from mergelaw.merging.methods import method_of
from mergelaw.merging.methods.learned import Learned
from mergelaw.merging.task_vector import TaskVector
from mergelaw.models import causal_lm, finetune
from mergelaw.models.checkpoint import read_config, vocabulary_size
from mergelaw.report.figures import draw, figures
from mergelaw.workflow.study import Study

PASSES = 60
STOP = 0.002  # nats
ROOM = 1 << 33  # bytes of memory for task vectors


class Pool:
    """A base of a study in memory, some of its experts, calibration and evaluation documents."""

    def __init__(self, study: Study, base: str, vectors: dict[str, Path] | None = None):
        self.study, self.base = study, base
        self.folder = study.results / study.bases[base].path
        paths = vectors or {
            name: study.results / study.task_vectors[base, name, 0].path
            for name in study.config.pool(base)
        }
        self.vectors = {name: TaskVector(path) for name, path in paths.items()}
        self.settings = study.config.evaluation.model_dump()
        self.tokenizer = causal_lm.load_tokenizer(self.folder)
        self.rows = vocabulary_size(read_config(self.folder))
        self.model = load_model(self.folder, self.settings["dtype"])
        method = method_of({"method": "learned"})
        self.merger = Merger(self.model, self.folder, self.vectors, method, ROOM)
        evaluation = {
            name: study.results / artifact.path
            for name, artifact in study.corpora["eval"].items()
            if not study.config.domains[name].held_out
        }
        self.evaluation = Documents(
            [[w for d in self.windows(n, path) for w in d] for n, path in evaluation.items()],
            self.settings["batch_tokens"],
            self.model.device,
        )
        self.tensors = list(self.merger.parameters)
        statistics = [vector.statistics()["tensors"] for vector in self.vectors.values()]
        self.norms = np.array([[s[t]["norm"] for t in self.tensors] for s in statistics])

    def windows(self, domain: str, path: Path) -> Any:
        return calibration.windows_of(self.tokenizer, self.rows, domain, path, self.settings)

    def objective(self, count: int | None = None, experts: Sequence[str] = ()) -> Calibration:
        """The calibration loss, of ``count`` documents a domain (None: the study's)."""
        domains = {}
        for name, artifact in self.study.corpora["calibration"].items():
            path = self.study.results / artifact.path
            with tempfile.TemporaryDirectory() as scratch:
                if count is not None:
                    recipe = artifact.sources["recipe"] | {"calibration_documents": count}
                    path, split = Path(scratch), SplitRecipe.model_validate(recipe)
                    corpus.write_split(split, "calibration", {}, path)
                domains[name] = self.windows(name, path)
        names = list(experts) or list(self.vectors)
        documents = divide(domains, self.settings["batch_tokens"], self.model.device)
        return Calibration(self.model, self.merger, names, documents)

    def loss(self, objective: Calibration, coefficients: np.ndarray) -> float:
        """Loss of evaluation documents."""
        objective.merge(coefficients)
        return self.evaluation.loss(self.model)

    def norms_of(self, experts: Sequence[str]) -> np.ndarray:
        return self.norms[[list(self.vectors).index(name) for name in experts]]

    def learned(
        self, by: str, count: int | None = None, experts: Sequence[str] = (), gradients: int = 5
    ) -> tuple[float, Any, float]:
        """Evaluation loss of learned coefficients, the result, and the passes it took."""
        names = list(experts) or list(self.vectors)
        with self.objective(count, names) as objective:
            result = learn(objective, self.tensors, self.norms_of(names), by, gradients)
            return self.loss(objective, result.coefficients), result, objective.passes


# -- rivals at the same passes -----------------------------------------------------------------


def adam(pool: Pool, by: str) -> float:
    """Adam from the learned scale, best of three rates by evaluation loss (hindsight)."""
    parts, best = Parts(by, pool.tensors, pool.norms), np.inf
    for rate in (0.03, 0.1, 0.3):
        with pool.objective() as objective:
            start = learn(objective, pool.tensors, pool.norms, "scale", 5).coefficients
            x = torch.tensor(parts.mean(start), requires_grad=True)
            optimiser = torch.optim.Adam([x], lr=rate * float(x.detach().abs().mean()))
            while objective.passes + BACKWARD <= PASSES:
                _, slope = objective.gradient(parts.spread(x.detach().numpy()), "all")
                x.grad = torch.tensor(parts.gather(slope))
                optimiser.step()
            best = min(best, pool.loss(objective, parts.spread(x.detach().numpy())))
    return best


def search(pool: Pool, by: str, ask: Callable[[np.ndarray, Any], Any]) -> float:
    """The best of as many coefficients as there are passes, by the loss of all documents."""
    parts = Parts(by, pool.tensors, pool.norms)
    with pool.objective() as objective:
        start = learn(objective, pool.tensors, pool.norms, "scale", 5).coefficients

        def value(x: np.ndarray) -> float:
            return objective.loss(parts.spread(x), "all")

        x = ask(parts.mean(start), lambda x: (value(x), objective.passes + 1 <= PASSES))
        return pool.loss(objective, parts.spread(x))


def random_search(start: np.ndarray, value: Any) -> np.ndarray:
    """Gaussian steps of 30% around the best so far."""
    generator, best = np.random.default_rng(0), start
    least, more = value(start)
    while more:
        x = best + 0.3 * np.abs(start).mean() * generator.normal(size=best.shape)
        loss, more = value(x)
        if loss < least:
            best, least = x, loss
    return best


def evolution(start: np.ndarray, value: Any) -> np.ndarray:
    """CMA-ES, as in mergekit-evolve."""
    import cma

    settings = {"seed": 1, "verbose": -9}
    strategy = cma.CMAEvolutionStrategy(start, 0.3 * float(np.abs(start).mean()), settings)
    more = True
    while more:
        points, losses = strategy.ask(), []
        for x in points:
            loss, more = value(x) if more else (np.inf, False)
            losses.append(loss)
        strategy.tell(points, losses)
    return np.asarray(strategy.result.xbest)


def fine_tune(pool: Pool) -> float:
    """Full fine-tune of the learned scale's merge on the same documents: Adam, full batch.

    The best of three rates and of every step, by evaluation loss (hindsight).
    """
    best = np.inf
    with pool.objective() as objective:
        start = learn(objective, pool.tensors, pool.norms, "scale", 5).coefficients
        objective.merge(start)
        documents = objective._documents["all"]
    for rate in (1e-4, 3e-4, 1e-3):
        model = copy.deepcopy(pool.model).requires_grad_(True)
        optimiser = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.99))
        for _ in range(PASSES // BACKWARD):
            documents.backward(model)
            optimiser.step()
            optimiser.zero_grad()
            best = min(best, pool.evaluation.loss(model))
    return best


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return scores.markdown([dict(zip(heads, row, strict=True)) for row in rows])


# -- tables --------------------------------------------------------------------------------------


def measured(study: Study, base: str) -> dict[str, float]:
    """Base, average of the whole pool and the best merge of the design, in hindsight."""
    shards = [study.results / one.path for one in study.evals.values() if one.base == base]
    rows = read_rows([shard for shard in shards if (shard / "lineage.json").exists()])
    rows = rows[~rows["held_out"]]
    ce = rows.groupby(["role", "method", "k", "merge"])["ce"].mean()
    merges = ce.loc["merge"]
    return {
        "base": float(ce.loc["base"].iloc[0]),
        "average": float(merges.loc["average", merges.index.get_level_values("k").max()].iloc[0]),
        "best measured": float(merges.min()),
        "of": merges.size,
    }


def against_rules(pools: Sequence[Pool]) -> None:
    rows = []
    for pool in pools:
        known = measured(pool.study, pool.base)
        losses = {by: pool.learned(by)[0] for by in GRANULARITIES}
        auto, result, passes = pool.learned("auto")
        rules = [f"{known[name]:.4f}" for name in ("base", "average", "best measured")]
        found = [f"{loss:.4f}" for loss in losses.values()]
        choice = f"{auto:.4f} ({result.chosen.by}, {result.chosen.steps} steps)"
        rows.append([pool.base, *rules, str(known["of"]), *found, choice, f"{passes:.0f}"])
    heads = ["base", "base itself", "average of all", "best measured", "of"]
    print("\n## Against every measured merge\n")
    print(markdown([*heads, *GRANULARITIES, "auto", "passes of auto"], rows))


def against_rivals(pools: Sequence[Pool]) -> None:
    rivals: dict[str, Callable[[Pool], float]] = {
        "auto": lambda pool: pool.learned("auto")[0],
        "Adam by block": lambda pool: adam(pool, "block"),
        "random, by expert": lambda pool: search(pool, "expert", random_search),
        "random, by block": lambda pool: search(pool, "block", random_search),
        "CMA-ES, by expert": lambda pool: search(pool, "expert", evolution),
        "CMA-ES, by block": lambda pool: search(pool, "block", evolution),
        "fine-tune": fine_tune,
    }
    try:
        import cma  # noqa: F401
    except ImportError:
        rivals = {name: run for name, run in rivals.items() if "CMA" not in name}
    rows = [[pool.base, *(f"{run(pool):.4f}" for run in rivals.values())] for pool in pools]
    print(f"\n## Rivals at {PASSES} passes\n")
    print("All start from the learned scale, whose passes count (but not the fine-tune's).")
    print("Adam's rate and the fine-tune's rate and step are the best by evaluation loss, which")
    print("flatters them.\n")
    print(markdown(["base", *rivals], rows))


def by_documents(pool: Pool, counts: Sequence[int]) -> None:
    names = [*GRANULARITIES, "auto"]
    rows = [[str(n), *(f"{pool.learned(by, n)[0]:.4f}" for by in names)] for n in counts]
    print(f"\n## By number of calibration documents a domain: {pool.base}\n")
    print(markdown(["documents", *names], rows))


def bad_expert(study: Study, base: str) -> None:
    """The pool with one expert that was trained at forty times the rate, on forty documents."""
    names = study.config.pool(base)
    vectors = {n: study.results / study.task_vectors[base, n, 0].path for n in names}
    name, start = names[-1], study.results / study.bases[base].path
    settings = study.config.training_of(base, name)
    wild = settings.model_copy(update={"learning_rate": 40 * settings.learning_rate, "steps": 60})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = study.corpora["train"][name].sources["recipe"] | {"train_documents": 40}
        split = SplitRecipe.model_validate(recipe)
        corpus.write_split(split, "train", {}, folder / "documents")
        for part in ("expert", "state"):
            (folder / part).mkdir()
        places = {name: folder / "documents"}
        finetune.fine_tune(wild, 0, start, places, folder / "expert", folder / "state", 600)

        def work(made: Path, state: Path) -> dict[str, Any]:
            return task_vector.write(start, folder / "expert", made)

        store.make(folder / "bad", "task_vector", {}, {}, work)
        pool = Pool(study, base, vectors | {name: folder / "bad"})
        lengths = np.linalg.norm(pool.norms, axis=1)
        place, rows = names.index(name), []
        with pool.objective() as objective:
            zero = np.zeros(pool.norms.shape)
            equal, without = zero + 1 / len(names), zero + 1 / (len(names) - 1)
            without[place] = 0
            alone = zero.copy()
            alone[place] = 1
            for what, c in (
                ("base", zero), (f"{name} alone", alone), ("average", equal),
                (f"average without {name}", without),
            ):  # fmt: skip
                rows.append([what, f"{pool.loss(objective, c):.4f}", ""])
        for by in [*GRANULARITIES, "auto"]:
            loss, result, _ = pool.learned(by)
            shares = np.linalg.norm(result.coefficients * pool.norms, axis=1)
            share = shares[place] / np.median(np.delete(shares, place))
            rows.append([by, f"{loss:.4f}", f"{share:.2f}"])
        best = measured(study, base)["best measured"]
    print(f"\n## A pool with a bad expert: {base}, {name} trained at 40 times the rate\n")
    print(f"Its norm is {lengths[place] / np.median(lengths):.1f} times the others'. (The sound")
    print(f"pool's best measured merge: {best:.4f}.) Share: its part of the merged change, as a")
    print("multiple of the others' median.\n")
    print(markdown(["merge", "loss", "share"], rows))


def law(study: Study, figure: Path | None) -> None:
    """Losses by k, and two laws of each method and base, of what is measured so far."""
    shards = [study.results / a.path for a in study.evals.values() if study.made(a)]
    rows, documents = read_cells(shards)
    fitted = fit_study(rows, documents)
    points = fitted.points[fitted.points["domain"] == MACRO].sort_values("k")
    losses, laws = [], []
    for one in fitted.fits:
        if one.base is None or one.domain != MACRO:
            continue
        place = {"base": one.base, "method": one.method}
        part = points[(points["base"] == one.base) & (points["method"] == one.method)]
        losses.append(place | {f"{k:g}": f"{ce:.3f}" for k, ce in part[["k", "ce"]].to_numpy()})
        power, gains = one.fit.refit(LAWS["power_fixed_N"]), -np.diff(part["ce"])
        small = part["k"].to_numpy()[:-1][gains < STOP]
        laws.append(
            place
            | {
                "A": f"{one.fit.parameters['A']:.3f}",
                "b": f"{one.fit.parameters['b']:.2f}",
                "RMSE, AICc of A / (k + b)": f"{one.fit.rmse:.5f}, {one.fit.aicc:.0f}",
                "a": f"{power.parameters['a']:.2f}",
                "RMSE, AICc of A k^-a": f"{power.rmse:.5f}, {power.aicc:.0f}",
                "verdict": one.fit.to_dict()["verdict"]["state"],
                f"stop (next gain below {STOP})": f"{small[0]:g}" if len(small) else "never",
                "last gain": f"{gains[-1]:.4f}",
            }
        )
    print("\n## The law of learned merges\n")
    print(scores.markdown(losses) + "\n")
    print(scores.markdown(laws))
    if figure is not None:
        fits = pd.DataFrame([one.to_dict() for one in fitted.fits])
        draw(figures(fits, fitted.points, rows)["methods"], figure)
        figure.with_suffix(".png").unlink()


def sections(study: Study, options: Any) -> Iterator[Callable[[], None]]:
    bases = options.bases or list(study.bases)
    pools = [Pool(study, base) for base in bases]
    last = pools[-1]
    yield lambda: against_rules(pools)
    yield lambda: against_rivals(pools)
    whole = last.study.config.corpus.calibration_documents
    synthetic = study.config.domains[next(iter(study.config.domains))].source.synthetic
    counts = [n for n in (4, 12, 40, 50, 100) if synthetic or n <= whole]
    yield lambda: by_documents(last, counts)
    if all(artifact.trains for artifact in study.experts.values()):
        yield lambda: bad_expert(study, last.base)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, nargs="?", default=Path("config/config.yaml"))
    parser.add_argument("--bases", nargs="*", help="default: all")
    parser.add_argument("--figure", type=Path, help="file for the laws' figure")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the sections to print")
    options = parser.parse_args(arguments)
    prepare_torch(1)
    study = Study(config.load(options.study))
    if any(isinstance(method, Learned) for method in study.config.designed.values()):
        law(study, options.figure)
        return
    missing = [a.path for a in study.coefficients if not study.made(a)]
    if missing:
        sys.exit(f"{missing[0]}: is not made yet; run the workflow first")
    for number, section in enumerate(sections(study, options)):
        if options.only is None or number in options.only:
            section()
            sys.stdout.flush()


if __name__ == "__main__":
    main()
