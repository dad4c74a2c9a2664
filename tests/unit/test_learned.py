"""Learned coefficients: the right gradient, the known optimum, and pools that mislead a merge."""

import math
from collections import deque
from itertools import islice

import numpy as np
import pytest
import torch

from mergelaw.data.documents import write_split
from mergelaw.data.recipe import SplitRecipe
from mergelaw.data.tokenize import encode
from mergelaw.decide import calibration as calibration_job
from mergelaw.decide.calibration import Calibration, divide, save_memory
from mergelaw.decide.learned import GRANULARITIES, Parts, block, descend, learn
from mergelaw.errors import MergelawError
from mergelaw.evaluation.recipe import Evaluation
from mergelaw.merging.engine import Merger
from mergelaw.merging.methods import method_of
from mergelaw.merging.methods.learned import read_coefficients, weights_of
from models import (
    documents,
    load,
    tokenizer,
    write_checkpoint,
    write_expert,
    write_jsonl,
    write_pool,
    write_task_vector,
)

LEARNED = {"method": "learned"}
ROOMY, NONE = 1 << 30, 0


def windows(count, chat=True):
    """Each document's windows, by domain: two domains of very different lengths."""
    parts = [
        encode(tokenizer(), [document], 1000, "refuse", "calibration").windows
        for document in documents(chat, 2 * count)
    ]
    return {"short": parts[:count], "long": parts[count:]}


def norms(pool, tensors):
    return np.array(
        [[vector.statistics()["tensors"][t]["norm"] for t in tensors] for vector in pool.values()]
    )


def calibration(base, pool, memory=ROOMY, dtype="float32", count=6):
    """The calibration loss of a pool, and the merger that it writes with."""
    model = load(base, dtype)
    merger = Merger(model, base, pool, method_of(LEARNED), memory)
    return Calibration(model, merger, list(pool), divide(windows(count), 512, "cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base") / "base", dtype="float32")


@pytest.fixture(scope="module")
def pool(tmp_path_factory, base):
    return write_pool(base, tmp_path_factory.mktemp("pool"), 3, scale=0.05)


# The gradient


@pytest.mark.parametrize("memory", [ROOMY, NONE], ids=["resident", "streamed"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_is_that_of_finite_differences(tmp_path, memory, tied):
    base = write_checkpoint(tmp_path / "base", tied=tied, dtype="float32")
    pool = write_pool(base, tmp_path, 3, scale=0.05)
    with calibration(base, pool, memory, "float64") as objective:
        shape = 3, len(objective.tensors)
        generator = np.random.default_rng(0)
        place = generator.normal(0.3, 0.2, shape)
        _, gradient = objective.gradient(place, "fit")
        for _ in range(3):
            way, eps = generator.normal(size=shape), 3e-3
            ends = [objective.gradient(place + s * eps * way, "fit")[0] for s in (1, -1)]
            slope = (ends[0] - ends[1]) / (2 * eps)
            # Losses are sums of fp32 values, and the difference of two close ones.
            tolerance = 3e-4 * np.linalg.norm(gradient) * np.linalg.norm(way)
            assert slope == pytest.approx((gradient * way).sum(), abs=tolerance)


def test_resident_and_streamed_gradients_are_equal(base, pool):
    place = np.full((3, 100), 0.4)
    found = []
    for memory in (ROOMY, NONE):
        with calibration(base, pool, memory) as objective:
            loss, gradient = objective.gradient(place[:, : len(objective.tensors)], "all")
            found.append((loss, gradient))
    assert found[0][0] == found[1][0]
    assert np.allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-7)


def test_bfloat16_gradients_point_the_same_way(base, pool):
    gradients = []
    for dtype in ("float32", "bfloat16"):
        with calibration(base, pool, dtype=dtype) as objective:
            place = np.full((3, len(objective.tensors)), 0.4)
            gradients.append(objective.gradient(place, "all")[1].ravel())
    full, half = gradients
    assert full @ half > 0.99 * np.linalg.norm(full) * np.linalg.norm(half)


def test_recomputed_activations_give_the_same_bits_and_no_dropout(base, pool):
    place, found = np.full((3, 100), 0.4), []
    settings = {"batch_tokens": 512, "max_tokens": 512, "dtype": "float32"}
    for room in (ROOMY, NONE):
        with calibration(base, pool) as objective:
            model, calls = objective._model, []
            save_memory(model, base, settings, room)
            layer = model.model.layers[0]
            layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            layer.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(2))
            found.append(objective.gradient(place[:, : len(objective.tensors)], "all"))
            found.append((calls.count(1), calls.count(2)))
            assert not any(module.training for module in model.modules())
    (loss, gradient), (once, also), (again, same), (whole, twice) = found
    assert loss == again and (gradient == same).all()
    assert once == also == whole and twice == 2 * once


