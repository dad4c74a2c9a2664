"""Predicted losses of merges: the expansion, its fit to measured merges, and honest checks."""

import json
from functools import partial

import numpy as np
import pytest
import torch

import pool
from mergelaw.data.tokenize import encode
from mergelaw.decide import gradients
from mergelaw.decide.gradients import PRODUCTS, STEP, candidates
from mergelaw.decide.measured import Measured, Model
from mergelaw.decide.predict import Expansion, coefficients, predictor
from mergelaw.errors import MergelawError
from mergelaw.evaluation.cross_entropy import batches, nll
from mergelaw.merging.engine import Merger
from mergelaw.merging.methods import method_of
from mergelaw.merging.task_vector import TaskVector
from models import (
    documents,
    load,
    read_tensors,
    tokenizer,
    write_checkpoint,
    write_expert,
    write_pool,
    write_task_vector,
)

METHODS = {
    "average": {"method": "average"},
    "task_arithmetic": {"method": "task_arithmetic", "lambda": 1.5},
    "dare": {"method": "dare_linear", "drop_rate": 0.5},
    "ties": {"method": "ties", "density": 0.3},
}
SETTINGS = {
    "dtype": "float32",
    "max_tokens": 1000,
    "long_documents": "refuse",
    "batch_tokens": 512,
    "protocol": "mergelaw",
}
EXPERTS = ("e0", "e1", "e2", "e3", "e4")
SUBSETS = candidates(len(EXPERTS))


def model(method, members, losses, weights=None, recipes=METHODS):
    members = tuple(np.array(EXPERTS)[members])
    weights = tuple(weights or [1.0] * len(members))
    recipe = json.dumps(recipes[method])
    identity = f"{method} {members} {weights}"
    return Model(identity, "merge", method, recipe, 0, members, weights, np.asarray(losses))


def measured(models, domains=("a", "b")):
    base = Model("base", "base", "", "{}", 0, (), (), np.full(len(domains), 2.0))
    every = {m.identity: m for m in [base, *models]}
    return Measured("tiny", tuple(domains), frozenset(), every, lambda names: None)


# A quadratic landscape, where the expansion is exact


class Landscape:
    """Losses of two domains, quadratic in the parameters, and the artifact that is made of them."""

    def __init__(self, folder, size=40, norms=(1.0,) * 5, cubic=0.0, seed=0):
        random = np.random.default_rng(seed)
        self.vectors = random.normal(size=(5, size)) * np.array(norms)[:, None] * 0.1
        root = random.normal(size=(2, size, size)) / np.sqrt(size)
        self.H = np.einsum("dij,dkj->dik", root, root)
        self.slope, self.cubic, self.folder = random.normal(size=(2, size)) * 0.3, cubic, folder
        self.random = random

    def loss(self, D):
        square = 0.5 * np.einsum("...i,dij,...j->...d", D, self.H, D)
        return 2 + D @ self.slope.T + square + self.cubic * square**1.5

    def gradient(self, D):
        return self.slope + self.H @ D

    def masked(self):
        return self.vectors * (np.random.default_rng(9).random(self.vectors.shape) > 0.5) * 2

    def difference(self, method, weights):
        """The merged difference of one merge: linear in the (masked) vectors, or TIES's."""
        vectors = self.masked() if method == "dare" else self.vectors
        if method != "ties":
            return coefficients(method_of(METHODS[method]), weights[None])[0] @ vectors
        chosen = self.vectors[weights > 0]
        chosen = np.where(np.abs(chosen) > np.quantile(np.abs(chosen), 0.6), chosen, 0.0)
        agree = np.sign(chosen) == np.where(chosen.sum(axis=0) >= 0, 1, -1)
        return (chosen * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)

    def write(self):
        mean, M = self.vectors.mean(axis=0), len(self.vectors)
        norms = np.linalg.norm(self.vectors, axis=1)
        steps = STEP * np.median(norms) / norms
        points = [mean, *(mean + s * v for s, v in zip(steps, self.vectors, strict=True))]
        slopes = np.array([self.gradient(point) for point in points])
        ties = np.array([self.difference("ties", s.astype(float)) for s in SUBSETS])
        blocks = {"experts": self.vectors, "method dare": self.masked(), "method ties": ties}
        arrays = {"losses": np.array([self.loss(p) for p in points]), "steps": steps}
        for name, columns in blocks.items():
            arrays[f"{name}/gradients"] = slopes @ columns.T
            arrays[f"{name}/vectors"] = self.vectors @ columns.T
            squares = columns @ columns.T
            arrays[f"{name}/squares"] = np.diag(squares) if name == "method ties" else squares
        about = {"experts": EXPERTS, "domains": ["a", "b"], "methods": METHODS}
        assert len(points) == M + 1
        np.savez(self.folder / PRODUCTS, about=json.dumps(about), subsets=SUBSETS, **arrays)
        return self.folder

    def measured(self, method, subsets):
        weights = subsets.astype(float)
        losses = [self.loss(self.difference(method, row)) for row in weights]
        return [model(method, row > 0, loss) for row, loss in zip(weights, losses, strict=True)]


