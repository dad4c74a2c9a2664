"""Measure a shard of merges: one resident model, one row per (merge, evaluation domain)."""

import base64
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergelaw.artifacts import keys, lineage
from mergelaw.data import documents as corpus
from mergelaw.data import tokenize as tokens
from mergelaw.errors import MergelawError
from mergelaw.evaluation import cells, cross_entropy
from mergelaw.evaluation.recipe import BASELINES
from mergelaw.merging.engine import Merger
from mergelaw.merging.methods import method_of
from mergelaw.merging.task_vector import TaskVector, digest_of
from mergelaw.models import training
from mergelaw.models.checkpoint import Tensors

ROWS = "cells.parquet"


def evaluate(
    recipe: Mapping[str, Any],
    subsets: Sequence[Sequence[Any]],
    base: Path,
    vectors: Mapping[str, Path],
    corpora: Mapping[str, Path],
    folder: Path,
    name: str,
    output: Path,
) -> dict[str, Any]:
    """Measure what of a shard is not in the store yet; write all its rows to ``output``.

    ``subsets``: rows (k, replicate, place, experts) of the plan; ``vectors``: task vectors by
    expert; ``corpora``: corpora by domain; ``folder``: the cell store, ``name``: this writer's.
    """
    wanted = _cells(recipe, subsets, base, vectors, corpora)
    facts: dict[str, Any] = {"cells": len(wanted), "measured": 0}
    with cells.Store(folder, name, {cell["cell"] for cell in wanted}) as store:
        missing = [cell for cell in wanted if cell["cell"] not in store.known]
        if missing:
            started = time.perf_counter()
            measured = _measure(recipe, missing, base, vectors, corpora, store)
            facts |= {"measured": measured, "seconds": round(time.perf_counter() - started, 3)}
    digests = {name: digest_of(path) for name, path in vectors.items()}
    _write_rows(recipe, wanted, store.known, lineage.read(base)["digest"], digests, output)
    return facts | {"tokens": sum(store.known[cell["cell"]]["tokens"] for cell in wanted)}


def _cells(
    recipe: Mapping[str, Any],
    subsets: Sequence[Sequence[Any]],
    base: Path,
    vectors: Mapping[str, Path],
    corpora: Mapping[str, Path],
) -> list[dict[str, Any]]:
    """The shard's cells: where each stands in the plan, and its identity."""
    base_digest = lineage.read(base)["digest"]
    digests = {name: digest_of(path) for name, path in vectors.items()}
    sets = {domain: lineage.read(path)["files"]["eval.parquet"] for domain, path in corpora.items()}
    wanted = []
    for k, replicate, place, experts in subsets:
        merge = {
            "base": base_digest,
            "vectors": [digests[expert] for expert in experts],
            "weights": [1.0] * len(experts),
            "method": recipe["method"] if experts else None,
        }
        for domain in recipe["domains"]:
            identity = {
                "version": keys.STAGES["evaluate"],
                "evaluation": recipe["evaluation"],
                "set": sets[domain],
                **merge,
            }
            wanted.append(
                {
                    "k": k,
                    "replicate": replicate,
                    "place": place,
                    "experts": list(experts),
                    "merge": keys.digest(merge)[:16],
                    "domain": domain,
                    "cell": keys.digest(identity)[:32],
                }
            )
    return wanted


