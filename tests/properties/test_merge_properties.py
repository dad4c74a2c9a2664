"""What holds for every small merge: a reference in plain Python agrees, order is what is stated."""

import math
from fractions import Fraction

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergelaw.merging.engine import Prepared
from mergelaw.merging.kernels import combine
from mergelaw.merging.methods import method_of
from mergelaw.merging.methods.dare import keep_mask
from mergelaw.merging.methods.ties import magnitude_threshold
from models import InMemory, bits

U = Fraction(1, 2**24)  # half a unit in the last place of fp32, relative

# Eighths and short weights: their sums and products are exact in fp32, so no sign is in doubt.
eighths = st.integers(-512, 512).map(lambda n: n / 8)
short = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0])


@st.composite
def merges(draw):
    k, size = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    row = st.lists(eighths, min_size=size, max_size=size)
    vectors = draw(st.lists(row, min_size=k, max_size=k))
    weights = draw(st.lists(short, min_size=k, max_size=k) | st.just([1.0] * k))
    return vectors, weights


@st.composite
def recipes(draw):
    name = draw(st.sampled_from(["average", "task_arithmetic", "ties", "dare_linear", "dare_ties"]))
    recipe = {"method": name}
    if name != "average":
        recipe["lambda"] = draw(st.sampled_from([0.3, 0.5, 1.0, 1.5]))
    if name in ("task_arithmetic", "dare_linear"):
        recipe["normalize"] = draw(st.booleans())
    if name == "ties":
        recipe["density"] = draw(st.sampled_from([0.1, 0.2, 0.5, 0.9, 1.0]))
        recipe["trim"] = draw(st.sampled_from(["tensor", "global"]))
    if "ties" in name:
        recipe["elect"] = draw(st.sampled_from(["sum", "count"]))
    if "dare" in name:
        recipe["drop_rate"] = draw(st.sampled_from([0.0, 0.5, 0.75]))  # 1/(1-p) is exact
        recipe["seed"] = draw(st.integers(0, 3))
    return recipe


def trim(values: list[Fraction], density: float) -> list[Fraction]:
    keep = max(int(density * len(values)), 1)
    threshold = sorted(map(abs, values), reverse=True)[keep - 1]
    return [v if abs(v) >= threshold else Fraction(0) for v in values]


def reference(recipe, vectors, weights) -> list[tuple[Fraction, Fraction]]:
    """Exactly, one element at a time: (merged value, the scale of its rounding errors)."""
    rows = [[Fraction(v) for v in vector] for vector in vectors]
    weights = [Fraction(w) for w in weights]
    if "density" in recipe and recipe["density"] < 1:
        rows = [trim(row, recipe["density"]) for row in rows]
    if recipe.get("drop_rate"):
        for i, row in enumerate(rows):
            mask = keep_mask(recipe["seed"], f"e{i}", "w", 0, len(row), recipe["drop_rate"])
            scale = 1 / (1 - Fraction(recipe["drop_rate"]))
            rows[i] = [
                v * scale if kept else Fraction(0) for v, kept in zip(row, mask, strict=True)
            ]
    scale = Fraction(recipe.get("lambda", 1))
    out = []
    for column in zip(*rows, strict=True):
        pairs = list(zip(column, weights, strict=True))
        if "ties" in recipe["method"]:
            sign = (lambda v: (v > 0) - (v < 0)) if recipe["elect"] == "count" else (lambda v: v)
            plus = sum(w * sign(v) for v, w in pairs) >= 0
            pairs = [(v, w) for v, w in pairs if (v > 0 if plus else v < 0)]
        total, size = sum(w * v for v, w in pairs), sum(abs(w * v) for v, w in pairs)
        mass = sum(w for _, w in pairs)
        if recipe.get("normalize", True) and mass:
            total, size = total / mass, size / mass
        out.append((scale * total, scale * size))
    return out