@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_in_the_span_the_expansion_is_exact_on_a_quadratic_for_any_weights(tmp_path, method):
    land = Landscape(tmp_path)
    answer = predictor(measured([]), land.write())
    weights = np.random.default_rng(1).uniform(0.1, 2, (6, 5))
    truth = [land.loss(land.difference(method, row)) for row in weights]
    assert np.allclose(answer.losses(method, weights)[0], truth, atol=1e-9)
    assert np.allclose(answer.macro(method, weights)[0], np.mean(truth, axis=1), atol=1e-9)


@pytest.mark.parametrize("method", ["dare", "ties"])
def test_out_of_the_span_only_the_residuals_own_curvature_is_missing(tmp_path, method):
    land = Landscape(tmp_path)
    land.write()
    differences = np.array([land.difference(method, row.astype(float)) for row in SUBSETS])
    apart = differences - land.vectors.mean(axis=0)
    c = apart @ np.linalg.pinv(land.vectors)
    rest = apart - c @ land.vectors
    missing = 0.5 * np.einsum("ci,dij,cj->cd", rest, land.H, rest)
    expansion = Expansion(tmp_path, measured([]))
    losses, found, size, _ = expansion.predict(
        method, method_of(METHODS[method]), SUBSETS.astype(float)
    )
    assert np.allclose(losses + missing, land.loss(differences), atol=1e-9)
    assert np.allclose(found, c)
    assert np.allclose(size, (rest**2).sum(axis=1) / (land.vectors**2).sum(axis=1).mean())


def test_a_dozen_measured_merges_mend_the_residuals_curvature(tmp_path):
    land = Landscape(tmp_path, size=400)
    several = SUBSETS[5:]
    order = np.random.default_rng(0).permutation(len(several))
    few, rest = several[order[:12]], several[order[12:]]
    truth = np.array([m.losses for m in land.measured("ties", rest)])
    none = predictor(measured([]), land.write())
    some = predictor(measured(land.measured("ties", few)), tmp_path)
    error = [np.abs(p.losses("ties", rest)[0] - truth).mean() for p in (none, some)]
    assert error[1] < error[0] / 3
    mean, deviation = some.losses("ties", rest)
    assert 0.7 < np.mean(np.abs(mean - truth) < 1.645 * deviation) <= 1
    assert none.checks["ties"]["macro"].verdict == "not usable"
    assert none.checks["ties"]["macro"].merges == 0
    assert (none.losses("ties", rest)[1] > 0).all()


def test_the_errors_covariance_between_domains_counts(tmp_path):
    land = Landscape(tmp_path, cubic=0.3)
    answer = predictor(measured(land.measured("average", SUBSETS[::2])), land.write())
    by_domain = answer.losses("average", SUBSETS)[1]
    one = answer.macro("average", SUBSETS, [1, 0])[1]
    both = answer.macro("average", SUBSETS, [0.5, 0.5])[1]
    assert np.allclose(one, by_domain[:, 0])
    assert (both <= by_domain.mean(axis=1) + 1e-12).all()
    apart = answer.losses("average", SUBSETS)[1] ** 2 @ [0.25, 0.25]
    assert not np.allclose(both**2, apart, rtol=0.05)


# What must not mislead


def test_identical_experts_leave_predictions_as_they_are(tmp_path):
    land = Landscape(tmp_path)
    land.vectors[1] = land.vectors[0]
    answer = predictor(measured([]), land.write())
    truth = [land.loss(land.difference("average", row.astype(float))) for row in SUBSETS]
    assert np.allclose(answer.losses("average", SUBSETS)[0], truth, atol=1e-9)
    assert np.isfinite(answer.losses("ties", SUBSETS)[0]).all()


def test_an_expert_at_a_hundred_times_the_norm_is_named_and_its_predictions_checked(tmp_path):
    land = Landscape(tmp_path, norms=(1, 1, 1, 1, 100), cubic=0.5)
    answer = predictor(measured(land.measured("average", SUBSETS[::2])), land.write())
    assert len(answer.warnings) == 1
    assert "task vector of e4 is 9" in answer.warnings[0]
    assert answer.checks["average"]["macro"].verdict == "not usable"


