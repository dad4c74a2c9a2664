"""What has the same bits on any number of threads, and what only comes close."""

import numpy as np
import pytest
import torch

from mergelaw.data.tokenize import encode
from mergelaw.evaluation.cross_entropy import batches, nll
from mergelaw.merging import engine as merge
from mergelaw.merging.engine import Merger
from mergelaw.merging.methods import method_of, registry
from models import (
    bits,
    documents,
    load,
    tokenizer,
    write_checkpoint,
    write_expert,
    write_task_vector,
)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Wide enough that torch shares its tensors out among threads."""
    folder = tmp_path_factory.mktemp("study")
    base = write_checkpoint(folder / "base", hidden_size=128, intermediate_size=512)
    experts = [write_expert(base, folder / f"expert{i}", seed=i) for i in (1, 2, 3)]
    return folder, base, experts


def run(folder, base, experts) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """(digests and merged values as bits, losses) of all methods."""
    exact, close = {}, {}
    pool = {e.name: write_task_vector(base, e, folder / f"{e.name}.vector") for e in experts}
    for name, vector in pool.items():
        exact[f"digest {name}"] = vector.digest.encode()
    items = documents(True)
    windows = encode(tokenizer(), items, 512, "refuse", "the set").windows
    for name in registry():
        method = method_of({"method": name})
        for memory in (0, 1 << 30):  # streamed and resident
            model = load(base)
            with Merger(model, base, pool, method, memory) as merger:
                merger.merge(list(pool))
                for parameter, value in model.named_parameters():
                    exact[f"{name} {parameter} {memory}"] = bits(value)
        close[name] = nll(model, batches(windows, 4096, "cpu"), len(items))
        written = folder / name
        written.mkdir()
        merge.write_merge(base, pool, method, None, written)
        exact[f"written {name}"] = (written / "model.safetensors").read_bytes()
    return exact, close


@pytest.fixture(scope="module")
def alone(study, tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), *study[1:])


def test_vectors_and_merges_have_the_same_bits_and_losses_come_close(
    study, alone, threads, tmp_path
):
    """A loss is a sum of many fp32 products, which threads add up in another order."""
    exact, close = run(tmp_path, *study[1:])
    assert exact == alone[0]
    for name, values in close.items():
        assert values == pytest.approx(alone[1][name], rel=1e-5)
        if threads == 1:
            assert values.tobytes() == alone[1][name].tobytes()
