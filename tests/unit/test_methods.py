"""Merge methods on small tensors: what is kept, what is drawn, who agrees."""

import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mergelaw.merging import kernels
from mergelaw.merging.engine import Prepared
from mergelaw.merging.kernels import Rule, combine, drop, pack, pack_by_torch
from mergelaw.merging.methods import method_of, registry
from mergelaw.merging.methods.dare import keep_mask, keep_mask_by_torch
from mergelaw.merging.methods.ties import kept, magnitude_threshold
from models import InMemory

SLICES = [(0, 1), (1, 7), (7, 8), (8, 1000), (1000, 4099)]


def normal(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ties(**parameters):
    return method_of({"method": "ties", **parameters})


def trimmed(method, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    least = method.thresholds(lambda: tensors.items())
    return {n: drop(t, least.get(n, 0.0)) for n, t in tensors.items()}


def test_the_registry_knows_each_method_by_its_name():
    assert list(registry()) == [
        "average", "dare_linear", "dare_ties", "learned", "task_arithmetic", "ties",
    ]  # fmt: skip
    for name in registry():
        method = method_of({"method": name})
        assert method_of(method.model_dump(by_alias=True)) == method


def test_another_package_may_bring_a_method(tmp_path):
    """An entry point names its module; in a process of its own, for the registry is remembered."""
    (tmp_path / "halves.py").write_text(HALVES)
    info = tmp_path / "halves-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[mergelaw.methods]\nhalves = halves\n")
    code = "from mergelaw.merging.methods import method_of; print(method_of({'method': 'halves'}))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert run.stdout.strip() == "method='halves' share=0.5"


HALVES = """
from typing import Literal
from mergelaw.merging.methods import Method

class Halves(Method):
    method: Literal["halves"] = "halves"
    share: float = 0.5
"""


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "average", "lambda": 1.0},
        {"method": "task_arithmetic", "lambda": 0},
        {"method": "ties", "density": 0},
        {"method": "ties", "density": 1.1},
        {"method": "dare_linear", "drop_rate": 1},
        {"method": "dare_ties", "seed": -1},
    ],
)
def test_parameters_that_mean_nothing_are_refused(recipe):
    with pytest.raises(ValidationError):
        method_of(recipe)


# TIES: trim