def combined(recipe, vectors, weights) -> torch.Tensor:
    method = method_of(recipe)
    tensors = [torch.tensor(v, dtype=torch.float32) for v in vectors]
    pool = [Prepared(method, InMemory(tensor, f"e{i}")) for i, tensor in enumerate(tensors)]
    return combine([v.part("w", 0, len(vectors[0])) for v in pool], method.rule(weights))


@settings(max_examples=300)
@given(recipe=recipes(), merge=merges())
def test_a_reference_in_plain_python_agrees(recipe, merge):
    """Each product rounds once and its weight once, each of k-1 additions once, lambda and the
    normalisation (or the division) once or twice: less than k + 4 roundings of the sum of sizes.
    """
    vectors, weights = merge
    found = combined(recipe, vectors, weights)
    for value, (exact, size) in zip(found.tolist(), reference(recipe, *merge), strict=True):
        assert abs(Fraction(value) - exact) <= (len(vectors) + 4) * U * size


@settings(max_examples=100)
@given(recipe=recipes(), merge=merges(), cut=st.integers(0, 12))
def test_methods_work_element_by_element(recipe, merge, cut):
    vectors, weights = merge
    method = method_of(recipe)
    tensors = [torch.tensor(v, dtype=torch.float32) for v in vectors]
    pool = [Prepared(method, InMemory(tensor, f"e{i}")) for i, tensor in enumerate(tensors)]

    def part(start, stop):
        return combine([v.part("w", start, stop) for v in pool], method.rule(weights))

    size = len(vectors[0])
    cut = min(cut, size)
    whole = part(0, size)
    assert bits(torch.cat([part(0, cut), part(cut, size)])) == bits(whole)


@settings(max_examples=100)
@given(merge=merges(), scale=st.sampled_from([2.0, 0.25, 1024.0]))
def test_weights_count_only_by_their_ratios_where_normalised(merge, scale):
    vectors, weights = merge
    scaled = [w * scale for w in weights]
    for name in ("average", "task_arithmetic", "ties", "dare_linear", "dare_ties"):
        recipe = {"method": name}
        assert bits(combined(recipe, vectors, weights)) == bits(combined(recipe, vectors, scaled))


@settings(max_examples=100)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
    data=st.data(),
)
def test_the_threshold_is_that_of_a_sort(values, data):
    keep = data.draw(st.integers(1, len(values)))
    tensor = torch.tensor(values, dtype=torch.float32)
    expected = sorted(map(abs, tensor.tolist()), reverse=True)[keep - 1]
    assert magnitude_threshold(lambda: [tensor], keep) == expected


@settings(max_examples=100)
@given(
    size=st.integers(1, 300),
    density=st.floats(0.001, 1),
    trim=st.sampled_from(["tensor", "global"]),
    seed=st.integers(0, 2**31),
)
def test_ties_keeps_the_count_it_says_of_distinct_magnitudes(size, density, trim, seed):
    rng = np.random.default_rng(seed)
    distinct = torch.from_numpy((rng.permutation(size) + 1).astype(np.float32))
    values = distinct * torch.from_numpy(rng.choice([-1, 1], size).astype(np.float32))
    method = method_of({"method": "ties", "density": density, "trim": trim})
    out = Prepared(method, InMemory(values)).part("w", 0, size)
    assert int((out != 0).sum()) == max(int(density * size), 1)
    assert math.isclose(out.abs().sum().item(), distinct.sort(descending=True).values[: int((out != 0).sum())].sum().item())  # fmt: skip


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**63),
    expert=st.text(max_size=8),
    name=st.text(max_size=8),
    start=st.integers(0, 5000),
    size=st.integers(0, 200),
    drop_rate=st.floats(0, 0.99),
)
def test_a_slice_of_a_mask_is_the_mask_of_the_slice(seed, expert, name, start, size, drop_rate):
    whole = keep_mask(seed, expert, name, 0, start + size, drop_rate)
    part = keep_mask(seed, expert, name, start, size, drop_rate)
    assert np.array_equal(part, whole[start:])
