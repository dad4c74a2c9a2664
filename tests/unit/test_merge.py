"""The merge engine on real models: whole or streamed, resident or written, always the same bits."""

import json
import multiprocessing
import time
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml

from mergelaw.errors import MergelawError
from mergelaw.evaluation import shard as evaluate
from mergelaw.merging import engine as merge
from mergelaw.merging.engine import Merger, thresholds
from mergelaw.merging.export import mergekit_recipe
from mergelaw.merging.methods import dare, method_of
from mergelaw.merging.task_vector import EXCEPTIONS, TaskVector
from mergelaw.models.checkpoint import INDEX, Tensors
from models import (
    ARCHITECTURES,
    DTYPES,
    bits,
    load,
    read_tensors,
    write_checkpoint,
    write_expert,
    write_pool,
    write_task_vector,
    write_tensors,
)

ROOMY, NONE = 1 << 30, 0
METHODS = {
    "average": {"method": "average"},
    "task_arithmetic": {"method": "task_arithmetic", "lambda": 1.5},
    "task_arithmetic_sum": {"method": "task_arithmetic", "lambda": 0.3, "normalize": False},
    "ties": {"method": "ties", "density": 0.3},
    "ties_global_count": {"method": "ties", "density": 0.3, "trim": "global", "elect": "count"},
    "dare_linear": {"method": "dare_linear", "drop_rate": 0.5},
    "dare_ties": {"method": "dare_ties", "drop_rate": 0.7, "lambda": 0.8},
}
each_method = pytest.mark.parametrize("recipe", METHODS.values(), ids=METHODS.keys())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base") / "base", dtype="bfloat16", shards=2)


@pytest.fixture(scope="module")
def pool(tmp_path_factory, base):
    return write_pool(base, tmp_path_factory.mktemp("pool"), 4)


def parameters(model) -> dict[str, bytes]:
    return {name: bits(p) for name, p in model.named_parameters(remove_duplicate=False)}


def merged(base, pool, recipe, subset, weights=None, memory=ROOMY, dtype="float32"):
    model = load(base, dtype)
    with Merger(model, base, pool, method_of(recipe), memory) as merger:
        merger.merge(subset, weights)
    assert merger.resident == (memory == ROOMY)
    return parameters(model)


# One expert is that expert