def _measure(
    recipe: Mapping[str, Any],
    missing: Sequence[Mapping[str, Any]],
    base: Path,
    vectors: Mapping[str, Path],
    corpora: Mapping[str, Path],
    store: cells.Store,
) -> int:
    """Measure the missing cells into the store; the number of those measured here.

    What another process is measuring is left to the end, and mostly found measured then.
    """
    import sys

    import torch

    settings = recipe["evaluation"]
    tokenizer = training.load_tokenizer(base)
    encoded = {}
    for domain in dict.fromkeys(cell["domain"] for cell in missing):
        documents = corpus.read(corpora[domain] / "eval.parquet")
        encoded[domain] = tokens.encode(
            tokenizer,
            documents,
            settings["max_tokens"],
            settings["long_documents"],
            f"evaluation documents of {domain}",
            settings["protocol"],
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    several = device == "cuda" and torch.cuda.device_count() > 1
    if device == "cuda":
        check_room(base, settings["dtype"])
    model = training.load(base, settings["dtype"], device_map="auto" if several else device).eval()
    if several and {"cpu", "disk"} & set(map(str, model.hf_device_map.values())):
        raise MergelawError(
            f"{base}: its layers do not fit the {torch.cuda.device_count()} GPUs given one by one; "
            "give the job more GPUs, or evaluate in bfloat16"
        )
    sets = {
        domain: cross_entropy.batches(e.windows, settings["batch_tokens"], model.device)
        for domain, e in encoded.items()
    }
    counts = _parameters(model)
    method = method_of(recipe["method"])
    experts = {e for cell in missing for e in cell["experts"]}
    pool = {e: TaskVector(path) for e, path in vectors.items() if e in experts}
    # Several cells of one merge follow each other; a merge in two replicates is measured once.
    by_merge: dict[str, dict[str, Mapping[str, Any]]] = {}
    for cell in missing:
        by_merge.setdefault(cell["merge"], {})[cell["cell"]] = cell
    measured = count = 0
    shown = started = time.perf_counter()
    cache = store.folder / "prepared"
    with Merger(model, base, pool, method, memory(model.device), cache) as merger:
        waiting, wait = list(by_merge), False
        while waiting:
            elsewhere = []
            for merge in waiting:
                with store.claim(merge, wait) as claimed:
                    if not claimed:
                        elsewhere.append(merge)
                        continue
                    group = [c for c in by_merge[merge].values() if c["cell"] not in store.known]
                    if group:
                        clock = time.perf_counter()
                        merger.merge(group[0]["experts"])
                        _synchronize(device)
                        facts = {**counts, "merge_seconds": time.perf_counter() - clock}
                        store.append([_cell(model, cell, sets, encoded, facts) for cell in group])
                        measured += len(group)
                count += 1
                now = time.perf_counter()
                if now - shown > training.PROGRESS_SECONDS:
                    shown = now
                    left = (now - started) / count * (len(by_merge) - count)
                    print(
                        f"mergelaw: {count} of {len(by_merge)} merges, {left:.0f} s left",
                        file=sys.stderr,
                        flush=True,
                    )
            waiting, wait = elsewhere, True
    return measured


def _cell(
    model: Any,
    cell: Mapping[str, Any],
    sets: Mapping[str, Any],
    encoded: Mapping[str, tokens.Encoded],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure one cell of the merge that is resident."""
    import torch

    domain = cell["domain"]
    clock = time.perf_counter()
    nll = cross_entropy.nll(model, sets[domain], encoded[domain].documents)
    return {
        "cell": cell["cell"],
        "document_nll": base64.b64encode(nll.astype("<f8").tobytes()).decode(),
        "document_tokens": _tokens(encoded[domain]),
        "tokens": sum(_tokens(encoded[domain])),
        "bytes": encoded[domain].scored_bytes,
        "long_documents": encoded[domain].long_documents,
        "dropped_tokens": encoded[domain].dropped_tokens,
        "eval_seconds": time.perf_counter() - clock,
        "device": _device_name(model.device.type),
        "threads": torch.get_num_threads(),
        **facts,
    }


def _tokens(encoded: tokens.Encoded) -> list[int]:
    counts = [0] * encoded.documents
    for window in encoded.windows:
        counts[window.document] += window.stop - window.start
    return counts


def _parameters(model: Any) -> dict[str, int]:
    """Counted parameters: all of them, and without embeddings and an untied head."""
    from torch import nn

    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        embeddings.add(head.weight)
    return {
        "parameters": total,
        "non_embedding": total - sum(weight.numel() for weight in embeddings),
    }


def check_room(base: Path, dtype: str) -> None:
    """Raise MergelawError where the GPUs that are given cannot hold a model, before it is loaded.

    Otherwise its layers would be left on the processor and on disk without a word.
    """
    import math

    import torch

    free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    with Tensors(base) as tensors:
        count = sum(math.prod(tensors.shape(name)) for name in tensors.names())
    needed = count * getattr(torch, dtype).itemsize
    if needed > sum(free):
        raise MergelawError(
            f"{base}: takes {needed / 1e9:.1f} GB in {dtype}, the {len(free)} GPUs given have "
            f"{sum(free) / 1e9:.1f} GB free; give the job more GPUs, or evaluate in bfloat16"
        )


def memory(device: Any) -> int:
    """Bytes that base and prepared vectors may take: half of what is free, or a job has.

    On one machine a job has as much of the free memory as it has of the cores, for other jobs may
    start on the others.
    """
    import os

    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    free = psutil.virtual_memory().available
    allotted = int(os.environ.get("SLURM_MEM_PER_NODE", 0)) << 20
    if not allotted:
        cores = os.cpu_count() or 1
        allotted = free * min(torch.get_num_threads(), cores) // cores
    return min(free, allotted) // 2


def _synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


def _write_rows(
    recipe: Mapping[str, Any],
    wanted: Sequence[Mapping[str, Any]],
    known: Mapping[str, Mapping[str, Any]],
    base: str,
    vectors: Mapping[str, str],
    output: Path,
) -> None:
    import math

    import numpy as np
    import pandas as pd

    labels = recipe["labels"]
    rows = []
    for cell in wanted:
        found = known[cell["cell"]]
        nll = np.frombuffer(base64.b64decode(found["document_nll"]), "<f8")
        total = math.fsum(nll) if np.isfinite(nll).all() else float("nan")
        kind = "baseline" if labels["method"] == BASELINES else "merge"
        rows.append(
            {
                "family": labels["family"],
                "base": labels["base"],
                "N": found["non_embedding"] / 1e9,
                "N_total": found["parameters"] / 1e9,
                "N_nominal": labels["N_nominal"],
                "method": labels["method"],
                "recipe": keys.canonical_json(recipe["method"]),
                "seed": labels["seed"],
                "role": kind if cell["k"] else "base",
                "k": cell["k"],
                "replicate": cell["replicate"],
                "place": cell["place"],
                "experts": cell["experts"],
                "weights": [1.0] * len(cell["experts"]),
                "merge": cell["merge"],
                "domain": cell["domain"],
                "held_out": recipe["domains"][cell["domain"]],
                "nll": total,
                "tokens": found["tokens"],
                "ce": total / found["tokens"],
                "bytes": found["bytes"],
                "bits_per_byte": total / found["bytes"] / math.log(2),
                "finite": bool(np.isfinite(total)),
                "document_nll": nll.tolist(),
                "document_tokens": found["document_tokens"],
                "long_documents": found["long_documents"],
                "dropped_tokens": found["dropped_tokens"],
                "dtype": recipe["evaluation"]["dtype"],
                "merge_seconds": found["merge_seconds"],
                "eval_seconds": found["eval_seconds"],
                "device": found["device"],
                "threads": found["threads"],
                "cell": cell["cell"],
                "base_digest": base,
                "vector_digests": [vectors[expert] for expert in cell["experts"]],
            }
        )
    table = pd.DataFrame(rows).astype({"N_nominal": "float64"})
    table.to_parquet(output / ROWS, index=False)


def read_rows(artifacts: Sequence[Path], documents: bool = False) -> Any:
    """The rows of evaluations as one table, by default without the per-document columns."""
    import pandas as pd
    import pyarrow.parquet as pq

    tables = []
    for path in artifacts:
        file = path / ROWS
        try:
            columns = None
            if not documents:
                columns = [n for n in pq.read_schema(file).names if not n.startswith("document_")]
            tables.append(pd.read_parquet(file, columns=columns))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise MergelawError(
                f"{file}: cannot be read ({reason}); delete {path} and run again"
            ) from None
    return pd.concat(tables, ignore_index=True)