def test_gradients_leave_nothing_behind(base, pool):
    with calibration(base, pool) as objective:
        objective.gradient(np.full((3, len(objective.tensors)), 0.4), "fit")
        parameters = list(objective._model.parameters())
        assert all(parameter.grad is None for parameter in parameters)
        assert any(parameter.requires_grad for parameter in parameters)
    assert not any(parameter.requires_grad for parameter in parameters)


def test_domains_count_alike_whatever_their_length(base, pool):
    coefficients = np.full((3, 100), 0.4)
    with calibration(base, pool) as objective:
        coefficients = coefficients[:, : len(objective.tensors)]
        both = objective.loss(coefficients, "all")
        model, merger = objective._model, objective._merger
    alone = []
    for name, domain in windows(6).items():
        with Calibration(model, merger, list(pool), divide({name: domain}, 512, "cpu")) as one:
            alone.append(one.loss(coefficients, "all"))
    assert both == pytest.approx(sum(alone) / 2, rel=1e-6)


# The search


class Bowl:
    """A quadratic loss of the coefficients with a known optimum, the same on all documents."""

    def __init__(self, optimum, experts, seed=0, noise=0.0):
        self.optimum, self.size = optimum, optimum.size
        generator = np.random.default_rng(seed)
        root = generator.normal(size=(2 * self.size, self.size)) / math.sqrt(2 * self.size)
        self.curvature = root.T @ root + np.eye(self.size)
        self.noise = noise * generator.normal(size=self.size)
        self.gradients = 0

    def _at(self, coefficients, kind):
        target = self.optimum.ravel() + (self.noise if kind == "fit" else 0)
        away = coefficients.ravel() - target
        slope = self.curvature @ away
        return 2 + 0.5 * away @ slope, slope.reshape(coefficients.shape)

    def loss(self, coefficients, kind):
        return self._at(coefficients, kind)[0]

    def gradient(self, coefficients, kind):
        self.gradients += 1
        return self._at(coefficients, kind)


TENSORS = [f"model.layers.{n}.{part}" for n in (0, 1) for part in ("mlp.up", "mlp.down", "attn.q")]


@pytest.mark.parametrize("by", [*GRANULARITIES, "auto"])
def test_a_known_optimum_is_found(by):
    generator = np.random.default_rng(1)
    finest = "tensor" if by == "auto" else by
    lengths = np.ones((3, len(TENSORS)))
    parts = Parts(finest, TENSORS, lengths)
    optimum = parts.spread(generator.normal(0.8, 0.4, parts.count))
    learned = learn(Bowl(optimum, 3), TENSORS, lengths, by, 30)
    assert learned.coefficients == pytest.approx(optimum, abs=2e-2)
    assert learned.chosen.by == finest