@pytest.mark.parametrize("density", [0.001, 0.1, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("size", [1, 7, 1000, 65537])
def test_ties_keeps_exactly_the_share_of_largest_magnitudes(density, size):
    values = normal(size, seed=size)
    out = trimmed(ties(density=density), {"w": values})["w"]
    count = max(int(density * size), 1)
    assert int((out != 0).sum()) == count
    threshold = values.abs().sort(descending=True).values[count - 1]
    assert torch.equal(out, torch.where(values.abs() >= threshold, values, 0.0))


@pytest.mark.parametrize("keep", [1, 2, 500, 999, 1000])
def test_the_threshold_is_that_of_a_sort_over_all_chunks(keep):
    values = normal(1000) * torch.logspace(-40, 38, 1000)  # denormal to huge
    values[::7] = 0
    values[1::7] = values[8]  # equal magnitudes
    chunks = [values[:1], values[1:1], values[1:700], values[700:]]
    expected = values.abs().sort(descending=True).values[keep - 1].item()
    assert magnitude_threshold(lambda: iter(chunks), keep) == expected


def test_the_threshold_of_a_large_tensor_counts_each_value_once():
    """Histograms are made of pieces of a million values."""
    values = torch.arange((1 << 21) + 5, dtype=torch.float32).flip(0)
    for keep in (3, 1 << 20, (1 << 20) + 1, (1 << 21) + 5):
        assert magnitude_threshold(lambda: [values], keep) == len(values) - keep


def test_equal_magnitudes_at_the_threshold_are_all_kept():
    out = trimmed(ties(density=0.5), {"w": torch.tensor([1.0, -2.0, 2.0, 2.0])})["w"]
    assert out.tolist() == [0, -2, 2, 2]


def test_a_global_trim_has_one_threshold_for_the_whole_expert():
    tensors = {"small": normal(1000) * 0.01, "large": normal(500, seed=1)}
    out = trimmed(ties(density=0.2, trim="global"), tensors)
    everything = torch.cat(list(tensors.values())).abs().sort(descending=True).values
    threshold = everything[int(0.2 * 1500) - 1]
    for name, values in tensors.items():
        assert torch.equal(out[name], torch.where(values.abs() >= threshold, values, 0.0))
    assert int(sum((values != 0).sum() for values in out.values())) == 300
    assert not out["small"].any()


def test_an_empty_tensor_is_nothing_to_trim():
    for trim in ("tensor", "global"):
        tensors = {"empty": torch.zeros(0), "w": normal(10)}
        out = trimmed(ties(density=0.2, trim=trim), tensors)
        assert len(out["empty"]) == 0
        assert int((out["w"] != 0).sum()) == 2


def test_density_as_mergekit_counts_it():
    assert [kept(10, 0.29), kept(10, 0.3), kept(3, 0.01), kept(0, 0.5)] == [2, 3, 1, 0]


# TIES: elect and merge


def column(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([float(value)]) for value in values]


@pytest.mark.parametrize(
    "values, weights, elect, expected",
    [
        ((3, -1, -1), (1, 1, 1), "sum", 3.0),  # the sum is +1
        ((3, -1, -1), (1, 1, 1), "count", -1.0),  # two to one
        ((2, -2), (1, 1), "sum", 2.0),  # a tie counts as plus
        ((2, -2), (1, 1), "count", 2.0),
        ((0, 0, -2), (1, 1, 1), "sum", -2.0),  # zeros do not share the mean
        ((0, 0, -2), (1, 1, 1), "count", -2.0),
        ((0, 4, 2), (1, 1, 1), "sum", 3.0),
        ((1, -2), (3, 1), "sum", 1.0),  # weighted votes
        ((1, 2, -9), (3, 1, 1), "count", 1.25),  # weighted mean of who agrees
        ((0, 0), (1, 1), "sum", 0.0),
        ((1, 3), (0, 0), "sum", 2.0),  # equal weights, whatever they are
    ],
)
def test_consensus_by_hand(values, weights, elect, expected):
    vectors = column(*values)
    assert combine(vectors, Rule(elect, weights)).item() == expected
    assert combine(vectors, Rule(elect, weights, 0.5)).item() == expected / 2


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_compiled_sums_have_the_bits_of_torch(k, threads):
    size = 3 * kernels.SHARE + 1001  # no multiple of anything
    vectors = [normal(size, seed=i) * (normal(size, seed=90 + i) > 0.5) for i in range(k)]
    bases = normal(size, seed=99), normal(size, seed=99).bfloat16(), normal(size, seed=99).half()
    for weights in ([1.0] * k, [0.3] * k, [1.0 + 0.7 * i for i in range(k)]):
        for elect in ("", "sum", "count"):
            rule = Rule(elect, weights, 0.7)
            wanted = kernels._by_torch(vectors, rule)
            assert (wanted != 0).any()
            torch.set_num_threads(threads)
            try:
                assert same_bits(combine(vectors, rule), wanted)
                for base in bases:
                    out = torch.empty(size)
                    kernels.merge(base, vectors, rule, out)
                    assert same_bits(out, base.float() + wanted)
            finally:
                torch.set_num_threads(1)


@pytest.mark.parametrize("elect", ["", "sum", "count"])
def test_lengths_that_do_not_fit_are_refused_before_compiled_code(elect):
    three = [normal(1000, seed=i) for i in range(3)]
    with pytest.raises(ValueError, match="2 vectors but 3 weights"):
        combine(three[:2], Rule(elect, [1.0, 2.0, 3.0]))
    for other in (normal(999), normal(1000).double()):
        with pytest.raises(ValueError, match="fp32 vectors of one length"):
            combine([*three, other], Rule(elect, [1.0] * 4))
    with pytest.raises(ValueError, match="fp32 vectors of one length"):
        kernels.merge(normal(999), three, Rule(elect, [1.0] * 3), torch.empty(1000))


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 511, 3 * kernels.SHARE + 1001])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_thresholds_and_packed_masks_drop(size, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    kept, values = normal(size).numpy() > 0.3, normal(size, seed=1)
    bits = pack(kept)
    assert len(bits) == -(-size // 8)
    wanted = torch.where(torch.from_numpy(kept), values * 2.5, 0.0)
    assert same_bits(drop(values, bits=bits, scale=2.5), wanted)
    small = torch.where(values.abs() >= 0.4, values, 0.0)
    assert same_bits(drop(values, 0.4), small)
    assert same_bits(kernels._drop_by_torch(values, 0.0, bits, 2.5), wanted)
    assert same_bits(kernels._drop_by_torch(values, 0.4, None, 1.0), small)
    with pytest.raises(ValueError, match=f"a mask of {size} values has"):
        drop(values, bits=torch.cat([bits, bits[:1], bits.new_zeros(1)]))


def test_no_method_writes_to_the_vectors_it_is_given():
    vectors = [normal(100, seed=i) for i in range(3)]
    before = [vector.clone() for vector in vectors]
    for name in registry():
        method = method_of({"method": name})
        for weights in ([1.0], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]):
            given = vectors[: len(weights)]
            combine(given, method.rule(weights))
            least = method.thresholds(lambda given=given: [("w", given[0])])
            bits = pack(normal(100).numpy() > 0)
            drop(given[0], least.get("w", 0.0))
            drop(given[0], bits=bits, scale=2.0)
        assert all(torch.equal(*pair) for pair in zip(vectors, before, strict=True))


# DARE: masks

MASK = """
import hashlib, sys, numpy as np
from mergelaw.merging.methods.dare import keep_mask
print(hashlib.sha256(np.packbits(keep_mask(3, "expert", "w", 5, 4000, 0.7)).tobytes()).hexdigest())
"""


@pytest.mark.parametrize("seed", ["0", "1", "random"])
def test_a_mask_is_the_same_in_every_process(seed):
    run = subprocess.run(
        [sys.executable, "-c", MASK],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": seed},
    )
    here = np.packbits(keep_mask(3, "expert", "w", 5, 4000, 0.7)).tobytes()
    assert run.stdout.strip() == hashlib.sha256(here).hexdigest()
    # The value itself, so that no later version draws other masks without saying so.
    assert run.stdout.startswith("54bdc3a5826e1561")


def test_a_mask_is_the_same_in_every_slice():
    whole = keep_mask(0, "expert", "w", 0, 4099, 0.5)
    for start, stop in SLICES:
        part = keep_mask(0, "expert", "w", start, stop - start, 0.5)
        assert np.array_equal(part, whole[start:stop])


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("first", [0, 5, 4096, (1 << 33) + 3])
def test_a_gpu_draws_the_same_masks(first, drop_rate):
    """Torch's own arithmetic, here on the processor, against numpy's stream: words, bits, slices."""
    for size in (0, 1, 8, 77, 4099):
        which = 3, "expert", "w", first, size, drop_rate
        drawn = keep_mask_by_torch(*which, torch.device("cpu"))
        assert np.array_equal(drawn.numpy(), keep_mask(*which))
        assert torch.equal(pack_by_torch(drawn), pack(keep_mask(*which)))


def test_masks_differ_by_seed_expert_and_tensor():
    masks = [
        keep_mask(*which, 0, 4096, 0.5)
        for which in [(0, "a", "w"), (1, "a", "w"), (0, "b", "w"), (0, "a", "v")]
    ]
    for i, left in enumerate(masks):
        for right in masks[:i]:
            # Independent fair coins agree in n/2 places, standard deviation sqrt(n)/2; 5 of them.
            assert abs(int((left == right).sum()) - 2048) < 5 * 32


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9, 0.99])
def test_a_mask_keeps_its_share_everywhere(drop_rate):
    size, runs = 1 << 16, 4
    for run in range(runs):
        mask = keep_mask(run, "expert", "w", 0, size, drop_rate)
        # The count is binomial: 5 standard deviations, for the whole and for each of 8 residues
        # (a generator used a word off would show in them).
        for part in (mask, *(mask[offset::8] for offset in range(8))):
            sigma = math.sqrt(len(part) * drop_rate * (1 - drop_rate))
            assert abs(int(part.sum()) - len(part) * (1 - drop_rate)) < 5 * sigma


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_rescales_what_it_keeps(name):
    method = method_of({"method": name, "drop_rate": 0.75})
    values = normal(1000)
    out = Prepared(method, InMemory(values, "expert")).part("w", 0, 1000)
    mask = torch.from_numpy(keep_mask(0, "expert", "w", 0, 1000, 0.75))
    assert torch.equal(out, torch.where(mask, values * 4, 0.0))


# In mergekit's words


def test_mergekit_has_the_same_rule_or_none():
    assert method_of({"method": "average"}).mergekit()["merge_method"] == "linear"
    assert method_of({"method": "task_arithmetic", "lambda": 2}).mergekit() == {
        "merge_method": "task_arithmetic",
        "parameters": {"lambda": 2.0, "normalize": True},
    }
    assert ties(density=0.3).mergekit()["parameters"]["density"] == 0.3
    for recipe in ({"trim": "global"}, {"elect": "count"}):
        assert ties(**recipe).mergekit() is None
    assert method_of({"method": "dare_linear"}).mergekit() is None
