"""Predicted losses of merges against measured ones, with none and a dozen measured merges a rule.

    snakemake --profile profiles/local && snakemake gradients --profile profiles/local
    python benchmarks/predict.py config/config.yaml > benchmarks/predict.md

Unseen are the study's measured merges that the prediction was not fitted to. ``--unseen 50``
measures as many other random subsets of each rule instead.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mergelaw import config
from mergelaw.artifacts import lineage
from mergelaw.decide.calibration import Documents
from mergelaw.decide.gradients import candidates
from mergelaw.decide.measured import Measured, Model
from mergelaw.decide.predict import Predictor, check, predictor
from mergelaw.evaluation.shard import encode, load_model
from mergelaw.merging.engine import Merger
from mergelaw.merging.methods import method_of
from mergelaw.merging.task_vector import TaskVector
from mergelaw.workflow import results
from mergelaw.workflow.study import Study
from scores import markdown

EACH = 4  # merges of a rule at each of three k, which the prediction is fitted to
DRAWS = 5  # of these merges
ROOM = 1 << 33  # bytes of memory for task vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--unseen", type=int, default=0)
    options = parser.parse_args()
    study = Study(config.load(options.config))
    every, _ = results.measured(study)
    print(f"# Predictions of {study.config.name}'s merges\n")
    print((__doc__.partition("\n\n")[2]).rstrip() + "\n")
    rows, costs = [], []
    for one in every:
        folder = study.results / study.gradients[one.base, 0].path
        costs.append({"base": one.base} | cost(folder))
        for method in predictor(one, folder).methods:
            unseen = measure(study, one, method, options.unseen) if options.unseen else None
            rows.append({"base": one.base, "rule": method} | scores(one, folder, method, unseen))
    show(rows, costs)


def show(rows: Sequence[dict[str, Any]], costs: Sequence[dict[str, Any]]) -> None:
    print(
        "Macro loss, k = 2 to M - 2. Correlation: rank correlation within k, losses in units of "
        "their standard deviation at that k. RMSE in nats; spread: standard deviation within k. "
        f"Held: share of 90% intervals of macro losses. Fitted to {3 * EACH} merges of a rule, "
        f"mean over {DRAWS} draws; passed: share of draws that the check calls usable. By weights: "
        "correlation and RMSE / spread without gradients, from all measured merges.\n"
    )
    print(markdown(rows))
    if not costs:
        return
    print("\n## Cost\n\nForward passes over the evaluation documents; seconds on this machine.\n")
    print(markdown(costs))


def cost(folder: Path) -> dict[str, Any]:
    facts = lineage.read(folder)["facts"]
    return {
        "forward passes": facts["forward_passes"],
        "merges made": facts["merged_differences"],
        "s, gradients": facts["seconds"]["gradients"],
        "s, making and multiplying": facts["seconds"]["columns"],
    }


def measure(study: Study, one: Measured, method: str, count: int) -> list[Model]:
    """Measure random subsets of the pool, equally weighted, in memory."""
    base, pool = one.base, study.config.pool(one.base)
    folder = study.results / study.bases[base].path
    vectors = {e: TaskVector(study.results / study.task_vectors[base, e, 0].path) for e in pool}
    settings = study.config.evaluation.model_dump()
    corpora = {d: study.results / a.path for d, a in study.corpora["eval"].items()}
    sets, model = encode(settings, folder, corpora), load_model(folder, settings["dtype"])
    domains = [Documents([sets[d].windows], settings["batch_tokens"], "cpu") for d in one.domains]
    recipe = next(m.recipe for m in one.merges if m.method == method)
    rule = method_of(study.config.methods[method].model_dump(by_alias=True))
    models = []
    with Merger(model, folder, vectors, rule, ROOM) as merger:
        for row in unseen_subsets(len(pool), count):
            experts = tuple(np.array(pool)[row])
            merger.merge(experts)
            losses = np.array([documents.loss(model) for documents in domains])
            weights = (1.0,) * len(experts)
            models.append(Model("", "merge", method, recipe, 0, experts, weights, losses))
    return models


def unseen_subsets(M: int, count: int) -> np.ndarray:
    subsets = candidates(M)
    sizes = subsets.sum(axis=1)
    subsets = subsets[(sizes >= 2) & (sizes <= M - 2)]
    chosen = np.random.default_rng(1).choice(len(subsets), min(count, len(subsets)), replace=False)
    return subsets[np.sort(chosen)]


def scores(
    one: Measured, folder: Path, method: str, unseen: Sequence[Model] | None = None
) -> dict[str, Any]:
    """Figures of one rule on one base."""
    merges = [m for m in one.merges if m.method == method and m.role == "merge"]
    row: dict[str, Any] = {}
    none = judge(one, predictor(only(one, []), folder), method, unseen or merges)
    row["none: correlation"], row["RMSE"] = f"{none[0]:.3f}", f"{none[1]:.4f}"
    figures, passed = [], []
    for few in draws(merges, len(one.pool)):
        answer = predictor(only(one, few), folder)
        rest = unseen or [m for m in merges if m not in few]
        figures.append(judge(one, answer, method, rest))
        passed.append(answer.checks[method]["macro"].verdict == "usable")
    correlation, rmse, share, held = np.mean(figures, axis=0)
    row[f"{3 * EACH}: correlation"] = f"{correlation:.3f}"
    row["RMSE "], row["RMSE / spread"] = f"{rmse:.4f}", f"{share:.2f}"
    row["held"], row["passed"] = f"{held:.2f}", f"{np.mean(passed):.1f}"
    weights = predictor(only(one, merges))
    if unseen:
        found = judge(one, weights, method, unseen)
        verdict = weights.checks[method]["macro"].verdict
        row["by weights"] = f"{found[0]:.3f} {found[2]:.2f} {verdict}"
    return row


def only(one: Measured, merges: Sequence[Model]) -> Measured:
    """The same base with these merges measured."""
    models = {m.identity: m for m in [one.reference, *merges]}
    return replace(one, models=models)


def draws(merges: Sequence[Model], M: int) -> Iterator[list[Model]]:
    """Merges to fit to: some at each of three k."""
    for draw in range(DRAWS):
        random, few = np.random.default_rng(draw), list[Model]()
        for k in (2, (M + 1) // 2, M - 1):
            of_size = [m for m in merges if len(m.experts) == k]
            few += [of_size[i] for i in random.choice(len(of_size), EACH, replace=False)]
        yield few


def judge(
    one: Measured, answer: Predictor, method: str, merges: Sequence[Model]
) -> tuple[float, float, float, float]:
    """Rank correlation within k, RMSE (nats), RMSE / spread, share of 90% intervals that held."""
    M, domains = len(answer.experts), np.array(one.counted)
    merges = [m for m in merges if 2 <= len(m.experts) <= M - 2]
    subsets = np.array([np.isin(answer.experts, m.experts) for m in merges])
    mean, deviation = answer.macro(method, subsets)
    truth = np.array([m.losses for m in merges]) @ domains
    sizes = subsets.sum(axis=1)
    found = check(truth, truth - mean, sizes)
    held = np.mean(np.abs(mean - truth) <= 1.645 * deviation)
    rmse = float(np.sqrt(np.mean((mean - truth) ** 2)))
    return found.correlation, rmse, found.error[0], float(held)


if __name__ == "__main__":
    main()