@pytest.mark.parametrize("by", ["scale", "expert", "auto"])
def test_an_optimum_between_base_and_average_is_found(by):
    """Where the base beats the average, a step onto the base is not the end of the search."""
    optimum = np.repeat([[0.1], [0.12], [0.08], [0.1]], len(TENSORS), axis=1)
    learned = learn(Bowl(optimum, 4), TENSORS, np.ones(optimum.shape), by, 20)
    assert learned.coefficients == pytest.approx(optimum, abs=3e-2)


def test_what_held_out_documents_refuse_is_not_learned():
    optimum = np.full((3, len(TENSORS)), 0.8)
    learned = learn(Bowl(optimum, 3, noise=0.5), TENSORS, np.ones(optimum.shape), "auto", 20)
    assert learned.chosen.by == "scale"


def test_units_make_experts_of_unequal_norm_learn_alike():
    lengths = np.ones((3, len(TENSORS)))
    equal = learn(Bowl(np.full(lengths.shape, 0.5), 3), TENSORS, lengths, "block", 4).coefficients
    factor = np.array([[1.0], [100.0], [1.0]])
    bowl = Bowl(np.full(lengths.shape, 0.5), 3)

    class Scaled:
        def loss(self, c, kind):
            return bowl.loss(c * factor, kind)

        def gradient(self, c, kind):
            loss, slope = bowl.gradient(c * factor, kind)
            return loss, slope * factor

    unequal = learn(Scaled(), TENSORS, lengths * factor, "block", 4).coefficients
    assert unequal * factor == pytest.approx(equal)


def test_blocks_have_names():
    names = {
        "model.embed_tokens.weight": "embedding",
        "transformer.wte.weight": "embedding",
        "model.layers.0.self_attn.q_proj.weight": "0.attention",
        "transformer.h.11.attn.c_attn.bias": "11.attention",
        "model.layers.3.mlp.experts.gate_up_proj": "3.mlp",
        "model.layers.3.block_sparse_moe.gate.weight": "3.mlp",
        "model.layers.3.post_attention_layernorm.weight": "3.norm",
        "transformer.h.1.ln_2.weight": "1.norm",
        "model.norm.weight": "norm",
        "lm_head.weight": "head",
        "backbone.layers.2.mixer.in_proj.weight": "2.other",
    }
    assert {name: block(name) for name in names} == names


# A job of several merges


