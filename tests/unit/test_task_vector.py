"""Task vectors: base plus vector is the expert, bit for bit."""

import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from mergelaw.artifacts import lineage
from mergelaw.errors import MergelawError
from mergelaw.merging import task_vector
from mergelaw.merging.task_vector import (
    EXCEPTIONS,
    STATISTICS,
    VECTOR,
    TaskVector,
    difference,
    squares_of,
)
from models import DTYPES, bits, read_tensors, write_expert, write_task_vector, write_tensors

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def every_finite(dtype: torch.dtype) -> torch.Tensor:
    """All finite values of a 16-bit type: both zeros, denormals, the largest."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    return values[torch.isfinite(values)]


def restored(base: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    vector, index, value = difference(expert, base)
    wide = base.float() + vector
    wide.view(-1)[index] = value
    return wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0, 1, 777, 16_000, 32_768, 60_000])
def test_every_16_bit_value_is_given_back(dtype, shift):
    base = every_finite(dtype)
    expert = base.roll(shift)
    wide = restored(base, expert)
    assert bits(wide) == bits(expert.float())
    assert bits(wide.to(dtype)) == bits(expert)


@settings(max_examples=200)
@given(
    dtype=st.sampled_from(list(INTEGERS)),
    pairs=st.lists(st.tuples(st.integers(), st.integers()), min_size=1, max_size=20),
)
def test_any_two_patterns_of_bits(dtype, pairs):
    kind = INTEGERS[dtype]
    width = torch.iinfo(kind).bits
    wrapped = [[(x + 2 ** (width - 1)) % 2**width - 2 ** (width - 1) for x in p] for p in pairs]
    base, expert = torch.tensor(wrapped, dtype=kind).T.contiguous().view(dtype)
    finite = torch.isfinite(base) & torch.isfinite(expert)
    base, expert = base[finite], expert[finite]
    assert bits(restored(base, expert).to(dtype)) == bits(expert)


def test_ordinary_experts_have_few_exceptions():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(10_000, generator=generator).bfloat16()
    step = torch.randn(10_000, generator=generator) * 1e-2
    vector, index, _ = difference((base.float() + step).bfloat16(), base)
    assert len(index) < 10
    assert (vector == 0).any()  # many steps are lost in the rounding of bfloat16


def test_negative_zeros_are_exceptions():
    base, expert = torch.tensor([1.0, -0.0, 0.0, -0.0]), torch.tensor([-0.0, -0.0, -0.0, 0.0])
    vector, index, value = difference(expert, base)
    assert vector.tolist() == [-1, 0, 0, 0]
    assert index.tolist() == [0, 1, 2]
    assert bits(value) == bits(torch.tensor([-0.0] * 3))


# As files

VALUES = {
    "b": torch.randn(40, 30, generator=torch.Generator().manual_seed(0)),
    "a": torch.linspace(-1, 1, 7),
    "n": torch.tensor(3),
}


@pytest.fixture
def base(tmp_path):
    values = {n: v.bfloat16() if v.is_floating_point() else v for n, v in VALUES.items()}
    return write_tensors(tmp_path / "base", values)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shards", [1, 2])
def test_the_files_give_the_expert_back(tmp_path, base, dtype, shards):
    expert = write_expert(base, tmp_path / "expert", scale=0.1, dtype=dtype, shards=shards)
    vector = write_task_vector(base, expert, tmp_path / "vector")
    assert vector.names == ["a", "b"]
    before, after = read_tensors(base), read_tensors(expert)
    for name, values in vector.tensors():
        flat = before[name].float().view(-1) + values
        if found := vector.exceptions(name):
            flat[found[0]] = found[1]
        assert bits(flat.to(DTYPES[dtype])) == bits(after[name])
    statistics = vector.statistics()
    assert statistics["elements"] == 1207
    assert statistics["norm"] == pytest.approx(0.1 * 1207**0.5, rel=0.1)
    assert statistics["tensors"]["a"]["zeros"] == int((vector["a"] == 0).sum())


def test_the_same_vector_whatever_the_shards_and_threads(tmp_path, base):
    digests = set()
    for number, (shards, threads) in enumerate([(1, 1), (2, 1), (1, 2)]):
        expert = write_expert(base, tmp_path / f"expert{number}", shards=shards)
        torch.set_num_threads(threads)
        try:
            vector = write_task_vector(base, expert, tmp_path / f"vector{number}")
        finally:
            torch.set_num_threads(1)
        digests.add(vector.digest)
    assert len(digests) == 1


def test_norms_are_those_of_float64(tmp_path):
    values = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.vector_norm(values.double()).item()
    # A sum of n positive terms in float64: relative error below n * 2^-53.
    assert math.fsum(squares_of(values)) ** 0.5 == pytest.approx(exact, rel=3e6 * 2**-53)
    assert squares_of(values[:0]) == []
    assert squares_of(torch.tensor([-3.0]).bfloat16()) == [9]


def refused(base, expert, folder, *words):
    with pytest.raises(MergelawError) as error:
        write_task_vector(base, expert, folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not folder.exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["base", "expert"])
def test_values_that_are_none_are_refused(tmp_path, base, bad, where):
    expert = write_expert(base, tmp_path / "expert")
    tensors = read_tensors(tmp_path / where)
    tensors["b"][3, 4] = bad
    write_tensors(tmp_path / where, tensors)
    refused(base, expert, tmp_path / "vector", str(tmp_path / where), "'b'", "NaN or Inf")


def test_an_expert_that_equals_its_base_is_refused(tmp_path, base):
    same = write_expert(base, tmp_path / "same", scale=0)
    refused(base, same, tmp_path / "vector", str(same), "equals its base")


def test_a_difference_beyond_float32_is_refused(tmp_path):
    base = write_tensors(tmp_path / "base", {"w": torch.tensor([3e38, 1.0])})
    expert = write_tensors(tmp_path / "expert", {"w": torch.tensor([-3e38, 1.0])})
    refused(base, expert, tmp_path / "vector", str(expert), "'w'", "more than float32 holds")


def test_a_missing_tensor_is_refused(tmp_path, base):
    tensors = read_tensors(base)
    del tensors["a"]
    expert = write_tensors(tmp_path / "expert", tensors)
    refused(base, expert, tmp_path / "vector", str(expert), "'a'")


@pytest.mark.parametrize("file", [VECTOR, EXCEPTIONS])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_task_vector_is_named(tmp_path, base, file, damage):
    expert = write_expert(base, tmp_path / "expert")
    folder = write_task_vector(base, expert, tmp_path / "vector").folder
    if damage == "missing":
        (folder / file).unlink()
    else:
        os.truncate(folder / file, (folder / file).stat().st_size - 1)
    with pytest.raises(MergelawError, match=r"vector: corrupt .* delete the folder"):
        TaskVector(folder)


def test_statistics_are_plain_json(tmp_path, base):
    expert = write_expert(base, tmp_path / "expert")
    vector = write_task_vector(base, expert, tmp_path / "vector")
    assert json.loads((vector.folder / STATISTICS).read_text()) == vector.statistics()
    assert lineage.read(vector.folder)["facts"]["exceptions"] == vector.statistics()["exceptions"]


# Derived


@pytest.fixture
def both(tmp_path, base):
    """The same task vector, materialised and derived."""
    tiny = {"b": torch.randn(40, 30, generator=torch.Generator().manual_seed(2)) * 1e-3}
    expert = write_expert(base, tmp_path / "expert", dtype="float32", shards=2, tensors=tiny)
    ways = ("materialised", "derived")
    return [write_task_vector(base, expert, tmp_path / way, storage=way) for way in ways]


def test_a_derived_vector_has_the_bits_and_the_digest_of_the_materialised(both):
    kept, derived = both
    assert not (derived.folder / VECTOR).exists() and derived.changed
    assert derived.digest == kept.digest != lineage.read(derived.folder)["digest"]
    assert derived.statistics() == kept.statistics()
    assert derived.names == kept.names
    for name in kept.names:
        assert bits(derived[name]) == bits(kept[name])
        assert bits(derived.part(name, 3, 6)) == bits(kept[name][3:6])
    for name in kept.changed:
        for ours, theirs in zip(derived.exceptions(name), kept.exceptions(name), strict=True):
            assert bits(ours) == bits(theirs)


@pytest.mark.parametrize("which", ["base", "expert"])
def test_what_a_derived_vector_is_derived_from_has_to_stay(tmp_path, both, which):
    folder = tmp_path / f"{which}@artifact"
    folder.rename(tmp_path / "away")
    with pytest.raises(MergelawError, match=rf"{which}@artifact: is gone, .* materialised"):
        TaskVector(both[1].folder)
    TaskVector(both[0].folder)
    other = write_expert(tmp_path / "base", tmp_path / "other", seed=9)
    models.as_artifact(other, which).rename(folder)
    with pytest.raises(MergelawError, match=rf"{which}@artifact: is not what .* rerun"):
        TaskVector(both[1].folder)


def test_an_expert_that_was_written_over_is_not_what_a_vector_is_derived_from(tmp_path, both):
    linked = tmp_path / "expert@artifact"
    file = next(
        path for path in sorted(linked.iterdir()) if path.suffix == ".safetensors"
    ).resolve()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(MergelawError, match="is not what was written"):
        TaskVector(both[1].folder)


@pytest.mark.parametrize("piece", [1 << 20, 1 << 22])
def test_large_tensors_are_worked_on_in_pieces(tmp_path, monkeypatch, piece):
    """With the same bits, exceptions of every piece included."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2_100_000, generator=generator)
    base = write_tensors(tmp_path / "base", {"w": values})
    after = torch.randn(values.shape, generator=generator)
    expert = write_tensors(tmp_path / "expert", {"w": after})
    monkeypatch.setattr(task_vector, "PIECE", piece)
    vector = write_task_vector(base, expert, tmp_path / "vector")
    whole, index, value = difference(after, values)
    assert bits(vector["w"]) == bits(whole)
    found = vector.exceptions("w")
    assert len(index) > 1000 and torch.equal(found[0], index) and bits(found[1]) == bits(value)


