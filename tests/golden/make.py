"""Golden values: what the library gives today, bit for bit, kept as digests in JSON files.

``python tests/golden/make.py`` writes all files anew, ``python tests/golden/make.py NAME`` one of
them. ``test_golden.py`` computes the same values and compares. Write a file anew only in a commit
that means to change results, and that raises the version of each stage whose results change.

Random numbers are the raw words of PCG64, whose stream numpy promises never to change.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of models, for a script

# ---- The library: every name that the golden values use. Where a module moves, change it here. -----
from mergelaw.artifacts.store import make as make_artifact
from mergelaw.config import load as load_config
from mergelaw.data.documents import read_split, write_split
from mergelaw.evaluation.design import sample
from mergelaw.evaluation.shard import cells_of as cells_of_shard
from mergelaw.merging.engine import Merger, write_merge
from mergelaw.merging.methods import method_of
from mergelaw.merging.task_vector import TaskVector
from mergelaw.workflow.study import Study
from models import DTYPES, bits, read_tensors, write_task_vector, write_tensors

# ---------------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
METHODS: dict[str, dict[str, Any]] = {
    "average": {"method": "average"},
    "task_arithmetic mean": {"method": "task_arithmetic", "lambda": 1.5, "normalize": True},
    "task_arithmetic sum": {"method": "task_arithmetic", "lambda": 0.3, "normalize": False},
    "ties tensor sum": {"method": "ties", "density": 0.3, "trim": "tensor", "elect": "sum"},
    "ties tensor count": {"method": "ties", "density": 0.3, "trim": "tensor", "elect": "count"},
    "ties global sum": {"method": "ties", "density": 0.3, "trim": "global", "elect": "sum"},
    "ties global count": {"method": "ties", "density": 0.3, "trim": "global", "elect": "count"},
    "dare_linear mean": {"method": "dare_linear", "drop_rate": 0.5, "seed": 7},
    "dare_linear sum": {"method": "dare_linear", "drop_rate": 0.5, "normalize": False, "seed": 7},
    "dare_ties sum": {"method": "dare_ties", "drop_rate": 0.7, "lambda": 0.8, "seed": 7},
    "dare_ties count": {"method": "dare_ties", "drop_rate": 0.7, "elect": "count", "seed": 7},
}
MERGES: list[tuple[str, list[float]]] = [  # experts, by their letters, and their weights
    ("a", [1.0]),
    ("b", [2.0]),
    ("ac", [1.0, 1.0]),
    ("bc", [1.0, 1.25]),
    ("abc", [1.0, 1.0, 1.0]),
    ("abc", [1.0, 1.5, 2.0]),
]
SHAPES = {
    "bias": (53,),
    "matrix": (37, 41),
    "square": (64, 64),
}  # also sizes that 8 does not divide
DIGITS = 16  # of a digest that is kept: enough to tell values apart, and the files stay small


def demo() -> Study:
    """The study of the demo's configuration."""
    return Study(load_config(ROOT / "config" / "config.yaml"))


def digest(*parts: bytes) -> str:
    """The first 16 digits of the SHA-256 of byte strings, each preceded by its length."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:DIGITS]


def json_digest(value: Any) -> str:
    """The digest of a value's canonical JSON text."""
    return digest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


# Documents


def documents(folder: Path) -> dict[str, Any]:
    """The demo's documents: how many each split of each domain has, and their digest.

    A digest is of each document's fields in order, not of the file, whose bytes the version of
    pyarrow decides.
    """
    golden: dict[str, Any] = {}
    config = demo().config
    for domain in config.domains:
        golden[domain] = {}
        for split in ("train", "eval", "calibration"):
            write_split(config.splits_of(domain), split, {}, folder / domain / split)
            found = read_split(folder / domain / split)
            rows = [[d.document, d.messages, d.response] for d in found]
            golden[domain][split] = {"documents": len(rows), "digest": json_digest(rows)}
    return golden


# Merges


