"""Checkpoints as tensors: what is read, what fits together, and every way to be broken."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergelaw.errors import MergelawError
from mergelaw.models.checkpoint import INDEX, WEIGHTS, Tensors, Writer
from mergelaw.models.compare import compare
from models import bits, read_tensors, write_expert, write_tensors

VALUES = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.bias": torch.tensor([0.5, -0.0, 2.0]).bfloat16(),
    "c.scalar": torch.tensor(7),
    "d.empty": torch.zeros(0, 4, dtype=torch.float16),
}


@pytest.fixture
def checkpoint(tmp_path):
    return write_tensors(tmp_path / "checkpoint", VALUES)


@pytest.fixture
def sharded(tmp_path):
    return write_tensors(tmp_path / "sharded", VALUES, shards=3)


def everything(folder) -> dict[str, torch.Tensor]:
    with Tensors(folder) as tensors:
        return {name: tensors[name].clone() for name in tensors.names()}


def refused(folder, *words: str) -> None:
    """Reading the folder is a MergelawError of one line that says these words."""
    with pytest.raises(MergelawError) as error:
        everything(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# Reading and writing


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_whole_and_sharded_checkpoints_hold_the_same_tensors(tmp_path, shards):
    folder = write_tensors(tmp_path / "checkpoint", VALUES, shards=shards)
    found = everything(folder)
    assert sorted(found) == sorted(VALUES)
    assert all(bits(found[name]) == bits(VALUES[name]) for name in VALUES)
    with Tensors(folder) as tensors:
        assert tensors.shape("a.weight") == (3, 4)
        assert [tensors.dtype(name) for name in tensors.names()] == ["F32", "BF16", "I64", "F16"]
        assert "a.weight" in tensors and "e" not in tensors


def test_a_file_written_tensor_by_tensor_is_what_safetensors_reads(tmp_path, checkpoint):
    with Tensors(checkpoint) as tensors:
        layout = {name: (tensors.dtype(name), tensors.shape(name)) for name in tensors.names()}
        with Writer(tmp_path / WEIGHTS, layout) as writer:
            for name in layout:
                writer.write(name, tensors[name])
    found = read_tensors(tmp_path)
    assert all(bits(found[name]) == bits(VALUES[name]) for name in VALUES)
    assert (tmp_path / WEIGHTS).stat().st_size % 8 == sum(len(bits(v)) for v in VALUES.values()) % 8


def test_a_dtype_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(MergelawError, match=r"'w' is F4"):
        Writer(tmp_path / WEIGHTS, {"w": ("F4", (2,))})


# Tied heads


@pytest.mark.parametrize("embedding", ["model.embed_tokens.weight", "transformer.wte.weight"])
@pytest.mark.parametrize("said", [{"tie_word_embeddings": True}, {}])
def test_a_tied_head_stored_a_second_time_is_one_tensor(tmp_path, embedding, said):
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    config = {"model_type": "tiny", "vocab_size": 4, **said}
    base = write_tensors(tmp_path / "base", {embedding: weight, "x": weight[:1] * 1}, config)
    expert = write_expert(base, tmp_path / "expert")
    head = {"lm_head.weight": read_tensors(expert)[embedding].clone()}
    twice = write_tensors(tmp_path / "twice", read_tensors(expert) | head, config)
    with Tensors(base) as ours, Tensors(twice) as theirs:
        assert "lm_head.weight" not in theirs
        assert compare(ours, theirs)[0] == [embedding, "x"]
    head["lm_head.weight"][0, 0] += 1
    other = write_tensors(tmp_path / "other", read_tensors(expert) | head, config)
    with (
        Tensors(base) as ours,
        Tensors(other) as theirs,
        pytest.raises(MergelawError, match=r"other: has a tensor 'lm_head.weight'"),
    ):
        compare(ours, theirs)


def test_an_untied_head_with_the_same_values_stays(tmp_path):
    weight = torch.ones(4, 3)
    tensors = {"model.embed_tokens.weight": weight, "lm_head.weight": weight.clone()}
    config = {"model_type": "tiny", "vocab_size": 4, "tie_word_embeddings": False}
    assert len(everything(write_tensors(tmp_path / "untied", tensors, config))) == 2


# What does not fit the base


@pytest.mark.parametrize(
    "changed, config, words",
    [
        ({}, {"model_type": "other"}, ["model_type is other", "tiny"]),
        ({}, {"vocab_size": 5}, ["vocab_size is 5", "base's is 4"]),
        ({"a.weight": torch.zeros(4, 3)}, {}, ["'a.weight'", "[4, 3]", "[3, 4]"]),
        ({"a.weight": None}, {}, ["no tensor 'a.weight'"]),
        ({"e.extra": torch.zeros(1)}, {}, ["'e.extra'", "base has not"]),
        ({"c.scalar": torch.tensor(8)}, {}, ["'c.scalar'", "I64", "differs"]),
        ({"c.scalar": torch.tensor(7.0)}, {}, ["'c.scalar'", "F32"]),
        ({"a.weight": torch.zeros(3, 4).double()}, {}, ["'a.weight'", "F64"]),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, checkpoint, changed, config, words):
    tensors = {n: v for n, v in (VALUES | changed).items() if v is not None}
    described = {"model_type": "tiny", "vocab_size": 4, **config}
    expert = write_tensors(tmp_path / "expert", tensors, described)
    with (
        Tensors(checkpoint) as ours,
        Tensors(expert) as theirs,
        pytest.raises(MergelawError) as error,
    ):
        compare(ours, theirs)
    assert str(error.value).startswith(f"{expert}: ")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_dtypes_may_differ_between_floats(tmp_path, checkpoint, sharded):
    wide = write_expert(sharded, tmp_path / "wide", dtype="float32")
    with Tensors(checkpoint) as ours, Tensors(wide) as theirs:
        assert compare(ours, theirs)[0] == ["a.weight", "b.bias", "d.empty"]


# Broken folders


def test_a_folder_without_weights_is_refused(tmp_path):
    refused(tmp_path, "config.json", "no such file")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json", "not JSON")
    (tmp_path / "config.json").write_text("[" * 100_000)
    refused(tmp_path, "config.json", "not JSON")
    for text in ("[]", "{}", "1"):
        (tmp_path / "config.json").write_text(text)
        refused(tmp_path, "config.json", "model_type")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(tmp_path, WEIGHTS, "no such file")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    refused(tmp_path, WEIGHTS, "only safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_named(checkpoint, size):
    path = checkpoint / WEIGHTS
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    refused(checkpoint, WEIGHTS, "corrupt or half-copied")


def test_a_file_with_a_tail_is_named(checkpoint):
    with (checkpoint / WEIGHTS).open("ab") as file:
        file.write(b"tail")
    refused(checkpoint, WEIGHTS, "corrupt or half-copied")


def test_a_half_copied_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size // 2)
    refused(sharded, shard.name, "corrupt or half-copied")


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, shard.name, "no such file")


@pytest.mark.parametrize(
    "weight_map, words",
    [
        ({"x": "{first}"}, ["'x'", "no file has it"]),
        ({"a.weight": "{second}"}, ["'a.weight'", "{second}"]),  # lies in the first
        ({"x": "../elsewhere.safetensors"}, ["leaves the folder"]),
        ({"x": "/etc/passwd"}, ["leaves the folder"]),
        ({"x": ".."}, ["no such file"]),
        ({"x": ""}, ["no such file"]),
        ({"x": 3}, ["not an index"]),
        ({"x": ["a"]}, ["not an index"]),
        ({"x": "missing.safetensors"}, ["missing.safetensors", "no such file"]),
    ],
)
def test_an_index_that_is_wrong_is_named(sharded, weight_map, words):
    first, second, _ = (path.name for path in sorted(sharded.glob("*.safetensors")))
    names = {"{first}": first, "{second}": second}
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] |= {
        key: names.get(file, file) if isinstance(file, str) else file
        for key, file in weight_map.items()
    }
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, *(names.get(word, word) for word in words))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', "\udcff"])
def test_an_index_that_is_none_is_named(sharded, text):
    (sharded / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    refused(sharded, INDEX, "not an index")


# Damaged headers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = write_tensors(tmp_path_factory.mktemp("fuzz"), VALUES)
    return folder, (folder / WEIGHTS).read_bytes()


def read_or_refused(folder, content: bytes) -> None:
    """A MergelawError, or tensors that are as long as their shapes say."""
    (folder / WEIGHTS).write_bytes(content)
    try:
        found = everything(folder)
    except MergelawError as error:
        assert "\n" not in str(error)
        return
    for tensor in found.values():
        assert len(bits(tensor)) == tensor.numel() * tensor.element_size()


def test_every_flipped_bit_of_a_header(whole):
    folder, content = whole
    (size,) = struct.unpack("<Q", content[:8])
    for place in range(8 + size):
        for bit in range(8) if place < 8 else (place % 8,):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            read_or_refused(folder, bytes(flipped))


@settings(max_examples=150)
@given(st.data())
def test_mangled_headers(whole, data):
    folder, content = whole
    (size,) = struct.unpack("<Q", content[:8])
    header = bytearray(content[8 : 8 + size])
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(header) - 1))
        header[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    length = data.draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
    read_or_refused(folder, struct.pack("<Q", length) + bytes(header) + content[8 + size :])


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(
            ["F32", "F16", "BF16", "I64", "F64", "BOOL", "U16", "C64", "F8_E4M3", "F4", "X", 3]
        ),
        "shape": st.lists(st.integers(-1, 5) | st.just(2**62), max_size=3) | st.none(),
        "data_offsets": st.lists(st.integers(-1, 60) | st.just(2**63), max_size=3),
    },
)


@settings(max_examples=150)
@given(
    header=st.dictionaries(st.text(max_size=4), entries | st.none() | st.integers(), max_size=3),
    data=st.binary(max_size=60),
)
def test_made_up_headers(whole, header, data):
    folder, _ = whole
    text = json.dumps(header).encode()
    read_or_refused(folder, struct.pack("<Q", len(text)) + text + data)


@settings(max_examples=50)
@given(
    dtype=st.sampled_from(["F32", "F16", "BF16", "I64", "F64", "U16", "F8_E4M3", "F4", "BOOL"]),
    count=st.integers(0, 4),
)
def test_well_formed_headers_of_any_dtype(whole, dtype, count):
    folder, _ = whole
    width = {"F64": 8, "I64": 8, "F32": 4, "F8_E4M3": 1, "BOOL": 1, "F4": 0.5}.get(dtype, 2)
    size = int(width * 2 * count)
    entry = {"dtype": dtype, "shape": [2, count], "data_offsets": [0, size]}
    text = json.dumps({"w": entry}).encode()
    read_or_refused(folder, struct.pack("<Q", len(text)) + text + bytes(size))


def test_a_file_of_another_kind(checkpoint):
    (checkpoint / WEIGHTS).write_bytes(b"PK\x03\x04 not safetensors at all")
    refused(checkpoint, WEIGHTS, "corrupt")
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / WEIGHTS).mkdir()
    refused(checkpoint, WEIGHTS, "no such file")


def test_a_link_to_a_file_elsewhere_is_followed(tmp_path, checkpoint):
    # A downloaded snapshot is a folder of links.
    save_file({"w": torch.ones(2)}, tmp_path / "blob")
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / WEIGHTS).symlink_to(tmp_path / "blob")
    assert list(everything(checkpoint)) == ["w"]