def test_what_was_never_a_candidate_is_not_predicted(tmp_path):
    land = Landscape(tmp_path)
    answer = predictor(measured(land.measured("ties", SUBSETS)), land.write())
    mean, deviation = answer.losses("ties", [[1, 2, 0, 0, 0], [1, 1, 0, 0, 0]])
    assert np.isnan(mean[0]).all() and np.isinf(deviation[0]).all()
    assert np.isfinite(mean[1]).all() and np.isfinite(deviation[1]).all()
    with pytest.raises(MergelawError, match=r"'breadcrumbs' cannot be predicted, only average"):
        answer.losses("breadcrumbs", SUBSETS)
    with pytest.raises(MergelawError, match="a merge has no experts, or a weight that is not"):
        answer.losses("ties", np.zeros((1, 5)))
    with pytest.raises(MergelawError, match="one row a merge, with a value for each of e0, e1"):
        answer.losses("ties", np.ones((1, 4)))


def test_gradients_of_another_pool_are_refused(tmp_path):
    folder = Landscape(tmp_path).write()
    other = measured([model("average", [0], [1.0, 1.0, 1.0])], domains=("a", "b", "c"))
    with pytest.raises(MergelawError, match="has no c, which are measured; run the target"):
        predictor(other, folder)
    with pytest.raises(MergelawError, match="no merge of tiny is measured"):
        predictor(measured([]))


# Without gradients


def test_without_gradients_a_quadratic_is_learned_from_measured_merges(tmp_path):
    land = Landscape(tmp_path)
    few = np.concatenate([SUBSETS[:5], SUBSETS[6::2]])
    answer = predictor(measured(land.measured("average", few)))
    truth = np.array([m.losses for m in land.measured("average", SUBSETS[5:])])
    mean, _ = answer.losses("average", SUBSETS[5:])
    assert np.abs(mean - truth).max() < 0.2 * truth.std(axis=0).max()
    assert answer.checks["average"]["macro"].verdict == "usable"


def test_few_measured_merges_predict_nothing_without_gradients(tmp_path):
    land = Landscape(tmp_path)
    answer = predictor(measured(land.measured("average", SUBSETS[-4:])))
    assert np.isnan(answer.macro("average", SUBSETS)[0]).all()
    assert np.isinf(answer.macro("average", SUBSETS)[1]).all()
    assert answer.checks["average"]["macro"].verdict == "not usable"


@pytest.mark.parametrize("seed", range(5))
def test_no_false_pass_where_losses_are_noise(seed):
    random = np.random.default_rng(seed)
    models = [model("average", row, random.normal(size=2)) for row in SUBSETS]
    answer = predictor(measured(models))
    for check in answer.checks["average"].values():
        assert check.verdict == "not usable"
        assert check.correlation < 0.9


def test_the_fall_with_k_alone_passes_no_check():
    def truth(method, experts, domain):
        return pool.good_pool(method, ("none",) * len(experts), domain)

    answer = predictor(pool.measured(pool.rows(truth, noise=0.05)))
    assert {c["macro"].verdict for c in answer.checks.values()} == {"not usable"}


def test_candidates_of_a_large_pool_have_every_single_pair_and_leave_one_out():
    subsets = candidates(60)
    sizes = subsets.sum(axis=1)
    assert [int((sizes == k).sum()) for k in (1, 2, 59, 60)] == [60, 1770, 60, 1]
    assert len(np.unique(subsets, axis=0)) == len(subsets) <= 2100
    assert (sizes[None] == np.arange(1, 61)[:, None]).any(axis=1).all()
    assert len(candidates(9)) == 511


# The artifact, from models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gradients")


@pytest.fixture(scope="module")
def base(folder):
    return write_checkpoint(folder / "base", dtype="float32")


@pytest.fixture(scope="module")
def vectors(folder, base):
    found = write_pool(base, folder, 5, scale=0.003)
    return dict(zip(EXPERTS, found.values(), strict=True))


def write(base, vectors, folder, monkeypatch, methods=METHODS, **settings):
    """Make the artifact of two domains in ``folder``."""
    parts = {"a": documents(True, 4), "b": documents(False, 6)[4:]}
    sets = {
        name: encode(tokenizer(), part, 1000, "refuse", "documents") for name, part in parts.items()
    }
    monkeypatch.setattr(gradients, "encode", lambda *_: sets)
    recipe = {"methods": methods, "experts": list(vectors), "evaluation": SETTINGS | settings}
    paths = {name: vector.folder for name, vector in vectors.items()}
    folder.mkdir()
    facts = gradients.write(recipe, base, paths, dict.fromkeys(sets), folder / "cache", folder)
    return sets, facts