def with_extremes(folder, seed):
    """Put zeros of both signs, denormals, tiny and huge values into every tensor."""
    generator = torch.Generator().manual_seed(seed)
    tensors = read_tensors(folder)
    for tensor in tensors.values():
        limits = torch.finfo(tensor.dtype)
        values = [0.0, -0.0, 1.0, -3.0, limits.tiny, -limits.tiny, limits.smallest_normal / 4]
        values = torch.tensor([*values, limits.max / 4, -limits.max / 4, limits.eps])
        flat = tensor.view(-1)
        picked = torch.randint(len(values), (len(flat) // 4,), generator=generator)
        flat[: len(picked)] = values[picked].to(tensor.dtype)
    config = json.loads((folder / "config.json").read_text())
    write_tensors(folder, tensors, config)
    return folder


@pytest.fixture(scope="module", params=[(t, d) for t in ("llama", "gpt2") for d in DTYPES])
def extreme(request, tmp_path_factory):
    model_type, dtype = request.param
    folder = tmp_path_factory.mktemp(f"{model_type}-{dtype}")
    base = write_checkpoint(folder / "base", model_type, tied=model_type == "gpt2", dtype=dtype)
    expert = with_extremes(write_expert(base, folder / "expert", scale=0.1), 1)
    with_extremes(base, 0)
    vector = write_task_vector(base, expert, folder / "vector", trust=["weights"])
    return base, expert, vector, dtype


SINGLE = [
    {"method": "average"},
    {"method": "task_arithmetic"},
    {"method": "task_arithmetic", "normalize": False},
    {"method": "ties", "density": 1.0},
    {"method": "dare_linear", "drop_rate": 0},
    {"method": "dare_ties", "drop_rate": 0},
]


@pytest.mark.parametrize("memory", [ROOMY, NONE])
def test_a_merge_of_one_is_that_expert_bit_for_bit(extreme, memory):
    base, expert, vector, dtype = extreme
    assert vector.changed, "the extremes are to be exceptions"
    for evaluation in {"float32", dtype}:
        wanted = parameters(load(expert, evaluation))
        for recipe in SINGLE:
            found = merged(base, {"e": vector}, recipe, ["e"], memory=memory, dtype=evaluation)
            assert found == wanted, recipe


def test_a_written_merge_of_one_is_that_expert_bit_for_bit(extreme, tmp_path):
    base, expert, vector, _ = extreme
    wanted = {name: bits(tensor) for name, tensor in read_tensors(expert).items()}
    for number, recipe in enumerate(SINGLE):
        folder = tmp_path / str(number)
        folder.mkdir()
        merge.write_merge(base, {"e": vector}, method_of(recipe), None, folder)
        assert {n: bits(t) for n, t in read_tensors(folder).items()} == wanted, recipe


def test_a_scaled_expert_is_not_restored(extreme):
    # theta_0 + 2 v, where an exception of the expert alone would have put theta back.
    base, _, vector, _ = extreme
    recipe = {"method": "task_arithmetic", "normalize": False}
    found = merged(base, {"e": vector}, recipe, ["e"], weights=[2.0])
    with Tensors(base) as tensors:
        for name in vector.changed:
            wanted = tensors[name].float().view(-1) + vector[name] * 2.0
            assert found.get(name, found.get(f"transformer.{name}")) == bits(wanted)


# Nothing depends on how it is done


@each_method
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_and_resident_merges_have_the_same_bits(base, pool, recipe, dtype):
    subset = list(pool)[:3]
    for weights in (None, [1.0, 2.0, 0.5]):
        whole = merged(base, pool, recipe, subset, weights, ROOMY, dtype)
        assert merged(base, pool, recipe, subset, weights, NONE, dtype) == whole


@each_method
@pytest.mark.parametrize("memory", [ROOMY, NONE])
def test_the_size_of_a_slice_changes_no_bit(base, pool, recipe, memory, monkeypatch):
    wanted = merged(base, pool, recipe, list(pool), memory=memory)
    monkeypatch.setattr(merge, "SLICE", 3 * 512)
    assert merged(base, pool, recipe, list(pool), memory=memory) == wanted


@each_method
@pytest.mark.parametrize("memory", [ROOMY, NONE])
def test_a_merge_leaves_no_trace(base, pool, recipe, memory):
    model = load(base)
    untouched = parameters(model)
    names = list(pool)
    with Merger(model, base, pool, method_of(recipe), memory) as merger:
        seen = {}
        for subset in [*combinations(names, 2), (), *combinations(names, 1), tuple(names)]:
            merger.merge(subset)
            seen[subset] = parameters(model)
        for subset in reversed(seen):
            merger.merge(subset)
            assert parameters(model) == seen[subset]
    assert seen[()] == untouched
    assert len({json.dumps(sorted(map(str, s.items()))) for s in seen.values()}) == len(seen)


@each_method
def test_the_order_of_the_pool_and_who_else_is_in_it_change_no_bit(base, pool, recipe):
    subset = list(pool)[1:3]
    wanted = merged(base, pool, recipe, subset)
    assert merged(base, dict(reversed(pool.items())), recipe, subset) == wanted
    assert merged(base, {name: pool[name] for name in subset}, recipe, subset) == wanted


@each_method
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_a_written_merge_is_the_resident_one_rounded_once(base, pool, recipe, weights, tmp_path):
    model = load(base)
    subset = list(pool)[:3]
    method = method_of(recipe)
    with Merger(model, base, pool, method, ROOMY) as merger:
        merger.merge(subset, weights)
    merge.write_merge(base, {name: pool[name] for name in subset}, method, weights, tmp_path)
    values = dict(model.named_parameters())
    written = read_tensors(tmp_path)
    assert written.keys() == values.keys()
    for name, tensor in written.items():
        assert tensor.dtype == torch.bfloat16
        assert bits(tensor) == bits(values[name].to(torch.bfloat16))


def by_tensor(base, experts):
    """Other weights for every tensor but the last, which the merge leaves alone."""
    generator = torch.Generator().manual_seed(3)
    with Tensors(base) as tensors:
        names = tensors.names()
    return {name: torch.randn(experts, generator=generator).tolist() for name in names[:-1]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_by_tensor_are_those_of_each_tensor_however_it_is_merged(
    base, pool, dtype, tmp_path
):
    weights, recipe = by_tensor(base, len(pool)), {"method": "learned"}
    whole = merged(base, pool, recipe, list(pool), weights, ROOMY, dtype)
    assert merged(base, pool, recipe, list(pool), weights, NONE, dtype) == whole
    with Tensors(base) as tensors:
        for name in tensors.names():
            total = torch.full_like(tensors[name].float(), -0.0).view(-1)
            for vector, weight in zip(pool.values(), weights.get(name, []), strict=False):
                total += vector[name] * torch.tensor(weight)
            wanted = (tensors[name].float().view(-1) + total).to(DTYPES[dtype])
            assert whole[name] == bits(wanted), name
    if dtype == "bfloat16":
        merge.write_merge(base, pool, method_of(recipe), weights, tmp_path)
        assert {n: bits(t) for n, t in read_tensors(tmp_path).items()}.items() <= whole.items()


def test_gradients_become_inner_products_in_slices(base, pool, monkeypatch):
    monkeypatch.setattr(merge, "SLICE", 3 * 512)
    name = "model.embed_tokens.weight"
    for memory in (ROOMY, NONE):
        model = load(base)
        with Merger(model, base, pool, method_of({"method": "learned"}), memory) as merger:
            gradient = torch.randn(merger.parameters[name].shape)
            found = merger.products(list(pool), name, gradient)
        flat = gradient.view(-1).double()
        wanted = [float(flat @ vector[name].double()) for vector in pool.values()]
        assert found.tolist() == pytest.approx(wanted, rel=1e-4)


def test_a_written_merge_is_a_checkpoint(base, pool, tmp_path):
    from transformers import AutoTokenizer

    merge.write_merge(base, pool, method_of({"method": "average"}), None, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|>x"
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_large_merge_is_written_in_shards(base, pool, tmp_path, monkeypatch):
    method, wanted, folder = method_of(METHODS["ties"]), tmp_path / "one", tmp_path / "shards"
    for place, limit in ((wanted, "5GB"), (folder, "20KB")):
        place.mkdir()
        monkeypatch.setattr(merge, "SHARD", limit)
        merge.write_merge(base, pool, method, None, place)
    assert len(list(wanted.glob("*.safetensors"))) == 1 < len(list(folder.glob("*.safetensors")))
    assert (folder / INDEX).exists() and not (wanted / INDEX).exists()
    assert parameters(load(folder)) == parameters(load(wanted))
    with Tensors(folder) as tensors:
        assert tensors.names() == sorted(read_tensors(wanted))


def test_the_same_merge_whatever_the_shards(base, pool, tmp_path):
    whole = write_tensors(
        tmp_path / "whole", read_tensors(base), json.loads((base / "config.json").read_text())
    )
    for folder, start in ((tmp_path / "a", base), (tmp_path / "b", whole)):
        folder.mkdir()
        merge.write_merge(start, pool, method_of(METHODS["dare_ties"]), None, folder)
    first, second = (read_tensors(tmp_path / name) for name in "ab")
    assert {n: bits(t) for n, t in first.items()} == {n: bits(t) for n, t in second.items()}


# Copies, and methods that become the average


averaging = {name: r for name, r in METHODS.items() if r.get("normalize", True)}


@pytest.mark.parametrize("recipe", averaging.values(), ids=averaging.keys())
@pytest.mark.parametrize("copies", [2, 3, 7])
def test_copies_of_one_expert_are_that_expert(base, pool, recipe, copies):
    """k copies of v against v alone, fp32, u = 2^-24.

    A sum of k copies errs by at most (k-1) u k|v| and a few u from scaling by 1/k (or dividing by
    k) and by lambda, so the merged differences are within (k+4) u c|v| of each other, c|v| the
    difference that is added; each of the two additions to theta_0 rounds by u |theta|.
    """
    vector = pool["expert0"]
    same = {f"copy{i}": vector for i in range(copies)}
    results = []
    for subset in (["copy0"], list(same)):
        model = load(base)
        with Merger(model, base, same, method_of(recipe), ROOMY) as merger:
            merger.merge(subset)
        results.append(dict(model.named_parameters()))
    u = 2.0**-24
    start = dict(load(base).named_parameters())
    for name, alone in results[0].items():
        alone, together = alone.double(), results[1][name].double()
        added = (alone - start[name].double()).abs()
        bound = (copies + 4) * u * added * (1 + 1e-3) + 3 * u * alone.abs()
        assert ((together - alone).abs() <= bound).all()


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_dare_without_dropping_is_the_average_bit_for_bit(base, pool, k):
    subset = list(pool)[:k]
    wanted = merged(base, pool, {"method": "average"}, subset)
    assert merged(base, pool, {"method": "dare_linear", "drop_rate": 0}, subset) == wanted
    full = {"method": "task_arithmetic", "lambda": 1.0}
    assert merged(base, pool, full, subset) == wanted


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("elect", ["sum", "count"])
def test_ties_without_trimming_averages_vectors_that_agree(tmp_path, k, elect):
    """Vectors without zeros that agree in sign; k a power of two, so that s / k is s * (1 / k)."""
    base = write_checkpoint(tmp_path / "base", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    signs = {n: t.sign() + (t == 0) for n, t in read_tensors(base).items()}
    pool = {}
    for i in range(k):
        before = read_tensors(base)
        after = {
            n: t + signs[n] * (0.01 + torch.rand(t.shape, generator=generator))
            for n, t in before.items()
        }
        expert = write_expert(base, tmp_path / f"expert{i}", tensors=after)
        pool[f"expert{i}"] = write_task_vector(base, expert, tmp_path / f"vector{i}")
    wanted = merged(base, pool, {"method": "average"}, list(pool))
    for recipe in ({"method": "ties", "density": 1.0}, {"method": "dare_ties", "drop_rate": 0}):
        assert merged(base, pool, {**recipe, "elect": elect}, list(pool)) == wanted


# Architectures, tied weights, the flat buffer


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
@pytest.mark.parametrize("tied", [True, False])
def test_every_architecture_is_merged_in_place(tmp_path, model_type, tied):
    base = write_checkpoint(tmp_path / "base", model_type, tied, "float32")
    pool = write_pool(base, tmp_path, 2)
    method = method_of({"method": "average"})
    model = load(base)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    ids = torch.arange(2, 42).view(2, 20)
    with torch.no_grad(), Merger(model, base, pool, method, ROOMY) as merger:
        assert merger.resident
        merger.merge(list(pool))
        inside = model(ids).logits
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    (tmp_path / "written").mkdir()
    merge.write_merge(base, pool, method, None, tmp_path / "written")
    with torch.no_grad():
        outside = load(tmp_path / "written")(ids).logits
    # The same weights in other places of memory: matrix products may round otherwise.
    assert (inside - outside).abs().max() <= 1e-5 * outside.abs().max()


def test_a_tied_head_that_the_trainer_stored_twice(tmp_path):
    base = write_checkpoint(tmp_path / "base", tied=True)
    expert = write_expert(base, tmp_path / "expert")
    embedding = read_tensors(expert)["model.embed_tokens.weight"].clone()
    twice = write_expert(base, tmp_path / "twice", tensors={"lm_head.weight": embedding})
    wanted = write_task_vector(base, expert, tmp_path / "vector")
    found = write_task_vector(base, twice, tmp_path / "vector2")
    assert found.digest == wanted.digest
    # And as the base.
    again = write_task_vector(twice, base, tmp_path / "vector3")
    expected = parameters(load(base))
    average = {"method": "average"}
    assert merged(twice, {"e": again}, average, ["e"], memory=ROOMY) == expected
    assert merged(twice, {"e": again}, average, ["e"], memory=NONE) == expected


# What cannot be merged


def test_a_tensor_that_transformers_ignores_is_written_but_not_measured(tmp_path):
    extra = {"mtp.weight": torch.ones(3, dtype=torch.bfloat16)}
    base = write_checkpoint(tmp_path / "plain")
    base = write_expert(base, tmp_path / "base", scale=0, tensors=extra)
    expert = write_expert(base, tmp_path / "expert")
    vector = write_task_vector(base, expert, tmp_path / "vector")
    average = {"method": "average"}
    assert merged(base, {"e": vector}, average, ["e"], memory=ROOMY) == parameters(load(expert))
    (tmp_path / "out").mkdir()
    merge.write_merge(base, {"e": vector}, method_of(average), None, tmp_path / "out")
    written = read_tensors(tmp_path / "out")
    assert all(torch.equal(written[n], v) for n, v in read_tensors(expert).items())


def test_task_vectors_of_two_bases_are_refused(base, pool, tmp_path):
    other = write_tensors(tmp_path / "base", {"w": torch.zeros(4)})
    expert = write_tensors(tmp_path / "expert", {"w": torch.ones(4)})
    vectors = {**pool, "other": write_task_vector(other, expert, tmp_path / "vector")}
    average = method_of({"method": "average"})
    with pytest.raises(MergelawError, match="has other tensors than the task vector of expert0"):
        Merger(load(base), base, vectors, average, ROOMY)
    with pytest.raises(MergelawError, match="has other tensors than the task vector of expert0"):
        merge.write_merge(base, vectors, average, None, tmp_path)


def test_a_model_that_is_not_the_base_is_refused(base, tmp_path):
    method = method_of({"method": "average"})
    other = write_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(MergelawError, match="other values than the file holds"):
        Merger(load(other), base, {}, method, ROOMY)
    wider = write_checkpoint(tmp_path / "wider", hidden_size=64)
    with pytest.raises(
        MergelawError, match=r"is \[320, 32\], but by config.json it would be \[320, 64\]"
    ):
        Merger(load(wider), base, {}, method, ROOMY)


# What depends on one expert alone is remembered


def test_thresholds_are_remembered_and_made_again_when_damaged(pool, tmp_path, monkeypatch):
    method = method_of(METHODS["ties"])
    vector = pool["expert0"]
    wanted = thresholds(method, vector, tmp_path)
    assert wanted == thresholds(method, vector)
    contents = {path: path.read_bytes() for path in tmp_path.glob("*[!k]")}
    assert sorted(path.suffix for path in contents) == [".json", ".sha256"]
    calls = []
    plain = type(method).thresholds
    monkeypatch.setattr(
        type(method), "thresholds", lambda self, tensors: calls.append(1) or plain(self, tensors)
    )
    assert thresholds(method, vector, tmp_path) == wanted
    assert not calls
    for path, whole in contents.items():
        for damage in (b"", whole[: len(whole) // 3], b"[]", whole.replace(b"0", b"1"), b"\xff"):
            path.write_bytes(damage)
            assert thresholds(method, vector, tmp_path) == wanted
            assert calls.pop()
            assert thresholds(method, vector, tmp_path) == wanted and not calls
    for other in (METHODS["ties_global_count"], {"method": "ties", "density": 0.31}):
        assert thresholds(method_of(other), vector, tmp_path) != wanted
    assert thresholds(method, pool["expert1"], tmp_path) != wanted
    assert thresholds(method_of({"method": "average"}), vector, tmp_path) == {}
    assert len(list(tmp_path.glob("*.json"))) == 4


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_masks_are_remembered_and_remade_when_damaged(base, pool, tmp_path, name, monkeypatch):
    """Streamed merges read them from a file; they have the bits of those that are held in memory."""
    recipe = METHODS[name]
    held = merged(base, pool, recipe, list(pool), memory=ROOMY)

    def streamed() -> dict[str, bytes]:
        model = load(base)
        with Merger(model, base, pool, method_of(recipe), NONE, tmp_path) as merger:
            merger.merge(list(pool))
        return parameters(model)

    assert streamed() == held
    files = sorted(tmp_path.glob("*[!k]"))  # no locks
    assert [path.suffix for path in files] == [".safetensors", ".sha256"] * len(pool)
    content = {path: path.read_bytes() for path in files}
    made = []
    plain = dare.keep_mask

    def counted(*arguments):
        made.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(dare, "keep_mask", counted)
    assert streamed() == held and not made
    for place in (0, 1, 2):
        path, whole = files[place], content[files[place]]
        for damage in (b"", whole[: len(whole) // 3], bytes([whole[0] ^ 1]) + whole[1:]):
            path.write_bytes(damage)
            assert streamed() == held
            assert made
            made.clear()
            assert files[0].read_bytes() == content[files[0]]


def write_slowly(cache, log):
    from mergelaw.merging.engine import stored

    def write(path):
        with log.open("a") as file:
            file.write("written\n")
        time.sleep(0.3)
        path.write_text("thresholds")

    stored(cache / "a.json", write)


def test_what_shards_need_of_an_expert_is_computed_once(tmp_path, monkeypatch):
    """By one of the shards that run side by side, while the others wait; and is not read again."""
    context = multiprocessing.get_context("spawn")
    shards = [
        context.Process(target=write_slowly, args=(tmp_path, tmp_path / "log")) for _ in "123"
    ]
    for process in shards:
        process.start()
    for process in shards:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "written\n"
    monkeypatch.setattr("mergelaw.artifacts.files.file_digest", lambda path: pytest.fail("read"))
    write_slowly(tmp_path, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "written\n"


def test_masks_do_not_depend_on_what_the_vector_is_called(base, pool, tmp_path):
    vector = pool["expert0"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in vector.folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert (moved / EXCEPTIONS).exists()
    recipe = METHODS["dare_linear"]
    wanted = merged(base, {"e": vector}, recipe, ["e"])
    assert merged(base, {"other": TaskVector(moved)}, recipe, ["other"]) == wanted


# In mergekit's words


def test_a_recipe_for_mergekit():
    experts = {"a": "x/a", "b": "x/b"}
    recipe = mergekit_recipe(
        "base", experts, method_of({"method": "average"}), [1.0, 3.0], "float32"
    )
    assert recipe["merge_method"] == "linear"
    assert "base_model" not in recipe
    assert recipe["dtype"] == "float32"
    assert recipe["models"][1] == {
        "model": {"model": {"path": "x/b"}},
        "parameters": {"weight": 3.0},
    }
    ties = mergekit_recipe("base", experts, method_of({"method": "ties"}), None, "float32")
    assert ties["base_model"] == {"model": {"path": "base"}}
    assert ties["parameters"] == {"density": 0.2, "lambda": 1.0, "normalize": True}
    assert (
        mergekit_recipe("base", experts, method_of({"method": "dare_ties"}), None, "float32")
        is None
    )


# The order of the configuration


def test_a_study_puts_experts_into_its_own_order():
    from mergelaw import config
    from mergelaw.workflow.study import Study

    domains = ["algebra", "code", "physics"]
    asked = {
        "one": {"experts": domains, "weights": [1, 2, 3]},
        "two": {"experts": ["physics", "algebra", "code"], "weights": [3, 1, 2]},
    }
    demo = Path(__file__).parents[2] / "config" / "config.yaml"
    data = yaml.safe_load(demo.read_text())
    base = next(iter(data["bases"]))
    data["merges"] = {n: {"base": base, "method": "average", **m} for n, m in asked.items()}
    one, two = Study(config.parse(data)).merges.values()
    assert one.recipe == two.recipe
    assert one.recipe["experts"] == domains
    assert one.recipe["weights"] == [1, 2, 3]


def test_a_written_merge_that_overflows_its_dtype_is_refused(tmp_path):
    base, expert = tmp_path / "base", tmp_path / "expert"
    write_tensors(base, {"w": torch.zeros(4, dtype=torch.float16)})
    write_tensors(expert, {"w": torch.full((4,), 60000.0, dtype=torch.float16)})
    vector = write_task_vector(base, expert, tmp_path / "vector")
    (tmp_path / "out").mkdir()
    with pytest.raises(MergelawError, match=r"overflows torch\.float16 in tensor 'w'"):
        merge.write_merge(
            base,
            {"e": vector},
            method_of({"method": "task_arithmetic", "lambda": 2.0}),
            None,
            tmp_path / "out",
        )


def test_weights_by_tensor_are_filters_of_mergekit(base, pool):
    weights = by_tensor(base, 2)
    experts = {"a": "models/a", "b": "models/b"}
    recipe = mergekit_recipe("base", experts, method_of({"method": "learned"}), weights, "float32")
    assert recipe["merge_method"] == "task_arithmetic"
    assert recipe["parameters"] == {"normalize": False}

    def value(place, name):  # as mergekit evaluates it: the first filter that is in the name
        conditions = recipe["models"][place]["parameters"]["weight"]
        return next(c["value"] for c in conditions if c.get("filter", "") in name)

    with Tensors(base) as tensors:
        for name in tensors.names():
            assert [value(0, name), value(1, name)] == weights.get(name, [0.0, 0.0])


def test_a_recipe_for_mergekit_says_which_expert_is_an_adapter():
    experts = {"a": "experts/a", "b": "experts/b"}
    average = method_of({"method": "average"})
    recipe = mergekit_recipe("base", experts, average, None, "bfloat16", ["b"])
    assert [model["model"] for model in recipe["models"]] == [
        {"model": {"path": "experts/a"}},
        {"model": {"path": "base"}, "lora": {"path": "experts/b"}},
    ]


@pytest.mark.parametrize("dtype, width", [("float32", 4), ("bfloat16", 2)])
def test_a_model_that_the_gpus_cannot_hold_is_refused_before_it_is_loaded(
    tmp_path, monkeypatch, dtype, width
):
    base = write_tensors(tmp_path / "base", {"w": torch.zeros(1000, 3), "b": torch.zeros(500)})
    free = [3500 * width // 2 - 1, 3500 * width // 2]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index], 10**12))
    with pytest.raises(MergelawError, match=rf"in {dtype}, .* 2 GPUs have .* more GPUs"):
        evaluate.check_gpu_memory(base, dtype)
    free[0] += 1
    evaluate.check_gpu_memory(base, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_refuse_what_would_read_beyond_a_vector(dtype):
    """Compiled loops receive addresses, and torch broadcasts."""
    from mergelaw.merging import kernels

    one, base = torch.ones(5), torch.ones(5, dtype=dtype)
    rule = kernels.Rule("", [1.0, 2.0])
    for vectors in ([], [one], [one, one, one], [one, torch.ones(4)], [torch.ones(1)] * 2,
                    [one, one.double()], [one.view(5, 1), one.view(5, 1)]):  # fmt: skip
        with pytest.raises(ValueError, match="vectors"):
            kernels.merge(base, vectors, rule, torch.empty_like(base))
    for vectors in ([], [one], [one, torch.ones(6)]):
        with pytest.raises(ValueError, match="vectors"):
            kernels.combine(vectors, rule)
    for ours, out in ((base[:1], base), (base, torch.empty(6, dtype=dtype))):
        with pytest.raises(ValueError, match="one length"):
            kernels.merge(ours, [one, one], rule, out)
    with pytest.raises(ValueError, match="no rule 'max'"):
        kernels.combine([one], kernels.Rule("max", [1.0]))
    for values in (one.double(), one.view(5, 1)):
        with pytest.raises(ValueError, match="flat fp32"):
            kernels.drop(values, 0.5)