def uniform(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """fp32 values from -1 to 1, each of the upper 24 bits of a word of PCG64."""
    words = np.random.PCG64(seed).random_raw(int(np.prod(shape))) >> np.uint64(40)
    return torch.from_numpy((words.astype(np.float32) * 2.0**-23 - 1.0).reshape(shape))


def tiny_base(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a base of 5,666 parameters."""
    shapes = enumerate(SHAPES.items())
    return {name: (uniform(number, shape) * 0.5).to(dtype) for number, (name, shape) in shapes}


def tiny_expert(base: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The tensors of a fine-tune of ``base``.

    The last values of each tensor are minute: base plus difference does not give their bits.
    """
    tensors = {}
    for number, (name, before) in enumerate(base.items()):
        after = before.float() + uniform(seed + number, tuple(before.shape)) * 0.05
        after.view(-1)[-5:] = 1e-10
        tensors[name] = after.to(before.dtype)
    return tensors


def model_of(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
    """A module whose parameters are these tensors in ``dtype``."""
    model = torch.nn.Module()
    for name, tensor in tensors.items():
        parameter = torch.nn.Parameter(tensor.to(dtype, copy=True), requires_grad=False)
        model.register_parameter(name, parameter)
    return model


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """The digest of names, dtypes, shapes and bits, in the order of the names."""
    parts = []
    for name, tensor in sorted(tensors.items()):
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), bits(tensor.detach())]
    return digest(*parts)


def in_model(
    base: Path,
    dtype: torch.dtype,
    pool: Mapping[str, TaskVector],
    recipe: dict[str, Any],
    memory: int,
) -> list[str]:
    """The digest of each of ``MERGES``, made one after the other in a resident model."""
    model = model_of(read_tensors(base), dtype)
    digests = []
    with Merger(model, base, pool, method_of(recipe), memory) as merger:
        assert merger.resident == bool(memory)
        for experts, weights in MERGES:
            merger.merge(list(experts), weights)
            digests.append(tensors_digest(dict(model.named_parameters())))
    return digests


def as_checkpoints(
    base: Path, pool: Mapping[str, TaskVector], recipe: dict[str, Any], folder: Path
) -> list[str]:
    """The digest of each of ``MERGES``, written as a checkpoint."""
    digests = []
    for number, (experts, weights) in enumerate(MERGES):
        output = folder / str(number)
        output.mkdir(parents=True)
        write_merge(base, {e: pool[e] for e in experts}, method_of(recipe), weights, output)
        digests.append(tensors_digest(read_tensors(output)))
    return digests


def merges(folder: Path) -> dict[str, Any]:
    """The bits of merges by every method of two tiny bases, in fp32 and bf16.

    Of the bf16 base also as an evaluation in fp32 has it. Held in memory, streamed from the files
    and written as a checkpoint, a merge has the same bits; AssertionError where it has not.
    """
    golden: dict[str, dict[str, list[str]]] = {}
    for dtype in ("float32", "bfloat16"):
        base = write_tensors(folder / dtype / "base", tiny_base(DTYPES[dtype]))
        pool = {}
        for number, expert in enumerate("abc", start=1):
            tensors = tiny_expert(read_tensors(base), 1000 * number)
            theirs = write_tensors(folder / dtype / expert, tensors)
            pool[expert] = write_task_vector(base, theirs, folder / dtype / f"vector-{expert}")
            assert pool[expert].changed == set(SHAPES)
            # Masks are drawn by this digest; the format of task vectors is not tested here.
            pool[expert].digest = hashlib.sha256(expert.encode()).hexdigest()
        for method, recipe in METHODS.items():
            resident = in_model(base, DTYPES[dtype], pool, recipe, 1 << 30)
            assert in_model(base, DTYPES[dtype], pool, recipe, 0) == resident
            written = as_checkpoints(base, pool, recipe, folder / dtype / method)
            assert written == resident
            golden.setdefault(dtype, {})[method] = resident
            if dtype == "bfloat16":
                wide = in_model(base, torch.float32, pool, recipe, 1 << 30)
                assert in_model(base, torch.float32, pool, recipe, 0) == wide
                golden.setdefault("bfloat16 in float32", {})[method] = wide
    return golden


# Identities of cells


def artifact_of(folder: Path, stage: str, files: Sequence[str], content: str = "") -> Path:
    """An artifact whose files hold ``content`` or else their path: its digest never changes."""

    def work(output: Path, state: Path) -> dict[str, Any]:
        for file in files:
            (output / file).write_text(content or f"{folder.name}/{file}", encoding="utf-8")
        return {}

    make_artifact(folder, stage, {}, {}, work)
    return folder


def cells(folder: Path) -> dict[str, Any]:
    """The identities of merges and cells of a tiny study, by the demo's methods and evaluation."""
    base = artifact_of(folder / "base", "base", ["config.json", "model.safetensors"])
    files = ["vector.safetensors", "exceptions.safetensors", "statistics.json"]
    vectors = {e: artifact_of(folder / f"vector-{e}", "task_vector", files) for e in "abc"}
    domains = {"algebra": False, "poetry": True}
    corpora = {}
    for domain in domains:
        # Once a file of this name in a folder of both splits: the identities are still the same.
        content = f"corpus-{domain}/eval.parquet"
        split = folder / f"corpus-{domain}"
        corpora[domain] = artifact_of(split, "corpus", ["documents.parquet"], content)
    subsets = [
        [0, -1, -1, []],
        [1, -1, -1, ["b"]],
        [2, 0, 1, ["a", "c"]],
        [2, 1, 0, ["a", "c"]],
        [3, -1, -1, ["a", "b", "c"]],
    ]
    study = demo()
    golden: dict[str, Any] = {}
    recipes = {method: e.recipe for (_, method, _, _), e in study.evals.items()}
    for method, demo_recipe in recipes.items():
        recipe = {**demo_recipe, "domains": domains}
        found = cells_of_shard(recipe, subsets, base, vectors, corpora)
        golden[method] = [
            f"{cell['k']} {cell['replicate']} {cell['place']} {''.join(cell['experts'])} "
            f"{cell['domain']}: merge {cell['merge']}, cell {cell['cell']}"
            for cell in found
        ]
    return golden


# Designs


def design(rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """A plan: how many rows (k, replicate, place, experts), their digest, and some of them."""
    sampled = next((i for i, row in enumerate(rows) if row[1] >= 0), 0)
    shown = [*rows[:3], *rows[sampled : sampled + 3], rows[-1]]
    lines = [f"{k} {replicate} {place} {' '.join(e)}" for k, replicate, place, e in shown]
    return {"rows": len(rows), "digest": json_digest(rows), "some": lines}


def designs(folder: Path) -> dict[str, Any]:
    """The plans of the shipped configurations, and of pool16's experts by every design."""
    golden = {}
    for name in ("config", "demo_exhaustive", "pool16"):
        study = Study(load_config(ROOT / "config" / f"{name}.yaml"))
        for base in study.config.bases:
            golden[f"{name}, {base}"] = design(study.subsets(base))
        pool = list(study.config.pool())
    for kind in ("ring", "difference", "exhaustive"):
        rows = sample(
            pool,
            design=kind,
            k=[1, 2, 3] if kind == "exhaustive" else [1, 3, 6, 8, 13, 16],
            circles=2,
            exhaustive_up_to=16,
            seed=5,
            base="3B",
        )
        golden[f"pool16's experts, {kind}"] = design(rows)
    return golden


# Keys


def keys(folder: Path) -> list[str]:
    """The path of every artifact of the demo, sorted; a path ends with the artifact's key."""
    return sorted(demo().by_path)


GOLDENS: dict[str, Callable[[Path], Any]] = {
    "documents": documents,
    "merges": merges,
    "cells": cells,
    "designs": designs,
    "keys": keys,
}


def computed(name: str, folder: Path) -> Any:
    """The golden values ``name`` as the library gives them now; ``folder`` is empty, for files."""
    return json.loads(json.dumps(GOLDENS[name](folder)))


def main(names: Sequence[str]) -> None:
    for name in names or GOLDENS:
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps(computed(name, Path(folder)), indent=1)
        (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