# A vocabulary of another size


@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize("storage", ["materialised", "derived"])
def test_common_rows_of_a_resized_vocabulary(tmp_path, rows, storage):
    head = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    base = write_tensors(tmp_path / "base", {"embed": head, "w": head[:2] * 2})
    after = torch.randn(rows, 3, generator=torch.Generator().manual_seed(1))
    config = {"model_type": "tiny", "vocab_size": rows}
    expert = write_tensors(tmp_path / "expert", {"embed": after, "w": head[:2] * 3}, config)
    refused(base, expert, tmp_path / "no", f"vocab_size is {rows}", "base's is 4", "common_rows")
    how = {"vocabulary": "common_rows", "storage": storage}
    vector = write_task_vector(base, expert, tmp_path / "vector", **how)
    common = min(rows, 4)
    wanted = torch.zeros(4, 3)
    wanted[:common] = after[:common] - head[:common]
    assert torch.equal(vector["embed"].view(4, 3), wanted)
    assert torch.equal(vector["w"].view(2, 3), head[:2] * 3 - head[:2] * 2)


def test_rows_of_other_tokens_are_refused(tmp_path):
    head = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    base = write_tensors(tmp_path / "base", {"embed": head})
    after = torch.cat([head, head]) + 1
    config = {"model_type": "tiny", "vocab_size": 8}
    expert = write_tensors(tmp_path / "expert", {"embed": after}, config)
    for folder, tokens in ((base, "abcd"), (expert, "abdcefgh")):
        vocabulary = {token: row for row, token in enumerate(tokens)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    with pytest.raises(MergelawError, match=r"token 2 is 'd', the base's is 'c'"):
        write_task_vector(base, expert, tmp_path / "vector", vocabulary="common_rows")


# What models compute


def test_tables_that_models_compute_are_nobodys_business(tmp_path):
    """Only older libraries wrote them, and not always the same."""
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    weights = {"w": torch.ones(3)}
    base = write_tensors(tmp_path / "base", weights | table)
    for number, more in enumerate(({}, table, {n: t + 1 for n, t in table.items()})):
        expert = write_tensors(tmp_path / f"expert{number}", {"w": torch.zeros(3)} | more)
        assert write_task_vector(base, expert, tmp_path / f"vector{number}").names == ["w"]


def test_quantised_checkpoints_are_refused(tmp_path, base):
    config = {"model_type": "tiny", "vocab_size": 4, "quantization_config": {"bits": 4}}
    expert = write_tensors(tmp_path / "expert", read_tensors(base), config)
    refused(base, expert, tmp_path / "vector", str(expert), "is quantised")