def test_a_killed_job_goes_on_with_the_next_merge_and_gives_the_same(
    tmp_path, base, pool, monkeypatch, capsys
):
    records = ({"prompt": f"What is {n}?", "response": f"It is {n * n}."} for n in range(8))
    source = {"files": [str(write_jsonl(tmp_path / "a.jsonl", records))]}
    counts = {"eval_documents": 1, "train_documents": 1, "calibration_documents": 6, "seed": 0}
    write_split(SplitRecipe(source=source, **counts), "calibration", {}, tmp_path / "corpus")
    settings = Evaluation(max_tokens=200, batch_tokens=512).model_dump()
    recipe = {"method": {"method": "learned", "by": "expert", "gradients": 2}}
    recipe |= {"evaluation": settings}
    subsets = [("expert1",), ("expert0", "expert2"), ("expert0", "expert1", "expert2")]
    places = {name: vector.folder for name, vector in pool.items()}
    learned = []

    def one(*arguments):
        if len(learned) == kill_at:
            raise KeyboardInterrupt
        learned.append(learn(*arguments))
        return learned[-1]

    def run(folder, state="state"):
        for path in (tmp_path / folder, tmp_path / state):
            path.mkdir(exist_ok=True)
        inputs = {"a": tmp_path / "corpus"}
        return calibration_job.write(
            recipe, subsets, base, places, inputs, tmp_path / folder, tmp_path / state
        )

    monkeypatch.setattr(calibration_job, "learn", one)
    kill_at = None
    facts = run("whole", "other")
    kill_at = 5
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    kill_at = None
    capsys.readouterr()
    assert run("again") == facts and facts["merges"] == 3 and len(learned) == 6
    assert (
        "learned 3 of 3 merges, expert0, expert1, expert2: by expert, " in capsys.readouterr().err
    )
    for name in ("coefficients.parquet", "searches.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    tables = read_coefficients(tmp_path / "again")
    assert list(tables) == subsets
    for subset, result in zip(subsets, learned[:3], strict=True):
        weights = np.array(list(weights_of(tables[subset]).values()))
        assert (result.coefficients == weights.T).all()


# Failures


def test_a_rise_is_followed_by_a_shorter_step():
    path = descend(lambda x: (float(x @ x), 2 * x), np.array([1.0]), deque(), 1.0)
    places = [abs(float(x[0])) for x in islice(path, 6)]
    assert places[-1] < 1e-6

    def cliff(x):
        return (math.inf if x[0] > 1.5 else float((x[0] - 1.4) ** 2)), 2 * (x - 1.4)

    *_, last = islice(descend(cliff, np.array([1.0]), deque(), 1.0), 12)
    assert last[0] == pytest.approx(1.4, abs=1e-3)


def test_a_loss_that_is_not_finite_at_the_average_is_refused(base, pool):
    with calibration(base, pool) as objective:
        tensors = objective.tensors
        objective._merger._flat_base[0] = math.nan
        with pytest.raises(MergelawError, match=r"calibration.*not finite.*evaluation.dtype"):
            learn(objective, tensors, norms(pool, tensors), "expert", 3)


# Pools


def trained(base, folder, seed):
    """An expert that has learned the documents of ``windows``."""
    model = load(base)
    model.requires_grad_(True)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    texts = [window for domain in windows(12).values() for part in domain for window in part]
    for _ in range(20):
        window = texts[int(torch.randint(len(texts), (), generator=generator))]
        ids = torch.tensor([window.ids])
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, base):
    """Two good experts, and a bad one of a hundred times the norm."""
    folder = tmp_path_factory.mktemp("mixed")
    good = {f"good{n}": trained(base, folder / f"good{n}", n) for n in range(2)}
    bad = {"bad": write_expert(base, folder / "bad", scale=1.0, seed=7)}
    return {
        name: write_task_vector(base, expert, folder / f"v-{name}")
        for name, expert in {**good, **bad}.items()
    }


def fitted(base, pool, by, gradients=8):
    with calibration(base, pool, count=12) as objective:
        lengths = norms(pool, objective.tensors)
        learned = learn(objective, objective.tensors, lengths, by, gradients)
        start = objective.loss(np.zeros(lengths.shape), "held")
        return learned, lengths, start, objective.passes


def test_a_bad_expert_is_weighed_down(base, mixed):
    learned, _, start, _ = fitted(base, mixed, "expert")
    good = {name: vector for name, vector in mixed.items() if name != "bad"}
    without, *_ = fitted(base, good, "expert")
    assert abs(learned.coefficients[2, 0]) < 0.02 * learned.coefficients[:2, 0].min()
    assert min(learned.chosen.losses) < min(without.chosen.losses) + 0.1 * (
        start - min(without.chosen.losses)
    )


@pytest.mark.parametrize("by", ["expert", "auto"])
def test_identical_experts_share_their_coefficient(base, mixed, by):
    pool = {"one": mixed["good0"], "two": mixed["good0"]}
    learned, _, start, _ = fitted(base, pool, by)
    assert learned.coefficients[0] == pytest.approx(learned.coefficients[1])
    assert min(learned.chosen.losses) < start


def test_one_expert_alone(base, mixed):
    learned, _, start, _ = fitted(base, {"good0": mixed["good0"]}, "auto")
    assert learned.coefficients.shape[0] == 1
    assert min(learned.chosen.losses) < start


def test_the_search_of_all_granularities_costs_at_most_sixty_forward_passes(base, mixed):
    *_, passes = fitted(base, mixed, "auto", gradients=5)
    assert passes <= 60