def losses_of(base, vectors, sets, method, subsets):
    """Measured losses of merges, (C, domains)."""
    resident, made = load(base), []
    with Merger(resident, base, vectors, method_of(METHODS[method]), 1 << 30) as merger:
        for row in subsets:
            merger.merge(list(np.array(list(vectors))[row]))
            made.append(
                [
                    nll(resident, batches(s.windows, 512, "cpu"), s.documents).sum()
                    / sum(w.stop - w.start for w in s.windows)
                    for s in sets.values()
                ]
            )
    return np.array(made)


@pytest.mark.parametrize("memory", [1 << 30, 0], ids=["resident", "streamed"])
def test_predictions_of_real_merges(base, vectors, tmp_path, monkeypatch, memory):
    monkeypatch.setattr(gradients, "memory_for_vectors", lambda device: memory)
    sets, facts = write(base, vectors, tmp_path / "made", monkeypatch)
    assert facts["forward_passes"] == 18
    assert facts["merged_differences"] == 31 * (1 if memory else 6 * 2)
    answer = predictor(measured([]), tmp_path / "made")
    for method, worst in {"average": 0.03, "task_arithmetic": 0.06, "dare": 0.2}.items():
        truth = losses_of(base, vectors, sets, method, SUBSETS)
        mean, _ = answer.losses(method, SUBSETS)
        assert np.abs(mean - truth).max() < worst * np.ptp(truth, axis=0).max(), method
    few = SUBSETS[::2]
    truth = losses_of(base, vectors, sets, "ties", SUBSETS)
    models = [model("ties", row, loss) for row, loss in zip(few, truth[::2], strict=True)]
    mean, _ = predictor(measured(models), tmp_path / "made").losses("ties", SUBSETS)
    assert np.abs(mean - truth)[1::2].max() < 0.1 * np.ptp(truth, axis=0).max()


def test_slices_and_groups_of_domains_change_nothing(base, vectors, tmp_path, monkeypatch):
    write(base, vectors, tmp_path / "one", monkeypatch)
    monkeypatch.setattr("mergelaw.merging.engine.SLICE", 512)
    monkeypatch.setattr(gradients, "COLUMNS", 2000)
    monkeypatch.setattr(gradients, "memory_for_vectors", lambda device: 0)
    write(base, vectors, tmp_path / "two", monkeypatch)
    one, other = (gradients.read(tmp_path / name)[1] for name in ("one", "two"))
    assert one.keys() == other.keys()
    for name in one:
        assert np.allclose(one[name], other[name], rtol=1e-3, atol=1e-5), name


def test_bfloat16_gradients_are_summed_in_fp32(base, vectors, tmp_path, monkeypatch):
    plain = {"average": METHODS["average"]}
    sets, _ = write(base, vectors, tmp_path / "made", monkeypatch, plain, dtype="bfloat16")
    truth = losses_of(base, vectors, sets, "average", SUBSETS).mean(axis=1)
    mean, _ = predictor(measured([]), tmp_path / "made").macro("average", SUBSETS)
    assert np.corrcoef(mean, truth)[0, 1] > 0.9


def test_an_overflow_is_one_line(base, folder, tmp_path, monkeypatch):
    huge = {n: torch.full_like(t, 3e37) for n, t in read_tensors(base).items() if "norm" in n}
    expert = write_expert(base, tmp_path / "huge", tensors=huge)
    pair = {
        "good": TaskVector(folder / "vector0"),
        "huge": write_task_vector(base, expert, tmp_path / "vector"),
    }
    with pytest.raises(MergelawError, match="loss of a or its gradient is not finite at the mean"):
        write(base, pair, tmp_path / "made", monkeypatch)
    assert not (tmp_path / "made" / PRODUCTS).exists()


def test_a_job_leaves_the_models_parameters_alone(base, vectors):
    resident = load(base)
    plain = method_of({"method": "task_arithmetic", "normalize": False})
    with (
        Merger(resident, base, vectors, plain, 0) as merger,
        gradients.Gradients(resident, merger) as objective,
    ):
        windows = encode(tokenizer(), documents(True, 3), 1000, "refuse", "x").windows
        make = partial(gradients.Documents, [windows], 512)
        objective.compute([make(torch.device("cpu"))])
        assert all(p.grad is None for p in resident.parameters())
    assert not any(p.requires_grad for p in resident.parameters())
